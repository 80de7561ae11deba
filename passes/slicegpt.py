"""Directions instead of positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxprune.plugin import Problem, Solution


@dataclass(frozen=True)
class SliceGPT:
    """Widths under norms and head dimensions lose the directions of least energy, folded into neighbours; no refit.

    RMSNorm(x Q) = RMSNorm(x) Q for an orthogonal Q, gains folded into readers. With `ln2rms` the mean is taken off by
    what writes the stream, and LayerNorm becomes RMSNorm (in single precision, without a pattern); else, and where a
    shift is read without a bias, Q leaves the mean where it is, which costs a direction. One basis serves the whole
    stream, so that no operator is added. The divisor of a norm stays that of the dense width, as a factor in its
    readers. Sources: METHODS D11 (SliceGPT, Ashkboos et al. 2024), D12 (Pre-RMSNorm, Jiang et al. 2023), D13.
    """

    ln2rms: int = 1
    subspaces: ClassVar[bool] = True

    def solve(self, problem: Problem) -> Solution | None:
        """Nothing: what the basis gives stays."""
        return None
