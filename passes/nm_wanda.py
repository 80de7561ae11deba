"""N:M by weights and activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.plugin import Runs, Thinned


@dataclass(frozen=True)
class Wanda:
    """N:M by |w_ij| times the norm of input j, measured on what the already sparse model feeds the layer.

    The weights that stay keep their values. A convolution's inputs are the columns of its patches. Source: METHODS F2
    (Wanda, Sun et al. 2024).
    """

    calibrated: ClassVar[bool] = True

    def thin(self, runs: Runs) -> Thinned:
        """The weight with zeros."""
        size = np.ones(len(runs.weight)) if runs.size is None else runs.size
        keep = runs.keep(np.abs(runs.weight) * size[:, None])
        return Thinned(np.where(keep, runs.weight, 0), keep)
