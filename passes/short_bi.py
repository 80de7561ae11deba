"""Block influence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.plugin import Evidence, Junction
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class BlockInfluence:
    """How far a branch turns its stream: 1 - mean cosine of the stream before and after it, over tokens or pixels.

    Source: METHODS E1 (ShortGPT, Men et al. 2024). Scores layers. Needs one pass.
    """

    calibrated: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("layers",)
    missing: ClassVar[str] = "it scores layers: --remove layers"

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays."""
        if group.kind != "layers":
            return None
        found = [influence(junction) for junction in evidence.junctions(group)]
        return np.array(found) if found else None


def influence(junction: Junction) -> float:
    """1 - mean cosine; rows of nothing but zeros say nothing."""
    x, y = junction.before.astype(np.float64), junction.after.astype(np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    known = norms > 0
    return float(1 - ((x * y).sum(axis=1)[known] / norms[known]).mean()) if known.any() else 1.0
