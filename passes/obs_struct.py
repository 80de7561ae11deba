"""Structured optimal brain surgeon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.lsq import surgeon
from onnxprune.plugin import Evidence, Problem, Reader, Solution
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class ObsStruct:
    """The error that is left in a unit's readers once the others have taken over its work, relative to their output.

    With C the inverse of the damped second moments of a reader's input, removing the columns B costs
    tr(W_B^T C_BB^-1 W_B); W and C are then updated and the next units chosen. Errors of several readers are added.
    Source: METHODS D3, D4 (ZipLM, Kurtic et al. 2023). Needs second moments. `damp` is a share of their mean diagonal,
    `rounds` how often units are chosen anew.
    """

    damp: float = 1e-3
    rounds: int = 24
    calibrated: ClassVar[bool] = True
    missing: ClassVar[str] = "no linear operator reads it"

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays: rises in the order in which the units are best removed."""
        energies = [(reader, reader.energy()) for reader in evidence.readers(group)]
        readers = [_State(reader, self.damp, energy) for reader, energy in energies if energy > 0]
        if not readers:
            return None
        count = len(group.units)
        left, found, floor = np.arange(count), np.zeros(count), 0.0
        while len(left):
            costs = np.sum([state.costs(left) for state in readers], axis=0)
            goes = np.argsort(costs, kind="stable")[: max(1, len(left) // self.rounds)]
            for k in goes:  # never less than what went before: the order is what counts
                floor = max(floor, float(costs[k]))
                found[left[k]] = floor
            for state in readers:
                state.remove(left[goes])
            left = np.delete(left, goes)
        return found


@dataclass(frozen=True)
class ObsUpdate:
    """Columns leave by the surgeon's update, on the dense model's inputs: what is left takes over their work.

    W -= W_:j C_j: / C_jj for each column j that goes, C the inverse of the damped second moments. The order does not
    change where that ends, which is computed at once. `damp` is a share of the mean diagonal of the second moments.
    Source: METHODS D3 (ZipLM, Kurtic et al. 2023). Consumers only; biases stay.
    """

    damp: float = 1e-2
    dense: ClassVar[bool] = True
    consumers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.damp > 0:
            raise ValueError("obs-struct: damp is above 0")

    def solve(self, problem: Problem) -> Solution | None:
        """The change of one site."""
        return surgeon(problem, self.damp)


class _State:
    """A reader's weight and inverse moments while units go."""

    def __init__(self, reader: Reader, damp: float, energy: float) -> None:
        self.columns = reader.columns
        self.weight = reader.weight.copy()
        self.scale = 1.0 / energy
        moments = reader.moments
        mean = float(np.trace(moments)) / len(moments)
        self.inverse = np.linalg.inv(moments + damp * mean * np.eye(len(moments)))

    def costs(self, units: Array) -> Array:
        """float64[units]: relative error of removing each alone."""
        columns = self.columns[units]
        if columns.shape[1] == 1:
            one = columns[:, 0]
            errors = (self.weight[one] ** 2).sum(axis=1) / np.maximum(self.inverse[one, one], 1e-300)
        else:
            blocks = self.inverse[columns[:, :, None], columns[:, None, :]]
            part = self.weight[columns]
            errors = (part * np.linalg.solve(blocks, part)).sum(axis=(1, 2))
        return np.asarray(np.maximum(errors, 0) * self.scale)

    def remove(self, units: Array) -> None:
        """Take units out; what is left takes over their work."""
        goes = self.columns[units].reshape(-1)
        stays = np.ones(len(self.weight), np.bool_)
        stays[goes] = False
        part = self.inverse[goes]
        gain = np.linalg.solve(part[:, goes], part[:, stays]).T
        self.weight = self.weight[stays] - gain @ self.weight[goes]
        self.inverse = self.inverse[np.ix_(stays, stays)] - gain @ part[:, stays]
        self.columns = (np.cumsum(stays) - 1)[self.columns]  # of units that went, it says nothing
