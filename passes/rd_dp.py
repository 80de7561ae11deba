"""Rate and distortion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.budget import by_losses, tables
from onnxprune.plugin import Search, Searcher, build
from onnxprune.types import Array


@dataclass(frozen=True)
class RateDistortion:
    """Measure what each group alone costs at the output, at `levels` sizes; least sum of that for the budget.

    Damages are taken to add up. Whether they do is seen at `checks` random plans that meet the target: where the sums
    are off by more than the share `gap` in the mean, `darwin-evo` searches as well, and the better plan of the two is
    taken. Source: METHODS C7 (Xu et al. 2023), with damage after repair in place of the output's squared error. Needs
    a repair for each group and size.
    """

    levels: int = 6
    rounds: int = 3
    checks: int = 5
    gap: float = 0.3
    seed: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.levels < 2 or self.rounds < 1 or self.checks < 0 or self.gap < 0 or not 0 <= self.floor < 1:
            raise ValueError("rd-dp: levels >= 2, rounds >= 1, checks, gap >= 0, floor in [0, 1)")

    def search(self, problem: Search) -> list[int]:
        """Units that go, by knob."""
        levels = tables(problem, self.levels)
        count = len(problem.knobs)
        states = [
            [level if i == k else 0 for i in range(count)] for k, listed in enumerate(levels) for level in listed[1:]
        ]
        damage = np.maximum(problem.damage(states), 0) if states else np.zeros(0)
        losses, start = [], 0
        for listed in levels:
            end = start + len(listed) - 1
            losses.append(np.concatenate([[0.0], np.maximum.accumulate(damage[start:end])]))
            start = end
        finite = max((float(each[np.isfinite(each)].max()) for each in losses), default=1.0)
        losses = [np.where(np.isfinite(each), each, 1e6 * (finite + 1)) for each in losses]
        state = by_losses(problem, levels, losses, self.rounds)
        off = self._off(problem, levels, losses)
        if off <= self.gap:
            return state
        problem.tell(f"rd-dp: damages of single groups miss that of all by {off:.0%}, so darwin-evo searched as well")
        evolution: Searcher = build("allocators", f"darwin-evo,seed={self.seed}")
        both = [state, evolution.search(problem)]
        return both[int(np.argmin(problem.damage(both)))]

    def _off(self, problem: Search, levels: Sequence[Sequence[int]], losses: Sequence[Array]) -> float:
        """By what share sums of damages miss what random plans do, in the mean; zero where there is none to look at."""
        rng = np.random.default_rng(self.seed)
        places = [_random(problem, levels, rng) for _ in range(self.checks)]
        sums = np.array([sum(loss[i] for loss, i in zip(losses, some, strict=True)) for some in places])
        states = [[listed[i] for listed, i in zip(levels, some, strict=True)] for some in places]
        found = problem.damage(states) if states else np.zeros(0)
        usable = np.isfinite(found) & (found > 0)
        return float(np.mean(np.abs(sums - found)[usable] / found[usable])) if usable.any() else 0.0


def _random(problem: Search, levels: Sequence[Sequence[int]], rng: np.random.Generator) -> list[int]:
    """Numbers of levels, a step further of one random knob after another until the target is met."""
    places = [0] * len(levels)
    while problem.cost([listed[i] for listed, i in zip(levels, places, strict=True)]) > 1:
        room = [k for k, listed in enumerate(levels) if places[k] < len(listed) - 1]
        if not room:
            break
        places[room[rng.integers(len(room))]] += 1
    return places
