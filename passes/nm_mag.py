"""Magnitude N:M."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxprune.plugin import Runs, Thinned


@dataclass(frozen=True)
class Magnitude:
    """N:M by |w|: the n largest weights of every m along the reduction axis stay as they are.

    Of equal ones the first stay, so that results repeat. Needs weights only. Source: METHODS F1 (Mishra et al. 2021).
    """

    def thin(self, runs: Runs) -> Thinned:
        """The weight with zeros."""
        keep = runs.keep(np.abs(runs.weight))
        return Thinned(np.where(keep, runs.weight, 0), keep)
