"""The deepest layers first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.plugin import Evidence
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class Tail:
    """The deepest branch goes first. The plain rule that elaborate scores have to beat.

    Source: METHODS E8 (reassessing layer pruning in LLMs, Lu et al. 2024); repair stands in for its tuning of what is
    left. Scores layers. Needs nothing.
    """

    kinds: ClassVar[tuple[str, ...]] = ("layers",)
    missing: ClassVar[str] = "it scores layers: --remove layers"

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays."""
        count = len(group.units)
        return (count - np.arange(count)) / count if group.kind == "layers" else None
