"""Mask gradients by finite differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.plugin import Evidence
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class FisherMask:
    """Fisher information of a mask on each head or branch, by second differences of the divergence, without gradients.

    At the dense point a divergence has no slope, and its curvature is the sum over samples of squared gradients of
    the log-likelihood: (L(1 - h) + L(1 + h)) / h^2, h = `step`. Source: METHODS B14 (Kwon et al. 2022). Two runs for
    each unit, so only heads and branches are scored.
    """

    step: float = 0.25
    calibrated: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("heads", "layers")
    missing: ClassVar[str] = "it scores heads and layers"

    def __post_init__(self) -> None:
        if not 0.01 <= self.step <= 1:
            raise ValueError("fisher-mask: step lies in [0.01, 1]")

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays."""
        if group.kind not in self.kinds:
            return None
        eye = np.eye(len(group.units)) * self.step
        levels = [{group.id: 1 + sign * row} for row in eye for sign in (-1, 1)]
        losses = evidence.loss(levels).reshape(-1, 2).sum(axis=1)
        if not np.isfinite(losses).all():  # what cannot go in part goes as a whole
            losses = evidence.loss([{group.id: 1 - np.eye(len(eye))[k]} for k in range(len(eye))])
            return losses if np.isfinite(losses).any() else None
        return np.asarray(losses / self.step**2)
