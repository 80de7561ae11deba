"""The masked reference: an operator that lets positions see each other, computed over the survivors alone.

Where a softmax, a norm or a mean runs along an axis, zeroing a position is not the same as not having it. There the
dense model gets the operator with the survivors gathered before it, and zeros put back in the other places after it.
What coupling says decides nothing but which positions of which operands those are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from onnxprune.dims import DimGraph
from onnxprune.infer import home, walk
from onnxprune.model import free_name, register
from onnxprune.types import Axis, Mask, Numbers, OpNode, Positions, View


class Kept(NamedTuple):
    """Which positions of an axis survive, with `after` more axes behind it.

    Of a dynamic axis (channels and space as one, say) `keep` speaks of as few equal `parts` as will do.
    """

    keep: Mask
    after: int
    parts: bool


@dataclass(frozen=True)
class Narrowed:
    """A node, by its first output, that mixes removed positions: {(input or output, axis): what survives}.

    `numbers` are outputs that hold positions by number, with the mask of the axis that these are of.
    """

    node: str
    inputs: Mapping[tuple[int, int], Kept]
    numbers: Mapping[int, Mask]
    outputs: Mapping[tuple[int, int], Kept]


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
            inputs, outputs = (
                dict(_survivors(dims, view, node, names, labels)) for names in (node.inputs, node.outputs)
            )
            numbers = {
                node.outputs.index(said.value): inputs[node.inputs.index(said.whole), said.axis].keep
                for speaker, said in dims.relations.numbers
                if speaker is node and isinstance(said, Numbers) and said.value in node.outputs
            }
            found.append(Narrowed(node.outputs[0], inputs, numbers, outputs))
    return found


def _survivors(
    dims: DimGraph, view: View, node: OpNode, names: Iterable[str], gone: Positions
) -> Iterator[tuple[tuple[int, int], Kept]]:
    for k, name in enumerate(names):
        rank = len(node.shapes.get(name, ()))
        for axis in range(rank):
            labels = dims.labels_of(Axis(name, axis))
            if labels is not None and not (keep := ~np.isin(labels, gone)).all():
                parts = Axis(name, axis) in view.dynamic
                if parts:
                    keep = keep[:: int(np.gcd.reduce([len(keep), *np.flatnonzero(np.diff(keep)) + 1]))]
                yield (k, axis), Kept(keep, rank - 1 - axis, parts)


def narrow(model: ir.Model, nodes: Iterable[Narrowed], types: Mapping[str, int]) -> None:
    """Compute these nodes of a dense model over the survivors; `types` are element types by value."""
    graph = model.graph
    by_output = {str(node.outputs[0].name): node for node in walk(graph)}
    for item in nodes:
        node = by_output[item.node]
        for (k, axis), kept in item.inputs.items():
            value = node.inputs[k]
            assert value is not None
            if kept.parts:
                mask, made = _spread(graph, value, axis, kept.keep, len(kept.keep))
                made.append(_node(graph, "Compress", [value, mask], axis=axis))
            else:
                survivors = register(graph, "survivors", np.flatnonzero(kept.keep))
                made = [_node(graph, "Gather", [value, survivors], axis=axis)]
            home(node).insert_before(node, made)
            node.replace_input_with(k, made[-1].outputs[0])
        for k, keep in item.numbers.items():
            _renumber(graph, node, k, keep)
        for (k, axis), kept in item.outputs.items():
            _put_back(graph, node, k, axis, kept, types)


def _spread(graph: ir.Graph, value: ir.Value, axis: int, keep: Mask, parts: int) -> tuple[ir.Value, list[ir.Node]]:
    """(bool[n], the nodes that make it): a mask of parts over all positions of an axis, where `value` has so many."""
    size = _node(graph, "Shape", [value])
    length = _node(graph, "Gather", [size.outputs[0], register(graph, "axis", np.array([axis]))], axis=0)
    step = _node(graph, "Div", [length.outputs[0], register(graph, "parts", np.array([parts]))])
    shape = _node(graph, "Concat", [register(graph, "all", np.array([len(keep)])), step.outputs[0]], axis=0)
    wide = _node(graph, "Expand", [register(graph, "alive", keep[:, None]), shape.outputs[0]])
    flat = _node(graph, "Reshape", [wide.outputs[0], register(graph, "flat", np.array([-1]))])
    return flat.outputs[0], [size, length, step, shape, wide, flat]


def _renumber(graph: ir.Graph, node: ir.Node, k: int, keep: Mask) -> None:
    """Numbers among the survivors become those that they have in the dense model, for all readers of an output."""
    value = node.outputs[k]
    uses = list(value.uses())
    numbers = _node(graph, "Gather", [register(graph, "numbers", np.flatnonzero(keep.reshape(-1))), value], axis=0)
    home(node).insert_after(node, numbers)
    for reader, place in uses:
        reader.replace_input_with(place, numbers.outputs[0])


def _put_back(graph: ir.Graph, node: ir.Node, k: int, axis: int, kept: Kept, types: Mapping[str, int]) -> None:
    """Zeros where nothing survives, for all readers of an output."""
    value, keep = node.outputs[k], kept.keep
    shape = [-1, *[1] * kept.after]
    made: list[ir.Node] = []
    if kept.parts:
        mask, made = _spread(graph, value, axis, keep, int(keep.sum()))
        flags = _node(graph, "Cast", [mask], to=int(ir.DataType.INT64))
        count = _node(graph, "CumSum", [flags.outputs[0], register(graph, "axis", np.array(0))])
        before = _node(graph, "Sub", [count.outputs[0], flags.outputs[0]])
        place = _node(graph, "Mul", [before.outputs[0], flags.outputs[0]])
        wide = _node(graph, "Reshape", [mask, register(graph, "behind", np.array(shape))])
        made += [flags, count, before, place, wide]
        places, alive = place.outputs[0], wide.outputs[0]
    else:
        places = register(graph, "places", np.where(keep, np.cumsum(keep) - 1, 0))
        alive = register(graph, "alive", keep.reshape(shape))
    spread = _node(graph, "Gather", [value, places], axis=axis)
    zero = register(graph, "zero", np.zeros((), ir.DataType(types[str(value.name)]).numpy()))
    filled = _node(graph, "Where", [alive, spread.outputs[0], zero])
    value.replace_all_uses_with(filled.outputs[0], replace_graph_outputs=True)
    spread.replace_input_with(0, value)
    for fresh in made[:1]:
        fresh.replace_input_with(0, value)
    home(node).insert_after(node, [*made, spread, filled])


def _node(graph: ir.Graph, op: str, inputs: list[ir.Value], **attributes: int) -> ir.Node:
    out = ir.Value(name=free_name(graph, f"masked_{op.lower()}"))
    return ir.node(op, inputs, attributes, outputs=[out], name=out.name)
