"""Group magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.plugin import Evidence
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class Magnitude:
    """Mean over the slices a unit owns of |w| to the power `order`, divided by the group's mean.

    Source: METHODS B1 (DepGraph, Fang et al. 2023). Needs weights only. A branch owns all slices of its weights.
    """

    order: int = 2
    missing: ClassVar[str] = "it has no weights to measure"

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError("mag: order is 1 or 2")

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays; biases and index tables say nothing about a unit's weight and are left out."""
        count, weights = len(group.units), evidence.weights
        slices = [weights.per_unit(m, self.order, count) for m in group.members if m.role in ("weight", "norm")]
        if not slices:
            slices = [weights.per_unit(m, self.order, count) for m in group.members if m.role == "bias"]
        if not slices:
            return None
        raw: Array = np.mean(slices, axis=0)
        if group.kind == "layers":  # of which one has more slices than another
            raw = raw / np.maximum(group.slices(), 1)
        mean = raw.mean()
        return np.ones(count) if not np.isfinite(mean) or mean == 0 else raw / mean
