"""Structured optimal brain surgeon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular

from onnxprune.lsq import surgeon
from onnxprune.plugin import Evidence, Problem, Reader, Solution
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class ObsStruct:
    """The error that is left in a unit's readers once the others have taken over its work, relative to their output.

    With C the inverse of the damped second moments of a reader's input, removing the columns B costs
    tr(W_B^T C_BB^-1 W_B); W and C are then updated and the next units chosen. Errors of several readers are added.
    Source: METHODS D3, D4 (ZipLM, Kurtic et al. 2023). Needs second moments. `damp` is a share of their mean diagonal,
    `rounds` how often units are chosen anew. Where second moments are larger than the memory, `rows` of the inputs at
    most take their place, fewer than there are columns: the same formulas by way of products of rows, in a third of
    the rounds: each looks at all of the weight anew.
    """

    damp: float = 1e-3
    rounds: int = 24
    rows: int = 1024
    calibrated: ClassVar[bool] = True
    missing: ClassVar[str] = "no linear operator reads it"

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays: rises in the order in which the units are best removed."""
        readers = [state for state in self._states(list(evidence.readers(group)), evidence) if state.scale > 0]
        if not readers:
            return None
        count = len(group.units)
        rounds = self.rounds if isinstance(readers[0], _State) else max(1, self.rounds // 3)
        left, found, floor = np.arange(count), np.zeros(count), 0.0
        while len(left):
            costs = np.sum([state.costs(left) for state in readers], axis=0)
            goes = np.argsort(costs, kind="stable")[: max(1, len(left) // rounds)]
            for k in goes:  # never less than what went before: the order is what counts
                floor = max(floor, float(costs[k]))
                found[left[k]] = floor
            for state in readers:
                state.remove(left[goes])
            left = np.delete(left, goes)
        return found

    def _states(self, readers: list[Reader], evidence: Evidence) -> list[_State] | list[_Rows]:
        """All readers by second moments, or all by as many rows as fit into memory."""
        shapes, memory = [reader.shape for reader in readers], evidence.memory
        last = COPIES * 8 * max((columns**2 for columns, _ in shapes), default=0)
        needed = sum(8 * (columns**2 + columns * outputs) for columns, outputs in shapes) + last
        if needed <= memory and all(evidence.affords(columns) for columns, _ in shapes):
            return [_State(readers.pop(0), self.damp) for _ in shapes]  # each remembers its moments as long as it is
        largest = 8 * max(columns * outputs for columns, outputs in shapes)
        each = sum(4 * (columns + outputs) + 16 * self.rows for columns, outputs in shapes)
        rows = max(LEAST, min(self.rows, int((memory - COPIES * largest) // each)))
        left = memory - COPIES * largest - rows * each
        held = sum(4 * columns * outputs for columns, outputs in shapes) <= left
        return [_Rows(reader, self.damp, rows, held) for reader in readers]


COPIES = 4  # of what is largest while something is made of it
LEAST = 64  # rows
STEP = 512  # columns
CHUNK = 1 << 22  # elements of a weight that are looked at at a time


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

    def __init__(self, reader: Reader, damp: float) -> None:
        energy = reader.energy()
        self.scale = 1.0 / energy if energy > 0 else 0.0
        if not self.scale:
            return
        self.columns = reader.columns
        self.weight = reader.weight.copy()
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


class _Rows:
    """The same of a reader with fewer rows than columns, without anything of columns x columns.

    With rows X, K = X X^T and r = n times the damping, C = n/r (I - X^T (r I + K)^-1 X); what is left of W once the
    columns B are gone is W + X^T (r I + K)^-1 X_B W_B, K without B by then.
    """

    def __init__(self, reader: Reader, damp: float, rows: int, held: bool) -> None:
        """With `held` the weight stays in memory."""
        x, weight = reader.sample(rows), reader.weight.astype(np.float32)
        self.weight: Callable[[], Array] = (lambda: weight) if held else lambda: reader.weight.astype(np.float32)
        self.columns = reader.columns
        self.x = np.ascontiguousarray((x - x.mean(axis=0) if reader.intercept else x).T)
        self.gram = _product(self.x)
        made = self.x.T @ weight
        energy = float(np.sum(made**2, dtype=np.float64))
        self.scale = self.gram.shape[0] / energy if energy > 0 else 0.0
        trace = float(np.trace(self.gram))
        self.damping = damp * trace / len(self.x)
        self.least = self.damping / (self.damping + trace or 1.0)  # of the eigenvalues of I - y y^T
        self.gone = np.zeros_like(made)

    def costs(self, units: Array) -> Array:
        """float64[units]: relative error of removing each alone."""
        columns, weight, each = self.columns[units], self.weight(), self.columns.shape[1]
        factor = cholesky(self.gram + self.damping * np.eye(len(self.gram)), lower=True)
        moved = cho_solve((factor, True), self.gone).astype(np.float32)
        errors = np.empty(len(units))
        step = max(1, CHUNK // (each * (len(factor) + weight.shape[1])))
        for start in range(0, len(units), step):
            some = columns[start : start + step].reshape(-1)
            x = self.x[some]
            left = (weight[some] + x @ moved).reshape(-1, each, weight.shape[1])
            y = solve_triangular(factor, x.T, lower=True).T.reshape(-1, each, len(factor))
            if each == 1:
                found = np.square(left).sum(axis=(1, 2)) / np.maximum(1 - np.square(y).sum(axis=(1, 2)), self.least)
            else:
                blocks = np.eye(each) - y @ y.swapaxes(1, 2)
                found = np.abs((left * np.linalg.solve(blocks, left)).sum(axis=(1, 2)))  # below zero it is beyond large
            errors[start : start + step] = found
        return np.asarray(errors * self.damping / len(factor) * self.scale)

    def remove(self, units: Array) -> None:
        """Take units out; what is left takes over their work."""
        goes = self.columns[units].reshape(-1)
        x = self.x[goes]
        self.gram -= _product(x)
        self.gone += x.T @ self.weight()[goes]


def _product(x: Array) -> Array:
    """float64[rows, rows] of float32[columns, rows], some columns at a time; in float32 a large one hides others."""
    total = np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, len(x), STEP):
        some = x[start : start + STEP].astype(np.float64)
        total += some.T @ some
    return total
