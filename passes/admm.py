"""Kept weights, best for any mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from onnxprune.lsq import Aim, Fit, Regression, fitted
from onnxprune.plugin import Problem, Solution
from onnxprune.types import Array, Mask


@dataclass(frozen=True)
class Admm:
    """Least squares under a mask: the weights that are kept are fitted to the dense outputs, zeros stay zeros.

    With columns scaled to unit norm, XX = X^T X + ridge I and M the mask, of a change D of the weight:
    Z = (D + U) o M; U += D - Z; D = (XX + rho I)^-1 (X^T R + rho (Z - U)), R what is missing. One factorisation serves
    all outputs, however their masks differ; without a mask the end is plain least squares. As in `sequential`, a change
    is damped, by as much as does best on held-out samples, and a site that would do worse there stays as it is.
    Source: METHODS D17 (Boža 2024).
    """

    iterations: int = 20
    rho: float = 1.0
    rounds: int = 3
    masked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.rho > 0 or self.iterations < 1:
            raise ValueError("admm: rho is above 0, iterations at least 1")

    def solve(self, problem: Problem) -> Solution | None:
        """The change of one site; conv groups are fitted one by one."""

        def masked(group: int) -> Masked | None:
            keep = None if problem.keep is None else problem.keep[group]
            return None if keep is None or keep.all() else Masked(keep, self.rho, self.iterations)

        return fitted(problem, self.rounds, masked)


@dataclass(frozen=True)
class Masked:
    """Solves one regression under a mask bool[columns, outputs]."""

    keep: Mask
    rho: float
    iterations: int

    def __call__(self, moments: Regression, aim: Aim, ridge: float) -> Fit:
        """The change of the kept weights, as Regression.towards gives that of all."""
        scale = np.sqrt(np.maximum(np.diag(moments.moments), 1e-12 * moments.scale + 1e-300))
        normal = moments.moments / np.outer(scale, scale) + np.diag(ridge * moments.scale / scale**2)
        target = aim.cross / scale[:, None]
        rho = self.rho * float(np.diag(normal).mean())
        factor = cho_factor(normal + rho * np.eye(len(normal)), check_finite=False)
        dual, change = np.zeros_like(target), cho_solve(factor, target)
        kept: Array = np.zeros_like(target)
        for _ in range(self.iterations):
            kept = np.where(self.keep, change + dual, 0)
            dual += change - kept
            change = cho_solve(factor, target + rho * (kept - dual))
        weight = np.where(self.keep, change + dual, 0) / scale[:, None]
        return Fit(weight, aim.mean - moments.mean @ weight)
