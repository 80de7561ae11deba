"""The default allocator where there is calibration data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from onnxprune.plugin import Knob, Search
from onnxprune.types import Array

KINDS = 4  # of which every combination is tried as a start
LONGEST = 30  # halvings of a bracket
SECOND = 8  # plans that are looked at once more in the end
PAIRS = 3  # of the cheapest knobs, and of the dearest, that trade with each other
SIZES = np.array([2.0, 1.0, 0.5, 0.25])  # of a step, that moves are tried in; far ones where few rounds are paid for
FREE = 4.0  # how far, as a logarithm, the others may move to make up for a coarse knob
COARSE = 8  # steps, up to which a knob turns by itself
FEW = 64  # steps, up to which knobs that turn at once overshoot the target


@dataclass(frozen=True)
class Measured:
    """Start from the best equal share of some kinds, then trade between groups what costs little for what costs much.

    Every judgement is the divergence at the output after repair, on samples the repair does not see, at the state that
    is to be improved: where much has gone, other cuts are the cheap ones. A round measures each knob turned a bit
    further, and moves all of them, far and less far, by how their damage per cost compares with one price that meets
    the target. Knobs of few steps (a branch, a handful of heads) are flipped one by one, and the others make up for it.
    Where two rounds are paid for, the cheapest knobs also trade with the dearest in pairs, and a second opinion on
    other samples decides in the end. Source: METHODS C7 (distortions measured at the output), with the equal-slope
    condition of rate-distortion theory.

    `rounds` and `step` (a factor of what is kept, as a logarithm) say how long and how far, `trials` how many plans may
    be measured, fewer where the effort does not pay for them; without rounds it is the equal share of all kinds, and
    nothing is measured.
    """

    rounds: int = 6
    step: float = 0.4
    trials: int = 160
    floor: float = 0.0

    def search(self, problem: Search) -> list[int]:
        """Units that go, by knob."""
        left = min(self.trials, problem.trials) if self.rounds else 0
        starts = self._starts(problem, left)
        left -= len(starts)
        if len(starts) == 1 and left <= 0:
            return starts[0]
        found = problem.damage(starts)
        seen = dict(zip(map(tuple, starts), found.tolist(), strict=True))
        state, best, step = starts[int(np.argmin(found))], float(found.min()), self.step
        rich = left >= 2 * (len(problem.knobs) + len(SIZES) + PAIRS**2) + SECOND + 1
        pairs, reserve = (PAIRS, SECOND + 1) if rich else (0, 0)
        for _ in range(self.rounds):
            fine = [k for k, knob in enumerate(problem.knobs) if not _coarse(knob) and state[k] < knob.most]
            flips = [
                turned for k, knob in enumerate(problem.knobs) if _coarse(knob) for turned in _flips(state, k, knob)
            ]
            left -= len(fine) + len(flips) + len(SIZES) + pairs**2
            if left < reserve:
                break
            prices = self._prices(problem, state, best, fine, step)
            wishes = [_balanced(problem, state, prices, size) for size in SIZES * step]
            wishes += [_balanced(problem, flip, np.ones(len(state)), FREE) for flip in flips]
            wishes += _trades(problem, state, prices, step, pairs)
            wishes = [wish for wish in wishes if problem.cost(wish) <= 1]
            found = problem.damage(wishes)
            seen |= zip(map(tuple, wishes), found.tolist(), strict=True)
            if len(found) and found.min() < best:
                state, best = wishes[int(np.argmin(found))], float(found.min())
            else:
                step /= 2
        start = starts[int(np.argmin([seen[tuple(s)] for s in starts]))]
        return self._confirmed(problem, start, state, seen) if rich else state

    @staticmethod
    def _confirmed(
        problem: Search, start: list[int], state: list[int], seen: Mapping[tuple[int, ...], float]
    ) -> list[int]:
        """Of the start and the best that were seen, the one that a second opinion likes best.

        A search fits what it is judged by: of many plans some look good on those samples alone.
        """
        if problem.confirm is None or state == start:
            return state
        some = [start, *(list(s) for s in sorted(seen, key=lambda s: seen[s])[:SECOND] if list(s) != start)]
        return some[int(np.argmin(problem.confirm(some)))]

    @staticmethod
    def _starts(problem: Search, most: float) -> list[list[int]]:
        """Equal shares of combinations of kinds, `most` at most, all of them first."""
        kinds = sorted({knob.kind for knob in problem.knobs} - {"layers"})
        sets = [set(kinds)]
        if len(kinds) <= KINDS:
            sets += [set(some) for size in range(1, len(kinds)) for some in combinations(kinds, size)]
        if len(sets) > most:
            del sets[1:]
        states = [state for some in sets if (state := _uniform(problem, some)) is not None]
        return states or [[knob.most for knob in problem.knobs]]

    @staticmethod
    def _prices(problem: Search, state: Sequence[int], damage: float, live: Sequence[int], step: float) -> Array:
        """float64[knobs]: what turning a knob further costs at the output, for each unit of cost that it saves."""
        trials = [_turned(state, k, _moved(problem, state, k, step)) for k in live]
        rises = np.maximum(problem.damage(trials) - damage, 1e-6 * damage + 1e-12)
        saved = np.array([problem.cost(state) - problem.cost(trial) for trial in trials])
        prices = np.full(len(state), np.inf)
        prices[list(live)] = np.divide(rises, saved, out=np.full(len(live), np.inf), where=saved > 0)
        return prices


def _coarse(knob: Knob) -> bool:
    """Whether a knob has so few steps that it is turned by itself: branches, a handful of heads."""
    return knob.kind == "layers" or len(np.unique(knob.table)) <= COARSE


def _flips(state: Sequence[int], k: int, knob: Knob) -> list[list[int]]:
    """States with one knob a step further or a step back."""
    levels = np.unique(knob.table).tolist()
    place = levels.index(state[k]) if state[k] in levels else 0
    return [_turned(state, k, levels[i]) for i in (place - 1, place + 1) if 0 <= i < len(levels)]


def _turned(state: Sequence[int], k: int, count: int) -> list[int]:
    return [count if i == k else gone for i, gone in enumerate(state)]


def _moved(problem: Search, state: Sequence[int], k: int, change: float) -> int:
    """Units gone if a knob keeps exp(-change) of what it keeps."""
    knob = problem.knobs[k]
    total = len(knob.table) - 1
    kept = (total - state[k]) * np.exp(-change)
    wish = total - kept
    rounded = int(np.ceil(wish - 1e-9) if change > 0 else np.floor(wish + 1e-9))
    return int(knob.table[min(max(rounded, 0), total)])


def _balanced(problem: Search, state: Sequence[int], prices: Array, step: float) -> list[int]:
    """Every knob moved by the logarithm of a common price over its own, at most by `step`; the lowest that will do."""
    moving = [k for k, knob in enumerate(problem.knobs) if not _coarse(knob)]

    def at(price: float) -> list[int]:
        changes = {
            k: float(np.clip(price - np.log(prices[k]), -step, step)) if np.isfinite(prices[k]) else -step
            for k in moving
        }
        return [_moved(problem, state, k, changes[k]) if k in changes else gone for k, gone in enumerate(state)]

    finite = np.log(prices[np.isfinite(prices)]) if np.isfinite(prices).any() else np.zeros(1)
    return _least(at, problem, finite.min() - 2 * step, finite.max() + 2 * step)


def _trades(problem: Search, state: Sequence[int], prices: Array, step: float, pairs: int) -> list[list[int]]:
    """States with one of the cheapest knobs turned further, and one of the dearest back as far as that pays for."""
    order = [k for k in np.argsort(prices, kind="stable").tolist() if np.isfinite(prices[k])]
    found = []
    for cheap in order[:pairs]:
        cut = _turned(state, cheap, _moved(problem, state, cheap, step))
        for dear in order[: -pairs - 1 : -1]:
            levels = [level for level in np.unique(problem.knobs[dear].table).tolist() if level < state[dear]]
            room = [level for level in levels if problem.cost(_turned(cut, dear, level)) <= 1]
            if dear != cheap and room:
                found.append(_turned(cut, dear, room[0]))
    return found


def _uniform(problem: Search, kinds: set[str]) -> list[int] | None:
    """The same share of every knob of these kinds; None if all of them together are not enough."""

    def at(share: float) -> list[int]:
        return [
            int(knob.table[min(int(np.floor(share * len(knob.table))), len(knob.table) - 1)])
            if knob.kind in kinds
            else 0
            for knob in problem.knobs
        ]

    return _least(at, problem, 0.0, 1.0) if problem.cost(at(1.0)) <= 1 else None


def _least(at: Callable[[float], list[int]], problem: Search, low: float, high: float) -> list[int]:
    """The state of the lowest number that meets the target, where a higher one costs less.

    Knobs of few steps jump together, as the heads of all layers do: those that need not do so turn back, and the others
    take up the rest.
    """
    held: dict[int, int] = {}

    def wish(number: float) -> list[int]:
        return [held.get(k, gone) for k, gone in enumerate(at(number))]

    def lowest() -> tuple[list[int], list[int]]:
        """The last state that misses the target, and the first that meets it."""
        under, over = low, high
        for _ in range(LONGEST):
            middle = (under + over) / 2
            under, over = (under, middle) if problem.cost(wish(middle)) <= 1 else (middle, over)
        return wish(under), wish(over)

    few = {k for k, knob in enumerate(problem.knobs) if len(np.unique(knob.table)) <= FEW}
    before, state = lowest()
    while problem.cost(state) <= 1 and (jumped := [k for k in few - held.keys() if before[k] < state[k]]):

        def gained(k: int, state: Sequence[int] = state, before: Sequence[int] = before) -> tuple[float, float]:
            """What turning a knob back costs; of what costs the same, what is worth more comes first."""
            worth = problem.knobs[k].worth
            return round(problem.cost(_turned(state, k, before[k])), 9), float(worth[before[k]] - worth[state[k]])

        for k in sorted(jumped, key=gained):
            back = _turned(state, k, before[k])
            state = back if problem.cost(back) <= 1 else state
            held[k] = state[k]
        before, finer = lowest()
        state = finer if problem.cost(finer) <= 1 else state
    return state
