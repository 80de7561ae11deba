"""Quantised forms: scales and zero points lie along the channels they scale."""

from __future__ import annotations

from collections.abc import Iterable

from onnxprune.ops import rule
from onnxprune.types import OpNode, Pattern, Relation


@rule("QuantizeLinear", "DequantizeLinear", roles={1: "quant", 2: "quant"})
def quantize(node: OpNode) -> Iterable[Relation]:
    """X, scale, zero point -> Y: one scale for all, or one for each position of `axis`."""
    rank = len(node.shape(0))
    names = [f"a{k}" for k in range(rank)]
    text = " ".join(names)
    scale = node.shape(1)
    if len(scale) > 1:  # blocks of positions share a scale
        return
    along = names[node.attr("axis", 1) % rank] if len(scale) == 1 and rank else ""
    zero = f", {along}" if node.has(2) else ""
    yield Pattern(f"{text}, {along}{zero} -> {text}")
