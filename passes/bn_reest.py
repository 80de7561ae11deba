"""Means and variances as they were."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxprune.plugin import Problem, Solution


@dataclass(frozen=True)
class MomentMatching:
    """Every output channel gets its dense mean and variance back: re-estimated BatchNorm, also where that was folded.

    W_c *= s, b_c moves along, s the ratio of the standard deviations on the pruned model's inputs; of a sum, the share
    of its linear operators is matched to what the others leave. `most` bounds s and 1 / s. Source: METHODS D16.
    """

    most: float = 10.0

    def __post_init__(self) -> None:
        if not self.most >= 1:
            raise ValueError("bn-reest: most is at least 1")

    def solve(self, problem: Problem) -> Solution | None:
        """The change of one site."""
        product = problem.x @ problem.weight.astype(np.float32)
        own = product.swapaxes(0, 1).reshape(problem.wanted.shape)
        goal = problem.wanted - (problem.current - own)
        spread = own.std(axis=0, dtype=np.float64)
        live = spread > 1e-9 * spread.max(initial=0.0)
        ratio = np.divide(goal.std(axis=0, dtype=np.float64), spread, out=np.ones(len(live)), where=live)
        ratio = np.clip(ratio, 1 / self.most, self.most)
        shift = np.zeros(len(ratio))
        if problem.intercept:
            shift = goal.mean(axis=0, dtype=np.float64) - ratio * own.mean(axis=0, dtype=np.float64)
        groups = len(problem.x)
        return Solution(problem.weight * (ratio - 1).reshape(groups, 1, -1), shift, 0.0)
