"""Means in place of what went."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxprune.plugin import Problem, Solution


@dataclass(frozen=True)
class BiasCompensation:
    """Biases take over the mean of what was removed: b += mean of the dense less mean of the pruned output.

    For the first layer that lost inputs that is W_P mu_P; later ones make up for what is left of it. Weights stay.
    Source: METHODS D1 (FLAP, An et al. 2024).
    """

    def solve(self, problem: Problem) -> Solution | None:
        """The change of one site; None where there is no bias."""
        if not problem.intercept:
            return None
        shift = (problem.wanted - problem.current).mean(axis=0, dtype=np.float64)
        return Solution(np.zeros_like(problem.weight), shift, 0.0)
