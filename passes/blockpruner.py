"""Greedy removal of sub-layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.greedy import one_by_one
from onnxprune.plugin import Evidence
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class SubLayers:
    """Again and again the branch, attention or feed-forward alone, goes without which the outputs move least.

    Source: METHODS E4 (BlockPruner, Zhong et al. 2024), without labels: the loss is the divergence from the dense
    outputs. Scores layers. Needs a run for each branch that is left, for each that goes.
    """

    calibrated: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("layers",)
    missing: ClassVar[str] = "it scores layers: --remove layers"

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays: the loss once a branch has gone."""
        if group.kind != "layers":
            return None
        return one_by_one(group, evidence, [np.array([k]) for k in range(len(group.units))])
