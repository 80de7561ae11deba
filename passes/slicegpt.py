"""Directions instead of positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxprune.plugin import Problem, Solution


@dataclass(frozen=True)
class SliceGPT:
    """Widths under norms and head dimensions lose the directions of least energy, folded into neighbours; no refit.

    RMSNorm(x Q) = RMSNorm(x) Q for an orthogonal Q, gains folded into readers; under LayerNorm Q leaves the mean where
    it is. One basis serves the whole stream, so that no operator is added. The divisor of a norm stays that of the
    dense width, as a factor in its readers. Sources: METHODS D11 (SliceGPT, Ashkboos et al. 2024), D13.
    """

    subspaces: ClassVar[bool] = True

    def solve(self, problem: Problem) -> Solution | None:
        """Nothing: what the basis gives stays."""
        return None
