"""How many of either kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.budget import filled
from onnxprune.plugin import Search


@dataclass(frozen=True)
class MaskSearch:
    """Try every number of the rarer kind (heads), fill up with the other (channels); the most importance stays.

    Either kind leaves in one order of importance over all its groups. Source: METHODS C9 (Kwon et al. 2022). Importance
    has to add up, as errors do. At most `most` numbers are tried.
    """

    most: int = 64
    floor: float = 0.0
    measures: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.most < 1 or not 0 <= self.floor < 1:
            raise ValueError("mask-search: most >= 1, floor in [0, 1)")

    def search(self, problem: Search) -> list[int]:
        """Units that go, by knob."""
        kinds: dict[str, int] = {}
        for knob in problem.knobs:
            kinds[knob.kind] = kinds.get(knob.kind, 0) + knob.most
        rare = min(kinds, key=lambda kind: (kinds[kind], kind))
        first = list(_line(problem, {rare}))
        second = list(_line(problem, kinds.keys() - {rare}))
        places = np.unique(np.linspace(0, len(first), min(self.most, len(first) + 1)).round().astype(int))
        found = [knob.most for knob in problem.knobs]
        kept = -np.inf
        for place in places:
            state = _fewest(problem, first[:place], second)
            if state is not None and (left := -_lost(problem, state)) > kept:
                found, kept = state, left
        return filled(problem, found)


def _line(problem: Search, kinds: set[str]) -> Iterator[tuple[int, int]]:
    """(knob, its next level) in the order of what a unit of the step is worth."""
    steps = []
    for k, knob in enumerate(problem.knobs):
        highest = -np.inf
        for before, after in zip(knob.levels, knob.levels[1:], strict=False):
            highest = max(highest, float(knob.worth[after] - knob.worth[before]) / (after - before))
            if knob.kind in kinds:
                steps.append((highest, k, after))
    return ((k, after) for _, k, after in sorted(steps))


def _fewest(problem: Search, fixed: list[tuple[int, int]], line: list[tuple[int, int]]) -> list[int] | None:
    """The state after all fixed steps and the shortest run of the line that meets the target; None if none does."""

    def after(length: int) -> list[int]:
        state = [0] * len(problem.knobs)
        for k, level in (*fixed, *line[:length]):
            state[k] = level
        return state

    low, high = -1, len(line)
    if problem.cost(after(high)) > 1:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if problem.cost(after(middle)) <= 1 else (middle, high)
    return after(high)


def _lost(problem: Search, state: list[int]) -> float:
    return sum(float(knob.worth[gone]) for knob, gone in zip(problem.knobs, state, strict=True))
