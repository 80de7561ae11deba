"""Experts that the outputs miss least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.greedy import one_by_one
from onnxprune.plugin import Evidence
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class ExpertLoss:
    """Again and again the expert goes without which the outputs move least, the router choosing among the others.

    Source: METHODS G3 (not all experts are equal, Lu et al. 2024), with its greedy form for many experts, and the
    model's outputs in place of the layer's. Scores experts. Needs a run for each that is left, for each that goes.
    """

    calibrated: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("experts",)
    missing: ClassVar[str] = "it scores experts: --remove experts --approximate"

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays: the loss once an expert has gone."""
        if group.kind != "experts":
            return None
        return one_by_one(group, evidence, [np.array([k]) for k in range(len(group.units))])
