"""Greedy removal of whole blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxprune.greedy import blocks, one_by_one
from onnxprune.plugin import Evidence
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class RedundantBlocks:
    """Again and again the block goes without which the outputs move least; all branches of a block go together.

    `barrier` blocks at either end go last. Source: METHODS E3 (SLEB, Song et al. 2024), without labels: the loss is the
    divergence from the dense outputs. Scores layers. Needs a run for each block that is left, for each that goes.
    """

    barrier: int = 1
    calibrated: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("layers",)
    missing: ClassVar[str] = "it scores layers: --remove layers"

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays: the loss once a block has gone."""
        if group.kind != "layers":
            return None
        parts = blocks(group)
        barrier = self.barrier if len(parts) > 2 * self.barrier else 0
        return one_by_one(group, evidence, parts, barrier=barrier)
