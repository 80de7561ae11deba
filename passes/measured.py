"""The default allocator where there is calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.plugin import Search


@dataclass(frozen=True)
class Measured:
    """In stages: measure what each single cut costs at the output after repair, then take the cheapest for their worth.

    Each stage brings the cost down to `step` of what it was, by cuts of an eighth, a quarter and a half of what each
    knob has left, chosen along the lower hull of damage over saving. Where much has gone, other cuts are the cheap
    ones: that is why it measures anew. Source: METHODS C7 (distortions measured one by one, added up).
    """

    step: float = 0.65
    shares: str = "0.125 0.25 0.5"

    def search(self, problem: Search) -> list[int]:
        """Units that go, by knob; meets the target by the smallest step that does."""
        state = [0] * len(problem.knobs)
        damage = 0.0
        while (cost := problem.cost(state)) > 1:
            goal = max(1.0, cost * self.step)
            moves = self._moves(problem, state)
            if not moves:
                return [knob.most for knob in problem.knobs]
            trials = [_turned(state, k, count) for k, count in moves]
            rises = np.maximum(problem.damage(trials) - damage, 0)
            savings = np.array([cost - problem.cost(trial) for trial in trials])
            state = _taken(problem, state, goal, moves, rises, savings)
            if problem.cost(state) > 1 or self.step > 0:
                damage = float(problem.damage([state])[0])
        return state

    def _moves(self, problem: Search, state: Sequence[int]) -> list[tuple[int, int]]:
        """(knob, units gone) of the cuts to try."""
        found = []
        for k, knob in enumerate(problem.knobs):
            left = len(knob.table) - 1 - state[k]
            seen = {state[k]}
            for share in map(float, self.shares.split()):
                count = int(knob.table[min(len(knob.table) - 1, state[k] + max(1, round(share * left)))])
                if count not in seen:
                    seen.add(count)
                    found.append((k, count))
        return found


def _turned(state: Sequence[int], k: int, count: int) -> list[int]:
    return [count if i == k else gone for i, gone in enumerate(state)]


def _taken(
    problem: Search,
    state: Sequence[int],
    goal: float,
    moves: Sequence[tuple[int, int]],
    rises: np.ndarray[tuple[int], np.dtype[np.float64]],
    savings: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> list[int]:
    """Steps along each knob's hull, the best for its worth first, until the goal is met; the last no longer than needed."""
    steps = []
    for knob in sorted({k for k, _ in moves}):
        points = [(0.0, 0.0, state[knob])]
        points += sorted((s, r, c) for (k, c), r, s in zip(moves, rises, savings, strict=True) if k == knob and s > 0)
        at = 0
        while at + 1 < len(points):
            slopes = [(max(r - points[at][1], 1e-9) / (s - points[at][0]), -j) for j, (s, r, _) in enumerate(points) if s > points[at][0]]
            if not slopes:
                break
            slope, j = min(slopes)
            at = -j
            steps.append((slope, knob, points[at][2]))
    current = list(state)
    last = None
    for _, knob, count in sorted(steps, key=lambda step: step[0]):
        if problem.cost(current) <= goal:
            break
        last = (knob, current[knob])
        current[knob] = count
    if last is not None and goal <= 1 and problem.cost(current) < 1:
        knob, low = last
        high = current[knob]
        while high - low > 1:  # the fewest units of the last step that do
            middle = (low + high) // 2
            low, high = (low, middle) if problem.cost(_turned(current, knob, int(problem.knobs[knob].table[middle]))) <= 1 else (middle, high)
        current[knob] = int(problem.knobs[knob].table[high])
    return current
