"""One ranking over all groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.types import Array


@dataclass(frozen=True)
class GlobalRank:
    """One ranking over all groups by importance / cost^power; `floor` of each group always stays.

    Source: METHODS C2 and B2 (the guard against collapsed layers). power=0 ranks by importance alone, 1 by importance
    for each unit of cost; costs are shares of the model, relative to the mean over all units.
    """

    power: float = 0.5
    floor: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1 or not 0 <= self.power <= 4:
            raise ValueError("global-rank: floor lies in [0, 1), power in [0, 4]")

    def priority(self, importance: Sequence[Array], cost: Sequence[Array]) -> list[Array]:
        """float64[units] for each group, lower goes first."""
        costs = [np.broadcast_to(c, len(scores)) for c, scores in zip(cost, importance, strict=True)]
        mean = float(np.concatenate(costs).mean()) or 1.0
        weights = [np.maximum(c / mean, 1e-6) ** self.power for c in costs]
        return [scores / weight for scores, weight in zip(importance, weights, strict=True)]
