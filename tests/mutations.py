"""One thing wrong with a legal model: what the tests of mutations and tools/fuzz.py draw from."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import onnx
from onnx import TensorProto, helper

Change = Callable[[onnx.ModelProto, random.Random], None]
CHANGES: dict[str, Change] = {}
SIZES = (-1, 0, 1, 2, 3, 5, 7, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1)
NAMES = ("", "x", "y0", "no such", "\x1b[31m", "a" * 300, "../../etc/passwd", "é", "w0", "v0_0")


def change(function: Change) -> Change:
    """Register one."""
    CHANGES[function.__name__] = function
    return function


def _any(rng: random.Random, things: Sequence[object]) -> int:
    """A place in a sequence. Raises IndexError if it is empty: nothing to change."""
    if not len(things):
        raise IndexError
    return rng.randrange(len(things))


def _bodies(model: onnx.ModelProto) -> list[onnx.GraphProto | onnx.FunctionProto]:
    """Functions, and the graphs inside nodes."""
    found: list[onnx.GraphProto | onnx.FunctionProto] = list(model.functions)
    for graph in (model.graph, *found):
        found += [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return found


def _node(model: onnx.ModelProto, rng: random.Random) -> onnx.NodeProto:
    """Any node, half of the time one inside another or in a function, where there are such."""
    inner = [node for body in _bodies(model) for node in body.node] if rng.random() < 0.5 else []
    nodes = inner or model.graph.node
    return nodes[_any(rng, nodes)]


def _tensor(model: onnx.ModelProto, rng: random.Random) -> onnx.TensorProto:
    """Any initializer, or now and then a tensor in an attribute."""
    held = [a.t for node in model.graph.node for a in node.attribute if a.HasField("t")] if rng.random() < 0.2 else []
    tensors = held or model.graph.initializer
    return tensors[_any(rng, tensors)]


@change
def node_dropped(model: onnx.ModelProto, rng: random.Random) -> None:
    del model.graph.node[_any(rng, model.graph.node)]


@change
def node_twice(model: onnx.ModelProto, rng: random.Random) -> None:
    model.graph.node.append(_node(model, rng))


@change
def nodes_shuffled(model: onnx.ModelProto, rng: random.Random) -> None:
    nodes = list(model.graph.node)
    rng.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


@change
def node_of_another_kind(model: onnx.ModelProto, rng: random.Random) -> None:
    kinds = sorted({node.op_type for node in model.graph.node} | {"Conv", "Reshape", "Split", "LSTM", "Loop", "NoSuch"})
    _node(model, rng).op_type = rng.choice(kinds)


@change
def node_of_another_domain(model: onnx.ModelProto, rng: random.Random) -> None:
    _node(model, rng).domain = rng.choice(["com.microsoft", "ai.onnx.ml", "ai.onnx", "no.such"])


@change
def input_of_another_name(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    values = [*NAMES, *(name for other in model.graph.node for name in (*other.input, *other.output))]
    node.input[_any(rng, node.input)] = rng.choice(values)


@change
def output_of_another_name(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    node.output[_any(rng, node.output)] = rng.choice([*NAMES, *model.graph.node[0].input])


@change
def inputs_swapped(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    names = list(node.input)
    rng.shuffle(names)
    node.input[:] = names


@change
def input_more_or_less(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if rng.random() < 0.5:
        node.input.append(rng.choice([*NAMES, *node.output]))
    else:
        del node.input[_any(rng, node.input)]


@change
def output_more_or_less(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if rng.random() < 0.5:
        node.output.append(rng.choice(NAMES))
    else:
        del node.output[_any(rng, node.output)]


@change
def cycle(model: onnx.ModelProto, rng: random.Random) -> None:
    node, other = _node(model, rng), _node(model, rng)
    node.input[_any(rng, node.input)] = other.output[_any(rng, other.output)]


@change
def attribute_dropped(model: onnx.ModelProto, rng: random.Random) -> None:
    nodes = [node for node in model.graph.node if node.attribute]
    node = nodes[_any(rng, nodes)]
    del node.attribute[_any(rng, node.attribute)]


@change
def attribute_of_another_value(model: onnx.ModelProto, rng: random.Random) -> None:
    nodes = [node for node in model.graph.node if node.attribute]
    node = nodes[_any(rng, nodes)]
    k = _any(rng, node.attribute)
    some = [rng.choice(SIZES) for _ in range(rng.randrange(5))]
    value = rng.choice([rng.choice(SIZES), some or [0], 0.5, "text", [0.5], float("nan")])
    attribute = helper.make_attribute(node.attribute[k].name, value)
    node.attribute[k].CopyFrom(attribute)


@change
def attribute_added(model: onnx.ModelProto, rng: random.Random) -> None:
    names = ("axis", "axes", "group", "kernel_shape", "pads", "strides", "perm", "body", "to", "num_heads", "keepdims")
    some = [rng.choice(SIZES) for _ in range(rng.randrange(1, 5))]
    _node(model, rng).attribute.append(helper.make_attribute(rng.choice(names), rng.choice([some[0], some])))


@change
def attribute_without_a_type(model: onnx.ModelProto, rng: random.Random) -> None:
    nodes = [node for node in model.graph.node if node.attribute]
    node = nodes[_any(rng, nodes)]
    node.attribute[_any(rng, node.attribute)].type = rng.randrange(16)  # type: ignore[assignment]


@change
def initializer_dropped(model: onnx.ModelProto, rng: random.Random) -> None:
    del model.graph.initializer[_any(rng, model.graph.initializer)]


@change
def initializer_twice(model: onnx.ModelProto, rng: random.Random) -> None:
    model.graph.initializer.append(_tensor(model, rng))


@change
def initializer_of_another_shape(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    if rng.random() < 0.3:
        tensor.dims.append(rng.choice(SIZES))
    elif rng.random() < 0.5:
        tensor.dims[_any(rng, tensor.dims)] = rng.choice(SIZES)
    else:
        tensor.dims[:] = list(reversed(tensor.dims))


@change
def initializer_of_another_rank(model: onnx.ModelProto, rng: random.Random) -> None:
    """As many elements as before."""
    tensor = _tensor(model, rng)
    if rng.random() < 0.5 or not tensor.dims:
        tensor.dims.insert(rng.randrange(len(tensor.dims) + 1), 1)
    else:
        count = 1
        for size in tensor.dims:
            count *= size
        tensor.dims[:] = [count]


@change
def initializer_of_another_type(model: onnx.ModelProto, rng: random.Random) -> None:
    _tensor(model, rng).data_type = rng.randrange(26)


@change
def initializer_cut(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]


@change
def initializer_garbled(model: onnx.ModelProto, rng: random.Random) -> None:
    """Sizes and indices of all kinds, weights with infinities and NaN."""
    tensor = _tensor(model, rng)
    tensor.raw_data = rng.randbytes(len(tensor.raw_data))


@change
def sizes_of_all_kinds(model: onnx.ModelProto, rng: random.Random) -> None:
    tensors = [t for t in model.graph.initializer if t.data_type == TensorProto.INT64 and t.raw_data]
    tensor = tensors[_any(rng, tensors)]
    k = rng.randrange(len(tensor.raw_data) // 8)
    size = rng.choice([*SIZES, -2, -(1 << 63)]).to_bytes(8, "little", signed=True)
    tensor.raw_data = tensor.raw_data[: 8 * k] + size + tensor.raw_data[8 * k + 8 :]


@change
def data_elsewhere(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    tensor.data_location = TensorProto.EXTERNAL
    if rng.random() < 0.8:
        tensor.ClearField("raw_data")
    places = ["m.onnx", "../m.onnx", "/etc/passwd", "none", ".", "", "a\0b", "m.onnx/x", "./m.onnx"]
    for key, value in (
        ("location", rng.choice(places)),
        ("offset", str(rng.choice([*SIZES, "x", "1e3", " 1"]))),
        ("length", str(rng.choice([*SIZES, len(tensor.raw_data)]))),
        ("checksum", "?"),
    ):
        if rng.random() < 0.8:
            tensor.external_data.add(key=key, value=value)


@change
def input_of_another_shape(model: onnx.ModelProto, rng: random.Random) -> None:
    kind = model.graph.input[_any(rng, model.graph.input)].type.tensor_type
    if rng.random() < 0.3:
        kind.ClearField("shape")
    elif rng.random() < 0.3:
        kind.shape.dim.add().dim_value = rng.choice(SIZES)
    else:
        dim = kind.shape.dim[_any(rng, kind.shape.dim)]
        if rng.random() < 0.5:
            dim.dim_value = rng.choice(SIZES)
        else:
            dim.dim_param = rng.choice(NAMES)


@change
def input_of_another_type(model: onnx.ModelProto, rng: random.Random) -> None:
    value = model.graph.input[_any(rng, model.graph.input)]
    if rng.random() < 0.3:
        value.ClearField("type")
    else:
        value.type.tensor_type.elem_type = rng.randrange(26)


@change
def graph_output_of_another_name(model: onnx.ModelProto, rng: random.Random) -> None:
    output = model.graph.output[_any(rng, model.graph.output)]
    output.name = rng.choice([*NAMES, *(name for node in model.graph.node for name in node.output)])


@change
def input_dropped(model: onnx.ModelProto, rng: random.Random) -> None:
    del model.graph.input[_any(rng, model.graph.input)]


@change
def written_shape_of_another_size(model: onnx.ModelProto, rng: random.Random) -> None:
    name = rng.choice([name for node in model.graph.node for name in node.output] or [""])
    shape = [rng.choice([*SIZES[:7], "n"]) for _ in range(rng.randrange(6))]
    model.graph.value_info.append(helper.make_tensor_value_info(name, rng.randrange(1, 17), shape))


@change
def another_opset(model: onnx.ModelProto, rng: random.Random) -> None:
    if rng.random() < 0.2:
        del model.opset_import[:]
    else:
        model.opset_import[_any(rng, model.opset_import)].version = rng.choice([-1, 0, 1, 6, 9, 12, 13, 18, 23, 99])


@change
def another_version(model: onnx.ModelProto, rng: random.Random) -> None:
    model.ir_version = rng.choice([0, 1, 2, 3, 4, 7, 11, 14, 99, 1 << 40])


@change
def called_by_itself(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    node.op_type, node.domain = "f", "own"
    inside = [helper.make_node("f", ["a"], ["b"], domain=rng.choice(["own", ""]))]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    model.functions.append(helper.make_function("own", "f", ["a"], ["b"], inside, opsets))
    model.opset_import.append(helper.make_opsetid("own", 1))


@change
def inside_a_branch(model: onnx.ModelProto, rng: random.Random) -> None:
    """A node goes into both branches of an If, which capture what it reads."""
    k = _any(rng, model.graph.node)
    node = model.graph.node[k]
    inner = onnx.NodeProto()
    inner.CopyFrom(node)
    inner.output[:] = [f"{name}_in" for name in node.output]
    out = [onnx.ValueInfoProto(name=name) for name in inner.output]
    body = helper.make_graph([inner], "b", [], out)
    model.graph.initializer.append(helper.make_tensor("cond", TensorProto.BOOL, [], [True]))
    node.CopyFrom(helper.make_node("If", ["cond"], list(node.output), then_branch=body, else_branch=body))


@change
def node_with_nothing(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    node.ClearField(rng.choice(["input", "output", "attribute", "op_type"]))


@change
def name_of_a_body(model: onnx.ModelProto, rng: random.Random) -> None:
    """An input, an output or a formal parameter of a body goes, comes twice or has another name."""
    bodies = _bodies(model)
    body = bodies[_any(rng, bodies)]
    values = body.input if rng.random() < 0.5 else body.output
    k, what = _any(rng, values), rng.randrange(3)
    if what == 0:
        del values[k]
    elif what == 1:
        values.append(values[k])  # type: ignore[arg-type]
    elif isinstance(body, onnx.GraphProto):
        values[k].name = rng.choice(NAMES)  # type: ignore[union-attr]
    else:
        values[k] = rng.choice(NAMES)  # type: ignore[assignment, call-overload]


@change
def texts_of_all_kinds(model: onnx.ModelProto, rng: random.Random) -> None:
    name = rng.choice(NAMES)
    model.producer_name = model.doc_string = model.graph.name = name
    node = _node(model, rng)
    node.name = node.doc_string = node.overload = rng.choice(NAMES)
    model.metadata_props.add(key=name, value=name)


@change
def a_domain_more(model: onnx.ModelProto, rng: random.Random) -> None:
    domain = rng.choice(["", "ai.onnx", "ai.onnx.ml", "com.microsoft", "own", "a" * 300])
    model.opset_import.add(domain=domain, version=rng.choice([-1, 0, 1, 5, 17, 99]))


def mutated(model: onnx.ModelProto, seed: int, count: int = 1) -> tuple[list[str], bytes]:
    """(what was changed, the file): some changes, now and then bytes of the file itself."""
    rng = random.Random(seed)
    done: list[str] = []
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for _ in range(count):
        name = rng.choice(list(CHANGES))
        try:
            CHANGES[name](changed, rng)
        except (IndexError, ValueError):
            continue
        done.append(name)
    content = bytearray(changed.SerializeToString())
    if rng.random() < 0.1:
        done.append("file cut")
        del content[rng.randrange(len(content)) :]
    elif rng.random() < 0.15:
        done.append("bytes flipped")
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    return done, bytes(content)
