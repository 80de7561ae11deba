"""LayerNorms of streams whose mean is zero, as the norms by root mean square that they then are.

METHODS D12 (Pre-RMSNorm, Jiang et al. 2023). Who calls this sees to the mean: what writes the stream has it taken off.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from onnxprune.infer import attributes
from onnxprune.model import Model, free_name, register

NATIVE = 23  # operator set from which on there is RMSNormalization


def by_root_mean_square(model: Model, norms: Collection[str]) -> Model:
    """A copy in which these nodes, named by their first output, do not take the mean off.

    A LayerNormalization over the last axis keeps its gain and loses its shift; a Sub that takes the mean off passes its
    first operand on.
    """
    copy = model.clone()
    graph = copy.graph
    graph.meta.pop("names", None)
    for node in [node for node in graph if str(node.outputs[0].name) in norms]:
        read = list(node.inputs)
        if node.op_type == "Sub":
            read += _passed(graph, node)
        else:
            _spelled(graph, node, copy.opset_imports.get("", 1))
        for value in read:
            if value is not None and value.is_initializer() and not value.uses() and not value.is_graph_input():
                graph.initializers.pop(str(value.name), None)
    return copy


def _passed(graph: ir.Graph, node: ir.Node) -> list[ir.Value | None]:
    """What the mean was computed from, where nothing else needs it."""
    stream, mean = node.inputs
    assert stream is not None and mean is not None
    node.outputs[0].replace_all_uses_with(stream)
    graph.remove(node, safe=True)
    maker = mean.producer()
    if mean.uses() or maker is None:
        return []
    read = list(maker.inputs)
    graph.remove(maker, safe=True)
    return read


def _spelled(graph: ir.Graph, node: ir.Node, opset: int) -> None:
    """The norm as one node, or as ONNX Runtime knows how to fuse it."""
    stream, gain, out = node.inputs[0], node.inputs[1], node.outputs[0]
    name, epsilon = str(out.name), float(attributes(node).get("epsilon", 1e-5))  # type: ignore[arg-type]
    made: list[ir.Node] = []

    def add(op_type: str, *inputs: ir.Value | None, **attrs: object) -> ir.Value:
        made.append(ir.node(op_type, inputs, attrs))  # type: ignore[arg-type]
        made[-1].name = made[-1].outputs[0].name = free_name(graph, f"{name}_{op_type}")
        return made[-1].outputs[0]

    if opset >= NATIVE:
        last = add("RMSNormalization", stream, gain, axis=-1, epsilon=epsilon)
    else:
        square = add("Pow", stream, register(graph, f"{name}_two", np.array(2, np.float32)))
        if opset < 18:
            mean = add("ReduceMean", square, axes=[-1], keepdims=1)
        else:
            mean = add("ReduceMean", square, register(graph, f"{name}_last", np.array([-1], np.int64)), keepdims=1)
        above = add("Add", mean, register(graph, f"{name}_epsilon", np.array(epsilon, np.float32)))
        last = add("Mul", add("Div", stream, add("Sqrt", above)), gain)
    graph.insert_before(node, made)
    out.replace_all_uses_with(last)
    graph.remove(node, safe=True)
    last.name, last.shape, last.type = name, out.shape, out.type
