"""Edits that keep what a model computes: constants into biases, constant operands written down, products of low rank.

Each edit says what it did; `realize` decides where they hold, and proves the result against the dense model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxprune.infer import home, initializers, walk
from onnxprune.model import add_initializer, free_name, register
from onnxprune.rewrite import stand_for
from onnxprune.types import Array

SUMS = frozenset({"Add", "Sum"})
BIASED = {"Conv": 2, "FusedConv": 2, "Gemm": 2, "FusedGemm": 2}  # where the bias of an operator is
WIDEST = 4096  # inner width of a product that is decomposed


@dataclass(frozen=True)
class Place:
    """Where a constant can be added behind a node: input `k` of `node`, `factor` times, or a new one if it is empty."""

    node: ir.Node
    k: int
    factor: float = 1.0


def by_output(model: ir.Model) -> dict[str, ir.Node]:
    """{first output: node}."""
    return {str(node.outputs[0].name): node for node in walk(model.graph)}


def _stored(value: ir.Value | None) -> Array | None:
    """A float initializer that is no output of the graph."""
    if value is None or value.const_value is None or value.is_graph_output():
        return None
    return value.const_value.numpy() if value.const_value.dtype.is_floating_point() else None


def place_of(node: ir.Node, axis: int, new_bias: bool) -> Place | None:
    """Where a constant along an axis of a node's output goes: its bias, what is added right after it, or a new one."""
    k = BIASED.get(node.op_type, -1)
    if 0 <= k < len(node.inputs) and node.inputs[k] is not None:
        beta = node.attributes["beta"].as_float() if "beta" in node.attributes else 1.0
        return Place(node, k, 1 / beta) if _stored(node.inputs[k]) is not None and beta else None
    uses = list(node.outputs[0].uses())
    if len(uses) == 1 and not node.outputs[0].is_graph_output() and not node.domain:
        reader, at = uses[0].node, uses[0].idx
        if reader.op_type == "Add" and not reader.domain and _stored(reader.inputs[1 - at]) is not None:
            return Place(reader, 1 - at)
        training = "training_mode" in reader.attributes and reader.attributes["training_mode"].as_int()
        normalised = reader.op_type == "BatchNormalization" and (at, axis) == (0, 1) and not training
        if normalised and _stored(reader.inputs[3]) is not None:
            return Place(reader, 3, -1.0)
    return Place(node, k) if new_bias else None


@dataclass(frozen=True)
class Offset:
    """A constant along an axis of a node's first output, of so many axes: float64[n]."""

    output: str
    axis: int
    rank: int
    values: Array


def shift(model: ir.Model, offsets: Iterable[Offset]) -> tuple[list[str], list[str]]:
    """Add constants behind nodes; the initializers that changed and those that are new."""
    nodes, graph = by_output(model), model.graph
    changed, fresh = [], []
    for offset in offsets:
        node = nodes[offset.output]
        place = place_of(node, offset.axis, new_bias=True)
        assert place is not None
        vector = (place.node is node and place.k >= 0) or place.node.op_type == "BatchNormalization"
        shaped = offset.values if vector else offset.values.reshape(-1, *(1,) * (offset.rank - 1 - offset.axis))
        old = place.node.inputs[place.k] if 0 <= place.k < len(place.node.inputs) else None
        if old is None:
            fresh.append(_new_bias(graph, place, shaped, _dtype(node)))
            continue
        before = _stored(old)
        assert before is not None and old.const_value is not None
        after = before.astype(np.float64) + place.factor * shaped
        tensor = ir.Tensor(after.astype(before.dtype), dtype=old.const_value.dtype, name=old.name)
        if len(list(old.uses())) == 1:
            old.const_value, old.shape = tensor, ir.Shape(after.shape)
            changed.append(str(old.name))
            continue
        name = free_name(graph, f"{old.name}_shifted")
        copy = ir.Value(name=name, shape=ir.Shape(after.shape), type=old.type, const_value=tensor)
        add_initializer(graph, copy)
        place.node.replace_input_with(place.k, copy)
        fresh.append(name)
    return changed, fresh


def _dtype(node: ir.Node) -> ir.DataType:
    """Element type of a node's weights."""
    for value in node.inputs:
        if value is not None and value.const_value is not None and value.const_value.dtype.is_floating_point():
            return value.const_value.dtype
    return node.outputs[0].dtype or ir.DataType.FLOAT


def _new_bias(graph: ir.Graph, place: Place, offset: Array, dtype: ir.DataType) -> str:
    """A bias for a node that has none: its own input, or an Add behind it."""
    node, output = place.node, place.node.outputs[0]
    bias = register(graph, f"{output.name}_bias", offset.astype(dtype.numpy()))
    if place.k >= 0:
        node.resize_inputs(max(len(node.inputs), place.k + 1))
        node.replace_input_with(place.k, bias)
        return str(bias.name)
    name = free_name(graph, f"{output.name}_unbiased")
    add = ir.node("Add", [output, bias])
    add.name = free_name(graph, f"{output.name}_add")
    output.replace_all_uses_with(add.outputs[0], replace_graph_outputs=True)
    add.replace_input_with(0, output)
    add.outputs[0].name, output.name = output.name, name
    add.outputs[0].shape, add.outputs[0].type = output.shape, output.type
    home(node).insert_after(node, add)
    return str(bias.name)


def with_values(model: ir.Model, values: Mapping[str, Array]) -> ir.Model:
    """A copy with other values of some initializers."""
    copy = model.clone()
    stored = initializers(copy.graph)
    for name, array in values.items():
        _write(stored[name], array)
    return copy


def write_operands(model: ir.Model, operands: Mapping[tuple[str, int], tuple[Array, int]]) -> list[str]:
    """Let inputs be constants: {(first output, input): (array that broadcasts from the right, its element type)}.

       Returns what was done.
    A term of zero or a factor of one is left out; the caller knows that the other operand has the
       output's shape. Then everything that reaches no output any more goes.
    """
    nodes, graph, told = by_output(model), model.graph, []
    for (output, k), (array, kind) in operands.items():
        if (node := nodes.get(output)) is None:
            continue
        value = node.inputs[k]
        assert value is not None
        nothing = not array.any() and (node.op_type in SUMS or (node.op_type == "Sub" and k == 1))
        nothing |= bool((array == 1).all()) and (node.op_type == "Mul" or (node.op_type == "Div" and k == 1))
        if nothing and len(node.inputs) == 2:
            other = node.inputs[1 - k]
            assert other is not None
            stand_for(graph, node, node.outputs[0], other)
            told.append(f"left out {value.name} of {output}")
        else:
            constant = register(graph, f"{value.name}_constant", array.astype(ir.DataType(kind).numpy()))
            node.replace_input_with(k, constant)
            told.append(f"folded {value.name} into {constant.name}")
    RemoveUnusedNodesPass()(model)
    return told


# Products of low rank ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factor:
    """A linear operator with its weight as float64[out, in], and how such a matrix is written back."""

    node: ir.Node
    weight: ir.Value
    matrix: Array
    bias: ir.Value | None = None

    def write(self, matrix: Array, inner_first: bool) -> None:
        """Replace the weight; `inner_first`: the axis that changed basis is that of the outputs."""
        assert self.weight.const_value is not None
        old = self.weight.const_value.numpy()
        if self.node.op_type != "Conv":
            turned = "transB" in self.node.attributes and self.node.attributes["transB"].as_int()
            array = matrix if turned else matrix.T
        elif inner_first:
            array = matrix.reshape(old.shape)
        else:
            out, inner, *taps = old.shape
            array = np.moveaxis(matrix.reshape(out, *taps, inner), -1, 1)
        _write(self.weight, array)


def _write(value: ir.Value, array: Array) -> None:
    assert value.const_value is not None
    dtype = value.const_value.dtype
    cast = np.ascontiguousarray(array).astype(dtype.numpy())
    value.const_value = ir.Tensor(cast, dtype=dtype, name=value.name)


def _factor(node: ir.Node | None, inner_first: bool) -> Factor | None:
    """The node as a matrix over the inner width, if it is a plain linear operator with a weight of its own."""
    if node is None or node.domain or node.op_type not in ("MatMul", "Gemm", "Conv") or len(node.inputs) < 2:
        return None
    weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    array = _stored(weight)
    if weight is None or array is None or len(list(weight.uses())) != 1:
        return None
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "group": 1}
    if any(key in node.attributes and node.attributes[key].value != usual for key, usual in plain.items()):
        return None
    if node.op_type == "Conv":
        matrix = array.reshape(len(array), -1) if inner_first else np.moveaxis(array, 1, -1).reshape(-1, array.shape[1])
    elif array.ndim != 2:
        return None
    else:
        turned = "transB" in node.attributes and node.attributes["transB"].as_int()
        matrix = array if turned else array.T
    return Factor(node, weight, matrix.astype(np.float64), bias)


def _sole_reader(value: ir.Value, k: int) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and uses[0].idx == k and not value.is_graph_output() else None


def pairs(model: ir.Model) -> Iterator[tuple[Factor, Factor]]:
    """Two linear operators with nothing but a bias between them."""
    for node in walk(model.graph):
        first = _factor(node, inner_first=True)
        if first is None:
            continue
        value, inner, bias = node.outputs[0], len(first.matrix), first.bias
        following = _sole_reader(value, 0) or _sole_reader(value, 1)
        if following is not None and following.op_type == "Add" and node.op_type == "MatMul":
            bias = following.inputs[1] if following.inputs[0] is value else following.inputs[0]
            value = following.outputs[0]
            following = _sole_reader(value, 0)
        second = _factor(following, inner_first=False) if _sole_reader(value, 0) is following else None
        if second is None or (second.node.op_type == "Conv") != (node.op_type == "Conv"):
            continue
        array = _stored(bias) if bias is not None else np.zeros(inner)
        shared = bias is not None and len(list(bias.uses())) != 1
        wide = array is not None and array.size == inner and (array.ndim < 2 or array.shape[-1] == inner)
        if wide and not shared and second.matrix.shape[1] == inner and 1 < inner <= WIDEST:
            yield Factor(first.node, first.weight, first.matrix, bias), second


def compress(model: ir.Model, tolerance: float, ignored: Iterable[str] = ()) -> tuple[list[str], list[str]]:
    """Give products of low rank a basis in which the units that they do not need are zero.

    Returns the initializers that changed, and what was done.

    y = F (G x + b): with F [G b] = U s V, F becomes U sqrt(s) and [G b] becomes sqrt(s) V, both filled up with zeros.
    """
    changed: list[str] = []
    told = []
    for first, second in pairs(model):
        names = (str(first.node.name), str(second.node.name), str(first.weight.name), str(second.weight.name))
        if any(fnmatch(name, pattern) for pattern in ignored for name in names):
            continue
        inner = len(first.matrix)
        bias = _stored(first.bias) if first.bias is not None else None
        column = np.zeros((inner, 1)) if bias is None else bias.reshape(-1, 1).astype(np.float64)
        given = np.concatenate([first.matrix, column], axis=1)
        left, upper = np.linalg.qr(second.matrix)
        right, lower = np.linalg.qr(given.T)
        u, s, v = np.linalg.svd(upper @ lower.T)
        eps = 1e-3 if _dtype(first.node).itemsize < 4 else np.finfo(np.float32).eps
        noise = eps * max(second.matrix.shape[0], given.shape[1]) ** 0.5
        rank = int((s > max(tolerance, noise) * s[0]).sum()) if s.size and s[0] > 0 else 0
        if rank >= inner or not rank:
            continue
        root = np.sqrt(s[:rank])
        outer, fresh = np.zeros_like(second.matrix), np.zeros_like(given)
        outer[:, :rank] = left @ (u[:, :rank] * root)
        fresh[:rank] = (root[:, None] * v[:rank]) @ right.T
        first.write(fresh[:, :-1], inner_first=True)
        second.write(outer, inner_first=False)
        if first.bias is not None and bias is not None:
            _write(first.bias, fresh[:, -1].reshape(bias.shape))
        changed += [str(v.name) for v in (first.weight, first.bias, second.weight) if v is not None]
        told.append(f"{first.weight.name} and {second.weight.name}: product of rank {rank}, inner width was {inner}")
    return changed, told
