"""The measured effect of every unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.plugin import Evidence
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class Oracle:
    """How far the outputs move when this unit alone goes, measured for each unit, without repair.

    The yardstick for cheaper scores. Source: METHODS B32. Needs one run for each unit.
    """

    calibrated: ClassVar[bool] = True
    missing: ClassVar[str] = "no unit of it can go alone"

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays."""
        found = evidence.loss([{group.id: 1 - row} for row in np.eye(len(group.units))])
        if not np.isfinite(found).any():
            return None
        return np.where(np.isfinite(found), found, np.nanmax(found[np.isfinite(found)]) + 1)
