"""Caches that lose heads with the attention that keeps them: by consent only, proven, and still a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper, parser
from zoo import ZOO

from onnxprune import interface, reconstruct
from onnxprune.analysis import Analysis
from onnxprune.cli import main
from onnxprune.feeds import random_feed
from onnxprune.interface import KEY, narrow, note, noted
from onnxprune.recipe import Options
from onnxprune.recovery import Recovery
from onnxprune.rows import Sampling
from onnxprune.worker import Worker

FUSED = (
    "grouped queries over a cache of open sizes",
    "heads over a cache of open sizes, mask as long as past and present",
    "Attention over a cache of open sizes",
)
BODY = """
q0 = MatMul(x, wq) q1 = Reshape(q0, split) q = Transpose<perm = [0,2,1,3]>(q1)
k0 = MatMul(x, wk) k1 = Reshape(k0, split) k2 = Transpose<perm = [0,2,1,3]>(k1) nk = Concat<axis = 2>(pk, k2)
v0 = MatMul(x, wv) v1 = Reshape(v0, split) v2 = Transpose<perm = [0,2,1,3]>(v1) nv = Concat<axis = 2>(pv, v2)
kt = Transpose<perm = [0,1,3,2]>(nk) s = MatMul(q, kt) p = Softmax(s) c0 = MatMul(p, nv)
c1 = Transpose<perm = [0,2,1,3]>(c0) c = Reshape(c1, join) o = MatMul(c, wo) y = Add(x, o)
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    """Attention of five heads, three wide, over a cache."""
    caches = "float[n,5,p,3] pk, float[n,5,p,3] pv"
    made = "float[n,t,7] y, float[n,5,u,3] nk, float[n,5,u,3] nv"
    text = f'<ir_version: 8, opset_import: ["": 18]> g (float[n,t,7] x, {caches}) => ({made}) {{ {BODY} }}'
    model, rng = parser.parse_model(text), np.random.default_rng(0)
    for name, shape in {"wq": (7, 15), "wk": (7, 15), "wv": (7, 15), "wo": (15, 7)}.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    for name, sizes in {"split": [0, -1, 5, 3], "join": [0, -1, 15]}.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(sizes), name))
    onnx.save(model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def feed(past: int, tokens: int = 4, count: int = 24) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(past)
    shapes = {"x": (count, tokens, 7), "pk": (count, 5, past, 3), "pv": (count, 5, past, 3)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def prune(path: Path, *more: object) -> tuple[Path, dict[str, Any]]:
    """(the pruned file, its report), verified."""
    out, report = path.parent / "s.onnx", path.parent / "r.json"
    found = run("prune", path, "-o", out, "--remove", "heads", "--allow-interface-change", "--round-to", 1,
                "--report", report, *more)  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "lost positions" in found.stderr
    verified = run("verify", path, out, "--plan", report)
    assert verified.exit_code == 0, verified.output
    return out, json.loads(report.read_text())


def test_heads_stay_with_their_cache_without_consent(decoder: Path) -> None:
    assert not [group for group in Analysis(decoder).groups if group.kind == "heads"]
    found = run("prune", decoder, "-o", decoder.parent / "s.onnx", "--remove", "heads", "--ratio", 0.5)
    assert found.exit_code == 3


def test_a_cache_loses_heads_by_consent(decoder: Path) -> None:
    out, report = prune(decoder, "--ratio", 0.5)  # measured beside the dense one, on its own part of the feed
    assert report["pruned"]["latency"] is not None
    kept = report["interface"]["narrowed"]["pk"]["1"]
    assert len(kept) == 3
    assert all(axes == {"1": kept} for axes in report["interface"]["narrowed"].values())
    graph = onnx.load(out).graph
    sizes = {v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in
             (*graph.input, *graph.output)}  # fmt: skip
    assert sizes == {"x": ["n", "t", 7], "pk": ["n", 3, "p", 3], "pv": ["n", 3, "p", 3], "y": ["n", "t", 7],
                     "nk": ["n", 3, "u", 3], "nv": ["n", 3, "u", 3]}  # fmt: skip
    compared = run("compare", decoder, out, "--json")
    assert compared.exit_code == 0, compared.output
    assert json.loads(compared.stdout)["relative-error"] > 0


def test_what_is_left_of_a_cache_continues(decoder: Path) -> None:
    out, report = prune(decoder, "--ratio", 0.5, "--no-measure")
    session, dense = (ort.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in (out, decoder))
    kept = report["interface"]["narrowed"]["pk"]["1"]
    whole = feed(2)
    part = {"x": whole["x"], "pk": whole["pk"][:, kept], "pv": whole["pv"][:, kept]}
    y, nk, nv = session.run(None, part)
    for small, large in zip((nk, nv), dense.run(["nk", "nv"], whole), strict=True):
        np.testing.assert_allclose(small, large[:, kept], rtol=1e-5)
    later = feed(1, tokens=1)["x"]
    step = session.run(None, {"x": later, "pk": nk, "pv": nv})
    assert step[1].shape == (24, 3, 7, 3)
    assert y.shape == (24, 4, 7)


def test_repair_runs_both_on_their_own_part(decoder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", **feed(0, tokens=1, count=64))  # of one token, heads say what others say as well
    data = ("--target", "params=0.7", "--evaluation", tmp_path / "c.npz", "--no-measure", "--force")
    _, naive = prune(decoder, *data)
    _, report = prune(decoder, *data, "--calibration", tmp_path / "c.npz")
    assert "wo" in report["repaired"]
    assert report["interface"]["narrowed"].keys() == {"pk", "pv", "nk", "nv"}
    assert report["quality"]["relative-error"] < 0.05 * naive["quality"]["relative-error"]


def test_what_a_cache_is_off_by_is_seen_at_the_other_outputs(decoder: Path) -> None:
    analysis, data = Analysis(decoder), [feed(0), feed(0, tokens=3)]
    model = analysis.prepared.model.clone()
    for name, factor in {"wk": 2.0, "wq": 0.5}.items():  # queries make up for keys
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        model.graph.initializers[name].const_value = ir.tensor(tensor.numpy() * np.float32(factor), name=name)
    with Worker() as worker:
        recovery = Recovery(analysis, data, Options(ratio=0.5, calibration="given"), worker)
        assert recovery.caches == {"nk", "nv"}
        found = []
        for aside in ((), recovery.caches, ("y", "nk", "nv")):
            reconstruct.begin(worker, analysis.prepared.model, data, Sampling(), judged=data, aside=aside)
            found.append(reconstruct.repair(worker, model, [], None, judge=True).divergence)
    assert found[1] < 1e-9 < found[0] == found[2]  # something has to count


def test_pruned_twice_the_note_speaks_of_the_last_model(decoder: Path, tmp_path: Path) -> None:
    first, _ = prune(decoder, "--ratio", 0.5, "--no-measure")
    second = tmp_path / "again"
    second.mkdir()
    first = first.rename(second / "m.onnx")
    out, report = prune(first, "--ratio", 0.5, "--no-measure")
    assert len(report["interface"]["narrowed"]["pk"]["1"]) == 2
    note_of = {p.key: p.value for p in onnx.load(out).metadata_props}[KEY]
    assert json.loads(note_of) == report["interface"]["narrowed"]


@pytest.mark.parametrize("name", FUSED)
def test_fused_attention_over_a_cache(name: str, tmp_path: Path) -> None:
    onnx.save(ZOO[name](), tmp_path / "m.onnx")
    _, report = prune(tmp_path / "m.onnx", "--ratio", 0.4, "--no-measure")
    assert {tuple(axes["1"]) for axes in report["interface"]["narrowed"].values()} <= {(0, 1), (0, 2), (1, 2)}
    assert set(report["interface"]["narrowed"]) == {"pk", "pv", "nk", "nv"}


def test_notes() -> None:
    left = {"pk": {1: np.array([0, 2])}}
    again = noted(note(left))
    assert {name: {axis: at.tolist() for axis, at in axes.items()} for name, axes in again.items()} == {
        "pk": {1: [0, 2]}
    }
    array = np.arange(6).reshape(1, 3, 2)
    assert narrow({"pk": array, "x": array}, left)["pk"].tolist() == [[[0, 1], [4, 5]]]
    assert narrow({"pk": array, "x": array}, left)["x"] is array
    assert narrow({"pk": array[:, :2]}, left)["pk"].shape == (1, 2, 2)  # as narrow already
    assert not note({})
    assert interface.noted({}) == {}


@pytest.mark.parametrize("text", ["", "[", "[]", "7", '{"pk": 1}', '{"pk": {"a": [0]}}', '{"pk": {"1": [-1]}}',
                                  '{"pk": {"1": ["x"]}}', '{"pk": {"1": [1e99]}}', "[" * 100_000])  # fmt: skip
def test_notes_of_somebody_else_are_none(text: str) -> None:
    assert noted({KEY: text}) == {}


@pytest.mark.parametrize("said", ['{"x": {"0": [0]}}', '{"x": {"1": [0, 1]}}', '{"y": {"1": [0, 1]}}', "[]", "{"])
def test_what_a_model_says_of_another_changes_nothing(said: str, tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 18]> g (float[n, 8] x) => (float[n, 4] y)
        { h = MatMul (x, w) r = Relu (h) y = MatMul (r, v) }"""
    model, rng = parser.parse_model(text), np.random.default_rng(0)
    for name, shape in (("w", (8, 16)), ("v", (16, 4))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    onnx.helper.set_model_props(model, {KEY: said})
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "c.npz", x=rng.standard_normal((70, 8)).astype(np.float32))
    result = run("prune", tmp_path / "m.onnx", "-o", tmp_path / "o.onnx", "--ratio", 0.5, "--calibration",
                 tmp_path / "c.npz", "--report", tmp_path / "r.json")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert KEY not in {entry.key for entry in onnx.load(tmp_path / "o.onnx").metadata_props}
    assert run("verify", tmp_path / "m.onnx", tmp_path / "o.onnx", "--plan", tmp_path / "r.json").exit_code == 0


@pytest.mark.parametrize("name", FUSED)
def test_fused_attention_over_a_cache_shows_what_its_readers_see(name: str, tmp_path: Path) -> None:
    onnx.save(ZOO[name](), tmp_path / "m.onnx")
    prepared = Analysis(tmp_path / "m.onnx").prepared
    (tmp_path / "feeds").mkdir()
    for k in range(4):
        one = random_feed(prepared.model.graph, prepared.facts.shapes, k, 0)
        np.savez(tmp_path / "feeds" / f"{k}.npz", **one)
    data = ("--calibration", tmp_path / "feeds", "--criterion", "obs-struct", "--effort", "quick")
    _, report = prune(tmp_path / "m.onnx", "--ratio", 0.4, "--no-measure", *data)
    assert set(report["interface"]["narrowed"]) == {"pk", "pv", "nk", "nv"}
