"""The default repair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxprune.lsq import fitted
from onnxprune.plugin import Problem, Solution


@dataclass(frozen=True)
class Sequential:
    """Least squares on the pruned model's inputs towards the dense outputs, producers and consumers, ReLU-aware.

    Source: METHODS D2 (closed-form least squares), D9 (both sides of a removal). The change is damped, so that weights
    are pulled towards what they were; how much is found on held-out samples, and a site that would do worse there
    stays as it is. `rounds`: how often targets behind a ReLU are aimed anew; `ln2rms`: as in slicegpt.
    """

    rounds: int = 8
    ln2rms: int = 0
    subspaces: ClassVar[bool] = True

    def solve(self, problem: Problem) -> Solution | None:
        """The change of one site; conv groups are fitted one by one."""
        return fitted(problem, self.rounds if problem.ridge is None else min(self.rounds, 2))
