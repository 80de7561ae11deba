"""The command line: verbs, exit codes, one-line errors, and that nothing is written when something is wrong."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pty
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from onnxprune.cli import main, stages, time_left

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "models" / "digits_cnn.onnx"


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture
def mlp(tmp_path: Path) -> Path:
    """x [n, 5] -> 16 hidden -> 3, with class names in its metadata."""
    rng = np.random.default_rng(0)
    stored = {"w1": (5, 16), "b1": (16,), "w2": (16, 3), "b2": (3,)}
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], "first"),
        helper.make_node("Relu", ["h"], ["r"], "act"),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["y"], "second"),
    ]
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), k) for k, s in stored.items()],
        doc_string="a small network",
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="tests")
    helper.set_model_props(model, {"names": "cat,dog,cow"})
    path = tmp_path / "mlp.onnx"
    onnx.save(model, path)
    return path


def test_prune_halves_writes_and_keeps_what_is_not_its_business(mlp: Path, tmp_path: Path) -> None:
    out, before = tmp_path / "small.onnx", mlp.read_bytes()
    result = run("prune", mlp, "-o", out, "--ratio", 0.5, "--no-measure")
    assert result.exit_code == 0, result.output
    assert "proven" in result.stdout
    dense, small = onnx.load(mlp), onnx.load(out)
    assert {i.name: list(i.dims) for i in small.graph.initializer} == {"w1": [5, 8], "b1": [8], "w2": [8, 3], "b2": [3]}
    assert small.graph.input == dense.graph.input
    assert small.graph.output == dense.graph.output
    assert [p.value for p in small.metadata_props] == ["cat,dog,cow"]
    for field in ("ir_version", "producer_name", "opset_import"):
        assert getattr(small, field) == getattr(dense, field)
    assert small.graph.doc_string == "a small network"
    assert mlp.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mlp.onnx", "small.onnx"]


def test_the_least_important_goes_and_the_report_lists_every_slice(mlp: Path, tmp_path: Path) -> None:
    model = onnx.load(mlp)
    arrays = {i.name: numpy_helper.to_array(i).copy() for i in model.graph.initializer}
    arrays["w1"][:, [3, 7]] *= 1e-6
    arrays["w2"][[3, 7]] *= 1e-6
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], tensor.name))
    onnx.save(model, mlp)
    report = tmp_path / "report.json"
    result = run(
        "prune", mlp, "-o", tmp_path / "s.onnx", "--ratio", 0.125, "--round-to", 1, "--no-measure", "--report", report
    )
    assert result.exit_code == 0, result.output
    found = json.loads(report.read_text())
    removed = {(r["initializer"], r["axis"], tuple(r["removed"]), r["role"]) for r in found["removed"]}
    assert removed == {("w1", 1, (3, 7), "weight"), ("b1", 0, (3, 7), "bias"), ("w2", 0, (3, 7), "weight")}
    assert found["kept"]["b1"]["0"] == [k for k in range(16) if k not in (3, 7)]
    assert found["groups"][0]["before"] == 16
    assert found["groups"][0]["after"] == 14
    assert found["quality"]["relative-error"] < 0.2


def test_verify_accepts_the_run_and_catches_a_forgery(mlp: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "s.onnx", tmp_path / "r.json"
    assert run("prune", mlp, "-o", out, "--ratio", 0.5, "--no-measure", "--report", report).exit_code == 0
    assert run("verify", mlp, out, "--plan", report).exit_code == 0
    model = onnx.load(out)
    weight = next(i for i in model.graph.initializer if i.name == "w2")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, "w2"))
    forged = tmp_path / "forged.onnx"
    onnx.save(model, forged)
    result = run("verify", mlp, forged, "--plan", report)
    assert result.exit_code == 3
    assert "w2" in result.stderr
    data = json.loads(report.read_text())
    data["removed"] = [r for r in data["removed"] if r["initializer"] != "b1"]
    report.write_text(json.dumps(data))
    result = run("verify", mlp, out, "--plan", report)
    assert result.exit_code == 3
    assert "not every slice" in result.stderr


def test_ratio_zero_is_the_identity(mlp: Path, tmp_path: Path) -> None:
    out = tmp_path / "same.onnx"
    assert run("prune", mlp, "-o", out, "--ratio", 0, "--no-measure").exit_code == 0
    assert onnx.load(out).graph == onnx.load(mlp).graph


def test_a_family_from_one_analysis(mlp: Path, tmp_path: Path) -> None:
    out = tmp_path / "s_{target}.onnx"
    result = run("prune", mlp, "-o", out, "--target", "params=0.8,0.5", "--no-measure", "--json")
    assert result.exit_code == 0, result.output
    sizes = [r["pruned"]["params"] / r["dense"]["params"] for r in json.loads(result.stdout)["family"]]
    assert sizes[0] <= 0.8
    assert sizes[1] <= 0.5
    assert (tmp_path / "s_params-0.8.onnx").exists()
    assert (tmp_path / "s_params-0.5.onnx").exists()
    assert run("prune", mlp, "-o", tmp_path / "x.onnx", "--target", "params=0.8,0.5").exit_code == 2


def test_several_targets_hold_together(mlp: Path, tmp_path: Path) -> None:
    result = run("prune", mlp, "-o", tmp_path / "s.onnx", "--target", "macs=0.9", "--target", "params=0.5",
                 "--no-measure", "--json")  # fmt: skip
    report = json.loads(result.stdout)
    assert report["pruned"]["macs"] <= 0.9 * report["dense"]["macs"]
    assert report["pruned"]["params"] <= 0.5 * report["dense"]["params"]


def test_size_counts_the_file(mlp: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.onnx"
    assert run("prune", mlp, "-o", out, "--target", "size=0.8", "--no-measure").exit_code == 0
    assert out.stat().st_size <= 0.8 * mlp.stat().st_size


def test_dry_run_writes_nothing(mlp: Path, tmp_path: Path) -> None:
    result = run("prune", mlp, "-o", tmp_path / "s.onnx", "--ratio", 0.5, "--dry-run")
    assert result.exit_code == 0
    assert "would write" in result.stdout
    assert not (tmp_path / "s.onnx").exists()


def test_same_input_same_bytes(mlp: Path, tmp_path: Path) -> None:
    hashes = set()
    for seed in ("0", "1", "2"):
        out = tmp_path / seed / "s.onnx"
        out.parent.mkdir()
        subprocess.run(
            [sys.executable, "-m", "onnxprune", "prune", mlp, "-o", out, "--target", "macs=0.6", "--no-measure", "-q"],
            check=True,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
        )
        hashes.add(hashlib.sha256(out.read_bytes()).hexdigest())
    assert len(hashes) == 1


def test_an_ignored_node_keeps_its_units(mlp: Path, tmp_path: Path) -> None:
    result = run("prune", mlp, "-o", tmp_path / "s.onnx", "--ratio", 0.5, "--ignore", "fir*", "--no-measure")
    assert result.exit_code == 3
    assert "nothing can be removed" in result.stderr


def test_explain_finds_the_chain(mlp: Path) -> None:
    result = run("explain", mlp, "w1:1", "w2:0", "--json")
    steps = json.loads(result.stdout)["steps"]
    assert [s["op"].split()[0] for s in steps] == ["Gemm", "Relu", "Gemm"]
    result = run("explain", mlp, "w1:1", "y:1")
    assert "not coupled" in result.stdout
    assert "graph output" in result.stdout


def test_inspect_counts(mlp: Path) -> None:
    found = json.loads(run("inspect", mlp, "--json").stdout)
    assert found["model"]["params"] == 5 * 16 + 16 + 16 * 3 + 3
    assert found["model"]["macs"] == 5 * 16 + 16 * 3
    assert [(g["kind"], g["units"], g["exact"]) for g in found["groups"]] == [("channels", 16, True)]
    assert run("inspect", mlp).exit_code == 0


def test_compare_is_a_gate(mlp: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.onnx"
    run("prune", mlp, "-o", out, "--ratio", 0.5, "--no-measure")
    assert run("compare", mlp, mlp, "--max-relative-error", 1e-6).exit_code == 0
    result = run("compare", mlp, out, "--max-relative-error", 1e-6, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["relative-error"] > 1e-6


def test_measure_finds_sizes_that_run(tmp_path: Path) -> None:
    """A window of five steps does not fit into what a time axis gets by default."""
    weight = numpy_helper.from_array(np.ones((4, 3 * 5), np.float32), "w")
    shape = numpy_helper.from_array(np.array([-1, 15]), "s")
    nodes = [helper.make_node("Reshape", ["x", "s"], ["r"]), helper.make_node("Gemm", ["r", "w"], ["y"], transB=1)]
    graph = helper.make_graph(
        nodes,
        "windows",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["time", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [weight, shape],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    result = run("measure", path, "--rounds", 3, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["models"][0]["rounds"] == 3


def test_measure_gives_ratios(mlp: Path) -> None:
    found = json.loads(run("measure", mlp, mlp, "--rounds", 3, "--json").stdout)["models"]
    assert found[0]["ratio"] == 1.0
    assert found[1]["cpu_ms"] > 0


@pytest.mark.parametrize(
    "what", ["criteria", "allocators", "reconstructors", "sparsifiers", "passes", "backends", "ops"]
)
def test_list(what: str) -> None:
    result = run("list", what, "--json")
    assert result.exit_code == 0
    rows = json.loads(result.stdout)[what]
    assert all(row["help"] for row in rows)
    assert rows
    assert what != "reconstructors" or {"none", "sequential", "lsq"} <= {row["name"] for row in rows}


def test_digits_evaluation_reports_accuracy(tmp_path: Path) -> None:
    data = ROOT / "models"
    given = ["--calibration", data / "digits_calibration.npz", "--evaluation", data / "digits_evaluation.npz"]
    result = run("prune", DIGITS, "-o", tmp_path / "d.onnx", "--ratio", 0.25, *given, "--no-measure", "--json")
    assert result.exit_code == 0, result.output
    accuracy = json.loads(result.stdout)["quality"]["accuracy"]
    assert accuracy["dense"] > 0.98


def test_repair_without_data_runs_on_random_inputs_and_says_so(mlp: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.onnx"
    result = run("prune", mlp, "-o", out, "--ratio", 0.5, "--reconstruct", "obspa", "--no-measure", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["repaired"] == ["w2"]
    assert any("random inputs" in warning for warning in report["warnings"])
    assert run("verify", mlp, out, "--plan", _written(tmp_path, report)).exit_code == 0


def _written(folder: Path, report: dict) -> Path:
    path = folder / "report.json"
    path.write_text(json.dumps(report))
    return path


def test_what_is_not_a_criterions_kind_gets_the_default(mlp: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.onnx"
    result = run("prune", mlp, "-o", out, "--ratio", 0.5, "--criterion", "tail", "--no-measure")
    assert result.exit_code == 0, result.output


BAD = {
    "no target": (["--no-measure"], "exactly one"),
    "both": (["--ratio", "0.5", "--target", "macs=0.5"], "exactly one"),
    "ratio above": (["--ratio", "1"], "--ratio"),
    "ratio below": (["--ratio", "-0.1"], "--ratio"),
    "ratio nan": (["--ratio", "nan"], "--ratio"),
    "ratio word": (["--ratio", "half"], "--ratio"),
    "metric": (["--target", "speed=0.5"], "speed"),
    "share": (["--target", "macs=2"], "macs=2"),
    "no value": (["--target", "macs"], "macs"),
    "twice": (["--target", "macs=0.5", "--target", "macs=0.4"], "already"),
    "criterion": (["--ratio", "0.5", "--criterion", "nope"], "nope"),
    "criterion option": (["--ratio", "0.5", "--criterion", "mag,order=9"], "order"),
    "allocator": (["--target", "macs=0.5", "--allocate", "nope"], "nope"),
    "ratio with allocator": (["--ratio", "0.5", "--allocate", "global-rank"], "uniform"),
    "criterion without data": (["--ratio", "0.5", "--criterion", "fluct"], "--criterion fluct needs --calibration"),
    "repair without data": (["--ratio", "0.5", "--reconstruct", "lsq"], "--reconstruct lsq needs --calibration"),
    "allocator without data": (["--target", "macs=0.5", "--allocate", "rd-dp"], "--calibration"),
    "kind": (["--ratio", "0.5", "--remove", "hats"], "hats"),
    "rounding": (["--ratio", "0.5", "--round-to", "0"], "--round-to"),
    "keep": (["--ratio", "0.5", "--min-keep", "0"], "--min-keep"),
    "threads": (["--ratio", "0.5", "--threads", "0"], "--threads"),
    "shape": (["--ratio", "0.5", "--input-shape", "x"], "--input-shape"),
    "shape rank": (["--ratio", "0.5", "--input-shape", "x:1x2x3"], "x"),
    "shape size": (["--ratio", "0.5", "--input-shape", "x:1x6"], "x"),
    "shape name": (["--ratio", "0.5", "--input-shape", "z:1x5"], "z"),
    "option": (["--ratio", "0.5", "--bogus"], "--bogus"),
    "metric name": (["--ratio", "0.5", "--metric", "nope"], "nope"),
    "report": (["--ratio", "0.5", "--report", "r.txt"], "r.txt"),
    "calibration": (["--ratio", "0.5", "--calibration", "missing.npz"], "missing.npz"),
    "backend": (["--ratio", "0.5", "--backend", "abacus"], "abacus"),
    "latency without a unit": (["--target", "latency=8"], "latency=8"),
    "latency below zero": (["--target", "latency=-1ms"], "latency=-1ms"),
    "latency nan": (["--target", "latency=nan"], "latency=nan"),
    "latency in bytes": (["--target", "latency=8MB"], "latency=8MB"),
    "latency unmeasured": (["--target", "latency=0.5", "--no-measure"], "--no-measure"),
    "latency on no backend": (["--target", "latency=0.5", "--backend", "abacus"], "abacus"),
    "two caches": (["--ratio", "0.5", "--cache", "c", "--no-cache"], "--no-cache"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_get_one_line_and_exit_2(name: str, mlp: Path, tmp_path: Path) -> None:
    args, culprit = BAD[name]
    before = sorted(tmp_path.iterdir())
    result = run("prune", mlp, "-o", tmp_path / "s.onnx", *args)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("onnxprune: error: ")
    assert result.stderr.count("\n") == 1
    assert culprit in result.stderr
    assert "Traceback" not in result.output
    assert sorted(tmp_path.iterdir()) == before


def test_an_unreachable_target_is_exit_3_and_says_what_can_be_had(mlp: Path, tmp_path: Path) -> None:
    result = run("prune", mlp, "-o", tmp_path / "s.onnx", "--target", "macs=0.001", "--json")
    assert result.exit_code == 3
    assert "macs=" in json.loads(result.stdout)["message"]
    assert not (tmp_path / "s.onnx").exists()


def test_latency_targets_are_met_as_the_report_says(tmp_path: Path) -> None:
    out, report, kept = tmp_path / "s.onnx", tmp_path / "r.json", tmp_path / "cache"
    options = ("--target", "latency=0.6", "--target", "params=0.9", "--cache", kept, "--report", report)
    result = run("prune", DIGITS, "-o", out, *options)
    assert result.exit_code in (0, 3), result.output  # the machine may be too busy to say
    entries = [path for path in kept.rglob("*") if path.is_file()]
    assert len(entries) > 20
    if result.exit_code == 3:
        assert "latency=" in result.stderr
        assert not out.exists()
        return
    data = json.loads(report.read_text())
    dense, pruned = data["dense"], data["pruned"]
    assert pruned["latency"]["cpu_ms"] <= 1.03 * 0.6 * dense["latency"]["cpu_ms"]
    assert pruned["params"] <= 0.9 * dense["params"]
    assert pruned["faster"] is not False


def test_a_latency_that_nothing_reaches_is_exit_3_and_says_what_can_be_had(mlp: Path, tmp_path: Path) -> None:
    result = run("prune", mlp, "-o", tmp_path / "s.onnx", "--target", "latency=0.001", "--json", "--no-cache")
    assert result.exit_code == 3
    assert "latency=" in json.loads(result.stdout)["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["mlp.onnx"]


def test_a_latency_that_the_dense_model_has_leaves_it_alone(mlp: Path, tmp_path: Path) -> None:
    result = run("prune", mlp, "-o", tmp_path / "s.onnx", "--target", "latency=100s")
    assert result.exit_code == 0, result.output
    assert "meets the target already" in result.stderr


def test_what_was_measured_is_looked_up(mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run with the same cache measures no operator and chooses the same."""
    from onnxprune import pace

    options = ("--target", "latency=0.999", "--cache", tmp_path / "cache", "--dry-run", "--json")
    first = run("prune", mlp, "-o", tmp_path / "s.onnx", *options)
    monkeypatch.setattr(pace.measure, "measure", None)
    monkeypatch.setattr(pace.measure, "quickest", None)
    again = run("prune", mlp, "-o", tmp_path / "s.onnx", *options)
    assert again.exit_code == first.exit_code
    if first.exit_code == 0:
        assert json.loads(first.stdout)["groups"] == json.loads(again.stdout)["groups"]


def test_an_existing_output_needs_force(mlp: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.onnx"
    out.write_bytes(b"precious")
    result = run("prune", mlp, "-o", out, "--ratio", 0.5, "--no-measure")
    assert result.exit_code == 2
    assert "--force" in result.stderr
    assert out.read_bytes() == b"precious"
    assert run("prune", mlp, "-o", out, "--ratio", 0.5, "--no-measure", "--force").exit_code == 0
    onnx.checker.check_model(onnx.load(out))


@pytest.mark.parametrize("spelling", ["same", "dotted", "link", "hard link"])
def test_the_input_is_never_the_output(spelling: str, mlp: Path, tmp_path: Path) -> None:
    before = mlp.read_bytes()
    out = {"same": mlp, "dotted": tmp_path / "." / "mlp.onnx"}.get(spelling, tmp_path / "other.onnx")
    if spelling == "link":
        out.symlink_to(mlp)
    elif spelling == "hard link":
        out.hardlink_to(mlp)
    assert run("prune", mlp, "-o", out, "--ratio", 0.5, "--no-measure", "--force").exit_code == 2
    assert mlp.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"\x08\x08garbage" * 9, ""),
        (b"version https://git-lfs.github.com/spec/v1\n", ""),
    ],
)
def test_a_file_that_is_no_model_is_exit_2(content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    if content is not None:
        path.write_bytes(content)
    result = run("prune", path, "-o", tmp_path / "s.onnx", "--ratio", 0.5)
    assert result.exit_code == 2
    assert "bad.onnx" in result.stderr
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_linked_model_is_refused_with_the_way_out(mlp: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.onnx"
    link.symlink_to(mlp)
    result = run("prune", link, "-o", tmp_path / "s.onnx", "--ratio", 0.5)
    assert result.exit_code == 2
    assert "cp -L" in result.stderr


def test_external_data_in_and_out(mlp: Path, tmp_path: Path) -> None:
    folder = tmp_path / "external"
    folder.mkdir()
    onnx.save(onnx.load(mlp), folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    out = tmp_path / "s.onnx"
    result = run("prune", folder / "m.onnx", "-o", out, "--ratio", 0.5, "--no-measure")
    assert result.exit_code == 0, result.output
    small = onnx.load(out)
    assert {i.name: list(i.dims) for i in small.graph.initializer}["w1"] == [5, 8]
    assert run("compare", folder / "m.onnx", mlp, "--max-relative-error", 0).exit_code == 0


def test_a_folder_holds_complete_feeds(tmp_path: Path) -> None:
    """Inputs of which the first axes count different things: samples of one, directions and layers of the other."""
    text = """<ir_version: 8, opset_import: ["": 18]>
        g (float[n,6] x, float[2,n,5] state) => (float[n,3] y) {
            a = MatMul(x, w0)  i = Gather<axis = 0>(state, zero)  b = MatMul(i, w1)  c = Add(a, b)
            d = Relu(c)  y = MatMul(d, w2) }"""
    model, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    shapes = {"w0": (6, 11), "w1": (5, 11), "w2": (11, 3)}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    tensors |= {"zero": np.array(0)}
    model.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in tensors.items())
    onnx.save(model, tmp_path / "m.onnx")
    folder = tmp_path / "feeds"
    folder.mkdir()
    for k, n in enumerate((8, 8, 3)):
        feed = {"x": rng.standard_normal((n, 6)), "state": rng.standard_normal((2, n, 5))}
        np.savez(folder / f"{k}.npz", **{name: array.astype(np.float32) for name, array in feed.items()})
    arguments = ("prune", tmp_path / "m.onnx", "-o", tmp_path / "s.onnx", "--ratio", 0.5, "--no-measure")
    result = run(*arguments, "--calibration", folder, "--force")
    assert result.exit_code == 0, result.output
    np.savez(folder / "3.npz", x=np.ones((2, 6), np.float32), state=np.ones((3, 2, 5), np.float32))
    result = run(*arguments, "--calibration", folder, "--force")
    assert result.exit_code == 2
    assert "3.npz" in result.stderr
    assert "state" in result.stderr


@pytest.mark.parametrize("more", [(), ("--json",), ("--quiet",)])
def test_long_work_says_what_is_left_on_a_terminal_only(more: tuple[str, ...], mlp: Path, tmp_path: Path) -> None:
    data = tmp_path / "c.npz"
    np.savez(data, x=np.random.default_rng(0).standard_normal((64, 5)).astype(np.float32))
    ours, theirs = pty.openpty()
    command = ["prune", mlp, "-o", tmp_path / "s.onnx", "--target", "macs=0.6", "--calibration", data, "--no-measure"]
    with open(ours, "rb", buffering=0) as terminal:
        whole = [sys.executable, "-m", "onnxprune", *command, "--no-cache", *more]
        with subprocess.Popen(whole, stdout=subprocess.DEVNULL, stderr=theirs) as process:
            os.close(theirs)
            said = b""
            with suppress(OSError):  # the other end is gone
                while part := terminal.read(1 << 16):
                    said += part
        assert process.returncode == 0
    text = said.decode(errors="replace")
    if more:
        assert all(line.startswith("warning: ") for line in text.splitlines())
    else:
        assert "read and analyse" in text


def test_what_can_be_counted_shows_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    with stages(False) as told:
        told("repair [/red]\x1b", 1, 4)
        time.sleep(0.4)
        told("write")
        time.sleep(1.1)
        told("prove", 3, 4)
        time.sleep(1.1)
        told("prove", 1, 4)  # the next proof: it does not take as long as both together
        time.sleep(0.4)
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", terminal.getvalue())
    assert re.search(r"repair \[/red\]\\x1b 0:00:00 1 of 4, 0:00:0\d left", text)
    assert "prove 0:00:01 3 of 4" in text
    assert re.search(r"prove 0:00:00 1 of 4, 0:00:0[01] left", text)


@pytest.mark.parametrize(
    ("elapsed", "done", "total", "text"),
    [
        (10.0, 0, 5, "time left unknown"),
        (10.0, 1, 5, "0:00:40 left"),
        (3600.0, 3, 9, "2:00:00 left"),
        (1, 9, 3, "0:00:00 left"),
    ],
)
def test_time_left(elapsed: float, done: int, total: int, text: str) -> None:
    assert time_left(elapsed, done, total) == text


def test_help_and_version_start_without_the_heavy_imports() -> None:
    """NumPy too: how many threads its algebra takes is said before it is loaded."""
    heavy = "{'numpy', 'onnx', 'scipy', 'networkx'}"
    code = f"import sys; from onnxprune.cli import main; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# Layers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    """Four residual blocks over x [n, 8], the third one weak, each with 16 hidden units."""
    rng = np.random.default_rng(0)
    nodes, stored = [], {"head": rng.standard_normal((8, 3))}
    for k in range(4):
        size = 0.1 if k == 2 else 1.0
        stored |= {f"up{k}": rng.standard_normal((8, 16)) * size, f"down{k}": rng.standard_normal((16, 8)) * size / 4}
        nodes += [
            helper.make_node("MatMul", [f"x{k}", f"up{k}"], [f"h{k}"], f"block{k}/up"),
            helper.make_node("Relu", [f"h{k}"], [f"r{k}"], f"block{k}/act"),
            helper.make_node("MatMul", [f"r{k}", f"down{k}"], [f"f{k}"], f"block{k}/down"),
            helper.make_node("Add", [f"x{k}", f"f{k}"], [f"x{k + 1}"], f"block{k}/add"),
        ]
    nodes.append(helper.make_node("MatMul", ["x4", "head"], ["y"], "head"))
    ports = [("x0", 8), ("y", 3)]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in ports]
    tensors = [numpy_helper.from_array(a.astype(np.float32), name) for name, a in stored.items()]
    graph = helper.make_graph(nodes, "stack", infos[:1], infos[1:], tensors)
    path = tmp_path / "stack.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_the_weakest_branch_goes_as_a_whole_and_verify_repeats_it(stack: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "s.onnx", tmp_path / "r.json"
    result = run("prune", stack, "-o", out, "--remove", "layers", "--ratio", 0.3, "--no-measure", "--report", report)
    assert result.exit_code == 0, result.output
    found = json.loads(report.read_text())
    assert found["bypass"] == ["x3"]
    assert found["kept"] == {}
    group = found["groups"][-1]
    assert (group["kind"], group["exact"], group["before"], group["after"]) == ("layers", True, 4, 3)
    wanted = {"axis": 0, "removed": "all", "role": "weight", "group": group["id"]}
    assert found["removed"] == [{"initializer": name, **wanted} for name in ("down2", "up2")]
    nodes = [node.name for node in onnx.load(out).graph.node]
    assert len(nodes) == 13
    assert not any(name.startswith("block2") for name in nodes)
    assert found["warnings"] == []
    assert run("verify", stack, out, "--plan", report).exit_code == 0
    found["removed"] = found["removed"][:1]
    report.write_text(json.dumps(found))
    result = run("verify", stack, out, "--plan", report)
    assert result.exit_code == 3
    assert "not every tensor of a removed branch" in result.stderr


def test_layers_and_channels_in_one_run(stack: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "s.onnx", tmp_path / "r.json"
    kinds = ("--remove", "layers,channels", "--no-measure", "--report", report)
    assert run("prune", stack, "-o", out, "--ratio", 0.5, *kinds).exit_code == 0
    found = json.loads(report.read_text())
    assert [group["after"] for group in found["groups"] if group["kind"] == "channels"].count(0) == 2
    assert sorted(r["removed"] == "all" for r in found["removed"]) == [False] * 4 + [True] * 4
    assert run("verify", stack, out, "--plan", report).exit_code == 0
    assert run("prune", stack, "-o", out, "--force", "--target", "macs=0.4", *kinds).exit_code == 0
    found = json.loads(report.read_text())
    assert found["pruned"]["macs"] <= 0.4 * found["dense"]["macs"]
    assert found["bypass"]
    assert run("verify", stack, out, "--plan", report).exit_code == 0


def test_ignore_keeps_a_branch(stack: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.onnx"
    options = ("--remove", "layers", "--ratio", 0.4, "--ignore", "block2/*", "--no-measure", "--json")
    result = run("prune", stack, "-o", out, *options)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert len(report["bypass"]) == 1
    assert report["bypass"] != ["x3"]


def test_criteria_that_cannot_score_branches_say_so(stack: Path, tmp_path: Path) -> None:
    options = ("--remove", "layers", "--ratio", 0.5, "--no-measure", "--criterion")
    assert run("prune", stack, "-o", tmp_path / "s.onnx", *options, "bn-scale").exit_code == 3
    assert run("prune", stack, "-o", tmp_path / "s.onnx", *options, "random-erk").exit_code == 0


def test_layers_asked_for_and_none_there(mlp: Path, tmp_path: Path) -> None:
    result = run("prune", mlp, "-o", tmp_path / "s.onnx", "--remove", "layers", "--ratio", 0.5)
    assert result.exit_code == 3
    assert "nothing can be removed" in result.stderr
    assert not (tmp_path / "s.onnx").exists()


def test_caches_go_with_their_layers_only_by_consent(tmp_path: Path) -> None:
    from zoo import ZOO

    path, out, report = tmp_path / "cached.onnx", tmp_path / "s.onnx", tmp_path / "r.json"
    onnx.save(ZOO["branches that cache keys and values"](), path)
    options = ("--remove", "layers", "--ratio", 0.7, "--no-measure", "--report", report)
    result = run("prune", path, "-o", out, *options)
    assert result.exit_code == 3
    assert "--allow-interface-change" in result.stderr
    result = run("prune", path, "-o", out, *options, "--allow-interface-change")
    assert result.exit_code == 0, result.output
    assert "warning: the interface changed" in result.stderr
    assert "warning: layers were cut from a model that generates" in result.stderr
    lost = json.loads(report.read_text())["interface"]
    assert lost["inputs"]
    dense, small = onnx.load(path).graph, onnx.load(out).graph
    assert {v.name for v in small.input} == {v.name for v in dense.input} - set(lost["inputs"])
    assert [v.name for v in small.output] == [v.name for v in dense.output if v.name not in lost["outputs"]]
    assert run("verify", path, out, "--plan", report).exit_code == 0
