"""An order of channels in which N:M costs less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from onnxprune.plugin import Seat
from onnxprune.types import Array, Mask, Positions

SWEEP = 1 << 27  # scores that are compared in one sweep over all swaps
FEWEST = 64  # rows of an operator that are looked at in any case


@dataclass(frozen=True)
class ChannelPermutation:
    """Permutes input channels so that N:M keeps more: strong ones that meet in one run are dealt out to others.

    Greedy: of all swaps of two units the best that do not touch each other's runs, until none gains, at most `swaps` of
    them; from the order as it is and from `restarts` random ones. What swaps gain is summed over all operators that
    read the units. Wide operators are judged by a sample of their outputs. Source: METHODS F4 (Pool and Yu 2021).
    """

    restarts: int = 4
    swaps: int = 10_000

    def __post_init__(self) -> None:
        if self.restarts < 0 or self.swaps < 1:
            raise ValueError("nm-perm: restarts is at least 0, swaps at least 1")

    def order(self, seats: Sequence[Seat], n: int, m: int, seed: int) -> Positions:
        """int64[units]: the unit that takes each place."""
        units = len(seats[0].places)
        rng = np.random.default_rng([seed, units])
        rows = max(SWEEP // (units * units * len(seats)), FEWEST)
        tables = [_Table(seat, n, m, rows, rng) for seat in seats]
        starts = min(self.restarts, 4 * SWEEP // (units * units * sum(table.rows for table in tables)))
        tried = [np.arange(units), *(rng.permutation(units) for _ in range(starts))]
        found = [self._climb(tables, order) for order in tried]
        return found[int(np.argmax([sum(table.kept(order) for table in tables) for order in found]))]

    def _climb(self, tables: Sequence[_Table], order: Positions) -> Positions:
        """Swap until nothing gains."""
        order, left = order.copy(), self.swaps
        places = np.arange(len(order))
        value = sum((table.values(order, places) for table in tables), np.zeros(1))
        while left > 0:
            given = value[:, order]  # of each place, filled by the unit that is in another
            own = np.diag(given)
            gain = given + given.T - own[:, None] - own[None, :]
            gain[reduce(np.logical_and, [table.together for table in tables])] = 0
            best = gain.argmax(axis=1)
            most = gain[places, best]
            floor = 1e-6 * max(float(own.sum()), 1e-30) / len(order)
            touched = np.zeros(len(order), np.bool_)
            for k in np.argsort(-most, kind="stable").tolist():
                other = int(best[k])
                if most[k] <= floor or left == 0:
                    break
                near = reduce(np.logical_or, [table.together[k] | table.together[other] for table in tables])
                if (near & touched).any():
                    continue
                touched |= near
                order[k], order[other] = order[other], order[k]
                left -= 1
            if not touched.any():
                break
            changed = np.flatnonzero(touched)
            value[changed] = sum((table.values(order, changed) for table in tables), np.zeros(1))
        return order


class _Table:
    """One operator: what each run keeps, and would keep with another unit in one of its places."""

    def __init__(self, seat: Seat, n: int, m: int, rows: int, rng: np.random.Generator) -> None:
        self.n, self.m, self.places = n, m, seat.places
        score = seat.score
        if score.shape[1] > rows:
            score = score[:, np.sort(rng.choice(score.shape[1], rows, replace=False))]
        self.score = np.ascontiguousarray(score, np.float32)
        self.rows = self.score.shape[1]
        run = seat.places // m
        self.together: Mask = run[:, None] == run[None, :]

    def _filled(self, order: Positions) -> Array:
        """float32[columns, rows]: the scores with the units in their new places."""
        filled = self.score.copy()
        filled[self.places] = self.score[self.places[order]]
        return filled

    def values(self, order: Positions, places: Positions) -> Array:
        """float64[places, units]: what the run of each place keeps with each unit there."""
        filled, units = self._filled(order), self.score[self.places]
        found = np.empty((len(places), len(units)))
        for row, place in enumerate(self.places[places].tolist()):
            first = place // self.m * self.m
            others = np.delete(filled[first : first + self.m], place - first, axis=0)
            top = -np.partition(-others, self.n - 1, axis=0)[: self.n]
            last = top[self.n - 1]
            found[row] = float(top.sum()) + np.maximum(units - last, 0).sum(axis=1)
        return found

    def kept(self, order: Positions) -> float:
        """What all runs keep."""
        parted = self._filled(order).reshape(-1, self.m, self.rows)
        return float(-np.partition(-parted, self.n - 1, axis=1)[:, : self.n].sum(dtype=np.float64))
