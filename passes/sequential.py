"""The default repair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.lsq import fit
from onnxprune.plugin import Problem, Solution


@dataclass(frozen=True)
class Sequential:
    """Least squares on the pruned model's inputs towards the dense outputs, producers and consumers, ReLU-aware.

    Source: METHODS D2 (closed-form least squares), D9 (both sides of a removal). The change is damped, so that weights
    are pulled towards what they were; how much is found on held-out samples, and a site that would do worse there
    stays as it is. `rounds`: how often targets behind a ReLU are aimed anew.
    """

    rounds: int = 8
    subspaces: ClassVar[bool] = True

    def solve(self, problem: Problem) -> Solution | None:
        """The change of one site; conv groups are fitted one by one."""
        groups, _, columns = problem.x.shape
        outputs = problem.wanted.shape[1] // groups
        weight = np.zeros((groups, columns, outputs))
        shift = np.zeros((groups, outputs))
        taken = []
        for g in range(groups):
            part = slice(g * outputs, (g + 1) * outputs)
            found = fit(
                problem.x[g],
                problem.wanted[:, part],
                problem.current[:, part],
                problem.held_out,
                bounds=problem.bounds,
                ridge=problem.ridge,
                rounds=self.rounds if problem.ridge is None else min(self.rounds, 2),
                intercept=problem.intercept,
            )
            if found is not None:
                change, ridge = found
                weight[g], shift[g] = change.weight, change.shift
                taken.append(ridge)
        return Solution(weight, shift.reshape(-1), float(np.median(taken))) if taken else None
