"""build: engines with their record, profiles, and refusals. Needs tensorrt-rtx, which builds without a GPU."""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper, parser
from zoo import ZOO

import onnxprune
from onnxprune import engines
from onnxprune.analysis import Analysis
from onnxprune.cli import main, parse_profiles
from onnxprune.errors import InputError
from onnxprune.prove import Prover
from onnxprune.runtime import tensorrt
from onnxprune.types import Profile
from onnxprune.worker import Worker

RTX = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="pip install 'onnxprune[tensorrt-rtx]'")
GPU = tensorrt.gpu()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> g (float[n,3,h,w] x) => (float[n,5] y) {'
        " c = Conv<pads = [1,1,1,1]>(x, k) r = Relu(c) p = GlobalAveragePool(r) f = Flatten(p) y = MatMul(f, W) }"
    )
    made = parser.parse_model(text)
    for name, shape in (("k", (16, 3, 3, 3)), ("W", (16, 5))):
        made.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    onnx.save(made, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def run(verb: str, *args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [verb, *map(str, args)])
    return result.exit_code, result.stdout, result.stderr


def left(model: Path) -> list[str]:
    return sorted(path.name for path in model.parent.iterdir())


@RTX
@pytest.mark.parametrize("to", ["fp32", "fp16", "bf16", "int8"])
def test_an_engine_and_its_record(model: Path, to: str) -> None:
    out = model.with_name("m.engine")
    more = ["--input-shape", "x:1x3x8x8..2x3x8x8..4x3x16x16", "--precision", to, "--sparse", "--json"]
    code, text, errors = run("build", model, "-o", out, *more)
    assert code == 0, errors
    assert errors.startswith("warning: ") == (to == "int8")  # no calibration data
    assert left(model) == ["m.engine", "m.engine.json", "m.onnx"]
    record = json.loads((out.parent / "m.engine.json").read_text())
    assert json.loads(text) == record
    assert record["model"]["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert record["engine"]["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert record["engine"]["bytes"] == out.stat().st_size
    assert (record["backend"], record["precision"], record["sparse"]) == ("tensorrt-rtx", to, True)
    assert record["profiles"] == {"x": {"min": [1, 3, 8, 8], "opt": [2, 3, 8, 8], "max": [4, 3, 16, 16]}}
    assert record["inputs"] == {"x": ["float", [-1, 3, -1, -1]]}
    assert record["outputs"] == {"y": ["float", [-1, 5]]}
    off = record["difference"]["relative-error"]
    assert off < {"fp32": 1e-4, "fp16": 1e-2, "bf16": 0.05, "int8": 0.2}[to]
    assert off > 0 or to == "fp32"


@RTX
def test_fixed_sizes(model: Path) -> None:
    out, more = model.with_name("m.plan"), ["--input-shape", "x:1x3x8x8"]
    assert run("build", model, "-o", out, *more)[0] == 0
    assert json.loads(out.with_name("m.plan.json").read_text())["inputs"] == {"x": ["float", [1, 3, 8, 8]]}
    code, _, errors = run("build", model, "-o", out, *more)
    assert code == 2
    assert "--force" in errors


@RTX
@pytest.mark.parametrize(
    "name",
    [
        "residual CNN",
        "channel shuffle",
        "U-Net at any size",
        "grouped queries, rotary, computed sizes",
        "stacked GRU",
    ],
)
def test_what_is_built_dense_is_built_pruned(name: str, tmp_path: Path) -> None:
    onnx.save(ZOO[name](), tmp_path / "m.onnx")
    onnxprune.prune(tmp_path / "m.onnx", tmp_path / "s.onnx", ratio=0.5, round_to=1, measure=False)
    prover = Prover(Analysis(tmp_path / "m.onnx"), [])
    with Worker() as worker:
        prover.check_dense(worker)
    shapes = {n: sorted(feed[n].shape for feed in prover.feeds) for n in prover.feeds[0]}
    profiles = {n: Profile(found[0], found[0], found[-1]) for n, found in shapes.items()}
    for stem in ("m", "s"):
        engines.build(tmp_path / f"{stem}.onnx", tmp_path / f"{stem}.engine", profiles)


@RTX
def test_what_it_cannot_take_is_named(tmp_path: Path) -> None:
    text = (
        '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> g (float[3,5] x) => (float[3,5] y)'
        " { y = com.microsoft.QuickGelu(x) }"
    )
    onnx.save(parser.parse_model(text), tmp_path / "m.onnx")
    code, _, errors = run("build", tmp_path / "m.onnx", "-o", tmp_path / "m.engine")
    assert code == 3
    assert "m.onnx: " in errors
    assert "TensorRT-RTX cannot take QuickGelu" in errors
    assert errors.count("\n") == 1
    assert left(tmp_path / "m.onnx") == ["m.onnx"]


@pytest.mark.parametrize(
    ("name", "more", "code", "said"),
    [
        ("m.engine", [], 2, "x: this input is dynamic"),
        ("m.engine", ["--input-shape", "x:4x3x8x8..2x3x8x8..1x3x8x8"], 2, "min..opt..max"),
        ("m.engine", ["--input-shape", "x:1x3x8x8..2x3x8x8"], 2, "expected"),
        ("m.engine", ["--input-shape", "x:1x4x8x8"], 2, "axis 1 is 3"),
        ("m.engine", ["--input-shape", "z:1x3x8x8"], 2, "no such graph input"),
        ("m.engine", ["--backend", "cpu"], 2, "engines are for"),
        ("m.engine", ["--precision", "fp8"], 2, "unknown precision"),
        ("m.engine", ["--timing-cache", "c.bin"], 2, "no timing cache"),
        ("m.engine", ["--seed", "-1"], 2, "--seed"),
        ("m.onnx", [], 2, "ends in .engine"),
        ("missing/m.engine", ["--input-shape", "x:1x3x8x8"], 2, "folder does not exist"),
        ("m.engine", ["--input-shape", "x:1x3x8x8", "--calibration", "c.npz"], 2, "no array for this graph input"),
    ],
)
@RTX
def test_bad_arguments_are_one_line_and_write_nothing(
    model: Path, name: str, more: list[str], code: int, said: str
) -> None:
    np.savez(model.with_name("c.npz"), z=np.zeros((4, 3, 8, 8), np.float32))
    before = model.read_bytes()
    more = [str(model.with_name(word)) if word == "c.npz" else word for word in more]
    found, _, errors = run("build", model, "-o", model.parent / name, *more)
    assert found == code
    assert said in errors
    assert errors.count("\n") == 1
    assert left(model) == ["c.npz", "m.onnx"]
    assert model.read_bytes() == before


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="tensorrt is there")
def test_a_library_that_is_not_there_is_named(model: Path) -> None:
    for verb in ("build", "measure"):
        more = ["-o", model.with_name("m.engine")] if verb == "build" else []
        code, _, errors = run(verb, model, *more, "--backend", "tensorrt")
        assert code == 4
        assert "pip install 'onnxprune[tensorrt]'" in errors
    assert left(model) == ["m.onnx"]


@pytest.mark.skipif(GPU is None, reason="there is a GPU")
@RTX
def test_without_a_gpu_nothing_runs(model: Path) -> None:
    code, _, errors = run("measure", model, "--backend", "tensorrt-rtx")
    assert code == 4
    assert "GPU" in errors
    code, _, errors = run("prune", model, "-o", model.with_name("s.onnx"), "--ratio", 0.5, "--backend", "tensorrt-rtx")
    assert code == 4
    assert left(model) == ["m.onnx"]


@pytest.mark.skipif(GPU is not None, reason=str(GPU))
@RTX
def test_an_engine_computes_what_the_model_does(model: Path) -> None:
    more = ["--input-shape", "x:2x3x8x8", "--json"]
    code, text, errors = run("build", model, "-o", model.with_name("m.engine"), *more)
    assert (code, errors) == (0, "")
    assert json.loads(text)["difference"]["backend"] == "tensorrt-rtx"


def test_engines_of_others_are_not_loaded(model: Path) -> None:
    engine = model.with_name("foreign.engine")
    engine.write_bytes(b"\0" * 64)
    for verb in ("measure", "inspect"):
        code, _, errors = run(verb, engine)
        assert code == 2
        assert "engine" in errors
    code, _, errors = run("measure", model, engine, "--backend", "tensorrt-rtx")
    assert code == 2
    assert "--trust-engine" in errors
    code, _, errors = run("measure", model, engine, "--backend", "cpu", "--trust-engine")
    assert code == 2
    assert "tensorrt" in errors


def test_profiles_are_read() -> None:
    found = parse_profiles(("x:1x3..2x3..4x3", "a:b:[5,7]"))
    assert found == {"x": Profile((1, 3), (2, 3), (4, 3)), "a:b": Profile((5, 7), (5, 7), (5, 7))}
    with pytest.raises(InputError, match="profile already"):
        parse_profiles(("x:1", "x:2"))
