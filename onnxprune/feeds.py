"""Random inputs of the right type, shape and range, for proof and measurement."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnxprune.errors import ImpossibleError
from onnxprune.infer import true_inputs
from onnxprune.types import Array, Shape

CARRIERS = frozenset("Cast Identity Reshape Unsqueeze Squeeze Flatten Transpose Concat Slice Expand Clip".split())


def index_bounds(graph: ir.Graph) -> dict[str, int]:
    """{graph input: rows of the smallest table that it indexes}, seen through operators that only carry it."""
    bounds: dict[str, int] = {}
    for source in true_inputs(graph):
        pending, seen = [source], {source}
        while pending:
            value = pending.pop()
            for use in value.uses():
                node, k = use.node, use.idx
                if node.op_type in ("Gather", "GatherElements") and k == 1:
                    data = node.inputs[0]
                    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
                    if data is not None and data.const_value is not None:
                        size = int(data.const_value.shape[axis])  # type: ignore[arg-type]
                        bounds[str(source.name)] = min(size, bounds.get(str(source.name), size))
                elif node.op_type in CARRIERS and k == 0:
                    fresh = [out for out in node.outputs if out not in seen]
                    seen.update(fresh)
                    pending += fresh
    return bounds


def random_feed(graph: ir.Graph, shapes: Mapping[str, Shape], seed: int) -> dict[str, Array]:
    """One feed: floats normal, indices within their tables, other integers and flags mostly one (as masks are).

    Raises ImpossibleError for an input type that no random value can stand for.
    """
    rng = np.random.default_rng(seed)
    bounds = index_bounds(graph)
    feed = {}
    for value in true_inputs(graph):
        name = str(value.name)
        dtype = value.dtype
        if dtype is None or dtype == ir.DataType.STRING or name not in shapes:
            raise ImpossibleError("no random value can stand for this input; pass --calibration", object=name)
        kind = dtype.numpy()
        shape = shapes[name]
        if name in bounds:
            drawn: Array = rng.integers(0, bounds[name], shape)
        elif np.issubdtype(kind, np.integer) or kind == np.bool_:
            drawn = (rng.random(shape) < 0.9).astype(np.int64)
            if drawn.ndim:
                drawn.reshape(-1)[:1] = 1
        else:
            drawn = rng.standard_normal(shape)
        feed[name] = drawn.astype(kind)
    return feed
