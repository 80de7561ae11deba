"""Weights that decide everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.plugin import Peak


@dataclass(frozen=True)
class SuperWeight:
    """Protects the few weights that make outliers: from an input far above the others to such an output.

    A layer spikes whose largest input and largest output are both above `factor` times the median of all layers'
    largest; the weight between the two stays as it is, whatever a criterion says. The frame puts it at zero and looks
    again until nothing spikes. Source: METHODS F11 (Yu et al. 2024), with a threshold that has no scale.
    """

    factor: float = 20.0

    def __post_init__(self) -> None:
        if not self.factor > 1:
            raise ValueError("superweight: factor is above 1")

    def protect(self, peaks: Sequence[Peak]) -> list[tuple[str, int, int]]:
        """(node, column, output) of each weight."""
        if not peaks:
            return []
        usual = [np.median([values.max(initial=0) for values in side]) for side in
                 ([peak.inputs for peak in peaks], [peak.outputs for peak in peaks])]  # fmt: skip
        return [
            (peak.node, int(peak.inputs.argmax()), int(peak.outputs.argmax()))
            for peak in peaks
            if peak.inputs.max(initial=0) > self.factor * usual[0]
            and peak.outputs.max(initial=0) > self.factor * usual[1]
        ]
