"""Greedy output approximation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.plugin import Evidence, Reader
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class GreedyOutput:
    """Error in the readers' outputs when units go one after the other, each time the one that adds least.

    The first costs E[x_j^2] ||W_j||^2; then what has gone counts as well: units whose outputs cancel may go together.
    Source: METHODS B26 (greedy output approximation). Needs second moments, uncentred. `joint=0` leaves out what
    units have to do with one another.
    """

    joint: int = 1
    calibrated: ClassVar[bool] = True
    missing: ClassVar[str] = "no linear operator reads it"

    @staticmethod
    def errors(reader: Reader) -> Array:
        """float64[units, units], E of the products of what units put out: summed over those that go, the error."""
        products = (reader.weight @ reader.weight.T) * reader.uncentred
        count = len(reader.columns)
        found = np.zeros((count, count))
        for columns in reader.columns.T:  # so many as a unit has
            found += reader.of_units(products[columns].T).T
        return found

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays: rises in the order in which units go."""
        found = []
        for reader in evidence.readers(group):
            errors = self.errors(reader)
            found.append(errors / (np.trace(errors) or 1.0))
        if not found:
            return None
        total = np.sum(found, axis=0)
        return greedy(total) if self.joint else np.diag(total).copy()


def greedy(errors: Array) -> Array:
    """float64[units]: the error once each has gone, in the order that keeps it least."""
    count = len(errors)
    adds, left = np.diag(errors).copy(), np.ones(count, np.bool_)
    found, error, floor = np.zeros(count), 0.0, 0.0
    for _ in range(count):
        k = int(np.argmin(np.where(left, adds, np.inf)))
        error += float(adds[k])
        floor = max(floor * (1 + 1e-9), error)  # the order counts, also where errors cancel
        found[k], left[k] = floor, False
        adds += 2 * errors[k]
    return found
