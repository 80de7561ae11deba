"""What computes in bfloat16, in single precision: ONNX Runtime has no kernels for bfloat16 on a CPU.

The user's model stays what it is. A copy of it computes, in which all that is bfloat16 is float32, which holds it
exactly; nothing is rounded on the way.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnxprune.infer import graphs, walk
from onnxprune.types import Array

BFLOAT16, FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT
MISSING = "ONNX Runtime has no kernels for bfloat16 on a CPU"
TYPED = ("to", "dtype", "output_dtype", "stash_type")  # attributes that name a type


def computes(model: ir.Model) -> bool:
    """Whether anything but a Cast to another type gets bfloat16."""
    typed = _typed(model)
    for node in _nodes(model):
        given = [value for value in node.inputs if value is not None]
        if node.op_type != "Cast" and any(value.dtype == BFLOAT16 for value in given):
            return True
        if any(_type(node.attributes.get(name)) == BFLOAT16 for name in typed):
            return True
    if any(_type(function.attributes.get(name)) == BFLOAT16 for function in model.functions.values() for name in typed):
        return True
    return any(value.dtype == BFLOAT16 for graph in graphs(model.graph) for value in (*graph.inputs, *graph.outputs))


def single(model: ir.Model) -> ir.Model:
    """A copy in single precision; the model itself where nothing computes in bfloat16."""
    if not computes(model):
        return model
    copy, typed = model.clone(), _typed(model)
    places: list[ir.Node | ir.Function] = [*_nodes(copy), *copy.functions.values()]
    for place in places:  # a function has defaults, for what calls leave out
        for name, attribute in list(place.attributes.items()):
            if name in typed and _type(attribute) == BFLOAT16:
                place.attributes[name] = ir.AttrInt64(name, int(FLOAT))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.value is not None:
                place.attributes[name] = ir.AttrTensor(name, wide(attribute.value))
    for graph in [graph for whole in _wholes(copy) for graph in graphs(whole)]:
        values = [*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)]
        for value in values:
            if value.const_value is not None:
                value.const_value = wide(value.const_value)
            if value.dtype == BFLOAT16:
                value.type = ir.TensorType(FLOAT)
    return copy


def fed(feed: Mapping[str, Array]) -> dict[str, Array]:
    """What such a copy is given in the place of a model's inputs."""
    return {name: widened(array) for name, array in feed.items()}


def widened(array: Array) -> Array:
    """float32 of bfloat16; others as they are."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def wide(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The tensor in float32, made when it is read; another type as it is."""
    if tensor.dtype != BFLOAT16:
        return tensor
    return ir.LazyTensor(
        lambda: ir.Tensor(widened(np.asarray(tensor.numpy())), name=tensor.name),
        dtype=FLOAT,
        shape=ir.Shape(tuple(tensor.shape)),  # type: ignore[arg-type]
        name=tensor.name,
    )


def _wholes(model: ir.Model) -> list[ir.Graph]:
    return [model.graph, *(function.graph for function in model.functions.values())]


def _nodes(model: ir.Model) -> list[ir.Node]:
    return [node for whole in _wholes(model) for node in walk(whole)]


def _typed(model: ir.Model) -> set[str]:
    """Names of attributes that name a type, those among them that functions hand on."""
    handed = {
        str(attribute.ref_attr_name)
        for function in model.functions.values()
        for node in walk(function.graph)
        for name in TYPED
        if (attribute := node.attributes.get(name)) is not None and attribute.is_ref()
    }
    return handed | {*TYPED}


def _type(attribute: ir.Attr | None) -> ir.DataType | None:
    """The type that an attribute names; None for one that is handed on."""
    known = attribute is not None and attribute.type == ir.AttributeType.INT and attribute.value in set(ir.DataType)
    return ir.DataType(attribute.value) if attribute is not None and known else None
