"""Standardised scores under one threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.types import Array


@dataclass(frozen=True)
class Standardised:
    """One ranking over all groups by (score - mean) / standard deviation of its group; cost does not matter.

    Groups in which scores spread keep more of their heads and lose more of their tails. Source: METHODS C3 (FLAP, An et
    al. 2024).
    """

    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1:
            raise ValueError("flap-std: floor lies in [0, 1)")

    def priority(self, importance: Sequence[Array], cost: Sequence[Array]) -> list[Array]:
        """float64[units] for each group, lower goes first."""
        found = []
        for scores in importance:
            spread = float(scores.std(ddof=1)) if len(scores) > 1 else 0.0
            found.append((scores - scores.mean()) / spread if spread > 0 else np.zeros(len(scores)))
        return found
