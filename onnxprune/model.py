"""A model made ready for coupling: constants lifted, static sizes folded, and seen as OpNodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass

from onnxprune import ops
from onnxprune.errors import InputError
from onnxprune.infer import (
    FOUND,
    Facts,
    Inference,
    bodies,
    body_name,
    control,
    graphs,
    initializers,
    moving,
    names,
    op_node,
    symbol,
    true_inputs,
    walk,
)
from onnxprune.outcome import evaluate
from onnxprune.probes import other_probes, probes
from onnxprune.types import Array, Axis, Mask, Shape, Stored, View

Model = ir.Model  # what the rest of the package passes around without looking inside
Graph = ir.Graph
NESTING = 100  # functions inside functions
SMALL = 1024  # elements up to which a matrix that serves several readers is mere storage
EXPANDED = (100_000, 2**31)  # nodes, and bytes of constants, up to which local functions are inlined
PASSES = frozenset("Identity Transpose Reshape Cast Squeeze Unsqueeze Flatten Expand Concat Split Slice Gather".split())


@dataclass(frozen=True)
class Prepared:
    """A model with its facts at two sets of dynamic sizes; `static` are the values that follow none of them.

    `moving` are the elements of computed values that do follow a dynamic size; `folded` are the computed values that
    were written down as constants: {name as it was read: name of the initializer}, `statistics` those of weights.
    """

    model: ir.Model
    sizes: Mapping[str, int]
    facts: Facts
    other_sizes: Mapping[str, int]
    other: Facts
    static: frozenset[str]
    moving: Mapping[str, Mask]
    folded: Mapping[str, str]
    statistics: frozenset[str]

    def constants(self, initializers: Iterable[str]) -> dict[str, ir.Value]:
        """{computed value: the initializer that it became}, of statistics and of the named initializers."""
        wanted = set(initializers)
        stored = self.model.graph.initializers
        return {
            name: stored[kept]
            for name, kept in self.folded.items()
            if kept in stored and (kept in wanted or name in self.statistics)
        }


def input_sizes(model: ir.Model, given: Mapping[str, Shape]) -> dict[str, int]:
    """Sizes of dynamic dimensions from whole input shapes. Raises InputError where they contradict the model."""
    inputs = {str(value.name): value for value in true_inputs(model.graph)}
    found: dict[str, int] = {}
    for name, shape in given.items():
        if name not in inputs:
            raise InputError(f"no such graph input; there are {', '.join(inputs)}", object=name)
        declared = inputs[name].shape
        if declared is None or len(declared) != len(shape):
            raise InputError(f"shape {list(shape)} does not fit {declared}", object=name)
        for axis, (dim, size) in enumerate(zip(declared, shape, strict=True)):
            if isinstance(dim, int) and dim > 0:
                if dim != size:
                    raise InputError(f"axis {axis} is {dim} in the model, not {size}", object=name)
                continue
            key = symbol(inputs[name], axis)
            if found.setdefault(key, size) != size:
                raise InputError(f"dimension '{key}' is given as {found[key]} and as {size}", object=name)
    return found


def write_sizes(model: Model, sizes: Mapping[str, int]) -> None:
    """Write sizes of dynamic dimensions down wherever they are declared."""
    for value in true_inputs(model.graph):
        keys = [symbol(value, axis) for axis in range(len(value.shape or ()))]
        _set(value, {axis: sizes[key] for axis, key in enumerate(keys) if key in sizes})
    for value in (out for node in walk(model.graph) for out in node.outputs):
        names = {axis: dim.value for axis, dim in enumerate(value.shape or ()) if not isinstance(dim, int)}
        _set(value, {axis: sizes[name] for axis, name in names.items() if name is not None and name in sizes})


def _set(value: ir.Value, known: Mapping[int, int]) -> None:
    if value.shape is not None and known:
        value.shape = ir.Shape([known.get(axis, dim) for axis, dim in enumerate(value.shape)])


def prepare(model: ir.Model, given: Mapping[str, int] | None = None) -> Prepared:
    """Normalise, infer at two sets of sizes, and write static computed sizes and choices down.

    The model is changed in place; names of initializers and nodes stay, and a Constant becomes an initializer under
    the name of its output. After this, only sizes that depend on a dynamic dimension are computed at run time, so a
    scale such as 1/sqrt(head_dim) that was read from a shape keeps its dense value.
    """
    normalise(model)
    inference = Inference(model)
    first, second = probes(inference, given or {})
    facts, other, moves = _known(inference, first, second)
    chosen: tuple[str, ...] = ()
    while fresh := _choose(model, facts, _static(facts, moves)):  # what follows a branch is known only then
        chosen += fresh
        inference = Inference(model)
        facts, other, moves = _known(inference, first, second)
    folded = _fold(model, facts, _static(facts, moves))
    statistics = _fold_statistics(model)
    if folded or statistics:
        inference = Inference(model)
        facts, other, moves = _known(inference, first, second)
    written = {name: name for name in chosen} | statistics | folded
    return Prepared(model, first, facts, second, other, _static(facts, moves), moves, written, frozenset(statistics))


def _known(
    inference: Inference, first: Mapping[str, int], second: Mapping[str, int]
) -> tuple[Facts, Facts, dict[str, Mask]]:
    facts = inference.at(first)
    if not inference.symbols and not inference.finds:
        return facts, facts, {}
    other = inference.at(second, FOUND[1])
    moves = moving(inference.nodes, facts, other)
    if any(control(seen.node) == "If" for seen in inference.nodes if seen.inner):
        for probe in other_probes(inference, first):  # a strided length may be one at many lengths, not all
            found = inference.at(probe, FOUND[1])
            for name, mask in moving(inference.nodes, facts, found).items():
                if name in found.values:
                    moves[name] = moves[name] | mask
    return facts, other, moves


def _static(facts: Facts, moves: Mapping[str, Mask]) -> frozenset[str]:
    return frozenset(name for name in facts.values if name not in moves or not moves[name].any())


def normalise(model: ir.Model, *, inline: bool = True) -> None:
    """One graph to look at: functions inlined, every value a name of its own, constants lifted to initializers.

    A name in a body that was used before gets the body's name in front. What a body hands out is made by a node of its
    own. The model is changed in place, each time alike.
    """
    graph = model.graph
    made = {value for node in walk(graph) for value in node.outputs}
    calls = {value.name for node in walk(graph) if node.op_identifier() in model.functions for value in node.outputs}
    if inline:
        _inline(model)
    _unique_names(graph, lambda value: value.producer() is None or value in made or value.name in calls)
    for inner in graphs(graph)[1:]:
        for k, value in enumerate(inner.outputs):
            maker = value.producer()
            if maker is None or maker.graph is not inner or maker.op_type == "Constant":
                passed = ir.node("Identity", [value])
                passed.outputs[0].name = passed.name = free_name(graph, f"{value.name}_out")
                passed.outputs[0].type = value.type
                inner.append(passed)
                inner.outputs[k] = passed.outputs[0]
    for inner in graphs(graph):
        _lift_constants(inner)


def _unique_names(graph: ir.Graph, own: Callable[[ir.Value], bool]) -> None:
    """Rename what is called as something else is; the file's own values before others, outer graphs before inner."""
    taken: set[str] = set()

    def rename(value: ir.Value, scope: str) -> None:
        wish = name = str(value.name)
        count = 1
        while name in taken:
            name = f"{scope}/{wish}" if scope and count == 1 else f"{wish}_{count}"
            count += 1
        taken.add(name)
        if name != wish:
            value.name = name

    for scope, value in sorted(_named_values(graph), key=lambda pair: not own(pair[1])):
        rename(value, scope)
    for node in walk(graph):
        if not node.outputs[0].name:  # nodes go by the name of their first output
            node.outputs[0].name = next((str(v.name) for v in node.outputs if v.name), node.op_type) + "_first"
            rename(node.outputs[0], "")


def _named_values(graph: ir.Graph, scope: str = "") -> list[tuple[str, ir.Value]]:
    """(name of the body, value) of everything that a graph defines, and after it what the bodies in it do."""
    values = dict.fromkeys((*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)))
    found = [(scope, value) for value in values if value.name]
    for node in graph:
        for key, body in bodies(node).items():
            found += _named_values(body, body_name(node, key))
    return found


def _inline(model: ir.Model) -> None:
    """Put local functions in the place of their calls, unless they are odd or too much would come of it."""
    functions = model.functions
    sizes: dict[ir.OperatorIdentifier, tuple[int, int]] = {}

    def size(nodes: Iterable[ir.Node], above: tuple[ir.OperatorIdentifier, ...]) -> tuple[int, int]:
        """(nodes, bytes of constants) after inlining."""
        count = weight = 0
        for node in nodes:
            key = node.op_identifier()
            if key in above or len(above) > NESTING:
                return EXPANDED[0] + 1, 0  # calls itself
            if key in functions:
                if key not in sizes:
                    sizes[key] = size(functions[key].all_nodes(), (*above, key))
                count, weight = count + sizes[key][0], weight + sizes[key][1]
            held = [
                a.as_tensor().nbytes
                for a in node.attributes.values()
                if a.type == ir.AttributeType.TENSOR and not a.is_ref()
            ]
            count, weight = count + 1, weight + sum(held)
        return count, weight

    if not functions or any(n > most for n, most in zip(size(model.graph.all_nodes(), ()), EXPANDED, strict=True)):
        return
    for node in list(model.graph.all_nodes()):
        if node.op_identifier() in functions:
            for k, value in enumerate(node.outputs):
                if not value.name:  # the value inside would lose its name to it
                    value.name = free_name(model.graph, f"{node.name or node.op_type}_output_{k}")
    InlinePass(lambda function: _plain(function, model))(model)
    model.graph.meta.pop("names", None)


def _plain(function: ir.Function, model: ir.Model) -> bool:
    """Whether a function can be inlined: the model's operator sets, outputs of its own, no graphs as arguments."""
    own = all(value.producer() is not None for value in function.outputs)
    distinct = len(set(function.outputs)) == len(function.outputs)
    graph = any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in function.attributes.values())
    same = all(model.opset_imports.get(key, version) == version for key, version in function.opset_imports.items())
    return own and distinct and same and not graph


def _lift_constants(graph: ir.Graph) -> None:
    """Constant nodes become initializers under the name of their output."""
    for node in list(graph):
        if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
            continue
        value, (key, attribute) = node.outputs[0], next(iter(node.attributes.items()))
        if (
            value.is_graph_output()
            or attribute.is_ref()
            or key not in ("value", "value_int", "value_float", "value_ints", "value_floats")
        ):
            continue
        tensor = (
            attribute.value  # as_tensor() would look through the whole protocol of tensors each time
            if key == "value"
            else ir.tensor(np.array(attribute.value, np.float32 if "float" in key else np.int64))
        )
        name = str(value.name)
        fresh = ir.Value(
            name=name, shape=ir.Shape(tensor.numpy().shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        value.replace_all_uses_with(fresh)
        graph.remove(node, safe=True)
        graph.register_initializer(fresh)


def _choose(model: ir.Model, facts: Facts, static: frozenset[str]) -> tuple[str, ...]:
    """Put the branch in the place of every If whose condition is static; the first outputs of these Ifs."""
    chosen = []
    asked = {node: str(node.inputs[0].name) for node in walk(model.graph) if control(node) == "If" and node.inputs[0]}
    asked = {node: name for node, name in asked.items() if name in static and facts.values[name].size == 1}
    for node, condition in asked.items():
        home = node.graph
        if not isinstance(home, ir.Graph):
            continue  # inside a branch that has gone
        inner = bodies(node)
        taken = inner.pop("then_branch" if facts.values[condition].all() else "else_branch")
        for name, value in list(taken.initializers.items()):
            taken.initializers.pop(name)
            model.graph.register_initializer(value)
        results = list(taken.outputs)
        taken.outputs.clear()
        inside = list(taken)
        taken.remove(inside)
        home.insert_before(node, inside)
        chosen.append(str(node.outputs[0].name))
        for old, new in zip(node.outputs, results, strict=True):
            if old.is_graph_output():
                passed = ir.node("Identity", [new])
                new = passed.outputs[0]
                passed.name = new.name = old.name
                new.shape, new.type = old.shape, old.type
                home.insert_before(node, passed)
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        for other in inner.values():
            dismantle(other)
        home.remove(node, safe=True)
    if chosen:
        RemoveUnusedNodesPass()(model)
    return tuple(chosen)


def dismantle(graph: ir.Graph) -> None:
    """Empty a body that goes, so that its nodes no longer count as readers of what they captured."""
    nodes = list(walk(graph))
    for inner in graphs(graph):
        inner.outputs.clear()
    for node in nodes:
        for k in range(len(node.inputs)):
            node.replace_input_with(k, None)
    for node in nodes:
        if node.graph is not None:
            node.graph.remove(node)


def _fold(model: ir.Model, facts: Facts, static: frozenset[str]) -> dict[str, str]:
    """Write down static values where a node that must stay reads them; {value: initializer}."""
    graph = model.graph
    places: dict[ir.Value, list[tuple[ir.Node, int]]] = defaultdict(list)
    for node in walk(graph):
        if all(name in facts.values for name in names(node.outputs) if name):
            continue  # evaluated itself
        for k, value in enumerate(node.inputs):
            if value is not None and value.producer() is not None and value.name in static:
                places[value].append((node, k))
    folded = {}
    for value, readers in places.items():
        name = str(value.name)
        folded[name] = write_down(graph, value, name, _tensor(facts.values[name]), readers)
    if folded:
        RemoveUnusedNodesPass()(model)
    return folded


def write_down(
    graph: ir.Graph, value: ir.Value, name: str, tensor: ir.TensorProtocol, readers: Iterable[tuple[ir.Node, int]]
) -> str:
    """Give these readers of a computed value an initializer of this name, even its own, where they can; the name."""
    if value.name == name and value.is_graph_output():
        name = free_name(graph, f"{name}_folded")
    elif value.name == name:
        value.name = free_name(graph, f"{name}_computed")
    shape = ir.Shape(tuple(int(d) for d in tensor.shape))  # type: ignore[arg-type]
    fresh = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    add_initializer(graph, fresh)
    for node, k in readers:
        node.replace_input_with(k, fresh)
    return name


def _tensor(array: Array) -> ir.TensorProtocol:
    return ir.tensor(np.ascontiguousarray(array) if array.ndim else array)


STATISTICS = frozenset("ReduceL1 ReduceL2 ReduceMean ReduceSum ReduceSumSquare LpNormalization".split())
ARITHMETIC = frozenset(
    """Abs Add BatchNormalization Clip Div Expand Flatten Identity Max Min Mul Neg Pow Reciprocal Reshape Sqrt Squeeze
    Sub Transpose Unsqueeze""".split()
)
WEIGHTS = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}


def _fold_statistics(model: ir.Model) -> dict[str, str]:
    """Write down what weights that are computed from weights take from whole rows of them; {value: initializer}.

    So the norms of weight normalisation keep their dense values, and so does the mean that weight standardisation
    subtracts. What only scales a weight afterwards stays an operator.
    """
    graph = model.graph
    cones: set[ir.Node] = set()
    for node in walk(graph):
        k = WEIGHTS.get(node.op_type, 0)
        if k and k < len(node.inputs):
            cones |= _cone(node.inputs[k])
    apart: set[ir.Value] = set()  # statistics, numbers, and what is computed from nothing else
    folded: dict[str, str] = {}
    arrays: dict[str, Array] = {}
    for node in [node for node in walk(graph) if node in cones]:
        inputs = [value for value in node.inputs if value is not None]
        arrays |= {str(v.name): v.const_value.numpy() for v in inputs if v.const_value is not None}
        apart |= {value for value in inputs if value.const_value is not None and value.const_value.size == 1}
        proto = ir.serde.serialize_node(node)
        results = evaluate(proto, model.opset_imports.get(node.domain, 1), {n: arrays[n] for n in names(inputs)})
        if results is None:
            return {}
        value, name = node.outputs[0], str(node.outputs[0].name)
        arrays[name] = results[0]
        statistic = _is_statistic(node)
        if statistic or apart.issuperset(inputs):
            apart.add(value)
        shifts = node.op_type in ("Add", "Sub") and not apart.isdisjoint(inputs) and value not in apart
        if statistic or shifts:
            readers = [(use.node, use.idx) for use in value.uses()]
            folded[name] = write_down(graph, value, name, _tensor(results[0]), readers)
            if statistic:
                apart.add(graph.initializers[folded[name]])
    if folded:
        RemoveUnusedNodesPass()(model)
    return folded


def _is_statistic(node: ir.Node) -> bool:
    trained = node.op_type == "BatchNormalization" and "training_mode" in node.attributes
    return node.op_type in STATISTICS or (trained and bool(node.attributes["training_mode"].as_int()))


def _cone(value: ir.Value | None) -> set[ir.Node]:
    """The nodes that compute a value from float initializers by arithmetic with statistics; empty if it is not so."""
    found: set[ir.Node] = set()
    pending = [value]
    while pending:
        here = pending.pop()
        if here is None:
            continue
        if here.const_value is not None:
            if here.const_value.dtype.name in ("FLOAT16", "BFLOAT16"):
                return set()  # what is summed in half precision is not what runtimes make of it
            continue
        node = here.producer()
        if node is None or node.domain or node.op_type not in STATISTICS | ARITHMETIC:
            return set()
        if node not in found:
            found.add(node)
            pending += node.inputs
    return found if any(map(_is_statistic, found)) else set()


def _register(graph: ir.Graph, wish: str, array: Array) -> ir.Value:
    """A new initializer under a free name."""
    tensor = ir.tensor(np.ascontiguousarray(array) if array.ndim else array, name=wish)
    value = ir.Value(
        name=free_name(graph, wish), shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    add_initializer(graph, value)
    return value


def add_initializer(graph: ir.Graph, value: ir.Value) -> None:
    """Register an initializer; where the others are graph inputs too (IR version 3), so is this one."""
    listed = any(other.name in graph.initializers for other in graph.inputs)
    graph.register_initializer(value)
    if listed:
        graph.inputs.append(value)


def free_name(graph: ir.Graph, wish: str) -> str:
    """A value name that the graph does not use yet."""
    taken = graph.meta.get("names")
    if taken is None:
        taken = {str(v.name) for inner in graphs(graph) for v in (*inner.inputs, *inner.initializers.values())}
        taken |= {str(v.name) for node in walk(graph) for v in node.outputs}
        graph.meta["names"] = taken
    name, count = wish, 0
    while name in taken:
        count += 1
        name = f"{wish}_{count}"
    taken.add(name)
    return name


def register(graph: ir.Graph, wish: str, array: Array) -> ir.Value:
    """Add an initializer with this value under a free name like `wish`."""
    return _register(graph, wish, array)


def stored_name(initializer: str, reader: str, k: int) -> str:
    """Name of one reader's view of a shared initializer; no ONNX name ends like this by accident."""
    return f"{initializer}\0{reader}\0{k}"


def view(prepared: Prepared) -> View:
    """The whole model as coupling sees it."""
    graph, facts = prepared.model.graph, prepared.facts
    stored, aliases = _stored(prepared)
    consts = facts.small | {name: facts.values[name] for name in prepared.static if name in facts.values}
    moves = prepared.moving.items()
    partly = {name: np.ma.array(facts.values[name], mask=mask) for name, mask in moves if mask.any()}
    nodes = []
    shapes: dict[str, Shape] = {}
    homes = {body: body_name(node, key) for node in walk(graph) for key, body in bodies(node).items()}
    for node in walk(graph):
        opset = prepared.model.opset_imports.get(node.domain, 1)
        seen = op_node(node, opset, facts, consts, aliases.get(node, {}), partly)
        nodes.append(replace(seen, within=homes[node.graph]) if node.graph in homes else seen)
        shapes |= nodes[-1].shapes
    inputs = tuple(names(true_inputs(graph)))
    for name in (*inputs, *names(graph.outputs)):
        if name in facts.shapes:
            shapes[name] = facts.shapes[name]
    dynamic = {
        Axis(name, k)
        for name, shape in shapes.items()
        if name not in stored
        for k, size in enumerate(shape)
        if prepared.other.shapes.get(name, shape)[k : k + 1] != (size,)
    }
    return View(tuple(nodes), shapes, inputs, tuple(names(graph.outputs)), stored, frozenset(dynamic))


def _stored(prepared: Prepared) -> tuple[dict[str, Stored], dict[ir.Node, dict[int, str]]]:
    """Initializers as their readers see them, and the alias of each reader's input."""
    graph = prepared.model.graph
    stored: dict[str, Stored] = {}
    aliases: dict[ir.Node, dict[int, str]] = {}
    outputs = set(names(graph.outputs))
    nodes = set(walk(graph))
    for name, value in initializers(graph).items():
        shape = prepared.facts.shapes.get(name)
        if shape is None or value.const_value is None:
            continue
        uses = [(use.node, use.idx) for use in value.uses() if use.node in nodes]
        uses.sort(key=lambda use: (str(use[0].outputs[0].name), use[1]))
        dtype = value.const_value.dtype.name
        storage = len(uses) > 1 and (len(shape) < 2 or int(np.prod(shape, dtype=np.int64)) <= SMALL)
        if storage and name not in outputs:
            for node, k in uses:
                alias = stored_name(name, str(node.outputs[0].name), k)
                aliases.setdefault(node, {})[k] = alias
                reader = (str(node.outputs[0].name), k)
                stored[alias] = Stored(name, shape, dtype, _role(node, k, dtype), _slot(node, k), (reader,), True)
        elif uses:
            readers = tuple((str(node.outputs[0].name), k) for node, k in uses)
            stored[name] = Stored(name, shape, dtype, _role(*uses[0], dtype), _slot(*uses[0]), readers, False)
    return stored, aliases


def _role(node: ir.Node, k: int, dtype: str) -> str:
    """What an initializer is to the operator that finally uses it, seen through what only moves it."""
    for _ in range(16):
        if k in ops.integers_of(node.domain, node.op_type):
            dtype = "FLOAT"
        carries = node.op_type in PASSES or node.op_type == "DequantizeLinear"
        if not carries or (node.op_type in ("Gather", "DequantizeLinear") and k):
            break
        following = [use for value in node.outputs for use in value.uses()]
        if not following:
            break
        node, k = following[0].node, following[0].idx
    role = ops.role_of(node.domain, node.op_type, k)
    return "index" if role != "quant" and not dtype.startswith(("FLOAT", "BFLOAT", "DOUBLE")) else role


def _slot(node: ir.Node, k: int) -> str:
    return f"{node.op_type}.{k}"
