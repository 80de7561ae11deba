"""Size of activations alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.plugin import Evidence, Reader
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class ActivationMean:
    """Size of what a unit gives its readers, weights left aside: `norm=l2` or `norm=mean` of |x|, by the group's mean.

    A unit's columns are taken together: the norm of a head's whole output. Source: METHODS B6 (Minitron, Muralidharan
    et al. 2024). Needs statistics of each input column.
    """

    norm: str = "l2"
    calibrated: ClassVar[bool] = True
    missing: ClassVar[str] = "no linear operator reads it"

    def __post_init__(self) -> None:
        if self.norm not in ("l2", "mean"):
            raise ValueError("act-mean: norm is l2 or mean")

    def units(self, reader: Reader) -> Array:
        """float64[units]: root of the sum of x^2 over rows and columns, or the mean of |x|."""
        if self.norm == "mean":
            return np.asarray(reader.of_units(reader.size) / reader.columns.shape[1])
        return np.asarray(np.sqrt(reader.of_units(reader.rows * reader.mean_square)))

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays."""
        found = []
        for reader in evidence.readers(group):
            scores = self.units(reader)
            found.append(scores / (scores.mean() or 1.0))
        return np.mean(found, axis=0) if found else None
