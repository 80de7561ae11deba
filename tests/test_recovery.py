"""Repair from the command line: what calibration data must look like, and what comes of it."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper, parser

from onnxprune import pipeline, reconstruct
from onnxprune.analysis import Analysis
from onnxprune.cli import main
from onnxprune.feeds import blended, noisy, padding_of, trimmed
from onnxprune.recipe import Options
from onnxprune.recovery import Recovery
from onnxprune.types import Plan
from onnxprune.worker import Worker

X = np.random.default_rng(1).standard_normal((64, 7)).astype(np.float32)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def save(path: Path, inputs: str, outputs: str, body: str, **weights: Any) -> Path:
    """A model; a weight given by its shape is random."""
    rng = np.random.default_rng(0)
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 18]> g ({inputs}) => ({outputs}) {{ {body} }}')
    for name, given in weights.items():
        drawn = rng.standard_normal(given) / np.sqrt(given[0]) if isinstance(given, tuple) else given
        array = drawn.astype(np.float32) if isinstance(given, tuple) else np.asarray(given)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.save(model, path)
    return path


@pytest.fixture
def mlp(tmp_path: Path) -> Path:
    body = "a = Gemm(x, w1, b1) r = Relu(a) b = Gemm(r, w2, b2) s = Relu(b) y = Gemm(s, w3, b3)"
    sizes = {"w1": (7, 32), "b1": (32,), "w2": (32, 24), "b2": (24,), "w3": (24, 3), "b3": (3,)}
    return save(tmp_path / "m.onnx", "float[n,7] x", "float[n,3] y", body, **sizes)


def arrays(folder: Path, **given: np.ndarray) -> Path:
    np.savez(folder / "c.npz", **given)
    return folder / "c.npz"


def prune(model: Path, data: Path, *more: object) -> tuple[Result, dict[str, Any]]:
    """(result, report) of a quick run that writes s.onnx beside the model."""
    report = model.parent / "r.json"
    result = run("prune", model, "-o", model.parent / "s.onnx", "--target", "macs=0.5", "--calibration", data,
                 "--effort", "quick", "--no-measure", "--report", report, "--force", *more)  # fmt: skip
    return result, json.loads(report.read_text()) if report.exists() else {}


def test_what_a_search_says_is_told_even_where_nothing_is_repaired(mlp: Path) -> None:
    analysis = Analysis(mlp)
    with Worker() as worker:
        recovery = Recovery(analysis, [], Options(ratio=0.5), worker)
        for _ in range(2):
            recovery._tell("something")
        assert recovery.repair(Plan({}), analysis.rewrite(Plan({}))).warnings == ["something"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"z": X}, "no array for this graph input"),
        ({"x": X.astype(np.int64)}, "has type int64"),
        ({"x": X.astype(np.complex64)}, "has type complex64"),
        ({"x": np.array(["a", "b"])}, "where float32 is needed"),
        ({"x": np.array([1, "a"], object)}, "Python objects"),
        ({"x": X[:, :5]}, "does not fit"),
        ({"x": X[0]}, "does not fit"),
        ({"x": X[:0]}, "no samples"),
        ({"x": np.where(X > 2, np.nan, X)}, "not a number"),
    ],
)
def test_calibration_that_does_not_fit_is_one_line(mlp: Path, given: dict[str, np.ndarray], said: str) -> None:
    result, _ = prune(mlp, arrays(mlp.parent, **given))
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (mlp.parent / "s.onnx").exists()


def test_labels_of_another_number_than_the_samples(mlp: Path, tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    labelled = arrays(tmp_path / "e", x=X, labels=np.zeros(3, np.int64))
    result, _ = prune(mlp, arrays(tmp_path, x=X), "--evaluation", labelled)
    assert result.exit_code == 2
    assert "labels" in result.stderr


@pytest.mark.parametrize("count", [1, 2, 3, 5, 11])
def test_few_samples_are_a_weaker_repair_that_says_so(mlp: Path, count: int) -> None:
    result, report = prune(mlp, arrays(mlp.parent, x=X[:count]))
    assert result.exit_code == 0, result.output
    assert any("more" in text for text in report["warnings"])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_samples_that_are_all_alike_are_no_crash(mlp: Path, value: float) -> None:
    result, _ = prune(mlp, arrays(mlp.parent, x=np.full_like(X, value)))
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("method", ["sequential", "lsq", "mask-tune", "bias-comp"])
def test_samples_beyond_numbers_are_no_crash(mlp: Path, method: str) -> None:
    x = X.copy()
    x[3, 3] = 3e38
    with np.errstate(all="ignore"):
        result, _ = prune(mlp, arrays(mlp.parent, x=x), "--reconstruct", method, "--criterion", "mag")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("effort", ["quick", "default", "thorough"])
def test_a_repaired_model_is_verified_and_the_same_every_time(mlp: Path, effort: str) -> None:
    data, written = arrays(mlp.parent, x=X), []
    for _ in range(2):
        result, report = prune(mlp, data, "--effort", effort, "--memory", "1MB", "--seed", 3)
        assert result.exit_code == 0, result.output
        written.append(hashlib.sha256((mlp.parent / "s.onnx").read_bytes()).hexdigest())
    assert report["repaired"]
    assert written[0] == written[1]
    result = run("verify", mlp, mlp.parent / "s.onnx", "--plan", mlp.parent / "r.json")
    assert result.exit_code == 0, result.output


def test_a_value_that_is_not_listed_as_repaired_is_a_forgery(mlp: Path) -> None:
    _, report = prune(mlp, arrays(mlp.parent, x=X))
    report["repaired"] = report["repaired"][1:]
    (mlp.parent / "r.json").write_text(json.dumps(report))
    assert run("verify", mlp, mlp.parent / "s.onnx", "--plan", mlp.parent / "r.json").exit_code == 3


def test_a_bias_that_others_read_is_repaired_in_a_copy(tmp_path: Path) -> None:
    body = (
        "a = Gemm(x, w1, b1) r = Relu(a) y = Gemm(r, w2, b) i = Identity(b) z0 = MatMul(r, w3) z = Add(z0, i) "
        "t = Gemm(x, w4, b)"
    )
    sizes = {"w1": (7, 32), "b1": (32,), "w2": (32, 5), "b": (5,), "w3": (32, 5), "w4": (7, 5)}
    model = save(tmp_path / "m.onnx", "float[n,7] x", "float[n,5] y, float[n,5] z, float[n,5] t", body, **sizes)
    result, report = prune(model, arrays(tmp_path, x=X))
    assert result.exit_code == 0, result.output
    before, after = ({i.name: i.raw_data for i in onnx.load(p).graph.initializer} for p in (model, tmp_path / "s.onnx"))
    assert before["b"] == after["b"]
    assert before["w4"] == after["w4"]
    assert len(set(report["repaired"]) - before.keys()) == 2
    assert run("verify", model, tmp_path / "s.onnx", "--plan", tmp_path / "r.json").exit_code == 0


@pytest.mark.parametrize("name", ["w1", "b1", "w3", "b3"])
def test_what_is_ignored_keeps_its_bits(mlp: Path, name: str) -> None:
    result, report = prune(mlp, arrays(mlp.parent, x=X), "--ignore", name)
    assert result.exit_code == 0, result.output
    before, after = (
        {i.name: i.raw_data for i in onnx.load(path).graph.initializer} for path in (mlp, mlp.parent / "s.onnx")
    )
    assert before[name] == after[name]
    assert report["repaired"]
    assert name not in report["repaired"]


def test_repair_can_be_turned_off_and_needs_samples(mlp: Path, tmp_path: Path) -> None:
    result, report = prune(mlp, arrays(tmp_path, x=X), "--reconstruct", "none")
    assert result.exit_code == 0
    assert report["repaired"] == []
    result = run("prune", mlp, "-o", tmp_path / "t.onnx", "--ratio", 0.5, "--reconstruct", "sequential")
    assert result.exit_code == 2
    assert "--calibration" in result.stderr


def test_no_new_bias_adds_nothing(mlp: Path) -> None:
    result, _ = prune(mlp, arrays(mlp.parent, x=X), "--no-new-bias")
    assert result.exit_code == 0
    assert len(onnx.load(mlp.parent / "s.onnx").graph.initializer) == 6


def test_a_family_is_repaired_one_by_one(mlp: Path, tmp_path: Path) -> None:
    result = run("prune", mlp, "-o", tmp_path / "s_{target}.onnx", "--target", "macs=0.7,0.5,0.3", "--no-measure",
                 "--calibration", arrays(tmp_path, x=X), "--effort", "quick", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    reports = json.loads(result.stdout)["family"]
    assert all(report["repaired"] for report in reports)
    assert [report["pruned"]["macs"] < 0.72 * report["dense"]["macs"] for report in reports] == [True] * 3


@pytest.mark.parametrize("stage", ["statistics", "repair"])
def test_an_interrupt_leaves_nothing(mlp: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (mlp.parent / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(mlp.parent / "tmp"))
    data, out = arrays(mlp.parent, x=X), mlp.parent / "s.onnx"

    def interrupted(text: str, done: int = 0, total: int = 0) -> None:
        if text == stage and total:
            raise KeyboardInterrupt

    options = Options(target={"macs": "0.5"}, calibration=str(data), effort="quick", measure=False)
    with pytest.raises(KeyboardInterrupt):
        pipeline.family(mlp, [out], [options], progress=interrupted)
    assert sorted(path.name for path in mlp.parent.iterdir()) == ["c.npz", "m.onnx", "tmp"]
    assert list((mlp.parent / "tmp").iterdir()) == []


BLOCK = """
e = Gather(table, ids) q0 = MatMul(e, wq) k0 = MatMul(e, wk) v0 = MatMul(e, wv)
q1 = Reshape(q0, split) k1 = Reshape(k0, split) v1 = Reshape(v0, split)
q = Transpose<perm = [0,2,1,3]>(q1) k = Transpose<perm = [0,2,3,1]>(k1) v = Transpose<perm = [0,2,1,3]>(v1)
s0 = MatMul(q, k) m0 = Cast<to = 1>(mask) m1 = Sub(one, m0) m2 = Mul(m1, far) m = Unsqueeze(m2, middle)
s = Add(s0, m) p = Softmax(s) c0 = MatMul(p, v) c1 = Transpose<perm = [0,2,1,3]>(c0) c = Reshape(c1, join)
o = MatMul(c, wo) h = Add(e, o) n1 = LayerNormalization(h, g, b) f0 = MatMul(n1, w1) f1 = Add(f0, b1) f = Relu(f1)
r0 = MatMul(f, w2) r1 = Add(r0, b2) r = Add(h, r1) t0 = Unsqueeze(m0, last) t1 = Mul(r, t0)
t = ReduceSum<keepdims = 0>(t1, first) y = MatMul(t, wy)
"""


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return save(
        tmp_path / "m.onnx", "int64[n,t] ids, int64[n,t] mask", "float[n,8] y", BLOCK, table=(50, 16), wq=(16, 32),
        wk=(16, 32), wv=(16, 32), split=np.array([0, 0, 2, 16]), one=np.float32(1), far=np.float32(-1e9),
        middle=np.array([1, 2]), join=np.array([0, 0, 32]), wo=(32, 16), g=np.ones(16, np.float32), b=(16,),
        w1=(16, 48), b1=(48,), w2=(48, 16), b2=(16,), last=np.array([2]), first=np.array([1]), wy=(16, 8),
    )  # fmt: skip


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_padding_holds_does_not_count(encoder: Path, side: str) -> None:
    """Padding is told from tokens by the mask, so what ids it holds changes nothing."""
    rng = np.random.default_rng(4)
    lengths = rng.integers(3, 10, 48)
    mask = (np.arange(9) < lengths[:, None]).astype(np.int64)[:, :: 1 if side == "right" else -1]
    ids = rng.integers(0, 50, mask.shape)
    written = []
    for padding in (0, 13):
        data = arrays(encoder.parent, ids=np.where(mask == 1, ids, padding), mask=mask)
        result, report = prune(encoder, data, "--remove", "channels,heads,head-dim")
        assert result.exit_code == 0, result.output
        assert report["repaired"]
        weights = onnx.load(encoder.parent / "s.onnx").graph.initializer
        written.append({i.name: numpy_helper.to_array(i) for i in weights})
    for name, array in written[0].items():
        np.testing.assert_allclose(array, written[1][name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_noise_is_for_what_is_no_mask() -> None:
    x, mask, far = X[:4], (X[:4] > 0).astype(np.float32), np.where(X[:4] > 0, 0, -np.inf).astype(np.float32)
    (found,) = noisy([{"x": x, "mask": mask, "far": far}], 0.5, 0)
    assert (found["x"] != x).all()
    assert found["mask"] is mask
    assert found["far"] is far
    assert noisy([{"mask": mask}], 0.5, 0) == []


def test_blends_lie_between_feeds_nearer_to_their_own() -> None:
    rng = np.random.default_rng(0)
    x = [rng.standard_normal((3, 4)).astype(np.float32) for _ in range(2)]
    masks = [(array > 0).astype(np.float32) for array in x]
    found = blended([{"x": a, "mask": m} for a, m in zip(x, masks, strict=True)], 0)
    for k, feed in enumerate(found):
        np.testing.assert_array_equal(feed["mask"], masks[k])
        share = (feed["x"] - x[k]) / (x[1 - k] - x[k])
        np.testing.assert_allclose(share, share.flat[0], rtol=1e-4)
        assert 0.2 <= share.flat[0] <= 0.5
    assert blended([{"x": x[0]}, {"x": x[1][:2]}], 0) == []  # no two are alike
    assert blended([{"mask": mask} for mask in masks], 0) == []


def test_padding_is_found_at_either_end_and_nowhere_else(encoder: Path) -> None:
    import onnx_ir as ir

    graph = ir.load(encoder).graph
    ids, holes = np.ones((2, 4), np.int64) * 7, np.array([[1, 0, 1, 1], [1, 1, 1, 1]])
    for mask, wanted in ((np.tri(2, 4, 1), "mask"), (np.tri(2, 4, 1)[:, ::-1], "mask"), (holes, None)):
        assert padding_of(graph, [{"ids": ids, "mask": mask.astype(np.int64)}]) == wanted


def test_padding_at_the_end_is_cut_and_samples_of_a_length_stay_together(encoder: Path) -> None:
    import onnx_ir as ir

    graph = ir.load(encoder).graph
    mask = (np.arange(9) < np.array([2, 9, 3, 8])[:, None]).astype(np.int64)
    ids = mask * np.arange(1, 5)[:, None]
    feeds = [{"ids": ids[k : k + 2], "mask": mask[k : k + 2]} for k in (0, 2)]
    short, long = sorted(trimmed(graph, feeds, "mask", 0), key=lambda feed: feed["mask"].size)
    assert short["ids"].tolist() == [[1, 1, 0], [3, 3, 3]]
    assert long["ids"].tolist() == [[4] * 8 + [0], [2] * 9]
    left = [{name: array[:, ::-1] for name, array in feed.items()} for feed in feeds]
    assert trimmed(graph, left, "mask", 0) is left


def test_a_length_that_only_looks_dynamic_is_left_alone(tmp_path: Path) -> None:
    """The model takes no other length than its table of positions has: calibration goes on with padding."""
    nodes = """e0 = Gather(table, ids) e = Add(e0, places) h0 = MatMul(e, w1) h = Relu(h0) o = MatMul(h, w2)
               m0 = Cast<to = 1>(mask) m = Unsqueeze(m0, last) r = Mul(o, m) y = ReduceSum<keepdims = 0>(r, first)"""
    model = save(
        tmp_path / "m.onnx", "int64[n,t] ids, int64[n,t] mask", "float[n,4] y", nodes, table=(20, 8), places=(6, 8),
        w1=(8, 32), w2=(32, 4), last=np.array([2]), first=np.array([1]),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    mask = (np.arange(6) < rng.integers(2, 5, 64)[:, None]).astype(np.int64)
    result, report = prune(model, arrays(tmp_path, ids=rng.integers(0, 20, (64, 6)), mask=mask))
    assert result.exit_code == 0, result.output
    assert report["repaired"]


def test_a_run_goes_on_where_it_was_killed(mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes without a cache, with an empty one, with a full one, and after a run that ended in the middle."""
    data = arrays(tmp_path, x=np.random.default_rng(5).standard_normal((96, 7)).astype(np.float32))
    cache, measured, real = tmp_path / "cache", [], reconstruct.repair
    limit = 10**9

    def counted(*args: Any, **kwargs: Any) -> Any:
        measured.append(bool(kwargs.get("keep")))
        if sum(measured) > limit:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(reconstruct, "repair", counted)

    def once(*more: object) -> tuple[int, int, bytes]:
        """(exit code, trials, what was written) of one run."""
        measured.clear()
        (mlp.parent / "s.onnx").unlink(missing_ok=True)
        result, _ = prune(mlp, data, "--effort", "default", *more)
        written = mlp.parent / "s.onnx"
        return result.exit_code, sum(measured), written.read_bytes() if written.exists() else b""

    without = once("--no-cache")
    assert without[:1] == (0,) and without[1] > 4
    limit = 3
    assert once("--cache", cache)[::2] == (130, b"")
    limit = 10**9
    code, trials, found = once("--cache", cache)
    assert (code, found) == (0, without[2])
    assert trials == without[1] - 3
    assert once("--cache", cache) == (0, 0, without[2])
    for entry in [file for file in cache.rglob("*") if file.is_file()][::2]:
        entry.write_bytes(entry.read_bytes()[:-1] + b"?")
    code, trials, found = once("--cache", cache)
    assert (code, found) == (0, without[2]) and 0 < trials < without[1]


def test_a_cache_that_cannot_be_written_costs_no_more_than_its_help(mlp: Path, tmp_path: Path) -> None:
    data = arrays(tmp_path, x=np.random.default_rng(5).standard_normal((32, 7)).astype(np.float32))
    (tmp_path / "file").write_bytes(b"")
    result, _ = prune(mlp, data, "--cache", tmp_path / "file" / "inside")
    assert result.exit_code == 4
    result, _ = prune(mlp, data, "--cache", tmp_path, "--no-cache")
    assert result.exit_code == 2
    assert "--no-cache" in result.stderr
