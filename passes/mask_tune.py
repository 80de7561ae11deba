"""One scale for each unit that stays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxprune.lsq import Fit, by_groups
from onnxprune.plugin import Problem, Solution
from onnxprune.types import Array

FAR = 10.0  # a scale beyond which the fit is not to be trusted


@dataclass(frozen=True)
class MaskTuning:
    """Each input channel that is left gets one scale, by least squares on the pruned model's inputs; else weights stay.

    min_m ||Y_dense - sum_u m_u Y_u||^2, damped around m = 1 by a share `damp` of the mean diagonal; where a scale
    comes out above 10, all stay 1. Few numbers, so that few samples do. Source: METHODS D10 (Kwon et al. 2022).
    """

    damp: float = 1e-2

    def __post_init__(self) -> None:
        if not self.damp > 0:
            raise ValueError("mask-tune: damp is above 0")

    def solve(self, problem: Problem) -> Solution | None:
        """The change of one site."""

        def scaled(x: Array, weight: Array, lacks: Array) -> Fit:
            found = scales(x, weight, lacks, problem.patch, problem.intercept, self.damp)
            extra = found - 1 if np.abs(found).max(initial=0.0) <= FAR else np.zeros(len(found))
            change = weight * np.repeat(extra, problem.patch)[:, None]
            shift = (lacks - x @ change.astype(np.float32)).mean(axis=0, dtype=np.float64)
            return Fit(change, shift if problem.intercept else np.zeros(len(shift)))

        return by_groups(problem, self.damp, scaled)


def scales(x: Array, weight: Array, lacks: Array, patch: int, intercept: bool, damp: float) -> Array:
    """float64[channels]: the scale of each run of `patch` columns."""
    if intercept:
        x, lacks = x - x.mean(axis=0), lacks - lacks.mean(axis=0)
    products = (x.T @ x).astype(np.float64) * (weight @ weight.T)
    cross = ((x.T @ lacks).astype(np.float64) * weight).sum(axis=1)
    count = len(cross) // patch
    normal = products.reshape(count, patch, count, patch).sum(axis=(1, 3))
    mean = float(np.trace(normal)) / max(count, 1)
    if mean <= 0:
        return np.ones(count)
    return np.asarray(
        1 + np.linalg.solve(normal + damp * mean * np.eye(count), cross.reshape(count, patch).sum(axis=1))
    )
