"""Activation-based attention maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.plugin import Evidence, Reader
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class ActivationAttention:
    """Mean over samples and positions of |x| to the power `power`, of what a unit gives, divided by the group's mean.

    Seen where linear operators read it, after its activation; a convolution's patches see its border less often.
    Source: METHODS B5 (adaptive activation-based pruning, Zhao et al. 2022). Needs statistics of each input column.
    """

    power: int = 2
    calibrated: ClassVar[bool] = True
    missing: ClassVar[str] = "no linear operator reads it"

    def __post_init__(self) -> None:
        if self.power not in (1, 2):
            raise ValueError("act-attn: power is 1 or 2")

    def units(self, reader: Reader) -> Array:
        """float64[units]: mean |x|^power."""
        values = reader.size if self.power == 1 else reader.mean_square
        return np.asarray(reader.of_units(values) / reader.columns.shape[1])

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays."""
        found = []
        for reader in evidence.readers(group):
            scores = self.units(reader)
            found.append(scores / (scores.mean() or 1.0))
        return np.mean(found, axis=0) if found else None
