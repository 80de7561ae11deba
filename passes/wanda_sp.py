"""Structured Wanda."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.plugin import Evidence, Reader
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class WandaStructured:
    """Mean |w| of a reader's columns times the norm of their inputs, divided by the group's mean.

    Summed over a unit's columns, averaged over its readers. A large constant input looks important, although a bias
    would do: see fluct. Source: METHODS B8 (Wanda, Sun et al. 2024, by structures). Needs statistics of each column.
    """

    calibrated: ClassVar[bool] = True
    missing: ClassVar[str] = "no linear operator reads it"

    @staticmethod
    def columns(reader: Reader) -> Array:
        """float64[columns]: mean_i |W_ij| ||x_j||."""
        return np.asarray(np.abs(reader.weight).mean(axis=1) * np.sqrt(reader.rows * reader.mean_square))

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays."""
        found = []
        for reader in evidence.readers(group):
            scores = reader.of_units(self.columns(reader))
            found.append(scores / (scores.mean() or 1.0))
        return np.mean(found, axis=0) if found else None
