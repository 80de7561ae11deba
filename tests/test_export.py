"""export: what is written runs in its runtime and computes the same; nothing is left of what does not."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from onnx import numpy_helper, parser

from onnxprune import export
from onnxprune.cli import main

NEEDS_OPENVINO = pytest.mark.skipif(find_spec("openvino") is None, reason="pip install openvino")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    made = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[n,3,h,w] x) => (float[n,5] y) {'
        " c = Conv<pads = [1,1,1,1]>(x, k) r = Relu(c) p = GlobalAveragePool(r) f = Flatten(p) y = MatMul(f, W) }"
    )
    for name, shape in (("k", (8, 3, 3, 3)), ("W", (8, 5))):
        made.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    onnx.save(made, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def run(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["export", *map(str, args)])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    ("to", "files"),
    [("ort", ["s.ort"]), ("onnx", ["s.onnx"]), pytest.param("openvino", ["s.xml", "s.bin"], marks=NEEDS_OPENVINO)],
)
def test_what_is_written_computes_the_same(model: Path, to: str, files: list[str]) -> None:
    out = model.parent / files[0]
    code, text, errors = run(model, "-o", out, "--to", to, "--input-shape", "x:2x3x7x9", "--json")
    assert (code, errors) == (0, "")
    found = json.loads(text)
    assert [Path(path).name for path in found["files"]] == files
    assert found["bytes"] == sum((model.parent / name).stat().st_size for name in files)
    assert found["relative-error"] < 1e-4
    assert sorted(path.name for path in model.parent.iterdir()) == sorted(["m.onnx", *files])
    code, _, errors = run(model, "-o", out, "--to", to)
    assert code == 2
    assert "--force" in errors
    assert run(model, "-o", out, "--to", to, "--force")[0] == 0


def test_fixed_sizes_are_written_down(model: Path) -> None:
    code, _, _ = run(model, "-o", model.parent / "s.onnx", "--to", "onnx", "--input-shape", "x:2x3x7x9")
    assert code == 0
    graph = onnx.load(model.parent / "s.onnx").graph
    sizes = [[d.dim_value for d in value.type.tensor_type.shape.dim] for value in (*graph.input, *graph.output)]
    assert sizes == [[2, 3, 7, 9], [2, 5]]


def test_sizes_that_the_model_accepts_are_found(tmp_path: Path) -> None:
    """Batch 1 at the usual length does not run: the first axis goes into rows of three."""
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> g (float[n,t] x) => (float[m,3] y)'
        " <int64[2] rows = {-1, 3}> { r = Reshape(x, rows) y = Relu(r) }"
    )
    onnx.save(parser.parse_model(text), tmp_path / "m.onnx")
    code, text, errors = run(tmp_path / "m.onnx", "-o", tmp_path / "s.ort", "--to", "ort", "--json")
    assert (code, errors) == (0, "")
    assert json.loads(text)["relative-error"] == 0


def test_what_would_compute_something_else_is_not_written(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def zero(fixed: ir.Model, sizes: object) -> None:
        fixed.graph.initializers["W"].const_value = ir.tensor(np.zeros((8, 5), np.float32), name="W")

    monkeypatch.setattr(export, "write_sizes", zero)
    code, _, errors = run(model, "-o", model.parent / "s.onnx", "--to", "onnx")
    assert code == 5
    assert "outputs differ by 1.0e+00" in errors
    assert [path.name for path in model.parent.iterdir()] == ["m.onnx"]


@NEEDS_OPENVINO
def test_openvino_measures(model: Path) -> None:
    result = CliRunner().invoke(main, ["measure", str(model), "--backend", "openvino", "--rounds", "3", "--json"])
    assert result.exit_code == 0, result.stderr
    (row,) = json.loads(result.stdout)["models"]
    assert row["backend"] == "openvino"
    assert row["wall_ms"] > 0


@pytest.mark.parametrize(
    ("name", "to", "more", "said"),
    [
        ("s.ort", "tflite", [], "unknown format"),
        ("s.onnx", "ort", [], "ends in .ort"),
        ("m.onnx", "onnx", ["--force"], "is an input"),
        ("s.ort", "ort", ["--input-shape", "z:1"], "no such graph input"),
    ],
)
def test_bad_arguments_are_one_line_and_write_nothing(
    model: Path, name: str, to: str, more: list[str], said: str
) -> None:
    before = model.read_bytes()
    code, _, errors = run(model, "-o", model.parent / name, "--to", to, *more)
    assert code == 2
    assert said in errors
    assert errors.count("\n") == 1
    assert [path.name for path in model.parent.iterdir()] == ["m.onnx"]
    assert model.read_bytes() == before
