"""Group magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.plugin import Weights
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class Magnitude:
    """Mean over the slices a unit owns of |w| to the power `order`, divided by the group's mean.

    A whole branch counts for the slices in it: it is as important as that many units of average importance, times
    its share of the magnitude. Source: METHODS B1 (DepGraph, Fang et al. 2023). Needs weights only.
    """

    order: int = 2
    missing: ClassVar[str] = "it has no weights to measure"

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError("mag: order is 1 or 2")

    def importance(self, group: Group, weights: Weights, seed: int) -> Array | None:
        """float64[units], higher stays; biases and index tables say nothing about a unit's weight and are left out."""
        count = len(group.units)
        if group.kind == "layers":
            return self._branches(group, weights)
        slices = [weights.per_unit(m, self.order, count) for m in group.members if m.role in ("weight", "norm")]
        if not slices:
            slices = [weights.per_unit(m, self.order, count) for m in group.members if m.role == "bias"]
        if not slices:
            return None
        raw: Array = np.mean(slices, axis=0)
        mean = raw.mean()
        return np.ones(count) if not np.isfinite(mean) or mean == 0 else raw / mean

    def _branches(self, group: Group, weights: Weights) -> Array | None:
        """Sum of |w|^order over all that a branch holds, over that of an average slice of the group."""
        members = [m for m in group.members if m.role in ("weight", "norm")]
        if not members:
            return None
        count = len(group.units)
        raw = np.sum([weights.per_unit(m, self.order, count) for m in members], axis=0)
        slices = float(sum(len(m.positions) for m in members))
        total = float(raw.sum())
        return np.full(count, slices / count) if not np.isfinite(total) or total == 0 else raw * (slices / total)
