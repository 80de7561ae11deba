"""N:M by optimal brain surgeon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.lsq import inverse_factor
from onnxprune.plugin import Runs, Thinned, strongest


@dataclass(frozen=True)
class SparseGpt:
    """N:M by optimal brain surgeon: columns leave from left to right, and those to the right take over.

    With U the upper Cholesky factor of H^-1, H the damped second moments: of every m columns, as soon as the first is
    reached, each output keeps the n with the largest w_j^2 / U_jj^2; what goes leaves e = w_j / U_jj, and every later
    column k loses e U_jk. Work behind a block of `block` columns is done once for all of it. `damp` is a share of the
    mean diagonal, ten times as much where the factor fails. What must stay keeps its value. Source: METHODS D7, F3
    (SparseGPT, Frantar and Alistarh 2023).
    """

    damp: float = 1e-2
    block: int = 128
    calibrated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.damp > 0 or self.block < 1:
            raise ValueError("nm-sparsegpt: damp is above 0, block at least 1")

    def thin(self, runs: Runs) -> Thinned:
        """The weight that is left; LinAlgError where moments are beyond what numbers hold."""
        assert runs.moments is not None
        n, m, width = runs.n, runs.m, len(runs.weight)
        dead = np.diag(runs.moments) <= 0
        weight = np.where(dead[:, None] & ~runs.stays, 0, runs.weight)
        keep = np.ones(weight.shape, np.bool_)
        upper = inverse_factor(runs.moments, self.damp)
        step = -(-self.block // m) * m
        for start in range(0, width, step):
            end = min(start + step, width)
            inner = upper[start:end, start:end]
            part, errors = weight[start:end], np.zeros((end - start, weight.shape[1]))
            for j in range(end - start):
                run = slice(start + j, start + j + m)
                if (start + j) % m == 0 and start + j < runs.count * m:
                    score = (part[j : j + m] / np.diag(inner)[j : j + m, None]) ** 2
                    keep[run] = strongest(np.where(runs.stays[run], np.inf, score), n, m)
                gone = ~keep[start + j]
                errors[j, gone] = part[j, gone] / inner[j, j]
                part[j:] -= np.where(runs.stays[start + j : end], 0, np.outer(inner[j, j:], errors[j]))
            weight[end:] -= np.where(runs.stays[end:], 0, upper[start:end, end:].T @ errors)
        return Thinned(np.where(keep, weight, 0), keep)
