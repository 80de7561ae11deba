"""How often a router takes an expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxprune.plugin import Evidence, Router
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class ExpertUsage:
    """How often the router takes an expert, and between equals the weight that it gives; `by=gate`: the weight alone.

    Source: METHODS G1. Scores experts. Needs one pass.
    """

    by: str = "count"
    calibrated: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("experts",)
    missing: ClassVar[str] = "it scores experts behind a top-k or softmax: --remove experts --approximate"

    def __post_init__(self) -> None:
        if self.by not in ("count", "gate"):
            raise ValueError("moe-freq: by is count or gate")

    @staticmethod
    def counts(router: Router) -> Array:
        """int64[units]: rows that each expert is taken for."""
        return np.asarray(np.count_nonzero(router.gates(), axis=0))

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays; a share of the rows."""
        router = evidence.router(group)
        if router is None:
            return None
        gates = router.gates().mean(axis=0)
        return np.asarray(gates if self.by == "gate" else (self.counts(router) + gates) / len(router.scores))
