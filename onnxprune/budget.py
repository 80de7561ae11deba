"""What allocators share: the cheapest choice of levels, one for each knob, that meets a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onnxprune.plugin import Search
from onnxprune.types import Array

HALVINGS = 30
BINS = 2000  # steps of a budget in the dynamic programme
ALL = 1 - 1e-12


def choose(losses: Sequence[Array], savings: Sequence[Array], need: float, bins: int = BINS) -> list[int]:
    """One option of each knob, with the least total loss that saves at least `need`; all that saves most if none does.

    Multiple-choice knapsack by dynamic programming; savings are rounded down to a bin, so that what is promised holds.
    """
    if sum(float(each.max()) for each in savings) < need:
        return [int(np.argmax(each)) for each in savings]
    best = np.full(bins + 1, np.inf)  # least loss that saves at least so many bins
    best[0] = 0.0
    numbers = np.arange(bins + 1)
    chosen, steps = [], []
    for loss, saving in zip(losses, savings, strict=True):
        whole = np.floor(saving / max(need, 1e-30) * bins + 1e-6).astype(np.int64)
        table = best[np.maximum(numbers - np.maximum(whole, 0)[:, None], 0)] + np.asarray(loss)[:, None]
        option = table.argmin(axis=0)
        best = table[option, numbers]
        chosen.append(option)
        steps.append(np.maximum(whole, 0))
    at = bins
    if not np.isfinite(best[at]):  # lost to rounding
        at = int(np.flatnonzero(np.isfinite(best))[-1])
    found = []
    for option, step in zip(reversed(chosen), reversed(steps), strict=True):
        k = int(option[at])
        found.append(k)
        at = max(at - int(step[k]), 0)
    return found[::-1]


def least(problem: Search, pick: Callable[[float], list[int]], most: float = 1.0) -> list[int]:
    """The state of the smallest number in [0, most] that meets the target; everything goes where none does."""
    low, high = 0.0, most
    best = pick(high)
    if problem.cost(best) > 1:
        return [knob.most for knob in problem.knobs]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        state = pick(middle)
        if problem.cost(state) <= 1:
            high, best = middle, state
        else:
            low = middle
    return best


def uniform(problem: Search) -> list[int]:
    """The same share of every knob; whole branches last."""

    def at(share: float) -> list[int]:
        return [
            int(knob.table[min(int(share * len(knob.table)), len(knob.table) - 1)]) if knob.kind != "layers" else 0
            for knob in problem.knobs
        ]

    state = at(ALL)
    if problem.cost(state) <= 1:
        return least(problem, at, ALL)
    branches = [k for k, knob in enumerate(problem.knobs) if knob.kind == "layers"]
    for k in sorted(branches, key=lambda k: float(problem.knobs[k].worth[-1])):
        state[k] = problem.knobs[k].most
        if problem.cost(state) <= 1:
            break
    return filled(problem, state)


def filled(problem: Search, state: Sequence[int]) -> list[int]:
    """Units given back, the most important step first, as long as the target is still met."""
    found = list(state)
    live = {k for k, gone in enumerate(found) if gone}
    while True:
        steps: dict[int, int] = {}
        for k in live:
            before = max((level for level in problem.knobs[k].levels if level < found[k]), default=None)
            if before is not None and _fits(problem, found, k, before):
                steps[k] = before
        if not steps:
            return found
        worth = {
            k: float(problem.knobs[k].worth[found[k]] - problem.knobs[k].worth[before]) for k, before in steps.items()
        }
        best = max(sorted(worth), key=worth.__getitem__)
        found[best] = steps[best]
        live = set(steps)  # what does not fit now never will


def _fits(problem: Search, state: Sequence[int], k: int, level: int) -> bool:
    return problem.cost([level if i == k else gone for i, gone in enumerate(state)]) <= 1


def tables(problem: Search, most: int) -> list[list[int]]:
    """Levels of each knob, at most so many, none and all of it among them, evenly spread."""
    found = []
    for knob in problem.knobs:
        levels = knob.levels
        places = np.unique(np.linspace(0, len(levels) - 1, min(most, len(levels))).round().astype(int))
        found.append([levels[place] for place in places])
    return found


def by_losses(problem: Search, levels: Sequence[Sequence[int]], losses: Sequence[Array], rounds: int = 3) -> list[int]:
    """The state of least total loss, given the loss of each level of each knob, that meets the target.

    What a level saves depends on the others: it is counted at the state found last, from the dense one on, and how
    much must be saved in all is found by halving.
    """
    state = [0] * len(problem.knobs)
    best, found = None, np.inf
    for _ in range(rounds):
        savings = []
        for k, listed in enumerate(levels):
            costs = [problem.cost([level if i == k else gone for i, gone in enumerate(state)]) for level in listed]
            savings.append(costs[0] - np.array(costs))
        whole = sum(float(each.max()) for each in savings)

        def pick(need: float, savings: list[Array] = savings) -> list[int]:
            return [listed[i] for listed, i in zip(levels, choose(losses, savings, need), strict=True)]

        state = least(problem, pick, whole)
        if problem.cost(state) > 1:
            break
        total = sum(
            float(loss[list(listed).index(gone)]) for loss, listed, gone in zip(losses, levels, state, strict=True)
        )
        if total < found:
            best, found = state, total
    return filled(problem, best or [knob.most for knob in problem.knobs])
