"""batch: many models by one recipe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper, parser

from onnxprune import pipeline
from onnxprune.cli import main


def mlp(path: Path, width: int) -> Path:
    """y = relu(x A) B, with `width` free units."""
    rng = np.random.default_rng(width)
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[n,4] x) => (float[n,3] y)'
        " { h = MatMul(x, A) r = Relu(h) y = MatMul(r, B) }"
    )
    for name, shape in (("A", (4, width)), ("B", (width, 3))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def run(*args: object) -> tuple[int, dict, str]:
    result = CliRunner().invoke(main, ["batch", *map(str, args), "--ratio", "0.5", "--no-measure", "--json"])
    return result.exit_code, json.loads(result.stdout), result.stderr


def test_a_folder_is_pruned_and_what_fails_stops_nothing(tmp_path: Path) -> None:
    models, out = tmp_path / "models", tmp_path / "models" / "small"
    mlp(models / "a.onnx", 16)
    mlp(models / "deep" / "b.onnx", 32)
    (models / "broken.onnx").write_bytes(b"no model")
    code, data, errors = run(models, "-o", out)
    assert code == 2
    assert errors.count("onnxprune: error:") == 1
    assert "broken.onnx" in errors
    found = {Path(row["model"]).name: row for row in data["models"]}
    assert found["broken.onnx"]["error"]["code"] == 2
    assert found["a.onnx"]["pruned"]["params"] == 8 * 7
    assert onnx.load(out / "deep" / "b.onnx").graph.initializer[0].dims == [4, 16]
    assert json.loads((out / "a.json").read_text())["pruned"]["params"] == 8 * 7
    assert not (out / "broken.onnx").exists()
    code, data, _ = run(models, "-o", out, "--force")  # what was written is not taken for a model of the folder
    assert len(data["models"]) == 3


def test_a_list_names_its_models(tmp_path: Path) -> None:
    mlp(tmp_path / "x" / "a.onnx", 16)
    mlp(tmp_path / "y" / "b.onnx", 16)
    listed = tmp_path / "models.txt"
    listed.write_text("# two models\nx/a.onnx\n\ny/b.onnx\n")
    code, data, errors = run(listed, "-o", tmp_path / "out")
    assert (code, errors) == (0, "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.json", "a.onnx", "b.json", "b.onnx"]
    assert [row["pruned"]["params"] for row in data["models"]] == [56, 56]


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "no models"), ("x/a.onnx\ny/a.onnx\n", "two models have this name"), (b"\xff\xfe", "a text file")],
)
def test_lists_that_cannot_be_used_are_one_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    listed = tmp_path / "models.txt"
    listed.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, _, errors = run(listed, "-o", tmp_path / "out")
    assert code == 2
    assert said in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_and_one_that_exists(tmp_path: Path) -> None:
    mlp(tmp_path / "a.onnx", 16)
    listed = tmp_path / "models.txt"
    listed.write_text("a.onnx\nmissing.onnx\n")
    code, data, _ = run(listed, "-o", tmp_path / "out")
    assert code == 2
    assert "pruned" in data["models"][0]
    before = (tmp_path / "out" / "a.onnx").read_bytes()
    code, data, _ = run(listed, "-o", tmp_path / "out")
    assert all("error" in row for row in data["models"])
    assert (tmp_path / "out" / "a.onnx").read_bytes() == before


def test_a_bug_of_ours_in_one_model_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp(tmp_path / "in" / "a.onnx", 16)
    mlp(tmp_path / "in" / "b.onnx", 16)
    real = pipeline.family

    def family(model: Path, *args: object, **options: object) -> list:
        if model.name == "a.onnx":
            raise ZeroDivisionError("oh")
        return real(model, *args, **options)

    monkeypatch.setattr(pipeline, "family", family)
    code, data, errors = run(tmp_path / "in", "-o", tmp_path / "out")
    assert code == 5
    assert "ZeroDivisionError: oh; this is a bug" in errors
    assert ["pruned" in row for row in data["models"]] == [False, True]
