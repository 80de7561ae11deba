"""The control arm: the same share everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.types import Array


@dataclass(frozen=True)
class Uniform:
    """The same share of every group goes, least important units first.

    Source: METHODS C1.
    """

    floor: float = 0.0

    def priority(self, importance: Sequence[Array], cost: Sequence[Array]) -> list[Array]:
        """float64[units] for each group: the share of the group that has gone once this unit goes."""
        ranks = [np.argsort(np.argsort(scores, kind="stable"), kind="stable") for scores in importance]
        return [(rank + 1) / len(rank) for rank in ranks]
