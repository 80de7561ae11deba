"""The baseline of every report."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from onnxprune.plugin import Evidence
from onnxprune.types import Array, Group


def erk_density(shape: tuple[int, ...]) -> float:
    """Erdos-Renyi kernel density of a weight, up to the common factor: sum of its sizes over their product."""
    return sum(shape) / prod(shape)


@dataclass(frozen=True)
class RandomErk:
    """Random units; layers keep shares in Erdos-Renyi-kernel proportion when one ranking spans all groups.

    A unit stays if a uniform u is below c times its layer's density, so density / u is a score whose threshold is c,
    and densities above one keep everything. Source: METHODS B15 (Liu et al. 2022). Needs a seed only.
    """

    missing: ClassVar[str] = "it has no weights"

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays; the same for the same seed and group id."""
        shapes = [evidence.weights.array(m.initializer).shape for m in group.members if m.role == "weight"]
        if not shapes:
            return None
        draws = np.random.default_rng([evidence.seed, group.id]).uniform(1e-9, 1, len(group.units))
        return erk_density(shapes[0]) / draws
