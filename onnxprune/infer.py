"""Concrete shapes, types and small values of a graph, node by node, at chosen sizes of its dynamic dimensions.

Sizes that the exporter computes at run time (Shape, Gather, Concat, ...) are evaluated on the way, so that every
Reshape has a target. What is the same at two different sets of sizes is static; no symbolic algebra is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir

from onnxprune import ops
from onnxprune.outcome import (
    ALIKE,
    GRAPHS,
    POINTWISE,
    VALUE_LIMIT,
    Attributes,
    Content,
    Known,
    Question,
    computed,
    question_attributes,
    shaped,
)
from onnxprune.types import Array, Body, Mask, OpNode, Shape

Partly = np.ma.MaskedArray[Any, Any]
ROUNDS = 4096  # of a loop that are worth following one by one
FINDS = frozenset("NonZero Compress".split())  # as many as the data says
FOUND = (23, 41)  # how many that is taken to be, in the first probe and in the others
LATEST = 4  # answers of an inference that are kept
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

    def known(self, name: str) -> Known:
        """What an operator may know that reads it."""
        value = self.value(name)
        return Known(self.types.get(name), self.shapes.get(name), None if value is None else Content.of(value))

    def value(self, name: str) -> Array | None:
        """The value itself, where it is small and fixed."""
        found = self.values.get(name)
        return self.small.get(name) if found is None else found


def bodies(node: ir.Node) -> dict[str, ir.Graph]:
    """The graphs inside a node, by attribute."""
    found: dict[str, ir.Graph] = {}
    for key, attribute in node.attributes.data.items():
        kind = attribute.type
        if kind not in GRAPHS or attribute.is_ref():
            continue
        if kind == ir.AttributeType.GRAPH:
            found[key] = attribute.as_graph()
        else:
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


def seed(graph: ir.Graph, sizes: Mapping[str, int], stored: Facts | None = None) -> Facts:
    """Facts of inputs and initializers (or `stored`, if known), with dynamic dimensions at the given sizes."""
    facts = Facts()
    for value in true_inputs(graph):
        if value.shape is None or value.dtype is None:
            continue
        shape = []
        for axis, dim in enumerate(value.shape):
            shape.append(dim if isinstance(dim, int) and dim > 0 else sizes[symbol(value, axis)])
        facts.shapes[str(value.name)] = tuple(shape)
        facts.types[str(value.name)] = int(value.dtype)
    stored = stored_facts(graph) if stored is None else stored
    facts.shapes |= stored.shapes
    facts.types |= stored.types
    facts.values |= stored.values
    facts.small |= stored.small
    return facts


def stored_facts(graph: ir.Graph) -> Facts:
    """Facts of every initializer."""
    facts = Facts()
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
    count = prod(facts.shapes[name])
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
    return {k: a.value for k, a in node.attributes.data.items() if isinstance(a, ir.Attr) and a.type not in GRAPHS}


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


class Seen(NamedTuple):
    """What inference reads of a node, which need not be looked up at every set of sizes."""

    node: ir.Node
    op_type: str
    opset: int
    attributes: Attributes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    inner: Mapping[str, ir.Graph]
    declared: tuple[tuple[str, int | None, Shape | None], ...]

    @property
    def title(self) -> str:
        """How problems call it."""
        return f"node '{self.node.name or self.outputs[0]}'"


def look(node: ir.Node, opset: int) -> Seen:
    """A node as inference sees it; `op_type` is empty where it is not one of ONNX's own."""
    declared = []
    for value in node.outputs:
        dims = None if value.shape is None else tuple(d for d in value.shape if isinstance(d, int))
        static = dims if value.shape is not None and dims is not None and len(dims) == len(value.shape) else None
        if value.dtype is not None or static is not None:
            declared.append((str(value.name), None if value.dtype is None else int(value.dtype), static))
    return Seen(
        node,
        "" if node.domain else node.op_type,
        opset,
        question_attributes(node),
        tuple(names(node.inputs)),
        tuple(names(node.outputs)),
        bodies(node),
        tuple(declared),
    )


def step(facts: Facts, node: ir.Node, opset: int) -> None:
    """Add what follows for the outputs of one node; whatever cannot be inferred stays unknown."""
    _step(facts, look(node, opset))


def _step(facts: Facts, seen: Seen) -> None:
    inputs, outputs, node = seen.inputs, seen.outputs, seen.node
    if seen.op_type == "Shape" and inputs[0] in facts.shapes:
        sizes = np.array(facts.shapes[inputs[0]], np.int64)
        start = node.attributes["start"].as_int() if "start" in node.attributes else 0
        end = node.attributes["end"].as_int() if "end" in node.attributes else None
        _note(facts, outputs[0], sizes[start:end])
        return
    if seen.op_type == "Size" and inputs[0] in facts.shapes:
        _note(facts, outputs[0], np.array(prod(facts.shapes[inputs[0]]), np.int64))
        return
    if seen.inner:
        _leave(facts, seen)
        return
    if node.op_type == "Constant" and (tensor := ir.convenience.get_const_tensor(node.outputs[0])) is not None:
        _note_tensor(facts, outputs[0], tensor)
        return
    known = tuple(facts.known(name) if name else None for name in inputs)
    asked = Question(node.op_type, node.domain, seen.opset, seen.attributes, known, tuple(map(bool, outputs)))
    if inputs and node.op_type not in RANDOM and all(name in facts.values for name in inputs if name):
        results = computed(asked)
        if results is not None:
            for name, result in zip(outputs, results, strict=False):
                if name:
                    _note(facts, name, result)
            return
    _infer(facts, seen, asked)


def _note(facts: Facts, name: str, value: Array) -> None:
    facts.shapes[name] = value.shape
    facts.types[name] = int(onnx.helper.np_dtype_to_tensor_dtype(value.dtype))
    if value.size <= VALUE_LIMIT:
        facts.values[name] = value


def _infer(facts: Facts, seen: Seen, asked: Question) -> None:
    """Shapes of the outputs by the operator's own inference, else as the exporter declared them."""
    node, inputs, outputs = seen.node, seen.inputs, seen.outputs
    answer = shaped(asked)
    if answer.problem is not None:
        facts.problems.append(f"{seen.title}: {answer.problem}")
    for name, found in zip(outputs, answer.outputs, strict=True):
        if name and found is not None:
            facts.types[name], sizes = found
            if sizes is not None and (node.op_type in FINDS or -1 not in sizes):
                facts.shapes[name] = tuple(facts.found if size < 0 else size for size in sizes)
    if any(name and name not in facts.shapes for name in outputs):
        shapes, like = ops.shapes_of(op_node(node, seen.opset, facts, {}, {}))
        for name, shape in zip(outputs, shapes, strict=False):
            facts.shapes.setdefault(name, shape)
            if (known := facts.types.get(inputs[like])) is not None:
                facts.types.setdefault(name, known)
    _declared(facts, seen)
    _ask(facts, seen)
    present = [name for name in inputs if name]
    if "Conv" in node.op_type or "kernel_shape" in node.attributes:
        empty = [name for name in outputs if 0 in facts.shapes.get(name, ())]
        if empty and not any(0 in facts.shapes.get(name, ()) for name in present):
            facts.problems.append(f"{seen.title}: nothing is left of its input")
    if seen.op_type == "Gather" and present[0] in facts.shapes:
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        shape, picked = facts.shapes[present[0]], facts.value(present[1])
        size = shape[axis] if -len(shape) <= axis < len(shape) else 0
        if picked is not None and picked.size and not -size <= picked.min() <= picked.max() < size:
            facts.problems.append(f"{seen.title}: picks position {picked.max()} of {size}")
    if node.op_type == "Reshape" and present[0] in facts.shapes:
        before, after = facts.shapes[present[0]], facts.shapes.get(outputs[0])
        if after is not None and prod(before) != prod(after):
            facts.problems.append(f"{seen.title}: {list(before)} cannot become {list(after)}")


def _ask(facts: Facts, seen: Seen) -> None:
    """Note sizes of inputs that do not suit an operator."""
    wants = ops.wants_of(seen.node.domain, seen.node.op_type)
    if wants is None:
        return
    try:
        wanted = wants(op_node(seen.node, seen.opset, facts, facts.values, {}))
    except (KeyError, *ops.ODD):  # the shape of an input is not known, or an attribute is no such operator's
        return
    for k, sizes in wanted.items():
        name = seen.inputs[k]
        for axis, (size, given) in enumerate(zip(sizes, facts.shapes.get(name, ()), strict=False)):
            if size not in (ops.ANY, given):
                facts.asked[name, axis] = size
                facts.problems.append(f"{seen.title}: '{name}:{axis}' has {given} positions, not {size}")


def _declared(facts: Facts, seen: Seen) -> None:
    """Fill gaps with fully static shapes that the exporter wrote down."""
    for name, kind, shape in seen.declared:
        if kind is not None:
            facts.types.setdefault(name, kind)
        if shape is not None:
            facts.shapes.setdefault(name, shape)


def moving(nodes: Iterable[Seen], first: Facts, second: Facts) -> dict[str, Mask]:
    """{computed value: bool mask of its elements that follow a dynamic size}, also where two probes happen to agree.

    A border of `h - 2 * (h // 2)` is zero at every even h and still no constant.
    """
    found: dict[str, Mask] = {}
    for seen in nodes:
        outputs = [name for name in seen.outputs if name]
        if not outputs or not all(name in first.values for name in outputs):
            continue
        if seen.op_type in ("Shape", "Size"):
            masks = _moving_sizes(seen.node, first.shapes.get(seen.inputs[0]), second.shapes.get(seen.inputs[0]))
        else:
            masks = _moving_values(seen, outputs, first, found)
        for name, mask in zip(outputs, masks, strict=False):
            value, other = first.values[name], second.values.get(name)
            agree = other is not None and other.shape == value.shape
            found[name] = (mask | (other != value)) if agree else np.ones(value.shape, np.bool_)
    return found


def _moving_sizes(node: ir.Node, first: Shape | None, second: Shape | None) -> list[Mask]:
    if first is None or second is None or len(first) != len(second):
        return [np.ones(len(first or ()), np.bool_)]
    differ = np.array(first) != np.array(second)
    if node.op_type == "Size":
        return [np.asarray(differ.any())]
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    return [differ[start : node.attributes["end"].as_int() if "end" in node.attributes else None]]


def _moving_values(seen: Seen, outputs: list[str], facts: Facts, found: Mapping[str, Mask]) -> list[Mask]:
    """Movement moves the mask, arithmetic unites masks element by element, anything else spreads to all of it."""
    inputs = seen.inputs
    masks = {n: found.get(n, np.zeros(np.shape(facts.values[n]), np.bool_)) for n in inputs if n in facts.values}
    data = [n for k, n in enumerate(inputs) if n and (k == 0 or seen.op_type == "Concat")]
    if not any(mask.any() for mask in masks.values()):
        return [np.zeros(facts.values[n].shape, np.bool_) for n in outputs]
    if seen.op_type in POINTWISE:
        united = np.logical_or.reduce(np.broadcast_arrays(*(masks[n] for n in inputs if n in masks)))
        return [np.broadcast_to(united, facts.values[n].shape) for n in outputs]
    if seen.op_type in ALIKE and not any(masks[n].any() for n in inputs if n and n not in data):
        fed = [(masks[n] if n in data else facts.values[n]) if n else None for n in inputs]
        known = tuple(None if array is None else Known(None, None, Content.of(array)) for array in fed)
        moved = computed(Question(seen.op_type, "", seen.opset, seen.attributes, known, tuple(map(bool, seen.outputs))))
        if moved is not None:
            return [np.asarray(mask, np.bool_) for mask in moved]
    return [np.ones(facts.values[n].shape, np.bool_) for n in outputs]


class Inference:
    """A model to be inferred at any number of sizes; it must not change meanwhile."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.stored = stored_facts(model.graph)
        opsets = model.opset_imports
        self.seen = {g: [look(node, opsets.get(node.domain, 1)) for node in g] for g in graphs(model.graph)}
        self.symbols = symbols(model.graph)
        self.finds = any(seen.op_type in FINDS for seen in self.nodes)
        self.latest: dict[tuple[Any, ...], Facts] = {}

    @property
    def nodes(self) -> Iterator[Seen]:
        """Every node with those inside its bodies before it: producers first."""
        return self._nodes(self.model.graph)

    def _nodes(self, graph: ir.Graph) -> Iterator[Seen]:
        for seen in self.seen[graph]:
            for body in seen.inner.values():
                yield from self._nodes(body)
            yield seen

    def at(self, sizes: Mapping[str, int], found: int = FOUND[0]) -> Facts:
        """Facts of every value of the main graph and the bodies in it, whose nodes are in topological order.

        Lengths that depend on data are taken to be `found`. The last few answers are kept: they are not to be changed.
        """
        key = (found if self.finds else 0, *(sizes.get(name) for name in self.symbols))
        if key not in self.latest:
            facts = seed(self.model.graph, sizes, self.stored)
            facts.found = found
            self._infer(facts, self.model.graph)
            if len(self.latest) == LATEST:
                self.latest.pop(next(iter(self.latest)))
            self.latest[key] = facts
        return self.latest[key]

    def _infer(self, facts: Facts, graph: ir.Graph) -> None:
        for seen in self.seen[graph]:
            while seen.inner:
                enter(facts, seen.node)
                taken = _taken(facts, seen.node)
                for key, body in seen.inner.items():
                    problems, asked = len(facts.problems), dict(facts.asked)
                    self._infer(facts, body)
                    if taken not in (None, key):
                        del facts.problems[problems:]  # this never runs at these sizes
                        facts.asked = asked
                varying = {
                    b
                    for _, b, c, _ in carried(seen.node)
                    if b in facts.shapes and facts.shapes.get(c) != facts.shapes[b]
                }
                if not varying:
                    break
                facts.varying |= varying  # once more, without the shapes of the first round
                inside = [name for body in seen.inner.values() for one in self._nodes(body) for name in one.outputs]
                for name in [*inside, *varying]:
                    for known in (facts.shapes, facts.types, facts.values):
                        known.pop(name, None)
            _step(facts, seen)


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


def _leave(facts: Facts, seen: Seen) -> None:
    """Shapes of a node's outputs from those of its bodies; whatever differs from branch to branch stays unknown."""
    node, outputs = seen.node, seen.outputs
    given = [names(body.outputs) for body in seen.inner.values()]
    kind = control(node)
    if not kind:
        _declared(facts, seen)
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
        rounds = _rounds(facts, node, seen.opset)
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
            if maker.domain not in ("", "ai.onnx"):
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
    elements = prod(array.size for array in (*given.values(), *state.values()))
    allowed = POINTWISE | {"Identity"} | (ALIKE - {"Concat", "Expand"} if elements == 1 else frozenset())
    if elements > VALUE_LIMIT or any(maker.op_type not in allowed for maker in made):  # might grow from round to round
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
    from onnx.reference import ReferenceEvaluator  # loads every operator

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
