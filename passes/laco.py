"""Layer collapse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.greedy import blocks
from onnxprune.plugin import Evidence
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class LayerCollapse:
    """From the deepest block up, `span` blocks collapse into the next one wherever outputs keep a cosine of `least`.

    The released rule replaces the first block of a run by the last one, which is to drop all before that; the paper's
    sum of differences changes weights, which a criterion cannot. After a collapse the sweep goes on `interval` blocks
    further up. What collapsed goes first, earlier collapses before later ones, then the others, deepest first. Source:
    METHODS E7 (LaCo, Yang et al. 2024). Scores layers. Needs a run for each place.
    """

    span: int = 2
    interval: int = 1
    least: float = 0.65
    calibrated: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("layers",)
    missing: ClassVar[str] = "it scores layers: --remove layers"

    def __post_init__(self) -> None:
        if self.span < 1 or self.interval < 1:
            raise ValueError("laco: span and interval are at least 1")

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays."""
        if group.kind != "layers":
            return None
        parts = blocks(group)
        level = np.ones(len(group.units))
        alive = list(range(len(parts)))
        found = np.array([0.0] * len(level))
        for k, part in enumerate(parts):
            found[part] = 2 + (len(parts) - k) / (len(parts) + 1)
        at, step = len(alive) - 1 - self.span, 0
        while at >= 0:
            trial = level.copy()
            trial[np.concatenate([parts[k] for k in alive[at : at + self.span]])] = 0
            turned = float(evidence.loss([{group.id: trial}], "angle")[0])
            if not np.isfinite(turned):
                return None
            if np.cos(np.pi * turned) > self.least:
                for k in alive[at : at + self.span]:
                    found[parts[k]] = step / len(parts)
                step += 1
                del alive[at : at + self.span]
                level = trial
                at -= self.interval
            else:
                at -= 1
            at = min(at, len(alive) - 1 - self.span)
        return found
