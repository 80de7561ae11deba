"""Running and timing models in the child: ONNX Runtime's part of it on tiny models."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxprune import runtime
from onnxprune.errors import InputError, MachineError
from onnxprune.measure import Latency, faster, measure
from onnxprune.runtime import ort
from onnxprune.worker import Worker, call

pytest.importorskip("onnxruntime", reason="pip install 'onnxprune[cpu]'")

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])
FEED = {"x": np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)}


def save(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any] | None = None) -> Path:
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights or [])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def conv(path: Path, width: int = 8, depth: int = 1) -> Path:
    """`depth` convolutions of `width` channels, sum over channels at the end."""
    rng = np.random.default_rng(width)
    nodes, weights, last, n = [], [], "x", 3
    for k in range(depth):
        array = rng.standard_normal((width, n, 3, 3)).astype(np.float32)
        weights.append(onnx.numpy_helper.from_array(array, f"w{k}"))
        nodes.append(helper.make_node("Conv", [last, f"w{k}"], [f"c{k}"], f"conv{k}", pads=[1, 1, 1, 1]))
        last, n = f"c{k}", width
    nodes.append(helper.make_node("ReduceMean", [last], ["y"], axes=[1], keepdims=0))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16, 16])
    return save(path, nodes, [X], [y], weights)


def identity(path: Path, kind: int) -> Path:
    x, y = (helper.make_tensor_value_info(name, kind, ["n"]) for name in "xy")
    return save(path, [helper.make_node("Identity", ["x"], ["y"])], [x], [y])


# run -----------------------------------------------------------------------------------------------------------------


def test_run_answers_every_feed(tmp_path: Path) -> None:
    path = conv(tmp_path / "m.onnx")
    feeds = [FEED, {"x": np.zeros((2, 3, 16, 16), np.float32)}]
    with Worker() as worker:
        found = worker.call(ort.run, str(path), feeds)
        plain = worker.call(ort.run, str(path), feeds, optimise=False, threads=2)
    assert [list(row) for row in found] == [["y"], ["y"]]
    assert found[0]["y"].shape == (1, 16, 16)
    assert not found[1]["y"].any()
    np.testing.assert_allclose(found[0]["y"], plain[0]["y"], rtol=1e-4, atol=1e-5)


def test_run_of_some_outputs(tmp_path: Path) -> None:
    x, y, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xyz")
    nodes = [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Abs", ["x"], ["z"])]
    path = str(save(tmp_path / "m.onnx", nodes, [x], [y, z]))
    feed = {"x": np.array([-1, 2], np.float32)}
    with Worker() as worker:
        assert list(worker.call(ort.run, path, [feed])[0]) == ["y", "z"]
        assert {k: v.tolist() for k, v in worker.call(ort.run, path, [feed], ["z"])[0].items()} == {"z": [1, 2]}
        with pytest.raises(InputError, match="no such output"):
            worker.call(ort.run, path, [feed], ["q"])


def test_strings(tmp_path: Path) -> None:
    path = identity(tmp_path / "m.onnx", TensorProto.STRING)
    assert call(ort.run, str(path), [{"x": np.array(["a", "bc"])}])[0]["y"].tolist() == ["a", "bc"]


def test_bfloat16_comes_back_as_float32(tmp_path: Path) -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    path = identity(tmp_path / "m.onnx", TensorProto.BFLOAT16)
    sent = np.array([0, -1.5, 3.1415926, np.inf], bfloat16)
    with Worker() as worker:
        back = worker.call(ort.run, str(path), [{"x": sent}, {"x": sent[:0]}])
        rows = measure([path], {"x": sent}, rounds=3)
    assert back[0]["y"].dtype == np.float32
    np.testing.assert_array_equal(back[0]["y"], sent.astype(np.float32))
    assert back[1]["y"].shape == (0,)
    assert rows[0].wall_ms > 0


def test_float8_is_a_clear_error(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT8E4M3FN)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT8E4M3FN, [2])],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), path)
    with pytest.raises(InputError, match="float8e4m3fn") as caught:
        call(ort.run, str(path), [{"x": np.ones(2, np.float32)}])
    assert caught.value.object == "y"


def test_sequences_and_maps_are_taken_apart(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])
    parts = helper.make_tensor_sequence_value_info("parts", TensorProto.FLOAT, None)
    split = helper.make_node("SplitToSequence", ["x"], ["parts"], axis=0)
    names = helper.make_node("ZipMap", ["x"], ["maps"], domain="ai.onnx.ml", classlabels_strings=["a", "b"])
    kind = helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    maps = helper.make_value_info("maps", helper.make_sequence_type_proto(kind))
    path = save(tmp_path / "m.onnx", [split, names], [x], [parts, maps])
    found = call(ort.run, str(path), [{"x": np.arange(4, dtype=np.float32).reshape(2, 2)}])[0]
    assert {k: v.tolist() for k, v in found.items()} == {
        "parts[0]": [[0, 1]],
        "parts[1]": [[2, 3]],
        "maps[0][a]": 0,
        "maps[0][b]": 1,
        "maps[1][a]": 2,
        "maps[1][b]": 3,
    }


def test_interface(tmp_path: Path) -> None:
    found = call(ort.interface, str(conv(tmp_path / "m.onnx")))
    assert found.inputs == (ort.Port("x", "tensor(float)", ("n", 3, 16, 16)),)
    assert found.outputs == (ort.Port("y", "tensor(float)", ("n", 16, 16)),)


def broken(path: Path, how: str) -> Path:
    if how == "bytes":
        path.write_bytes(b"no model" * 9)
    elif how != "missing":
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
        op = "Nope" if how == "operator" else "Neg"
        save(path, [helper.make_node(op, ["x" if how == "operator" else "nix"], ["y"], "n1")], [x], [x])
    return path


@pytest.mark.parametrize("how", ["bytes", "missing", "operator", "input"])
def test_a_model_that_does_not_load(tmp_path: Path, how: str) -> None:
    with pytest.raises(InputError, match=r"^ONNX Runtime cannot load the model: ") as caught:
        call(ort.interface, str(broken(tmp_path / "m.onnx", how)))
    message = caught.value.message
    assert "\n" not in message
    assert not any(noise in message for noise in ("[ONNXRuntimeError]", "onnxruntime_src", "Load model from"))


@pytest.mark.parametrize(
    ("feed", "said", "culprit"),
    [
        ({}, "no value for this input", "x"),
        ({"x": np.zeros((1, 3, 16, 16))}, r"Unexpected input data type", ""),
        ({"x": np.zeros((1, 3, 16), np.float32)}, "Invalid rank for input", ""),
    ],
)
def test_a_feed_that_does_not_fit(tmp_path: Path, feed: dict[str, Any], said: str, culprit: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        call(ort.run, str(conv(tmp_path / "m.onnx")), [feed])
    assert caught.value.object == culprit


def expand(path: Path) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    s = helper.make_tensor_value_info("s", TensorProto.INT64, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["k"])
    return save(path, [helper.make_node("Expand", ["x", "s"], ["y"], "grow")], [x, s], [y])


def test_a_node_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot run") as caught:
        call(ort.run, str(expand(tmp_path / "m.onnx")), [{"x": np.ones(1, np.float32), "s": np.array([-3])}])
    assert caught.value.object == "node 'grow'"


@pytest.mark.parametrize("count", [1 << 28, 1 << 45])
def test_a_run_that_needs_too_much_memory(tmp_path: Path, count: int) -> None:
    feed = {"x": np.ones(1, np.float32), "s": np.array([count])}
    with pytest.raises(MachineError, match="out of memory"):
        call(ort.run, str(expand(tmp_path / "m.onnx")), [feed], memory=700 << 20)


def test_an_endless_loop_is_stopped(tmp_path: Path) -> None:
    scalar = {name: helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in "cdvwxy"}
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Not", ["v"], ["w"])],
        "b",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), scalar["c"], scalar["v"]],
        [scalar["d"], scalar["w"]],
    )
    loop = helper.make_node("Loop", ["", "x", "x"], ["y"], body=body)
    path = save(tmp_path / "m.onnx", [loop], [scalar["x"]], [scalar["y"]])
    with pytest.raises(MachineError, match="longer than"):
        call(ort.run, str(path), [{"x": np.array(True)}], seconds=1)


# backends ------------------------------------------------------------------------------------------------------------


def test_backends_that_are_not() -> None:
    with pytest.raises(InputError, match="there are cpu, cuda"):
        runtime.known("abacus")


def test_cuda_is_there_or_an_error(tmp_path: Path) -> None:
    path = conv(tmp_path / "m.onnx")
    try:
        rows = measure([path], FEED, backend="cuda", rounds=3)
    except MachineError as error:
        assert "CUDA" in error.message  # noqa: PT017
    else:
        assert rows[0].backend == "cuda"


def test_a_provider_that_falls_back_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="did not start"):
        call(fall_back, str(conv(tmp_path / "m.onnx")))


def fall_back(path: str) -> None:
    ort.OrtBackend("cuda", "NoSuchExecutionProvider").session(path)


@pytest.mark.parametrize(
    ("installed", "backend", "said"),
    [
        ({}, "cpu", None),  # found as a module: a build of one's own
        ({"onnxruntime": "1.2"}, "cpu", None),
        ({"onnxruntime-gpu": "1.2"}, "cuda", None),
        ({"onnxruntime": "1.2", "onnxruntime-gpu": "1.2"}, "cpu", None),
        ({"onnxruntime": "1.2", "onnxruntime-gpu": "1.3"}, "cpu", "both installed"),
        ({"onnxruntime": "1.2", "onnxruntime-gpu": "1.2"}, "cuda", r"both installed.*onnxprune\[gpu\]"),
    ],
)
def test_packages_that_exclude_each_other(
    installed: dict[str, str], backend: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.metadata as metadata
    import re

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    found = ort.conflict(backend)
    assert found is None if said is None else re.search(said, found or "")


# measure -------------------------------------------------------------------------------------------------------------


def test_a_smaller_model_is_faster(tmp_path: Path) -> None:
    dense, pruned = conv(tmp_path / "dense.onnx", 64, 4), conv(tmp_path / "pruned.onnx", 8, 4)
    rows = measure([dense, pruned], FEED, rounds=15)
    assert faster(*rows) is True
    assert faster(*reversed(rows)) is False
    assert [row.rounds for row in rows] == [15, 15]
    assert all(row.cpu_ms > 0 and row.wall_ms > 0 and row.spread >= 0 for row in rows)
    assert json.loads(json.dumps([asdict(row) for row in rows]))[0]["backend"] == "cpu"


def test_seconds_bound_the_sampling(tmp_path: Path) -> None:
    path = conv(tmp_path / "m.onnx", 64, 3)
    start = time.perf_counter()
    rows = measure([path, path], FEED, rounds=10**6, seconds=0.5)
    assert time.perf_counter() - start < 3
    assert rows[0].rounds == rows[1].rounds > 1


def test_what_is_left_of_the_sampling_is_said(tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    measure([conv(tmp_path / "m.onnx")], FEED, rounds=10**6, seconds=2.6, progress=lambda *told: said.append(told))
    assert said
    assert all(stage == "measure" and 0 < done < total < 10**6 for stage, done, total in said)
    assert sorted(said) == said


def test_one_round_at_least(tmp_path: Path) -> None:
    rows = measure([conv(tmp_path / "m.onnx")] * 2, FEED, seconds=1e-6)
    assert rows[0].rounds == 1
    assert faster(*rows) is None


def test_more_threads_count_wall_time(tmp_path: Path) -> None:
    (row,) = measure([conv(tmp_path / "m.onnx")], FEED, threads=2, rounds=3)
    assert row.threads == 2
    assert row.ms == row.wall_ms


def test_a_model_without_the_inputs(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        measure([conv(tmp_path / "m.onnx")], {"z": FEED["x"]})
    assert caught.value.object == "x"


@pytest.mark.parametrize("bad", [{"threads": 0}, {"rounds": 0}, {"seconds": 0.0}, {"seconds": float("nan")}])
def test_bad_numbers(bad: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError):
        measure([tmp_path / "never_read.onnx"], FEED, **bad)


def test_timeout(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="longer than"):
        measure([conv(tmp_path / "m.onnx", 64, 3)], FEED, seconds=1e-3, timeout=1e-3)


ROW = Latency(10.0, 11.0, 0.02, 30, "cpu", 1)


@pytest.mark.parametrize(
    ("dense", "pruned", "verdict"),
    [
        (ROW, replace(ROW, cpu_ms=5.0), True),
        (ROW, replace(ROW, cpu_ms=12.0), False),
        (ROW, replace(ROW, cpu_ms=9.9), None),
        (ROW, replace(ROW, cpu_ms=10.1), None),
        (ROW, replace(ROW, cpu_ms=5.0, spread=2.0), None),
        (ROW, replace(ROW, cpu_ms=5.0, rounds=2), None),
        (ROW, replace(ROW, wall_ms=1.0), None),
        (replace(ROW, threads=4), replace(ROW, threads=4, wall_ms=5.0), True),
        (replace(ROW, backend="cuda"), replace(ROW, backend="cuda", wall_ms=20.0), False),
    ],
)
def test_faster(dense: Latency, pruned: Latency, verdict: bool | None) -> None:
    assert faster(dense, pruned) is verdict
