"""Optimal brain surgeon without data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxprune.lsq import surgeon
from onnxprune.plugin import Problem, Solution


@dataclass(frozen=True)
class ObsPa:
    """The surgeon's update of every consumer of what went, on random inputs where there is no calibration data.

    Second moments are those of the dense model fed with standard normal noise, which says less with every layer: any
    real inputs do better. Source: METHODS D6 (structurally prune anything, Wang et al. 2024). Consumers only.
    """

    damp: float = 1e-2
    dense: ClassVar[bool] = True
    consumers: ClassVar[bool] = True
    synthetic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.damp > 0:
            raise ValueError("obspa: damp is above 0")

    def solve(self, problem: Problem) -> Solution | None:
        """The change of one site."""
        return surgeon(problem, self.damp)
