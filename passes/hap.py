"""Relative Hessian trace, as far as it can be had forward-only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.plugin import Evidence
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class RelativeTrace:
    """How sharply the outputs curve when a whole group is scaled, dealt out to units by their squared weights.

    Tr(H) / (2 p) ||w_u||^2, with the mean curvature Tr(H) / p of a layer taken along its own weights: w H w / ||w||^2,
    by the second difference of the loss at 1 - `step`, 1 and 1 + `step` times the weights. Between units of one group
    only weights tell. Source: METHODS B12 (HAP, Yu et al. 2022). Needs two runs for each group.
    """

    step: float = 0.1
    calibrated: ClassVar[bool] = True
    missing: ClassVar[str] = "what reads it cannot be scaled: no linear operator does alone"

    def __post_init__(self) -> None:
        if not 0 < self.step <= 1:
            raise ValueError("hap: step lies in (0, 1]")

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays."""
        squares = [reader.of_units((reader.weight**2).sum(axis=1)) for reader in evidence.readers(group)]
        if not squares:
            return None
        each: Array = np.sum(squares, axis=0)
        ones = np.ones(len(each))
        low, high = evidence.loss([{group.id: ones * (1 - self.step)}, {group.id: ones * (1 + self.step)}])
        curvature = (low + high) / self.step**2  # w H w; the loss is zero at 1
        return each * (curvature / (2 * (each.sum() or 1.0))) if np.isfinite(curvature) else None
