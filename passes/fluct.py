"""Fluctuation of what a unit gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.plugin import Evidence, Reader
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class Fluctuation:
    """Variance of a reader's inputs times the squared norm of their weights: what a bias cannot stand in for.

    Summed over a unit's columns and its readers, each relative to what the reader puts out. Source: METHODS B7 (FLAP,
    An et al. 2024). Needs statistics of each input column.
    """

    calibrated: ClassVar[bool] = True
    missing: ClassVar[str] = "no linear operator reads it"

    @staticmethod
    def columns(reader: Reader) -> Array:
        """float64[columns]: v_j ||W_j||^2."""
        return np.asarray(reader.variance * (reader.weight**2).sum(axis=1))

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays."""
        found = []
        for reader in evidence.readers(group):
            whole = float((reader.mean_square * (reader.weight**2).sum(axis=1)).sum())
            found.append(reader.of_units(self.columns(reader)) / (whole or 1.0))
        return np.sum(found, axis=0) if found else None
