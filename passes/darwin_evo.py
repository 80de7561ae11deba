"""Evolution of levels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxprune.budget import filled, tables, uniform
from onnxprune.plugin import Search


@dataclass(frozen=True)
class Evolution:
    """Offspring trade levels between groups of a kind; the one that does least damage at the output is the next parent.

    A child is the parent after 1 to 3 trades: one group gives a level, another of its kind takes one, and what that
    leaves of the budget is given back. Damage is measured after repair, and the parent competes. Source: METHODS C12
    (DarwinLM, Tang et al. 2025), C13. Needs generations x offspring repairs.
    """

    generations: int = 8
    offspring: int = 8
    levels: int = 17
    seed: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.generations < 1 or self.offspring < 1 or self.levels < 2 or not 0 <= self.floor < 1:
            raise ValueError("darwin-evo: generations, offspring >= 1, levels >= 2, floor in [0, 1)")

    def search(self, problem: Search) -> list[int]:
        """Units that go, by knob."""
        rng = np.random.default_rng(self.seed)
        levels = tables(problem, self.levels)
        parent = uniform(problem)
        damage = float(problem.damage([parent])[0])
        for _ in range(self.generations):
            children = [
                child for _ in range(self.offspring) if (child := self._child(problem, parent, levels, rng)) != parent
            ]
            if not children:
                continue
            found = problem.damage(children)
            best = int(np.argmin(found))
            if found[best] < damage:
                parent, damage = children[best], float(found[best])
        return parent

    @staticmethod
    def _child(problem: Search, parent: list[int], levels: list[list[int]], rng: np.random.Generator) -> list[int]:
        """The parent after some trades that keep the target met."""
        child = list(parent)
        for _ in range(min(rng.integers(1, 4), rng.integers(1, 4))):
            kinds = sorted({knob.kind for knob in problem.knobs})
            kind = kinds[rng.integers(len(kinds))]
            own = [k for k, knob in enumerate(problem.knobs) if knob.kind == kind]
            more, less = rng.permutation(own)[:2] if len(own) > 1 else (own[0], own[0])
            child[less] = max((level for level in levels[less] if level < child[less]), default=0)
            child[more] = min((level for level in levels[more] if level > child[more]), default=child[more])
        for k in rng.permutation(len(child)).tolist() * 2:
            if problem.cost(child) <= 1:
                break
            child[k] = min((level for level in levels[k] if level > child[k]), default=child[k])
        return filled(problem, child) if problem.cost(child) <= 1 else list(parent)
