"""Most importance for the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxprune.budget import by_losses, tables
from onnxprune.plugin import Search


@dataclass(frozen=True)
class Knapsack:
    """Keep the most importance that the budget holds: a knapsack, solved by dynamic programming.

    Units of a group leave in order of importance, so a group is one item in `levels` sizes; a branch is one item. What
    a size costs depends on the others and is counted anew `rounds` times. Source: METHODS C8 (Aflalo et al. 2020).
    """

    levels: int = 33
    rounds: int = 3
    floor: float = 0.0
    measures: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.levels < 2 or self.rounds < 1 or not 0 <= self.floor < 1:
            raise ValueError("knapsack: levels >= 2, rounds >= 1, floor in [0, 1)")

    def search(self, problem: Search) -> list[int]:
        """Units that go, by knob."""
        levels = tables(problem, self.levels)
        losses = [knob.worth[listed] for knob, listed in zip(problem.knobs, levels, strict=True)]
        return by_losses(problem, levels, losses, self.rounds)
