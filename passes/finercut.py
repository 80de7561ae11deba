"""Greedy removal of sub-layers that preserves outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.greedy import one_by_one
from onnxprune.plugin import Evidence
from onnxprune.types import Array, Group

MEASURES = {"js": "jensen-shannon", "angle": "angle"}


@dataclass(frozen=True)
class FinerCut:
    """Again and again the branch goes that changes the final outputs least: `measure=js` (Jensen-Shannon) or `angle`.

    Source: METHODS E5 (FinerCut, Zhang et al. 2024). Scores layers. Needs a run for each branch that is left, for each
    that goes.
    """

    measure: str = "js"
    calibrated: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("layers",)
    missing: ClassVar[str] = "it scores layers: --remove layers"

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"finercut: measure is {' or '.join(MEASURES)}")

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays: the change once a branch has gone."""
        if group.kind != "layers":
            return None
        return one_by_one(group, evidence, [np.array([k]) for k in range(len(group.units))], MEASURES[self.measure])
