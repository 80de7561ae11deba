"""Removal one by one, each time what the outputs miss least: for criteria that score whole branches or experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune.plugin import Evidence
from onnxprune.types import Array, Group, Positions


def blocks(group: Group) -> list[Positions]:
    """The units of each block of a group of branches: branches that follow one another in a pattern that repeats.

    The pattern is told by which inputs of which operators hold the weights: attention, feed-forward, attention, ...
    """
    count = len(group.units)
    slots: list[list[str]] = [[] for _ in range(count)]
    for member in group.members:
        slots[int(member.units[0])].append(member.slot)
    kinds = [sorted(each) for each in slots]
    repeats = (p for p in range(1, count // 2 + 1) if count % p == 0 and kinds[p:] == kinds[:-p])
    period = next(repeats, 1)
    return list(np.arange(count).reshape(-1, period))


def one_by_one(
    group: Group, evidence: Evidence, parts: Sequence[Positions], measure: str = "divergence", barrier: int = 0
) -> Array | None:
    """float64[units]: the loss once each part has gone, in the order that keeps it least; None where it is not known.

    `barrier` parts at either end go last, as do those without which there is no loss to be had. Of equals the later
    part goes first.
    """
    level = np.ones(len(group.units))
    free = list(range(barrier, len(parts) - barrier))
    found, floor = np.full(len(group.units), np.nan), 0.0
    while free:
        levels = [np.where(np.isin(np.arange(len(level)), parts[k]), 0.0, level) for k in free]
        losses = evidence.loss([{group.id: each} for each in levels], measure)
        losses = np.where(np.isnan(losses), np.inf, losses)
        best = len(free) - 1 - int(np.argmin(losses[::-1]))
        if not np.isfinite(losses[best]):
            break
        floor = max(floor * (1 + 1e-9), float(losses[best]))
        level = levels[best]
        found[parts[free.pop(best)]] = floor
    if np.isnan(found).all():
        return None
    return np.where(np.isnan(found), 2 * np.nanmax(found) + 1e-9, found)
