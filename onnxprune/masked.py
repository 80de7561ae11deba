"""The masked reference: an operator that lets positions see each other, computed over the survivors alone.

Where a softmax, a norm or a mean runs along an axis, zeroing a position is not the same as not having it. There the
dense model gets the operator with the survivors gathered before it, and zeros put back in the other places after it.
What coupling says decides nothing but which positions of which operands those are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxprune.dims import DimGraph
from onnxprune.infer import home, walk
from onnxprune.model import free_name, register
from onnxprune.types import Axis, Mask, Numbers, OpNode, Positions, View


@dataclass(frozen=True)
class Narrowed:
    """A node, by its first output, that mixes removed positions: {(input or output, axis): True survives}.

    A mask is bool[n, 1, ...], with as many axes as follow its own, so that it broadcasts against the operand. `numbers`
    are outputs that hold positions by number, with the mask of the axis that these are of.
    """

    node: str
    inputs: Mapping[tuple[int, int], Mask]
    numbers: Mapping[int, Mask]
    outputs: Mapping[tuple[int, int], Mask]


def narrowed(dims: DimGraph, view: View, alive: Mask) -> list[Narrowed]:
    """The nodes along whose mixing axes something goes."""
    gone: dict[str, set[int]] = {}
    for mark in dims.relations.mixing:
        labels = dims.labels_of(dims.relations.axes[mark.axis])
        assert labels is not None
        if len(removed := labels[~alive[labels]]):
            gone.setdefault(mark.node, set()).update(removed.tolist())
    found = []
    for node in view.nodes:
        if node.outputs[0] in gone:
            labels = np.array(sorted(gone[node.outputs[0]]), np.int64)
            inputs, outputs = (dict(_survivors(dims, node, names, labels)) for names in (node.inputs, node.outputs))
            numbers = {
                node.outputs.index(said.value): inputs[node.inputs.index(said.whole), said.axis]
                for speaker, said in dims.relations.numbers
                if speaker is node and isinstance(said, Numbers) and said.value in node.outputs
            }
            found.append(Narrowed(node.outputs[0], inputs, numbers, outputs))
    return found


def _survivors(
    dims: DimGraph, node: OpNode, names: Iterable[str], gone: Positions
) -> Iterator[tuple[tuple[int, int], Mask]]:
    for k, name in enumerate(names):
        rank = len(node.shapes.get(name, ()))
        for axis in range(rank):
            labels = dims.labels_of(Axis(name, axis))
            if labels is not None and not (keep := ~np.isin(labels, gone)).all():
                yield (k, axis), keep.reshape(-1, *(1,) * (rank - 1 - axis))


def narrow(model: ir.Model, nodes: Iterable[Narrowed], types: Mapping[str, int]) -> None:
    """Compute these nodes of a dense model over the survivors; `types` are element types by value."""
    graph = model.graph
    by_output = {str(node.outputs[0].name): node for node in walk(graph)}
    for item in nodes:
        node = by_output[item.node]
        for (k, axis), keep in item.inputs.items():
            value = node.inputs[k]
            assert value is not None
            picked = _node(
                graph, "Gather", [value, register(graph, "survivors", np.flatnonzero(keep.reshape(-1)))], axis=axis
            )
            home(node).insert_before(node, picked)
            node.replace_input_with(k, picked.outputs[0])
        for k, keep in item.numbers.items():
            _renumber(graph, node, k, keep)
        for (k, axis), keep in item.outputs.items():
            _put_back(graph, node, k, axis, keep, types)


def _renumber(graph: ir.Graph, node: ir.Node, k: int, keep: Mask) -> None:
    """Numbers among the survivors become those that they have in the dense model, for all readers of an output."""
    value = node.outputs[k]
    uses = list(value.uses())
    numbers = _node(graph, "Gather", [register(graph, "numbers", np.flatnonzero(keep.reshape(-1))), value], axis=0)
    home(node).insert_after(node, numbers)
    for reader, place in uses:
        reader.replace_input_with(place, numbers.outputs[0])


def _put_back(graph: ir.Graph, node: ir.Node, k: int, axis: int, keep: Mask, types: Mapping[str, int]) -> None:
    """Zeros where nothing survives, for all readers of an output."""
    value = node.outputs[k]
    alive = keep.reshape(-1)
    places = register(graph, "places", np.where(alive, np.cumsum(alive) - 1, 0))
    spread = _node(graph, "Gather", [value, places], axis=axis)
    zero = register(graph, "zero", np.zeros((), ir.DataType(types[str(value.name)]).numpy()))
    filled = _node(graph, "Where", [register(graph, "alive", keep), spread.outputs[0], zero])
    value.replace_all_uses_with(filled.outputs[0], replace_graph_outputs=True)
    spread.replace_input_with(0, value)
    home(node).insert_after(node, [spread, filled])


def _node(graph: ir.Graph, op: str, inputs: list[ir.Value], **attributes: int) -> ir.Node:
    out = ir.Value(name=free_name(graph, f"masked_{op.lower()}"))
    return ir.node(op, inputs, attributes, outputs=[out], name=out.name)
