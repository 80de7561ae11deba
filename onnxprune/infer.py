"""Concrete shapes, types and small values of a graph, node by node, at chosen sizes of its dynamic dimensions.

Sizes that the exporter computes at run time (Shape, Gather, Concat, ...) are evaluated on the way, so that every
Reshape has a target. What is the same at two different sets of sizes is static; no symbolic algebra is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations, product
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import infer_node_outputs

from onnxprune import ops
from onnxprune.types import Array, Mask, OpNode, Shape

Partly = np.ma.MaskedArray[Any, Any]
VALUE_LIMIT = 1 << 16  # elements of a value that is worth knowing
SHORT = 16  # elements of a float initializer that may be a list of scales
RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


@dataclass
class Facts:
    """What is known about each value: shape, ONNX element type, and the value itself where it is small and fixed.

    `values` are sizes, indices and scalars, and what is computed from them; `small` are short float initializers
    (Resize scales), which rules and shape inference may read but nothing is computed from.
    """

    shapes: dict[str, Shape] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)
    small: dict[str, Array] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def value(self, name: str) -> Array | None:
        """The value itself, where it is small and fixed."""
        found = self.values.get(name)
        return self.small.get(name) if found is None else found


def symbols(graph: ir.Graph) -> dict[str, list[tuple[str, int]]]:
    """{dynamic dimension: the (input, axis) places where it stands}, unnamed ones named `input:axis`."""
    found: dict[str, list[tuple[str, int]]] = {}
    for value in true_inputs(graph):
        for axis, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int) or dim <= 0:
                found.setdefault(symbol(value, axis), []).append((str(value.name), axis))
    return found


def symbol(value: ir.Value, axis: int) -> str:
    """Name of a dynamic dimension: the exporter's, else `input:axis`."""
    dim = value.shape[axis] if value.shape is not None else None
    named = dim is not None and not isinstance(dim, int) and dim.value
    return str(dim.value) if named else f"{value.name}:{axis}"  # type: ignore[union-attr]


def true_inputs(graph: ir.Graph) -> list[ir.Value]:
    """Graph inputs that are not merely the default of an initializer (IR version 3)."""
    return [value for value in graph.inputs if value.name not in graph.initializers]


def seed(graph: ir.Graph, sizes: Mapping[str, int]) -> Facts:
    """Facts of inputs and initializers, with dynamic dimensions at the given sizes."""
    facts = Facts()
    for value in true_inputs(graph):
        if value.shape is None or value.dtype is None:
            continue
        shape = []
        for axis, dim in enumerate(value.shape):
            shape.append(dim if isinstance(dim, int) and dim > 0 else sizes[symbol(value, axis)])
        facts.shapes[str(value.name)] = tuple(shape)
        facts.types[str(value.name)] = int(value.dtype)
    for name, value in graph.initializers.items():
        note_initializer(facts, name, value)
    return facts


def note_initializer(facts: Facts, name: str, value: ir.Value) -> None:
    """Shape and type of an initializer; its value if it may be a size, an index or a scalar."""
    tensor = value.const_value
    if tensor is None:
        return
    facts.shapes[name] = tuple(int(d) for d in tensor.shape)  # type: ignore[arg-type]
    facts.types[name] = int(tensor.dtype)
    count = int(np.prod(facts.shapes[name], dtype=np.int64))
    integer = tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
    if (integer and count <= VALUE_LIMIT) or (count == 1 and tensor.dtype != ir.DataType.STRING):
        facts.values[name] = tensor.numpy()
    elif count <= SHORT and tensor.dtype == ir.DataType.FLOAT:
        facts.small[name] = tensor.numpy()


def names(values: Iterable[ir.Value | None]) -> list[str]:
    """Value names, empty for absent ones."""
    return [str(value.name) if value is not None and value.name else "" for value in values]


def attributes(node: ir.Node) -> dict[str, object]:
    """Attributes as Python values; subgraphs are left out."""
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return {k: a.value for k, a in node.attributes.items() if isinstance(a, ir.Attr) and a.type not in graphs}


def op_node(
    node: ir.Node,
    opset: int,
    facts: Facts,
    consts: Mapping[str, Array],
    alias: Mapping[int, str],
    partly: Mapping[str, Partly] = MappingProxyType({}),
) -> OpNode:
    """A node as rules see it; `alias` renames inputs whose initializer is storage for several readers."""
    inputs = tuple(alias.get(k, name) for k, name in enumerate(names(node.inputs)))
    outputs = tuple(names(node.outputs))
    true = dict(zip(inputs, names(node.inputs), strict=True)) | {name: name for name in outputs}
    shapes = {name: facts.shapes[real] for name, real in true.items() if real in facts.shapes}
    known = {name: consts[real] for name, real in true.items() if real in consts}
    half = {name: partly[name] for name in inputs if name in partly}
    return OpNode(
        str(node.name or ""), node.op_type, node.domain, opset, attributes(node), inputs, outputs, shapes, known, half
    )


def step(facts: Facts, node: ir.Node, opset: int) -> None:
    """Add what follows for the outputs of one node; whatever cannot be inferred stays unknown."""
    inputs, outputs = names(node.inputs), names(node.outputs)
    if node.op_type == "Shape" and not node.domain and inputs[0] in facts.shapes:
        sizes = np.array(facts.shapes[inputs[0]], np.int64)
        start = node.attributes["start"].as_int() if "start" in node.attributes else 0
        end = node.attributes["end"].as_int() if "end" in node.attributes else None
        _note(facts, outputs[0], sizes[start:end])
        return
    if node.op_type == "Size" and not node.domain and inputs[0] in facts.shapes:
        _note(facts, outputs[0], np.array(np.prod(facts.shapes[inputs[0]], dtype=np.int64)))
        return
    if any(
        isinstance(a, ir.Attr) and a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for a in node.attributes.values()
    ):
        _declared(facts, node)
        return
    proto = ir.serde.serialize_node(node)
    known = [facts.values[name] for name in inputs if name and name in facts.values]
    if inputs and len(known) == sum(map(bool, inputs)) and node.op_type not in RANDOM:
        results = evaluate(proto, opset, {n: facts.values[n] for n in inputs if n})
        if results is not None:
            for name, result in zip(outputs, results, strict=False):
                if name:
                    _note(facts, name, np.asarray(result))
            return
    _infer(facts, node, proto, opset)


def _note(facts: Facts, name: str, value: Array) -> None:
    facts.shapes[name] = value.shape
    facts.types[name] = int(onnx.helper.np_dtype_to_tensor_dtype(value.dtype))
    if value.size <= VALUE_LIMIT:
        facts.values[name] = value


def evaluate(proto: onnx.NodeProto, opset: int, values: Mapping[str, Array]) -> list[Array] | None:
    """The outputs of a node whose inputs are all known, by the reference implementation; None if it has none."""
    graph = onnx.helper.make_graph(
        [proto],
        "one",
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UNDEFINED, None) for n in values],
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UNDEFINED, None) for n in proto.output if n],
    )
    if proto.op_type in ("Expand", "ConstantOfShape", "Tile", "Range"):
        last = values[proto.input[-1]] if proto.op_type != "Range" else np.array([1])
        if proto.op_type != "Range" and np.prod(np.abs(last.astype(np.float64))) > VALUE_LIMIT:
            return None
        if proto.op_type == "Range":
            low, high, stride = (float(np.asarray(values[n]).reshape(-1)[0]) for n in proto.input)
            if not stride or abs((high - low) / stride) > VALUE_LIMIT:
                return None
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid(proto.domain, opset)])
    try:
        with np.errstate(all="ignore"):
            return list(ReferenceEvaluator(model).run(None, dict(values)))
    except Exception:  # an operator or type that the reference does not know: the value stays unknown
        return None


def _infer(facts: Facts, node: ir.Node, proto: onnx.NodeProto, opset: int) -> None:
    """Shapes of the outputs by the operator's own inference, else as the exporter declared them."""
    present = [name for name in names(node.inputs) if name]
    found: dict[str, onnx.TypeProto] = {}
    kinds: Mapping[str, int] = facts.types
    if (other := ops.stand_in_of(node.domain, node.op_type)) is not None:
        proto, opset, present = _standing_in(proto, *other)
        kinds = dict.fromkeys(present, int(ir.DataType.FLOAT))  # ONNX has most of these for floats only
    try:
        schema = onnx.defs.get_schema(proto.op_type, opset, proto.domain)
        types = {n: onnx.helper.make_tensor_type_proto(kinds[n], facts.shapes.get(n)) for n in present}
        data = {n: onnx.numpy_helper.from_array(v, n) for n in present if (v := facts.value(n)) is not None}
        found = infer_node_outputs(schema, proto, types, data)
    except (KeyError, onnx.defs.SchemaError):  # nothing is known about an input, or about the operator
        pass
    except Exception as error:
        facts.problems.append(f"node '{node.name or node.outputs[0].name}': {str(error).strip().splitlines()[-1]}")
    for name in names(node.outputs):
        tensor = found[name].tensor_type if name in found else None
        if tensor is None or not tensor.elem_type:
            continue
        facts.types[name] = tensor.elem_type if other is None else facts.types.get(present[0], tensor.elem_type)
        dims = tensor.shape.dim
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            facts.shapes[name] = tuple(d.dim_value for d in dims)
    if any(name and name not in facts.shapes for name in names(node.outputs)):
        shapes, like = ops.shapes_of(op_node(node, opset, facts, {}, {}))
        for name, shape in zip(names(node.outputs), shapes, strict=False):
            facts.shapes.setdefault(name, shape)
            if (known := facts.types.get(names(node.inputs)[like])) is not None:
                facts.types.setdefault(name, known)
    _declared(facts, node)
    if node.op_type == "Reshape" and present[0] in facts.shapes:
        before, after = facts.shapes[present[0]], facts.shapes.get(str(node.outputs[0].name))
        if after is not None and prod(before) != prod(after):
            facts.problems.append(f"node '{node.name}': {list(before)} cannot become {list(after)}")


STAND_IN_OPSET = 13


def _standing_in(proto: onnx.NodeProto, op_type: str, inputs: tuple[int, ...]) -> tuple[onnx.NodeProto, int, list[str]]:
    """An ONNX node whose outputs have the shapes of this one's, its opset and its inputs."""
    schema = onnx.defs.get_schema(op_type, STAND_IN_OPSET)
    node = onnx.NodeProto(op_type=op_type, output=proto.output)
    node.input.extend(proto.input[k] for k in inputs)
    node.attribute.extend(a for a in proto.attribute if a.name in schema.attributes)
    return node, STAND_IN_OPSET, list(node.input)


def _declared(facts: Facts, node: ir.Node) -> None:
    """Fill gaps with fully static shapes that the exporter wrote down."""
    for value in node.outputs:
        name = str(value.name)
        if value.dtype is not None:
            facts.types.setdefault(name, int(value.dtype))
        if name not in facts.shapes and value.shape is not None:
            sizes = tuple(d for d in value.shape if isinstance(d, int))
            if len(sizes) == len(value.shape):
                facts.shapes[name] = sizes


ALIKE = frozenset("Identity Reshape Transpose Squeeze Unsqueeze Flatten Concat Split Slice Gather Expand".split())
POINTWISE = frozenset(
    """Abs Add And Cast Ceil Div Equal Exp Floor Greater GreaterOrEqual Less LessOrEqual Log Max Min Mod Mul Neg Not Or
    Pow Reciprocal Round Sign Sqrt Sub Where Xor""".split()
)


def moving(model: ir.Model, first: Facts, second: Facts) -> dict[str, Mask]:
    """{computed value: bool mask of its elements that follow a dynamic size}, also where two probes happen to agree.

    A border of `h - 2 * (h // 2)` is zero at every even h and still no constant.
    """
    found: dict[str, Mask] = {}
    for node in model.graph:
        inputs, outputs = names(node.inputs), [name for name in names(node.outputs) if name]
        if not outputs or not all(name in first.values for name in outputs):
            continue
        values = {name: first.values[name] for name in outputs}
        if node.op_type in ("Shape", "Size") and not node.domain:
            masks = _moving_sizes(node, first.shapes.get(inputs[0]), second.shapes.get(inputs[0]))
        else:
            masks = _moving_values(node, model.opset_imports.get("", 1), inputs, outputs, first, found)
        for name, mask in zip(outputs, masks, strict=False):
            other = second.values.get(name)
            agree = other is not None and other.shape == values[name].shape
            found[name] = (mask | (other != values[name])) if agree else np.ones(values[name].shape, np.bool_)
    return found


def _moving_sizes(node: ir.Node, first: Shape | None, second: Shape | None) -> list[Mask]:
    if first is None or second is None or len(first) != len(second):
        return [np.ones(len(first or ()), np.bool_)]
    differ = np.array(first) != np.array(second)
    if node.op_type == "Size":
        return [np.asarray(differ.any())]
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    return [differ[start : node.attributes["end"].as_int() if "end" in node.attributes else None]]


def _moving_values(
    node: ir.Node, opset: int, inputs: list[str], outputs: list[str], facts: Facts, found: Mapping[str, Mask]
) -> list[Mask]:
    """Movement moves the mask, arithmetic unites masks element by element, anything else spreads to all of it."""
    masks = {n: found.get(n, np.zeros(np.shape(facts.values[n]), np.bool_)) for n in inputs if n in facts.values}
    alike = node.op_type in ALIKE and not node.domain
    data = [n for k, n in enumerate(inputs) if n and (k == 0 or node.op_type == "Concat")]
    if not any(mask.any() for mask in masks.values()):
        return [np.zeros(facts.values[n].shape, np.bool_) for n in outputs]
    if node.op_type in POINTWISE and not node.domain:
        united = np.logical_or.reduce(np.broadcast_arrays(*(masks[n] for n in inputs if n in masks)))
        return [np.broadcast_to(united, facts.values[n].shape) for n in outputs]
    if alike and not any(masks[n].any() for n in inputs if n and n not in data):
        fed = {n: masks[n] if n in data else facts.values[n] for n in inputs if n}
        moved = evaluate(ir.serde.serialize_node(node), opset, fed)
        if moved is not None:
            return [np.asarray(mask, np.bool_) for mask in moved]
    return [np.ones(facts.values[n].shape, np.bool_) for n in outputs]


def infer(model: ir.Model, sizes: Mapping[str, int]) -> Facts:
    """Facts of every value of the main graph, whose nodes are in topological order."""
    facts = seed(model.graph, sizes)
    for node in model.graph:
        step(facts, node, model.opset_imports.get(node.domain, 1))
    return facts


# From the cheapest on: attention over every pixel grows with the fourth power of an image's side.
SCALES: tuple[dict[str, tuple[tuple[int, ...], tuple[int, ...]]], ...] = (
    {"image": ((32, 64), (64, 96)), "length": ((11, 13, 17), (19, 29, 37))},
    {"image": ((64, 96), (128, 160)), "length": ((64, 96, 160), (224, 288, 352))},
    {"image": ((224, 320), (256, 416)), "length": ((1024, 1536), (2560, 3072))},
    {"image": ((224, 224), (256, 256)), "length": ((16384,), (24576,))},
)
SUMMANDS = 4  # lengths up to which sums are tried
BATCHES = (((3, 7, 11), (5, 13, 17)), ((1,), (1,)))  # some exports bake batch 1 in and still call it dynamic


def probes(model: ir.Model, given: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Two sets of sizes for the dynamic dimensions at which the graph is consistent, or as nearly as can be found.

    Batches get small primes, so that they are never mistaken for a factor of something else; images get multiples
    of 32; other lengths get primes first, then what convolutions over long signals need. Sizes that depend on each
    other under names of their own are tried as equal, and as sums: a mask is as long as past and present together.
    `given` sizes stand in the first set.
    """
    dimensions = {name: _kind(model.graph, places) for name, places in symbols(model.graph).items()}
    best: tuple[int, Sizes, Sizes] | None = None
    for batches, scale in product(BATCHES, SCALES):
        tables = {"batch": batches, **scale}
        for relate in _dependences(dimensions):
            first, second = (relate({kind: table[k] for kind, table in tables.items()}) for k in (0, 1))
            first.update(given)
            problems = sum(len(infer(model, sizes).problems) for sizes in (first, second)) if dimensions else 0
            if best is None or problems < best[0]:
                best = (problems, first, second)
            if problems == 0:
                return first, second
    assert best is not None
    return best[1], best[2]


Sizes = dict[str, int]
Kind = tuple[str, tuple[int, ...]]  # batch, image or length; then what is fixed about its first place
Tables = Mapping[str, tuple[int, ...]]


def _dependences(dimensions: Mapping[str, Kind]) -> Iterable[Callable[[Tables], Sizes]]:
    """Ways to choose sizes: each by itself; one for each kind; one for each place, of which one is the sum of two."""

    def by(key: Callable[[str], Any]) -> Callable[[Tables], Sizes]:
        """Sizes from the tables, equal where `key` is; within a kind different ones as far as the tables go."""

        def choose(tables: Tables) -> Sizes:
            chosen: dict[Any, int] = {}
            seen: Counter[str] = Counter()
            for name, (kind, _) in dimensions.items():
                if key(name) not in chosen:
                    chosen[key(name)] = tables[kind][seen[kind] % len(tables[kind])]
                    seen[kind] += 1
            return {name: chosen[key(name)] for name in dimensions}

        return choose

    def place(name: str) -> Any:
        kind, fixed = dimensions[name]  # caches of all layers look alike; ids and a mask [n, t] say nothing
        return kind if kind == "batch" else fixed if any(fixed[:-1]) else name

    def summed(total: Any, parts: Iterable[Any]) -> Callable[[Tables], Sizes]:
        def choose(tables: Tables) -> Sizes:
            sizes = by(place)(tables)
            length = {place(name): size for name, size in sizes.items()}
            return {n: sum(length[p] for p in parts) if place(n) == total else size for n, size in sizes.items()}

        return choose

    yield by(lambda name: name)
    if len({kind for kind, _ in dimensions.values()}) == len(dimensions):
        return
    yield by(lambda name: dimensions[name][0])
    lengths = list(dict.fromkeys(place(name) for name, (kind, _) in dimensions.items() if kind == "length"))
    if len(lengths) > 1:
        yield by(place)
    for total in reversed(lengths if 3 <= len(lengths) <= SUMMANDS else []):
        for parts in combinations([one for one in lengths if one != total], 2):
            yield summed(total, parts)


def _kind(graph: ir.Graph, places: list[tuple[str, int]]) -> Kind:
    """What a dynamic dimension probably is: batch, image (two of four axes move besides the batch) or length."""
    shapes = {
        str(v.name): [d if isinstance(d, int) and d > 0 else 0 for d in v.shape] for v in true_inputs(graph) if v.shape
    }
    value, axis = places[0]
    shape = shapes[value]
    if any(axis == 0 and len(shapes[value]) > 1 for value, axis in places):
        return "batch", ()
    return "image" if len(shape) == 4 and shape[1:].count(0) > 1 else "length", (*shape, axis)


def cost_sizes(model: ir.Model, given: Mapping[str, int]) -> dict[str, int]:
    """Sizes at which cost is counted: batch 1, images 224 x 224, other lengths 128, unless given."""
    usual = {"batch": 1, "image": 224, "length": 128}
    sizes = {name: usual[_kind(model.graph, places)[0]] for name, places in symbols(model.graph).items()}
    return sizes | dict(given)
