"""Perturbative regression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.plugin import Evidence
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class Bonsai:
    """Regress how far the outputs move on which units are gone, over random cuts and their complements.

    Each of `rounds` rounds takes the units that give their readers least as candidates, twice as many as go in a round,
    drops random halves of them and their complements (`masks` runs in all), fits a ridge regression of the loss, and
    lets the units go of which it says that they matter least; the next round starts from there. Source: METHODS B23
    (Bonsai, Dery et al. 2024), one group at a time. Needs rounds x masks runs for each group.
    """

    rounds: int = 4
    masks: int = 32
    ridge: float = 0.1
    calibrated: ClassVar[bool] = True
    missing: ClassVar[str] = "no unit of it can go"

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.masks < 2 or not self.ridge > 0:
            raise ValueError("bonsai: rounds >= 1, masks >= 2, ridge > 0")

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays: the round in which a unit goes, and what the regression said there."""
        count = len(group.units)
        prior = self._prior(group, evidence)
        rng = np.random.default_rng([evidence.seed, group.id])
        left, found = np.arange(count), np.zeros(count)
        for step in range(self.rounds):
            goes = -(-len(left) // (self.rounds - step))
            candidates = left[np.argsort(prior[left], kind="stable")][: 2 * goes] if prior.any() else left
            halves = [rng.permutation(len(candidates)) < len(candidates) // 2 for _ in range(self.masks // 2)]
            masks = np.array([side for half in halves for side in (half, ~half)], np.float64)  # True is gone
            base = np.isin(np.arange(count), left).astype(np.float64)
            levels = []
            for mask in masks:
                level = base.copy()
                level[candidates] = 1 - mask
                levels.append({group.id: level})
            losses = evidence.loss(levels)
            known = np.isfinite(losses)
            if known.sum() < 2:
                if step == 0:
                    return None
                found[left] = step + 1 + _ranks(prior[left])
                return found
            worth = regression(masks[known], losses[known], self.ridge)
            order = np.argsort(worth, kind="stable")[:goes]
            found[candidates[order]] = step + np.arange(len(order)) / len(order)
            left = np.setdiff1d(left, candidates[order])
        return found

    @staticmethod
    def _prior(group: Group, evidence: Evidence) -> Array:
        """float64[units]: what units put out, which says who may go first."""
        found = np.zeros(len(group.units))
        for reader in evidence.readers(group):
            values = reader.mean_square * (reader.weight**2).sum(axis=1)
            found += reader.of_units(values) / (values.sum() or 1.0)
        return found


def regression(masks: Array, values: Array, ridge: float) -> Array:
    """float64[units]: ridge regression of float64[runs] on float64[runs, units]; no offset is needed."""
    gram = masks.T @ masks
    scale = float(np.trace(gram)) / max(len(gram), 1)
    return np.asarray(np.linalg.solve(gram + max(ridge * scale, 1e-12) * np.eye(len(gram)), masks.T @ values))


def _ranks(values: Array) -> Array:
    return np.argsort(np.argsort(values, kind="stable"), kind="stable") / len(values)
