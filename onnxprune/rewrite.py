"""The one place that changes a model: slice what is stored, resize what has its sizes written down.

Every size follows from counting survivors. The result is inferred node by node and compared with those counts, so a
wrong rule is caught here, with the name of the node, before anything runs.
"""

from __future__ import annotations

from collections import ChainMap, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from onnxprune import interface, ops
from onnxprune.branches import SKIP_NORMS, Branches, cut_edges, operands
from onnxprune.dims import DimGraph, keep_of
from onnxprune.errors import InternalError
from onnxprune.infer import (
    Facts,
    bodies,
    enter,
    home,
    initializers,
    note_initializer,
    op_node,
    seed,
    step,
    true_inputs,
    walk,
)
from onnxprune.model import Prepared, add_initializer, dismantle, free_name, register
from onnxprune.types import Array, Axis, Mask, OpNode, Positions, Shape, View
from onnxprune.weights import taken

Keep = Callable[[Axis], Mask]


def apply(prepared: Prepared, dims: DimGraph, view: View, alive: Mask, branches: Branches | None = None) -> ir.Model:
    """A smaller copy of the model in which only alive labels, and after them branches, are left.

    Raises InternalError, with the node as object, where a shape does not follow the survivor counts.
    """
    model = prepared.model.clone()
    model.graph.meta.pop("names", None)
    nodes = list(model.graph)

    def keep(axis: Axis) -> Mask:
        return keep_of(dims, alive, axis, view.shapes[axis.value][axis.index])

    wanted = {
        name: tuple(int(keep(Axis(name, k)).sum()) if size > 1 else size for k, size in enumerate(shape))
        for name, shape in view.shapes.items()
    }
    _slice_initializers(model.graph, view, wanted, keep)
    _narrow_interface(model, view, wanted, keep)
    if branches is not None and (goes := branches.gone(alive)).any():
        _bypass(model, nodes, branches, goes)
    _drop_pieces(model.graph, view, keep)
    _resize_nodes(model, prepared, dims, view, wanted, keep)
    outputs = set(model.graph.outputs)
    for node in walk(model.graph):
        inner = [value for body in bodies(node).values() for value in (*body.inputs, *body.outputs)]
        for value in node.outputs:
            if value not in outputs:  # what exporters wrote down is stale now
                value.shape, value.type = None, None
        for value in inner:  # a round's number is a scalar or not, as is written down
            if (name := str(value.name)) in wanted and wanted[name] != view.shapes[name]:
                value.shape = None
    return model


def _narrow_interface(model: ir.Model, view: View, wanted: Mapping[str, Shape], keep: Keep) -> None:
    """Caches that lose positions: their shapes as declared, and what is left of them noted in the metadata."""
    narrowed: dict[str, dict[int, Positions]] = {}
    for value in (*true_inputs(model.graph), *model.graph.outputs):
        name = str(value.name)
        masks = {k: keep(Axis(name, k)) for k in range(len(view.shapes[name]))} if name in view.shapes else {}
        left = {k: np.flatnonzero(mask) for k, mask in masks.items() if not mask.all()}
        if left and value.shape is not None:
            value.shape = ir.Shape([wanted[name][k] if k in left else dim for k, dim in enumerate(value.shape)])
            narrowed[name] = left
    model.metadata_props.update(interface.note(narrowed))


def _slice_initializers(graph: ir.Graph, view: View, wanted: Mapping[str, Shape], keep: Keep) -> None:
    """Take the survivors of every initializer; readers that lose different positions get copies of their own."""
    nodes = {str(node.outputs[0].name): node for node in walk(graph)}
    values = initializers(graph)
    variants: dict[str, dict[tuple[bytes, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, stored in view.stored.items():
        kept = tuple(keep(Axis(name, k)).tobytes() for k in range(len(stored.shape)))
        variants[stored.initializer][kept].append(name)
    for initializer, by_mask in variants.items():
        value = values[initializer]
        others = sum(1 for _ in value.uses()) - sum(len(view.stored[n].uses) for ns in by_mask.values() for n in ns)
        for aliases in by_mask.values():
            stored = view.stored[aliases[0]]
            if wanted[aliases[0]] == stored.shape:
                continue
            assert value.const_value is not None
            masks = {axis: keep(Axis(aliases[0], axis)) for axis in range(len(stored.shape))}
            left = {axis: np.flatnonzero(mask) for axis, mask in masks.items() if not mask.all()}
            alone = len(by_mask) == 1 and not others
            name = initializer if alone else free_name(graph, initializer)
            tensor = taken(value.const_value, left, name)
            shape = ir.Shape(wanted[aliases[0]])
            if alone:
                value.const_value, value.shape = tensor, shape
                continue
            fresh = ir.Value(name=name, shape=shape, type=value.type, const_value=tensor)
            add_initializer(graph, fresh)
            for alias in aliases:
                for reader, k in view.stored[alias].uses:
                    nodes[reader].replace_input_with(k, fresh)
        if not value.uses() and not value.is_graph_output():
            (value.graph or graph).initializers.pop(initializer)


def permute(model: ir.Model, view: View, order: Callable[[Axis], Positions | None]) -> tuple[ir.Model, list[str]]:
    """(a copy of a model in which initializers have their positions in another order, those that changed).

    `order` says for an axis, as coupling names it, which position comes where; None: as it is. The model may be what
    `apply` made of the one that `view` shows. Readers that see different orders of a shared initializer get copies.
    """
    model = model.clone()
    model.graph.meta.pop("names", None)
    nodes = {str(node.outputs[0].name): node for node in walk(model.graph)}
    readers: dict[ir.Value, dict[tuple[bytes, ...], list[tuple[ir.Node, int]]]] = defaultdict(lambda: defaultdict(list))
    orders: dict[tuple[bytes, ...], list[Positions | None]] = {}
    for name, stored in view.stored.items():
        found = [order(Axis(name, axis)) for axis in range(len(stored.shape))]
        key = tuple(b"" if positions is None else positions.tobytes() for positions in found)
        if not any(key):
            continue
        orders[key] = found
        for reader, k in stored.uses:
            value = nodes[reader].inputs[k] if reader in nodes else None
            if value is not None and value.const_value is not None:
                readers[value][key].append((nodes[reader], k))
    changed = []
    for value, by_order in readers.items():
        alone = len(by_order) == 1 and len(value.uses()) == sum(map(len, by_order.values()))
        for key, uses in by_order.items():
            assert value.const_value is not None
            name = str(value.name) if alone else free_name(model.graph, str(value.name))
            moved = {axis: positions for axis, positions in enumerate(orders[key]) if positions is not None}
            tensor = taken(value.const_value, moved, name)
            if tensor.tobytes() == value.const_value.tobytes():
                continue
            changed.append(name)
            if alone:
                value.const_value = tensor
                continue
            fresh = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=value.type, const_value=tensor)
            add_initializer(model.graph, fresh)
            for node, k in uses:
                node.replace_input_with(k, fresh)
    return model, sorted(changed)


def _resize_nodes(
    model: ir.Model, prepared: Prepared, dims: DimGraph, view: View, wanted: Mapping[str, Shape], keep: Keep
) -> None:
    """Walk the smaller graph; where sizes are written down in a node, write down the new ones."""
    graph = model.graph
    facts = seed(graph, prepared.sizes)
    facts.varying = prepared.facts.varying
    dense_nodes = {name: node for node in view.nodes for name in node.outputs if name}
    for node in walk(graph, lambda node: enter(facts, node)):
        _keep_results(model, node, facts, prepared)
        opset = model.opset_imports.get(node.domain, 1)
        dense = dense_nodes.get(next(str(value.name) for value in node.outputs if value.name))
        if dense is None or dense.op_type != node.op_type:  # stands where a branch was
            step(facts, node, opset)
            continue
        _keep_numbers(model, node, facts, prepared)
        resize = ops.resize_of(node.domain, node.op_type)
        if resize is not None and all(name in dense.shapes for name in (*dense.inputs, *dense.outputs) if name):
            alias = {k: name for k, name in enumerate(dense.inputs) if "\0" in name}
            now = op_node(node, opset, facts, ChainMap(facts.values, facts.small), alias)
            try:
                edit = resize(ops.Resizing(_named(now, dense), dense, wanted, keep, dims.relations.counted.get))
            except KeyError as missing:
                raise InternalError(
                    f"the size in {missing} is not known", object=dense.name or dense.outputs[0]
                ) from None
            if edit is not None:
                _edit(model, node, edit, facts, prepared)
        step(facts, node, opset)
        for name in dense.outputs:
            if name in wanted and name in facts.shapes and facts.shapes[name] != wanted[name]:
                raise InternalError(
                    f"{node.op_type} gives {list(facts.shapes[name])} where {list(wanted[name])} survive",
                    object=dense.name or dense.outputs[0],
                )


def _keep_numbers(model: ir.Model, node: ir.Node, facts: Facts, prepared: Prepared) -> None:
    """A number computed from sizes that is used as a number (a mean's divisor, a position) keeps its dense value."""
    if all(str(out.name) in prepared.facts.values for out in node.outputs if out.name):
        return  # part of such a computation itself
    for k, value in enumerate(node.inputs):
        if value is None or value.producer() is None or ops.is_slot(node.domain, node.op_type, k):
            continue
        now, dense = facts.values.get(str(value.name)), prepared.facts.values.get(str(value.name))
        if now is not None and dense is not None and now.shape == dense.shape and not np.array_equal(now, dense):
            node.replace_input_with(k, _dense_copy(model, node, value, facts, prepared))


def _keep_results(model: ir.Model, node: ir.Node, facts: Facts, prepared: Prepared) -> None:
    """A number computed from sizes that a body hands out keeps its dense value: who reads it outside is not known."""
    for body in bodies(node).values():
        for k, value in enumerate(body.outputs):
            now, dense = facts.values.get(str(value.name)), prepared.facts.values.get(str(value.name))
            if now is not None and dense is not None and now.shape == dense.shape and not np.array_equal(now, dense):
                passed = ir.node("Identity", [value])
                passed.outputs[0].name = passed.name = free_name(model.graph, f"{value.name}_kept")
                body.append(passed)
                passed.replace_input_with(0, _dense_copy(model, passed, value, facts, prepared))
                body.outputs[k] = passed.outputs[0]


def _dense_copy(model: ir.Model, reader: ir.Node, value: ir.Value, facts: Facts, prepared: Prepared) -> ir.Value:
    """The same computation from the dense sizes, inserted before its reader."""
    producer, name = value.producer(), str(value.name)
    if producer is None or np.array_equal(facts.values[name], prepared.facts.values[name]):
        return value
    if producer.op_type in ("Shape", "Size"):
        return _corrected(model, reader, value, facts, prepared.facts.values[name])
    inputs = [v and _dense_copy(model, reader, v, facts, prepared) for v in producer.inputs]
    copy = ir.node(
        producer.op_type,
        inputs,
        dict(producer.attributes),
        domain=producer.domain,
        num_outputs=len(producer.outputs),
    )
    for fresh, old in zip(copy.outputs, producer.outputs, strict=True):
        fresh.name = free_name(model.graph, f"{old.name}_dense")
    copy.name = copy.outputs[0].name
    home(reader).insert_before(reader, copy)
    step(facts, copy, model.opset_imports.get(copy.domain, 1))
    return copy.outputs[producer.outputs.index(value)]


def _named(now: OpNode, dense: OpNode) -> OpNode:
    """The node as it is now, under the names that its values have in the dense model."""
    rename = dict(zip(now.inputs, dense.inputs, strict=False))
    return replace(
        now,
        inputs=tuple(rename.get(name, name) for name in now.inputs),
        shapes={rename.get(name, name): shape for name, shape in now.shapes.items()},
        consts={rename.get(name, name): value for name, value in now.consts.items()},
    )


def _edit(model: ir.Model, node: ir.Node, edit: ops.Edit, facts: Facts, prepared: Prepared) -> None:
    """Write new sizes into a node: attributes, constants, or a correction of a size computed at run time."""
    graph = model.graph
    for key, value in edit.attrs.items():
        if value is None:
            node.attributes.pop(key, None)
        elif isinstance(value, float):
            node.attributes[key] = ir.AttrFloat32(key, value)
        elif isinstance(value, int):
            node.attributes[key] = ir.AttrInt64(key, value)
        else:
            node.attributes[key] = ir.AttrInt64s(key, list(value))
    for k, array in edit.inputs.items():
        if k >= len(node.inputs):
            node.resize_inputs(k + 1)
        old = node.inputs[k]
        name = str(old.name) if old is not None else ""
        if old is not None and not old.is_initializer() and name not in prepared.static:
            if _divides(old):  # (batch heads) // heads: the survivors need not be a multiple
                old = _dense_copy(model, node, old, facts, prepared)
            node.replace_input_with(k, _corrected(model, node, old, facts, array))
            continue
        array = array.astype(facts.values[name].dtype if name in facts.values else np.int64)
        if old is not None and old.is_initializer() and len(old.uses()) == 1 and not old.is_graph_output():
            old.const_value, old.shape = ir.tensor(array, name=name), ir.Shape(array.shape)
            note_initializer(facts, name, old)
            continue
        fresh = register(graph, name or f"{node.outputs[0].name}_sizes", array)
        note_initializer(facts, str(fresh.name), fresh)
        node.replace_input_with(k, fresh)


def _divides(value: ir.Value) -> bool:
    """Whether a computed size came through a division, which loses what is no multiple."""
    pending, seen = [value], set()
    while pending:
        producer = pending.pop().producer()
        if producer is None or producer in seen or producer.op_type in ("Shape", "Size"):
            continue
        if producer.op_type in ("Div", "Mod", "Floor"):
            return True
        seen.add(producer)
        pending += [v for v in producer.inputs if v is not None]
    return False


def _corrected(model: ir.Model, node: ir.Node, old: ir.Value, facts: Facts, wanted: Array) -> ir.Value:
    """old * wanted / now, elementwise: right at every value of the dynamic dimensions that `old` depends on."""
    graph, now = model.graph, facts.values[str(old.name)]
    changed = wanted != now
    if now.shape == wanted.shape and not changed.any():
        return old
    if now.shape != wanted.shape or (now[changed] == 0).any():
        raise InternalError("a size computed at run time cannot follow the survivors", object=str(node.name))
    times = register(graph, f"{old.name}_survivors", np.where(changed, wanted, 1).astype(now.dtype))
    over = register(graph, f"{old.name}_dense", np.where(changed, now, 1).astype(now.dtype))
    multiply = ir.node("Mul", [old, times])
    divide = ir.node("Div", [multiply.outputs[0], over])
    for fresh, tail in ((multiply, "scaled"), (divide, "sizes")):
        fresh.outputs[0].name = free_name(graph, f"{old.name}_{tail}")
        fresh.name = fresh.outputs[0].name
    home(node).insert_before(node, [multiply, divide])
    for value in (times, over):
        note_initializer(facts, str(value.name), value)
    for fresh in (multiply, divide):
        step(facts, fresh, model.opset_imports.get("", 1))
    return divide.outputs[0]


def _bypass(model: ir.Model, nodes: list[ir.Node], branches: Branches, goes: Mask) -> None:
    """Let what is left of each sum pass through; then everything that reaches no output goes."""
    graph, view = model.graph, branches.view
    dropped = [branches.found[k] for k in np.flatnonzero(goes)]
    outputs = {name for branch in dropped for name in branch.outputs}
    for value in [value for value in graph.outputs if value.name in outputs]:
        graph.outputs.remove(value)
    edges = cut_edges(branches, goes)
    for i in sorted({i for i, _ in edges}):
        node, seen = nodes[i], view.nodes[i]
        left = [k for k in operands(seen) if (i, k) not in edges]
        if len(left) > 1:
            kept = [node.inputs[k] for k in left]
            node.resize_inputs(len(left))
            for k, operand in enumerate(kept):
                node.replace_input_with(k, operand)
        elif left:
            _pass_through(model, node, left[0])
    read = {name for name, value in graph.initializers.items() if value.uses()}
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            for body in bodies(node).values():
                dismantle(body)
            graph.remove(node, safe=True)
    inputs = {name for branch in dropped for name in branch.inputs}
    for name in read:
        value = graph.initializers[name]
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(name)
            inputs.add(name)  # listed there too before IR version 4
    for value in [value for value in graph.inputs if value.name in inputs]:
        graph.inputs.remove(value)


def _pass_through(model: ir.Model, node: ir.Node, k: int) -> None:
    """Readers of a sum read its operand `k`, requantised or normalised where the sum does that as well."""
    graph, value = model.graph, node.inputs[k]
    assert value is not None
    if node.op_type == "QLinearAdd":
        scales = [node.inputs[n] if n < len(node.inputs) else None for n in (k + 1, k + 2, 6, 7)]
        if [v and v.const_value and v.const_value.tobytes() for v in scales[:2]] != [
            v and v.const_value and v.const_value.tobytes() for v in scales[2:]
        ]:
            whole = _insert(graph, node, "DequantizeLinear", [value, *scales[:2]])
            value = _insert(graph, node, "QuantizeLinear", [whole, *scales[2:]])
    elif node.op_type in SKIP_NORMS:
        if len(node.outputs) > 3:
            stand_for(graph, node, node.outputs[3], value)
        simple = node.op_type == "SkipSimplifiedLayerNormalization"
        norm = "SimplifiedLayerNormalization" if simple else "LayerNormalization"
        vectors = node.inputs[2:3] if simple else node.inputs[2:4]
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-12
        value = _insert(graph, node, norm, [value, *vectors], {"axis": -1, "epsilon": epsilon})
    stand_for(graph, node, node.outputs[0], value)


def _insert(
    graph: ir.Graph,
    before: ir.Node,
    op_type: str,
    inputs: list[ir.Value | None],
    attrs: Mapping[str, object] | None = None,
) -> ir.Value:
    """The output of a new node."""
    while inputs[-1] is None:
        inputs.pop()
    node = ir.node(op_type, inputs, attrs or {})  # type: ignore[arg-type]
    node.outputs[0].name = node.name = free_name(graph, f"{before.outputs[0].name}_passed")
    graph.insert_before(before, node)
    return node.outputs[0]


def stand_for(graph: ir.Graph, node: ir.Node, old: ir.Value, value: ir.Value) -> None:
    """Readers of a value read another; a graph output keeps its name, on a copy."""
    if old.is_graph_output():
        copy, name = ir.node("Identity", [value]), old.name
        copy.name, old.name = free_name(graph, f"{name}_passed"), free_name(graph, f"{name}_sum")
        copy.outputs[0].name, copy.outputs[0].shape, copy.outputs[0].type = name, old.shape, old.type
        graph.insert_before(node, copy)
        value = copy.outputs[0]
        graph.outputs[:] = [value if output is old else output for output in graph.outputs]
    old.replace_all_uses_with(value)


def _drop_pieces(graph: ir.Graph, view: View, keep: Keep) -> None:
    """Outputs of a Split of which nothing is left go, if nobody reads them."""
    for node in list(walk(graph)):
        whole = str(node.inputs[0].name) if node.inputs and node.inputs[0] is not None else ""
        if node.op_type != "Split" or node.domain or whole not in view.shapes:
            continue
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        axis %= len(view.shapes[whole])
        ends = np.cumsum([view.shapes[str(value.name)][axis] for value in node.outputs])
        pieces = np.split(keep(Axis(whole, axis)), ends[:-1])
        empty = [not (value.uses() or value.is_graph_output() or piece.any())
                 for value, piece in zip(node.outputs, pieces, strict=True)]  # fmt: skip
        if not any(empty) or all(empty):
            continue
        left = [value for value, goes in zip(node.outputs, empty, strict=True) if not goes]
        fresh = [ir.Value(name=value.name) for value in left]
        smaller = ir.node("Split", list(node.inputs), dict(node.attributes), outputs=fresh, name=node.name)
        for old, new in zip(left, fresh, strict=True):
            old.replace_all_uses_with(new)
        home(node).insert_before(node, smaller)
        home(node).remove(node, safe=True)
