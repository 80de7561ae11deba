"""Models in bfloat16: proven, repaired and compared in single precision, written as they came."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from test_codes import cnn, images
from test_recovery import run
from test_shared import albert, tokens

from onnxprune import bfloat
from onnxprune.reading import deserialized

bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
BFLOAT16, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT


def network(folder: Path) -> Path:
    onnx.save(cnn(), folder / "m.onnx")
    return folder / "m.onnx"


def pictures(count: int, seed: int) -> dict[str, np.ndarray]:
    return {"x": images(count, seed)}


def halved(model: onnx.ModelProto, how: str) -> onnx.ModelProto:
    """In bfloat16 all through ("pure"), between a Cast of inputs and outputs ("inside"), or as far as it is stored."""
    model.opset_import[0].version = 22  # from which on convolutions may compute in it
    before, behind = [], []
    for stored in model.graph.initializer:
        if stored.data_type == FLOAT:
            name, array = stored.name, numpy_helper.to_array(stored).astype(bfloat16)
            own = f"{name}_half" if how == "stored" else name
            stored.CopyFrom(TensorProto(name=own, data_type=BFLOAT16, dims=array.shape, raw_data=array.tobytes()))
            before += [helper.make_node("Cast", [own], [name], to=FLOAT)] if own != name else []
    for value in (*model.graph.input, *model.graph.output):
        kind = value.type.tensor_type
        if kind.elem_type != FLOAT or how == "stored":
            continue
        if how == "pure":
            kind.elem_type = BFLOAT16
            continue
        inner = f"{value.name}_half"
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [inner if name == value.name else name for name in names]
        if value in model.graph.input:
            before.append(helper.make_node("Cast", [value.name], [inner], to=BFLOAT16))
        else:
            behind.append(helper.make_node("Cast", [inner], [value.name], to=FLOAT))
    nodes = [*before, *model.graph.node, *behind]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model, full_check=True)
    return model


def outputs(path: Path, feed: Mapping[str, np.ndarray]) -> np.ndarray:
    """What a file computes in float32, by a copy that is made here."""
    model = onnx.load(path)
    for stored in model.graph.initializer:
        if stored.data_type == BFLOAT16:
            array = numpy_helper.to_array(stored).astype(np.float32)
            stored.CopyFrom(numpy_helper.from_array(array, stored.name))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == BFLOAT16:
            value.type.tensor_type.elem_type = FLOAT
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == BFLOAT16:
                attribute.i = FLOAT
    del model.graph.value_info[:]
    return ort.InferenceSession(model.SerializeToString()).run(None, dict(feed))[0]


@pytest.mark.parametrize("how", ["pure", "inside", "stored"])
@pytest.mark.parametrize(("make", "data"), [(network, pictures), (albert, tokens)])
def test_it_is_repaired_and_stays_bfloat16(
    how: str, make: Callable[[Path], Path], data: Callable[[int, int], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    dense, out, report, samples = make(tmp_path), tmp_path / "s.onnx", tmp_path / "r.json", tmp_path / "c.npz"
    onnx.save(halved(onnx.load(dense), how), dense)
    np.savez(samples, **data(200, 1))
    fresh, wanted, errors = data(100, 2), outputs(dense, data(100, 2)), []
    for more in (["--reconstruct", "none", "--criterion", "mag"], []):
        result = run("prune", dense, "-o", out, "--ratio", 0.4, "--calibration", samples, "--effort", "quick",
                     "--force", "--report", report, *more)  # fmt: skip
        assert result.exit_code == 0, result.output
        errors.append(float(np.square(outputs(out, fresh) - wanted).mean()))
    assert errors[1] < 0.5 * errors[0]
    found: dict[str, Any] = json.loads(report.read_text())
    kinds = {i.name: i.data_type for i in onnx.load(out).graph.initializer}
    assert {kinds[name] for name in found["repaired"]} == {BFLOAT16}
    assert all(row["relative"] < 1e-4 for row in found["verification"]["differences"])
    assert any("bfloat16" in text for text in found["warnings"]) == (how != "stored")
    assert found["dense"]["latency"] is None or how == "stored"
    assert run("verify", dense, out, "--plan", report).exit_code == 0
    assert run("compare", dense, out).exit_code == 0


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    onnx.save(halved(cnn(), "pure"), tmp_path / "m.onnx")
    result = run("measure", tmp_path / "m.onnx")
    assert result.exit_code == 3
    assert "bfloat16" in result.stderr
    result = run("prune", tmp_path / "m.onnx", "-o", tmp_path / "s.onnx", "--target", "latency=0.5")
    assert result.exit_code == 3
    assert "bfloat16" in result.stderr
    result = run("prune", tmp_path / "m.onnx", "-o", tmp_path / "s.onnx", "--ratio", 0.3)
    assert result.exit_code == 0


def made(text: str) -> ir.Model:
    return deserialized(parser.parse_model(f'<ir_version: 10, opset_import: ["": 22]> {text}'))


def test_a_copy_is_float_in_every_corner_and_the_model_as_it_was() -> None:
    model = made(  # constants by their bits: 1, 2 and 3
        """g (bfloat16[n,2] x, bool c) => (bfloat16[n,2] y) <bfloat16[2] w = {16256, 16384}> {
            a = Mul(x, w) s = Shape(x) z = ConstantOfShape<value = bfloat16[1] {16448}>(s)
            y = If(c) <then_branch = t () => (bfloat16[n,2] p) { f = Cast<to = 1>(a) p = Cast<to = 16>(f) },
                       else_branch = e () => (bfloat16[n,2] q) { q = Add(a, z) }>
        }"""
    )
    before = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    copy = bfloat.single(model)
    assert ir.serde.serialize_model(model).SerializeToString(deterministic=True) == before
    assert bfloat.computes(model) and not bfloat.computes(copy)
    assert bfloat.single(copy) is copy
    session = ort.InferenceSession(ir.serde.serialize_model(copy).SerializeToString())
    x = np.array([[1, 1.5]], np.float32)
    for flag, wanted in ((True, [[1, 3]]), (False, [[4, 6]])):
        (found,) = session.run(None, {"x": x, "c": np.array(flag)})
        np.testing.assert_array_equal(found, np.array(wanted, np.float32))


def test_what_is_only_stored_in_it_computes_as_it_is() -> None:
    model = made("g (float[n,2] x) => (float[n,2] y) <bfloat16[2] w = {1, 2}> { f = Cast<to = 1>(w) y = Mul(x, f) }")
    assert not bfloat.computes(model)
    assert bfloat.single(model) is model


@pytest.mark.parametrize(
    ("head", "cast", "call"),
    [
        ("f <to> (x) => (y)", "Cast <to = @to> (x)", "own.f <to = 16> (h)"),
        ("f <kind: int = 16> (x) => (y)", "Cast <to: int = @kind> (x)", "own.f (h)"),
        ("f <to> (x) => (y)", "Cast <to = @to> (x)", "own.f <to = 1> (h)"),
    ],
)
def test_types_that_functions_hand_on(head: str, cast: str, call: str, tmp_path: Path) -> None:
    given = "bfloat16" if "= 1>" not in call else "float"
    text = f"""<ir_version: 10, opset_import: ["": 22, "own": 1]>
    g (float[n,4] x) => (float[n,3] y) {{
        h = MatMul(x, w) c = {call} d = Relu(c) e = Cast <to = 1> (d) y = MatMul(e, v)
    }}
    <domain: "own", opset_import: ["": 22]> {head} {{ y = {cast} }}"""
    model, rng = parser.parse_model(text), np.random.default_rng(0)
    for name, shape in {"w": (4, 8), "v": (8, 3)}.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    onnx.save(model, tmp_path / "m.onnx")
    read = deserialized(model)
    assert bfloat.computes(read) == (given == "bfloat16")
    assert not bfloat.computes(bfloat.single(read))
    feed = {"x": rng.standard_normal((2, 4)).astype(np.float32)}
    whole = ir.serde.serialize_model(bfloat.single(read)).SerializeToString()
    (y,) = ort.InferenceSession(whole, providers=["CPUExecutionProvider"]).run(None, feed)
    weights = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    np.testing.assert_allclose(y, np.maximum(feed["x"] @ weights["w"], 0) @ weights["v"], rtol=1e-4, atol=1e-5)


def test_no_other_precision_is_judged(tmp_path: Path) -> None:
    onnx.save(halved(cnn(), "inside"), tmp_path / "m.onnx")
    found = run("prune", tmp_path / "m.onnx", "-o", tmp_path / "o.onnx", "--ratio", 0.5, "--precision", "fp16",
                "--no-measure")  # fmt: skip
    assert found.exit_code == 3, found.output
    assert bfloat.MISSING in found.output
