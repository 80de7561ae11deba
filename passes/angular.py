"""Runs of layers that turn their stream least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.greedy import blocks
from onnxprune.plugin import Evidence
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class Angular:
    """The run of `share` of the blocks, one after the other, between whose ends the stream turns least, goes first.

    Blocks of the run, and then the others, go by their own angle, as a share of a straight one. Source: METHODS E2
    (the unreasonable ineffectiveness of the deeper layers, Gromov et al. 2024). Scores layers. Needs one pass.
    """

    share: float = 0.25
    calibrated: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("layers",)
    missing: ClassVar[str] = "it scores layers: --remove layers"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError("angular: share lies in (0, 1)")

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays."""
        junctions = evidence.junctions(group) if group.kind == "layers" else ()
        if not junctions:
            return None
        parts = blocks(group)
        ends = [(junctions[int(part[0])].before, junctions[int(part[-1])].after) for part in parts]
        length = max(1, round(self.share * len(parts)))
        runs = [angle(ends[k][0], ends[k + length - 1][1]) for k in range(len(parts) - length + 1)]
        first = int(np.argmin(runs))
        found = np.zeros(len(group.units))
        for k, part in enumerate(parts):
            found[part] = angle(*ends[k]) + (not first <= k < first + length)
        return found


def angle(x: Array, y: Array) -> float:
    """Mean over rows of the angle between them, as a share of a straight one; 1 where they do not compare."""
    if x.shape != y.shape:
        return 1.0
    x, y = x.astype(np.float64), y.astype(np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    known = norms > 0
    cosines = np.clip((x * y).sum(axis=1)[known] / norms[known], -1, 1)
    return float(np.arccos(cosines).mean() / np.pi) if known.any() else 1.0
