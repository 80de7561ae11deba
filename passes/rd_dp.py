"""Rate and distortion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxprune.budget import by_losses, tables
from onnxprune.plugin import Search


@dataclass(frozen=True)
class RateDistortion:
    """Measure what each group alone costs at the output, at `levels` sizes; least sum of that for the budget.

    Damages are taken to add up, which holds for small cuts. Source: METHODS C7 (Xu et al. 2023), with damage after
    repair in place of the output's squared error. Needs a repair for each group and size.
    """

    levels: int = 6
    rounds: int = 3
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.levels < 2 or self.rounds < 1 or not 0 <= self.floor < 1:
            raise ValueError("rd-dp: levels >= 2, rounds >= 1, floor in [0, 1)")

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
        return by_losses(problem, levels, losses, self.rounds)
