"""Least squares on each consumer by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxprune.lsq import Fit, Regression, by_groups
from onnxprune.plugin import Problem, Solution
from onnxprune.types import Array


@dataclass(frozen=True)
class LeastSquares:
    """What is left of a consumer's inputs is fitted to its dense output, on the dense model's inputs, layer by layer.

    W = W_0 G_:S (G_SS + ridge I)^-1, centred where there is a bias, which is then fitted as well. `ridge` is a share of
    the mean diagonal. Source: METHODS D2.
    """

    ridge: float = 1e-2
    dense: ClassVar[bool] = True
    consumers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise ValueError("lsq: ridge is at least 0")

    def solve(self, problem: Problem) -> Solution | None:
        """The change of one site."""

        def whole(x: Array, weight: Array, lacks: Array) -> Fit:
            found = Regression(x, problem.intercept).solve(lacks + x @ weight.astype(x.dtype), self.ridge)
            return Fit(found.weight - weight, found.shift)

        return by_groups(problem, self.ridge, whole)
