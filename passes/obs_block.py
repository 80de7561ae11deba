"""Optimal brain surgeon's update of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxprune.lsq import surgeon
from onnxprune.plugin import Problem, Solution


@dataclass(frozen=True)
class ObsBlock:
    """Blocks of columns (heads, patches) leave by the surgeon's update, on the inputs that the pruned model gives.

    Each layer sees what the layers before it, repaired, hand on, and aims at the dense outputs. The order and size of
    blocks do not change where it ends, which is computed at once. `damp` is a share of the mean diagonal of the second
    moments. Source: METHODS D4 (ZipLM, Kurtic et al. 2023), with the inputs collected anew after each layer (0.4).
    """

    damp: float = 1e-2
    consumers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.damp > 0:
            raise ValueError("obs-block: damp is above 0")

    def solve(self, problem: Problem) -> Solution | None:
        """The change of one site."""
        return surgeon(problem, self.damp)
