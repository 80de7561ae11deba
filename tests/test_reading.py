"""Models that strangers made: each bad one is one line with the right code, each odd one works or says why not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from onnxprune.cli import main

Model = onnx.ModelProto
NAMES = ("x", "w1", "b1", "w2", "b2", "h", "r", "y")


def mlp(names: tuple[str, ...] = NAMES, opset: int = 17, ir: int = 8, dtype: type = np.float32) -> Model:
    """x [n, 5] -> 16 hidden -> 3."""
    rng = np.random.default_rng(0)
    x, w1, b1, w2, b2, h, r, y = names
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", [x, w1, b1], [h], "first"),
            helper.make_node("Relu", [h], [r], "act"),
            helper.make_node("Gemm", [r, w2, b2], [y], "second"),
        ],
        "mlp",
        [helper.make_tensor_value_info(x, kind, ["n", 5])],
        [helper.make_tensor_value_info(y, kind, ["n", 3])],
        [
            numpy_helper.from_array(rng.standard_normal(shape).astype(dtype), name)
            for name, shape in ((w1, (5, 16)), (b1, (16,)), (w2, (16, 3)), (b2, (3,)))
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def changed(change: Callable[[Model], object], **given: object) -> bytes:
    model = mlp(**given)  # type: ignore[arg-type]
    change(model)
    return model.SerializeToString()


def weight(model: Model) -> TensorProto:
    return model.graph.initializer[0]


def add(model: Model, op: str, inputs: list[str], output: str, kind: int | None = None, **attributes: object) -> None:
    """One more node, its output a graph output where a type is given."""
    model.graph.node.append(helper.make_node(op, inputs, [output], **attributes))
    if kind is not None:
        model.graph.output.append(helper.make_tensor_value_info(output, kind, None))


def sparse(model: Model, places: Any = (1, 7), shape: tuple[int, ...] | list[int] = (5, 16), kind: int = 1) -> None:
    """Two weights or none, the others zero."""
    values = numpy_helper.from_array(np.ones(2 if len(places) else 0, np.float32), "w1")
    values.data_type = kind
    index = numpy_helper.from_array(np.array(places, np.int64), "at")
    model.graph.initializer.remove(weight(model))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, index, list(shape)))


def function(model: Model, body: str) -> None:
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    inside = helper.make_node(body, ["a"], ["b"], domain="" if body == "Relu" else "my")
    model.functions.append(helper.make_function("my", "Bend", ["a"], ["b"], [inside], domains))
    model.graph.node[1].op_type, model.graph.node[1].domain = "Bend", "my"
    model.opset_import.append(domains[1])


def node(model: Model, **fields: str) -> None:
    for key, value in fields.items():
        setattr(model.graph.node[1], key, value)


def typed(model: Model, kind: int) -> None:
    model.graph.input[0].type.tensor_type.elem_type = kind


def attention(model: Model, **attributes: object) -> None:
    """ONNX Runtime's own operator, whose attributes no schema describes here."""
    add(model, "Unsqueeze", ["r", "axes"], "q")
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "axes"))
    add(model, "MultiHeadAttention", ["q", "q", "q"], "z", TensorProto.FLOAT, domain="com.microsoft", **attributes)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def picked(model: Model) -> None:
    for name, value in (("none", np.zeros((0, 3), np.float32)), ("at", np.array([1, 2]))):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    add(model, "Gather", ["none", "at"], "z", TensorProto.FLOAT)
    add(model, "MatMul", ["y", "z"], "zz", TensorProto.FLOAT)


def denoted(model: Model) -> None:
    model.graph.input[0].type.denotation = "batch"


def around(model: Model) -> None:
    branch = helper.make_graph([], "branch", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "go"))
    add(model, "If", ["go"], "z", TensorProto.FLOAT, then_branch=branch, else_branch=branch)


def sparse_constant(model: Model, place: int) -> None:
    values, index = numpy_helper.from_array(np.ones(1, np.float32)), numpy_helper.from_array(np.array([place]))
    add(model, "Constant", [], "c", TensorProto.FLOAT, sparse_value=helper.make_sparse_tensor(values, index, [3]))


def wide(model: Model, size: int) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = size


# name: (bytes, words of the message)
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty file"),
    "text": (b"hello, no model here\n" * 9, "not an ONNX model"),
    "html": (b"<!doctype html>", "HTML"),
    "zip": (b"PK\x03\x04" + bytes(99), "zip"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "pickle": (b"\x80\x02}q\x00.", "pickle"),
    "half": (mlp().SerializeToString()[:300], "cut short"),
    "one byte short": (mlp().SerializeToString()[:-1], "cut short"),
    "no graph": (changed(lambda m: m.ClearField("graph")), "no graph"),
    "cycle": (changed(lambda m: m.graph.node[0].input.__setitem__(0, "r")), "'first': depends on its own"),
    "two producers": (changed(lambda m: m.graph.node[1].output.__setitem__(0, "h")), "'h': defined twice"),
    "initializer twice": (changed(lambda m: m.graph.initializer.append(weight(m))), "'w1': defined twice"),
    "input twice": (changed(lambda m: m.graph.input.append(m.graph.input[0])), "'x': defined twice"),
    "dangling": (changed(lambda m: m.graph.node[0].input.__setitem__(1, "ghost")), "'ghost', which nothing defines"),
    "no such output": (changed(lambda m: setattr(m.graph.output[0], "name", "ghost")), "ghost"),
    "huge dim": (changed(lambda m: weight(m).dims.__setitem__(0, 2**62)), "'w1': 320 bytes of data"),
    "negative dim": (changed(lambda m: weight(m).dims.__setitem__(0, -5)), "'w1': negative size"),
    "many huge dims": (changed(lambda m: weight(m).dims.extend([2**62] * 999)), "'w1'"),
    "short data": (changed(lambda m: setattr(weight(m), "raw_data", bytes(316))), "316 bytes of data"),
    "no data": (changed(lambda m: weight(m).ClearField("raw_data")), "0 elements of data"),
    "data twice": (changed(lambda m: weight(m).float_data.extend([1.0] * 80)), "'w1': holds its data twice"),
    "element type": (changed(lambda m: setattr(weight(m), "data_type", 77)), "unknown element type 77"),
    "strings": (
        changed(lambda m: m.graph.initializer.append(TensorProto(name="s", data_type=8, dims=[10**12]))),
        "'s': 0 strings",
    ),
    "sparse, outside": (changed(lambda m: sparse(m, [1, 80])), "'w1': indices of a sparse tensor that lie outside"),
    "sparse, negative": (changed(lambda m: sparse(m, [-1, 7])), "'w1': indices of a sparse tensor that lie outside"),
    "sparse, twice": (changed(lambda m: sparse(m, [7, 7])), "'w1': indices of a sparse tensor that lie outside"),
    "sparse, more indices": (changed(lambda m: sparse(m, [1, 2, 3])), "'w1': indices that do not suit"),
    "sparse, gigabytes": (changed(lambda m: sparse(m, [1, 7], [1 << 20, 1 << 20])), "'w1': written out"),
    "sparse, of strings": (changed(lambda m: sparse(m, [1, 7], kind=TensorProto.STRING)), "'w1': "),
    "opset 999": (mlp(opset=999).SerializeToString(), "opset 999"),
    "opset 0": (mlp(opset=0).SerializeToString(), "opset 0"),
    "no opset": (changed(lambda m: m.ClearField("opset_import")), "no operator set"),
    "endless function": (changed(lambda m: function(m, "Bend"), ir=9), "'Bend': calls itself"),
    "no UTF-8": (mlp().SerializeToString().replace(b"first", b"fi\xff\xfet"), "not UTF-8"),
    "shapes contradict": (changed(lambda m: m.graph.node[2].input.__setitem__(1, "w1")), "ONNX Runtime cannot"),
    "unknown operator": (changed(lambda m: node(m, op_type="Foo")), "Foo"),
    "a domain of 60 kB": (changed(lambda m: node(m, domain="a" * 60_000)), "ONNX Runtime cannot"),
    "two values in a Constant": (
        changed(lambda m: add(m, "Constant", [], "c", value_int=1, value_float=2.0)),
        "'c': has 2 values instead of one",
    ),
    "no value in a Constant": (changed(lambda m: add(m, "Constant", [], "c")), "'c': has 0 values"),
    "custom operator": (changed(lambda m: node(m, op_type="Foo", domain="their")), "--unproven"),
    "too few inputs": (changed(lambda m: m.graph.node[0].input.__delitem__(slice(1, 9))), "'first': reads 1 values, 2"),
    "too many outputs": (changed(lambda m: m.graph.node[0].output.append("o")), "'first': makes 2 values, 1 for"),
    "attribute of another type": (
        changed(lambda m: add(m, "Softmax", ["x"], "z", TensorProto.FLOAT, axis=[1])),
        "has type INTS, not INT",
    ),
    "attribute without a type": (
        changed(lambda m: m.graph.node[1].attribute.add(name="alpha", f=1.0)),
        "has type UNDEFINED",
    ),
    "group 0": (changed(lambda m: add(m, "Conv", ["x", "w1"], "z", TensorProto.FLOAT, group=0)), "ONNX Runtime"),
    "NaN": (changed(lambda m: setattr(weight(m), "raw_data", b"\xff" * 320)), "no output is finite"),
}


BAD |= {
    "a node that makes nothing": (
        changed(lambda m: m.graph.node.append(helper.make_node("Foo", ["y"], [], "last", domain="their"))),
        "'last': makes 0 values, 1 and more",
    ),
    "a function given too much": (
        changed(lambda m: (function(m, "Relu"), m.graph.node[1].input.append("h")), ir=9),
        "'act': calls 'Bend' with more values",
    ),
    "a function that reads what nothing defines": (
        changed(lambda m: (function(m, "Relu"), m.functions[0].node[0].input.__setitem__(0, "ghost")), ir=9),
        "function 'Bend': node 'b': reads 'ghost'",
    ),
    "a function that makes nothing": (
        changed(lambda m: (function(m, "Relu"), m.functions[0].output.__setitem__(0, "ghost")), ir=9),
        "function 'Bend': ghost: graph output that nothing defines",
    ),
    "an input of 70 axes": (
        changed(lambda m: [m.graph.input[0].type.tensor_type.shape.dim.add(dim_value=1) for _ in range(68)]),
        "'x': 70 axes",
    ),
    "a branch that gives out what lies around it": (changed(around), "y: lies around the graph"),
    "Gather along no axis": (
        changed(
            lambda m: (
                m.graph.initializer.append(numpy_helper.from_array(np.array([1]), "at")),
                add(m, "Gather", ["y", "at"], "z", TensorProto.FLOAT, axis=4),
            )
        ),
        "ONNX Runtime cannot",
    ),
    "sparse Constant": (changed(lambda m: sparse_constant(m, 3)), "'c': indices of a sparse tensor that lie outside"),
    "input without a type": (changed(lambda m: m.graph.input[0].ClearField("type")), "'x': has no type"),
    "input without an element type": (changed(lambda m: typed(m, 0)), "'x': has no type"),
    "their attribute of another type": (changed(lambda m: attention(m, num_heads=[0.5])), "attribute type"),
    "no heads": (changed(lambda m: attention(m, num_heads=0)), "num_heads"),
    "positions of nothing": (changed(lambda m: picked(m)), "ONNX Runtime cannot"),
    "a text that is not UTF-8": (changed(lambda m: denoted(m)).replace(b"batch", b"ba\xff\xfeh"), "not UTF-8"),
    "an input of gigabytes": (changed(lambda m: wide(m, 1 << 24)), "ONNX Runtime cannot"),
}


def prune(path: Path, *more: object) -> Result:
    given = ["prune", path, "-o", path.with_name("out.onnx"), "--ratio", 0.5, "--round-to", 1, "--no-measure", *more]
    return CliRunner().invoke(main, [str(a) for a in given])


@pytest.mark.parametrize("name", BAD)
def test_bad_models_are_one_line_and_exit_2(name: str, tmp_path: Path) -> None:
    content, words = BAD[name]
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    result = prune(path, "--json")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("onnxprune: error: ")
    assert result.stderr.count("\n") == 1
    assert "bad.onnx" in result.stderr
    assert words in result.stderr
    assert len(result.stderr) < 800
    assert json.loads(result.stdout)["code"] == 2
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["bad.onnx"]


def constants(model: Model) -> None:
    for tensor in model.graph.initializer:
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    model.graph.ClearField("initializer")


def unsorted(model: Model) -> None:
    nodes = list(model.graph.node)[::-1]
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)


def strings(model: Model) -> None:
    model.graph.initializer.append(helper.make_tensor("s", TensorProto.STRING, [2], [b"a", b"b"]))
    add(model, "Identity", ["s"], "t", TensorProto.STRING)


def quantised(model: Model, kind: int) -> None:
    model.graph.initializer.append(helper.make_tensor("q", kind, [3], [1, 2, -3]))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "scale"))
    add(model, "DequantizeLinear", ["q", "scale"], "d")
    add(model, "Add", ["y", "d"], "z", TensorProto.FLOAT)


def training(model: Model) -> None:
    out = helper.make_tensor_value_info("w1n", TensorProto.FLOAT, [5, 16])
    step = helper.make_graph([helper.make_node("Add", ["w1", "w1"], ["w1n"])], "step", [], [out])
    model.training_info.add().algorithm.CopyFrom(step)


def sequence(model: Model) -> None:
    add(model, "SequenceConstruct", ["y"], "s")
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, ["n", 3])
    model.graph.output.append(helper.make_value_info("s", helper.make_sequence_type_proto(tensor)))


def names_by_class(model: Model) -> None:
    node = helper.make_node("ZipMap", ["y"], ["m"], domain="ai.onnx.ml", classlabels_int64s=[1, 2, 3])
    model.graph.node.append(node)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    number = helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    rows = helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.INT64, number))
    model.graph.output.append(helper.make_value_info("m", rows))


def optional(model: Model) -> None:
    add(model, "Optional", ["y"], "o")
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, ["n", 3])
    model.graph.output.append(helper.make_value_info("o", helper.make_optional_type_proto(tensor)))


def inputs_too(model: Model) -> None:
    model.graph.input.extend(helper.make_tensor_value_info(t.name, 1, list(t.dims)) for t in model.graph.initializer)


def unused(model: Model) -> None:
    for kind in (TensorProto.COMPLEX64, TensorProto.FLOAT8E5M2, TensorProto.UINT4, TensorProto.BFLOAT16):
        model.graph.initializer.append(helper.make_tensor(f"unused{kind}", kind, [2], [1, 2]))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((0, 4), np.float32), "nothing"))
    add(model, "Relu", ["h"], "nobody")


def nameless(model: Model) -> None:
    model.graph.initializer.insert(0, weight(model))
    model.graph.initializer[0].name = ""


def twice(model: Model) -> None:
    """Two layers with one bias, of which each loses positions of its own."""
    model.graph.initializer.append(numpy_helper.from_array(np.eye(16, dtype=np.float32), "w16"))
    add(model, "Gemm", ["r", "w16", "b1"], "h2")
    add(model, "Relu", ["h2"], "r2")
    model.graph.node[2].input[0] = "r2"
    unsorted(model)


def texts(model: Model) -> None:
    model.doc_string = model.producer_name = model.graph.name = model.graph.node[0].doc_string = "Caf"
    model.metadata_props.add(key="Caf", value="Caf")


def called_unsorted(model: Model) -> None:
    function(model, "Relu")
    inside = [helper.make_node("Relu", ["c"], ["b"]), helper.make_node("Relu", ["a"], ["c"])]
    model.functions[0].ClearField("node")
    model.functions[0].node.extend(inside)


def nothing(model: Model) -> None:
    pass


ODD: dict[str, bytes] = {
    "unsorted": changed(unsorted),
    "sparse": changed(sparse),
    "sparse, by row and column": changed(lambda m: sparse(m, [[0, 1], [4, 15]])),
    "sparse, of nothing": changed(lambda m: sparse(m, [])),
    "sparse Constant": changed(lambda m: sparse_constant(m, 2)),
    "unsorted inside a function": changed(called_unsorted, ir=9),
    "no node names": changed(lambda m: [n.ClearField("name") for n in m.graph.node]),
    "Constant nodes": changed(constants),
    "IR 3": changed(inputs_too, opset=9, ir=3),
    "ai.onnx": changed(lambda m: setattr(m.opset_import[0], "domain", "ai.onnx")),
    "spaces and colons": changed(nothing, names=("x in", "w 1", "b 1", "w:2", "b/2", "h h", "r\tr", "y:0")),
    "unicode": changed(nothing, names=("вход", "重み", "β", "🦊", "é", "ñ", "ü", "выход")),
    "60 kB": changed(nothing, names=tuple(c * 60_000 for c in "abcdefgi")),
    "control": changed(nothing, names=("x\x1b[31m", "w\n1", "b\r1", "w\x002", "b\x07", "h\x1b]0;hi\x07", "r", "y")),
    "paths": changed(nothing, names=("../x", "/etc/w", "..", "a/b", "~", "$HOME", "`id`", "%s{0}")),
    "our own separator": changed(nothing, names=("x\0reader\0001", "w1", "w1\0second\0001", "w2", "b", "h", "r", "y")),
    "fp16": changed(nothing, dtype=np.float16),
    "fp64": changed(nothing, dtype=np.float64),
    "strings": changed(strings),
    "int4": changed(lambda m: quantised(m, TensorProto.INT4), opset=21, ir=10),
    "float8": changed(lambda m: quantised(m, TensorProto.FLOAT8E4M3FN), opset=21, ir=10),
    "odd types unused": changed(unused, opset=21, ir=11),
    "an initializer without a name": changed(nameless),
    "training info": changed(training),
    "sequence output": changed(sequence),
    "map output": changed(names_by_class),
    "optional output": changed(optional, opset=18),
    "unknown field": mlp().SerializeToString() + b"\xfa\x3f\x03abc",
    "before IR 4, one bias for two layers": changed(twice, opset=9, ir=3),
    "texts that are not UTF-8": changed(texts).replace(b"Caf", b"C\xff\xfe"),
    "no static types": changed(lambda m: m.graph.output[0].ClearField("type")),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_models_are_pruned_all_the_same(name: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.onnx"
    path.write_bytes(ODD[name])
    result = prune(path)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert all(c.isprintable() or c == "\n" for c in result.stdout)
    assert path.read_bytes() == ODD[name]
    dense, small = onnx.load(path), onnx.load(tmp_path / "out.onnx")
    kinds = [[(v.name, v.type.WhichOneof("value")) for v in m.graph.output] for m in (dense, small)]
    assert kinds[1] == kinds[0] or name == "no static types"
    assert small.ir_version == dense.ir_version
    stored = [
        [*(t for t in m.graph.initializer if t.data_type in (1, 10, 11)), *m.graph.sparse_initializer]
        for m in (dense, small)
    ]
    held = [sum(np.prod(t.dims) for t in tensors) for tensors in stored]
    assert name == "Constant nodes" or held[1] < held[0]


def test_sizes_that_no_machine_has_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    def stretch(model: Model) -> None:
        for value in (model.graph.input[0], model.graph.output[0]):
            value.type.tensor_type.shape.dim[0].dim_value = 2**40

    path = tmp_path / "large.onnx"
    path.write_bytes(changed(stretch))
    result = prune(path)
    assert result.exit_code == 4
    assert "large.onnx: x:0: an axis of 1,099,511,627,776 positions" in result.stderr


def test_a_custom_operator_is_kept_and_what_is_understood_goes_with_unproven(tmp_path: Path) -> None:
    path = tmp_path / "custom.onnx"
    path.write_bytes(changed(lambda m: add(m, "Foo", ["y"], "z", TensorProto.FLOAT, domain="their"), ir=8))
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("their", 1))
    onnx.save(model, path)
    assert prune(path).exit_code == 2
    result = prune(path, "--unproven", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["verification"]["proven"] is False


# External data ------------------------------------------------------------------------------------------------------


def external(tmp_path: Path, **changes: str | None) -> Path:
    """A model whose w1 lies at offset 64 of deep/a.bin and w2 in b.bin; `changes` are keys of w1's entry."""
    model = mlp()
    (tmp_path / "deep").mkdir()
    for tensor, location, offset in ((weight(model), "deep/a.bin", 64), (model.graph.initializer[2], "b.bin", 0)):
        (tmp_path / location).write_bytes(bytes(offset) + tensor.raw_data + b"rest")
        entries = {"location": location, "offset": str(offset), "length": str(len(tensor.raw_data)), "mood": "odd"}
        entries |= changes if tensor.name == "w1" else {}  # type: ignore[arg-type]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in entries.items():
            if value is not None:
                tensor.external_data.add(key=key, value=value)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_weights_over_several_files_and_folders_are_read_and_written(tmp_path: Path) -> None:
    path = external(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    (tmp_path / "plain.onnx").write_bytes(mlp().SerializeToString())
    gate = ["compare", str(path), str(tmp_path / "plain.onnx"), "--max-relative-error", "0"]
    assert CliRunner().invoke(main, gate).exit_code == 0
    assert prune(path).exit_code == 0
    assert all(p.read_bytes() == content for p, content in before.items())
    assert {t.name: list(t.dims) for t in onnx.load(tmp_path / "out.onnx").graph.initializer}["w1"] == [5, 8]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"location": "../secret"}, "outside the model's folder"),
        ({"location": "/etc/passwd"}, "outside the model's folder"),
        ({"location": "deep/../../secret"}, "outside the model's folder"),
        ({"location": "deep\\a.bin"}, "outside the model's folder"),
        ({"location": ""}, "outside the model's folder"),
        ({"location": None}, "outside the model's folder"),
        ({"location": "link"}, "is a link"),
        ({"location": "linked/a.bin"}, "is a link"),
        ({"location": "hard"}, "hard links"),
        ({"location": "pipe"}, "not a regular file"),
        ({"location": "deep"}, "not a regular file"),
        ({"location": "gone.bin"}, "is missing"),
        ({"offset": "-1"}, "no number of bytes"),
        ({"offset": "1e3"}, "no number of bytes"),
        ({"offset": str(2**70)}, "no number of bytes"),
        ({"offset": "9999"}, "which has"),
        ({"length": "321"}, "320 needed"),
    ],
)
def test_hostile_external_data_is_refused(changes: dict[str, str | None], words: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"MARKER" * 99)
    path = external(folder, **changes)
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "linked").symlink_to(folder / "deep")
    (folder / "hard").hardlink_to(tmp_path / "secret")
    os.mkfifo(folder / "pipe")
    before = sorted(folder.rglob("*"))
    result = prune(path)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert "w1" in result.stderr
    assert result.stderr.count("\n") == 1
    assert "MARKER" not in result.output
    assert sorted(folder.rglob("*")) == before


# name: bytes of a .npy, of a header that Python's own parser chokes on, or of one that says too much
DAMAGED: dict[str, bytes] = {
    "nothing": b"",
    "no header": b"\x93NUMPY\x01\x00\xff\xff",
    "open brace": b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4'\n" + bytes(9),
    "open text": b"\x93NUMPY\x01\x00\x08\x00{'descr\n",
    "indent": b"\x93NUMPY\x01\x00\x09\x00  a\n b\n  ",
    "deep": b"\x93NUMPY\x01\x00\x00\x20" + b"(" * 0x2000,
    "huge": b"\x93NUMPY\x01\x00\x40\x00" + b"{'descr':'<f4','fortran_order':False,'shape':(9999999999999,)}".ljust(64),
    "negative": b"\x93NUMPY\x01\x00\x40\x00" + b"{'descr':'<f4','fortran_order':False,'shape':(-4,)}".ljust(64),
    "objects": b"\x93NUMPY\x01\x00\x40\x00" + b"{'descr':'|O','fortran_order':False,'shape':(1,)}".ljust(64) + bytes(8),
    "pickle": b"\x80\x04cos\nsystem\n(S'touch canary'\ntR.",
    "pickle inside": b"\x93NUMPY\x01\x00\x40\x00"
    + b"{'descr':'|O','fortran_order':False,'shape':(1,)}".ljust(64)
    + b"cos\nsystem\n(S'touch canary'\ntR.",
    "version": b"\x93NUMPY\x09\x00\x02\x00{}",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_calibration_is_one_line_and_exit_2(name: str, tmp_path: Path) -> None:
    path, data = tmp_path / "m.onnx", tmp_path / "c.npy"
    path.write_bytes(mlp().SerializeToString())
    data.write_bytes(DAMAGED[name])
    result = prune(path, "--calibration", data)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("onnxprune: error: ") and result.stderr.count("\n") == 1
    assert "c.npy" in result.stderr
    assert not Path("canary").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c.npy", "m.onnx"]
