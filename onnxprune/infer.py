"""Concrete shapes, types and small values of a graph, node by node, at chosen sizes of its dynamic dimensions.

Sizes that the exporter computes at run time (Shape, Gather, Concat, ...) are evaluated on the way, so that every
Reshape has a target. What is the same at two different sets of sizes is static; no symbolic algebra is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import infer_node_outputs

from onnxprune import ops
from onnxprune.types import Array, Body, Mask, OpNode, Shape

Partly = np.ma.MaskedArray[Any, Any]
VALUE_LIMIT = 1 << 16  # elements of a value that is worth knowing
ROUNDS = 4096  # of a loop that are worth following one by one
FINDS = frozenset("NonZero Compress".split())  # as many as the data says
FOUND = (23, 41)  # how many that is taken to be, in the first probe and in the others
SHORT = 16  # elements of a float initializer that may be a list of scales
RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


@dataclass
class Facts:
    """What is known about each value: shape, ONNX element type, and the value itself where it is small and fixed.

    `values` are sizes, indices and scalars, and what is computed from them; `small` are short float initializers
    (Resize scales), which rules and shape inference may read but nothing is computed from. `varying` are inputs of
    Loop and Scan bodies whose shape is not the same in every round. `asked` are the sizes that operators need in
    place of those that are there: {(value, axis): size}.
    """

    shapes: dict[str, Shape] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)
    small: dict[str, Array] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    varying: set[str] = field(default_factory=set)
    asked: dict[tuple[str, int], int] = field(default_factory=dict)
    found: int = FOUND[0]

    def value(self, name: str) -> Array | None:
        """The value itself, where it is small and fixed."""
        found = self.values.get(name)
        return self.small.get(name) if found is None else found


def bodies(node: ir.Node) -> dict[str, ir.Graph]:
    """The graphs inside a node, by attribute."""
    found: dict[str, ir.Graph] = {}
    for key, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            found[key] = attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            found |= {f"{key}.{k}": body for k, body in enumerate(attribute.as_graphs())}
    return found


def walk(graph: ir.Graph, entering: Callable[[ir.Node], None] = lambda node: None) -> Iterator[ir.Node]:
    """Every node with those inside its bodies before it: producers first. `entering` is called before the bodies."""
    for node in list(graph):
        inner = bodies(node)
        if inner:
            entering(node)
        for body in inner.values():
            yield from walk(body, entering)
        yield node


def home(node: ir.Node) -> ir.Graph:
    """The graph that a node stands in: the model's or a body."""
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def graphs(graph: ir.Graph) -> list[ir.Graph]:
    """The graph itself and every body in it."""
    return [graph, *(body for node in walk(graph) for body in bodies(node).values())]


def initializers(graph: ir.Graph) -> dict[str, ir.Value]:
    """Initializers of the graph and of every body in it, by name."""
    return {name: value for inner in graphs(graph) for name, value in inner.initializers.items()}


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
    for name, value in initializers(graph).items():
        note_initializer(facts, name, value)
    return facts


def note_initializer(facts: Facts, name: str, value: ir.Value) -> None:
    """Shape and type of an initializer; its value if it may be a size, an index or a scalar."""
    tensor = value.const_value
    if tensor is not None:
        _note_tensor(facts, name, tensor)


def _note_tensor(facts: Facts, name: str, tensor: ir.TensorProtocol) -> None:
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
    inner = {
        key: Body(body_name(node, key), tuple(names(body.inputs)), tuple(names(body.outputs)))
        for key, body in bodies(node).items()
    }
    seen = (*outputs, *(name for body in inner.values() for name in (*body.inputs, *body.outputs)))
    true = dict(zip(inputs, names(node.inputs), strict=True)) | {name: name for name in seen}
    shapes = {name: facts.shapes[real] for name, real in true.items() if real in facts.shapes}
    known = {name: consts[real] for name, real in true.items() if real in consts}
    half = {name: partly[name] for name in inputs if name in partly}
    return OpNode(
        str(node.name or ""),
        node.op_type,
        node.domain,
        opset,
        attributes(node),
        inputs,
        outputs,
        shapes,
        known,
        half,
        inner,
    )


def body_name(node: ir.Node, key: str) -> str:
    """Name of a graph inside a node."""
    return f"{node.outputs[0].name}/{key}"


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
    if bodies(node):
        _leave(facts, node, opset)
        return
    if node.op_type == "Constant" and (tensor := ir.convenience.get_const_tensor(node.outputs[0])) is not None:
        _note_tensor(facts, outputs[0], tensor)
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


def run_node(node: OpNode, values: Mapping[str, Array]) -> list[Array] | None:
    """The outputs of a node as rules see it, all of whose inputs are given; None if they cannot be computed."""
    places = {name: f"value{k}" for k, name in enumerate(dict.fromkeys((*node.inputs, *node.outputs))) if name}
    inputs, outputs = ([places.get(name, "") for name in names] for names in (node.inputs, node.outputs))
    if any(isinstance(value, ir.Attr | ir.TensorProtocol) for value in node.attrs.values()):
        return None
    attrs = {key: value for key, value in node.attrs.items() if value is not None}
    proto = onnx.helper.make_node(node.op_type, inputs, outputs, domain=node.domain, **attrs)
    return evaluate(proto, node.opset, {places[name]: values[name] for name in dict.fromkeys(node.inputs) if name})


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
        sizes = tuple(d.dim_value if d.HasField("dim_value") else facts.found for d in dims)
        if tensor.HasField("shape") and (node.op_type in FINDS or all(d.HasField("dim_value") for d in dims)):
            facts.shapes[name] = sizes
    if any(name and name not in facts.shapes for name in names(node.outputs)):
        shapes, like = ops.shapes_of(op_node(node, opset, facts, {}, {}))
        for name, shape in zip(names(node.outputs), shapes, strict=False):
            facts.shapes.setdefault(name, shape)
            if (known := facts.types.get(names(node.inputs)[like])) is not None:
                facts.types.setdefault(name, known)
    _declared(facts, node)
    _ask(facts, node, opset)
    if "kernel_shape" in node.attributes or "Conv" in node.op_type:
        empty = [name for name in names(node.outputs) if 0 in facts.shapes.get(name, ())]
        if empty and not any(0 in facts.shapes.get(name, ()) for name in present):
            facts.problems.append(f"node '{node.name}': nothing is left of its input")
    if node.op_type == "Gather" and not node.domain and present[0] in facts.shapes:
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        size, picked = facts.shapes[present[0]][axis], facts.value(present[1])
        if picked is not None and picked.size and not -size <= picked.min() <= picked.max() < size:
            facts.problems.append(f"node '{node.name}': picks position {picked.max()} of {size}")
    if node.op_type == "Reshape" and present[0] in facts.shapes:
        before, after = facts.shapes[present[0]], facts.shapes.get(str(node.outputs[0].name))
        if after is not None and prod(before) != prod(after):
            facts.problems.append(f"node '{node.name}': {list(before)} cannot become {list(after)}")


def _ask(facts: Facts, node: ir.Node, opset: int) -> None:
    """Note sizes of inputs that do not suit an operator."""
    wants = ops.wants_of(node.domain, node.op_type)
    if wants is None:
        return
    try:
        wanted = wants(op_node(node, opset, facts, facts.values, {}))
    except KeyError:  # the shape of an input is not known
        return
    inputs = names(node.inputs)
    for k, sizes in wanted.items():
        for axis, (size, given) in enumerate(zip(sizes, facts.shapes.get(inputs[k], ()), strict=False)):
            if size not in (ops.ANY, given):
                facts.asked[inputs[k], axis] = size
                facts.problems.append(f"node '{node.name}': '{inputs[k]}:{axis}' has {given} positions, not {size}")


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
    for node in walk(model.graph):
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


def finds(model: ir.Model) -> bool:
    """Whether some length depends on data."""
    return any(node.op_type in FINDS and not node.domain for node in walk(model.graph))


def infer(model: ir.Model, sizes: Mapping[str, int], found: int = FOUND[0]) -> Facts:
    """Facts of every value of the main graph and the bodies in it, whose nodes are in topological order.

    Lengths that depend on data are taken to be `found`.
    """
    facts = seed(model.graph, sizes)
    facts.found = found
    _infer_graph(facts, model.graph, model.opset_imports)
    return facts


def _infer_graph(facts: Facts, graph: ir.Graph, opsets: Mapping[str, int]) -> None:
    for node in graph:
        inner = bodies(node)
        while inner:
            enter(facts, node)
            taken = _taken(facts, node)
            for key, body in inner.items():
                problems, asked = len(facts.problems), dict(facts.asked)
                _infer_graph(facts, body, opsets)
                if taken not in (None, key):
                    del facts.problems[problems:]  # this never runs at these sizes
                    facts.asked = asked
            varying = {
                b for _, b, c, _ in carried(node) if b in facts.shapes and facts.shapes.get(c) != facts.shapes[b]
            }
            if not varying:
                break
            facts.varying |= varying  # once more, without the shapes of the first round
            for name in [name for body in inner.values() for n in walk(body) for name in names(n.outputs)] + [*varying]:
                for known in (facts.shapes, facts.types, facts.values):
                    known.pop(name, None)
        step(facts, node, opsets.get(node.domain, 1))


# Bodies ----------------------------------------------------------------------------------------------------------


def control(node: ir.Node) -> str:
    """If, Loop or Scan, where the bodies fit the node; else nothing (other operators, Scan before opset 9)."""
    inner = bodies(node)
    if node.domain not in ("", "ai.onnx") or not inner:
        return ""
    body = next(iter(inner.values()))
    if node.op_type == "If":
        fits = len(inner) == 2 and all(len(b.outputs) == len(node.outputs) and not b.inputs for b in inner.values())
    elif node.op_type == "Loop":
        fits = 2 <= len(node.inputs) == len(body.inputs) <= len(body.outputs) + 1
        fits = fits and len(body.outputs) - 1 >= len(node.outputs)
    elif node.op_type == "Scan" and "num_scan_inputs" in node.attributes:
        count = node.attributes["num_scan_inputs"].as_int()
        fits = 1 <= count <= len(node.inputs) == len(body.inputs) <= len(body.outputs) + count
        fits = fits and len(body.outputs) >= len(node.outputs)
    else:
        return ""
    return node.op_type if fits else ""


def _taken(facts: Facts, node: ir.Node) -> str | None:
    """Which branch an If takes, where that is known."""
    asked = facts.values.get(names(node.inputs)[0]) if control(node) == "If" and node.inputs else None
    return None if asked is None else "then_branch" if asked.all() else "else_branch"


def carried(node: ir.Node) -> list[tuple[str, str, str, str]]:
    """(input, body's input, body's output, output) of each value that a Loop or Scan carries from round to round."""
    if control(node) not in ("Loop", "Scan"):
        return []
    body = next(iter(bodies(node).values()))
    count = len(body.inputs) - (2 if node.op_type == "Loop" else node.attributes["num_scan_inputs"].as_int())
    skip = 2 if node.op_type == "Loop" else 0
    inputs, inner = names(node.inputs)[skip:], names(body.inputs)[skip:]
    given, outputs = names(body.outputs)[skip // 2 :], [*names(node.outputs), *[""] * count]
    return list(zip(inputs[:count], inner, given, outputs, strict=False))


def enter(facts: Facts, node: ir.Node) -> None:
    """Note what a node gives to the inputs of its bodies, as far as it is the same in every round."""
    for source, name, _, _ in carried(node):
        if name not in facts.varying and source in facts.shapes:
            facts.shapes[name] = facts.shapes[source]
        if source in facts.types:
            facts.types[name] = facts.types[source]
    kind = control(node)
    if kind == "Loop":
        own = next(iter(bodies(node).values())).inputs[:2]
        for value, dtype in zip(own, (ir.DataType.INT64, ir.DataType.BOOL), strict=True):
            rank = len(value.shape) if value.shape is not None else 0
            facts.shapes[str(value.name)], facts.types[str(value.name)] = (1,) * rank, int(dtype)
    if kind == "Scan":
        count = node.attributes["num_scan_inputs"].as_int()
        axes = _integers(node, "scan_input_axes", count)
        inner = names(next(iter(bodies(node).values())).inputs)[-count:]
        for source, name, axis in zip(names(node.inputs)[-count:], inner, axes, strict=False):
            if source in facts.shapes and -len(facts.shapes[source]) <= axis < len(facts.shapes[source]):
                sizes = list(facts.shapes[source])
                sizes.pop(axis)
                facts.shapes[name] = tuple(sizes)
            if source in facts.types:
                facts.types[name] = facts.types[source]


def _integers(node: ir.Node, key: str, count: int) -> list[int]:
    """A list attribute, by default zeros."""
    return list(node.attributes[key].as_ints()) if key in node.attributes else [0] * count


def _leave(facts: Facts, node: ir.Node, opset: int) -> None:
    """Shapes of a node's outputs from those of its bodies; whatever differs from branch to branch stays unknown."""
    outputs = names(node.outputs)
    given = [names(body.outputs) for body in bodies(node).values()]
    kind = control(node)
    if not kind:
        _declared(facts, node)
    elif kind == "If":
        for name, *inner in zip(outputs, *given, strict=False):
            shapes = {facts.shapes.get(other) for other in inner}
            if len(shapes) == 1 and (shape := shapes.pop()) is not None:
                facts.shapes[name] = shape
            if (known := next((other for other in inner if other in facts.types), None)) is not None:
                facts.types[name] = facts.types[known]
    else:
        count = len(carried(node))
        for _, first, last, name in carried(node):
            if facts.shapes.get(last) is not None and facts.shapes.get(first) == facts.shapes[last]:
                facts.shapes[name] = facts.shapes[last]
            facts.types |= {name: facts.types[last]} if last in facts.types else {}
        rounds = _rounds(facts, node, opset)
        axes = _integers(node, "scan_output_axes", len(outputs) - count)
        for other, name, axis in zip(given[0][count + (kind == "Loop") :], outputs[count:], axes, strict=False):
            if other in facts.shapes and rounds is not None:
                sizes = list(facts.shapes[other])
                sizes.insert(axis if axis >= 0 else len(sizes) + 1 + axis, rounds)
                facts.shapes[name] = tuple(sizes)
            facts.types |= {name: facts.types[other]} if other in facts.types else {}
    for known in (facts.shapes, facts.types):
        known.pop("", None)  # an output that nobody takes


def _rounds(facts: Facts, node: ir.Node, opset: int) -> int | None:
    """How often a body runs, unless numbers that are not known decide that."""
    inputs = names(node.inputs)
    if node.op_type == "Scan":
        count = node.attributes["num_scan_inputs"].as_int()
        axis, shape = _integers(node, "scan_input_axes", count)[0], facts.shapes.get(inputs[-count])
        return shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
    body = next(iter(bodies(node).values()))
    going: ir.Value | None = body.outputs[0]
    while going is not None and (maker := going.producer()) is not None and maker.op_type == "Identity":
        going = maker.inputs[0]
    always = going is body.inputs[1] or (going is not None and _true(facts, str(going.name)))
    started = len(inputs) < 2 or not inputs[1] or _true(facts, inputs[1])
    most = facts.values.get(inputs[0])
    if not started or (inputs[0] and (most is None or most.size != 1)):
        return None
    trips = ROUNDS if most is None else max(0, int(most.reshape(-1)[0]))
    if always:
        return None if most is None else trips
    return _counted(facts, node, trips, opset) if trips <= ROUNDS else None


def _counted(facts: Facts, node: ir.Node, trips: int, opset: int) -> int | None:
    """How often the body of a Loop runs, by computing its condition from round to round out of known numbers alone."""
    body = next(iter(bodies(node).values()))
    carry = {inner: (source, last) for source, inner, last, _ in carried(node)}
    condition, counter = str(body.outputs[0].name), str(body.inputs[0].name)
    within = {name: maker for maker in body for name in names(maker.outputs)}
    made: set[ir.Node] = set()
    given: dict[str, Array] = {}
    state: dict[str, Array] = {}
    pending = [condition]
    while pending:
        name = pending.pop()
        maker = within.get(name)
        if maker is not None:
            if maker.domain not in ("", "ai.onnx") or bodies(maker) or maker.op_type in RANDOM:
                return None
            if maker not in made:
                made.add(maker)
                pending += filter(None, names(maker.inputs))
        elif name in carry and name not in state:
            source, last = carry[name]
            if source not in facts.values:
                return None
            state[name] = facts.values[source]
            pending.append(last)
        elif name in facts.values:
            given[name] = facts.values[name]
        elif name not in (*carry, counter):
            return None
    rank = len(facts.shapes[counter])
    wanted = [condition, *(carry[name][1] for name in state)]
    unknown = onnx.TensorProto.UNDEFINED
    graph = onnx.helper.make_graph(
        [ir.serde.serialize_node(maker) for maker in body if maker in made],
        "condition",
        [onnx.helper.make_tensor_value_info(n, unknown, None) for n in (*given, *state, counter)],
        [onnx.helper.make_tensor_value_info(n, unknown, None) for n in dict.fromkeys(wanted) if n in within],
    )
    try:
        run = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])).run
        for count in range(trips):
            feed = given | state | {counter: np.full((1,) * rank, count, np.int64)}
            found = feed | dict(zip([o.name for o in graph.output], map(np.asarray, run(None, feed)), strict=True))
            if not found[condition].all():
                return count + 1
            state = {name: found[carry[name][1]] for name in state}
    except Exception:  # an operator or type that the reference does not know
        return None
    return trips


def _true(facts: Facts, name: str) -> bool:
    value = facts.values.get(name)
    return value is not None and bool(value.all())
