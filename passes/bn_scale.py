"""Network slimming's score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.plugin import Evidence
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class BatchNormScale:
    """|gamma| of the BatchNormalization nodes that a unit passes through, averaged over them.

    Source: METHODS B4 (network slimming, Liu et al. 2017). Needs weights only, and BatchNormalization nodes that the
    exporter did not fold.
    """

    missing: ClassVar[str] = "no BatchNormalization scale is left in it"

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays; None where the group passes no BatchNormalization."""
        scales = [m for m in group.members if m.slot == "BatchNormalization.1"]
        if not scales or group.kind == "layers":  # no scale speaks for a whole branch
            return None
        count, weights = len(group.units), evidence.weights
        raw: Array = np.mean(
            [weights.per_unit(m, 1, count) / np.maximum(np.bincount(m.units, minlength=count), 1) for m in scales],
            axis=0,
        )
        return raw
