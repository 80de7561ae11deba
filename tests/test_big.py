"""Models larger than memory: what stays in its file, what runs piece by piece, and that neither changes the result."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import math
import pickle
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper, parser
from test_reading import mlp
from zoo import ZOO

from onnxprune import (
    evidence,
    feeds,
    flow,
    layerwise,
    plugin,
    prune,
    reading,
    running,
    storage,
    verify,
    weights,
    wire,
)
from onnxprune.ahead import ahead
from onnxprune.analysis import Analysis
from onnxprune.calibrate import Columns, MomentsOf, ProfileOf, Reads, RowsOf, collect
from onnxprune.errors import ImpossibleError, MachineError, PruneError
from onnxprune.flow import Flow, Room, Sessions
from onnxprune.model import normalise, prepare
from onnxprune.prove import Prover
from onnxprune.recipe import Options
from onnxprune.recovery import Recovery
from onnxprune.rows import Rows, Sampling, totals_of
from onnxprune.running import Runner, in_pieces, memory_of, packed
from onnxprune.sparsify import sparsify
from onnxprune.types import Member, Plan
from onnxprune.worker import Worker, call

ROOT = Path(__file__).resolve().parents[1]
onnxruntime.set_default_logger_severity(4)


def wide(tmp_path: Path, kind: type[np.generic] = np.float16, inner: int = 1023) -> Path:
    """Two layers with weights beside the model, each larger than what is sliced at once."""
    rng = np.random.default_rng(1)
    body = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 18]>
        m ({"float16" if kind is np.float16 else "float"}[n, 67] x) => (float16[n, 61] y) {{
            a = MatMul (x, w)
            b = Relu (a)
            y = MatMul (b, v)
        }}"""
    )
    body.graph.output[0].type.tensor_type.elem_type = body.graph.input[0].type.tensor_type.elem_type
    for name, shape in (("w", (67, inner)), ("v", (inner, 61))):
        array = (rng.standard_normal(shape) / 8).astype(kind)
        body.graph.initializer.append(numpy_helper.from_array(array, name))
    path = tmp_path / "wide.onnx"
    onnx.save(body, path, save_as_external_data=True, location="wide.data", size_threshold=0)
    return path


@pytest.fixture
def stored(tmp_path: Path) -> weights.Mapped:
    found = reading.read_model(wide(tmp_path))[0].graph.initializers["w"].const_value
    assert isinstance(found, weights.Mapped)
    return found


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_part_is_what_is_taken_and_zeroed(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    kind = np.dtype(data.draw(st.sampled_from(["float16", "float32", "float64", "int8", "complex128", "bool"])))
    whole = np.random.default_rng(0).integers(0, 2 if kind.kind == "b" else 99, shape).astype(kind)
    path = tmp_path_factory.mktemp("part") / "w"
    path.write_bytes(b"head" + whole.tobytes())
    info = path.stat()
    place = weights.Place(str(path), info.st_dev, info.st_ino, 4, whole.nbytes)
    axes = data.draw(st.lists(st.integers(0, len(shape) - 1), unique=True))
    some = {k: np.flatnonzero(np.random.default_rng(k).random(shape[k]) < 0.6) for k in axes}
    with path.open("rb") as file:
        mapped = weights.Mapped.at(file.fileno(), place, ir.DataType.from_numpy(kind), shape, "w")
    taken, zeroed = whole, whole.copy()
    for axis, positions in some.items():
        taken = np.take(taken, positions, axis)
        zeroed[(slice(None),) * axis + (positions,)] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "BLOCK", data.draw(st.sampled_from([1, 40, 1 << 20])))
        for part, wanted in (
            (weights.Part(mapped, "w", taken=some), taken),
            (weights.Part(mapped, "w", zeroed=some), zeroed),
        ):
            assert np.array_equal(part.numpy(), wanted)
            assert part.nbytes == wanted.nbytes
            assert b"".join(weights.contents(part)) == wanted.tobytes()
            assert np.array_equal(sent(part).numpy(), wanted)


def test_a_part_of_a_part_is_one_part(stored: weights.Mapped, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns, again = np.arange(0, 67, 2), np.arange(1022, 0, -3), np.array([5, 0, 9])
    first = weights.taken(stored, {1: columns}, "w")
    second = weights.taken(first, {0: rows, 1: again}, "v")
    assert isinstance(second, weights.Part)
    assert second.whole is stored
    assert second.name == "v"
    np.testing.assert_array_equal(second.numpy(), stored.numpy()[rows][:, columns[again]])


def sent(tensor: Any) -> Any:
    """As another process gets it."""
    return pickle.loads(pickle.dumps(tensor))  # noqa: S301


def test_another_file_at_the_path_is_noticed(stored: weights.Mapped) -> None:
    path = Path(stored.place.path)
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes())
    other.replace(path)
    with pytest.raises(Exception, match="changed while it was read"):
        sent(stored)


def test_a_file_that_changes_has_no_hash(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(mlp().SerializeToString())
    _, source = reading.read_model(path)
    assert reading.read_model(path)[1].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(MachineError, match="changed since it was read"):
        source.sha256  # noqa: B018


@pytest.mark.parametrize("name", ZOO)
def test_weights_left_out_of_the_message_are_found_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(ZOO[name]().SerializeToString())
    plain, _ = reading.read_model(path)
    monkeypatch.setattr(reading, "WHOLE", 0)
    monkeypatch.setattr(wire, "LEAST", 8)
    found, source = reading.read_model(path)
    assert reading.serialized(found) == reading.serialized(plain)
    source.hash_ahead()
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("cut", range(1, 400, 7))
def test_a_message_cut_short_is_refused_in_the_same_words(
    cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = mlp().SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(content[: -cut if cut < len(content) else 1])
    said = []
    for whole in (1 << 20, 0):
        monkeypatch.setattr(reading, "WHOLE", whole)
        monkeypatch.setattr(wire, "LEAST", 8)
        with pytest.raises(Exception) as error:  # noqa: PT011
            reading.read_model(path)
        said.append((type(error.value), str(error.value)))
    assert said[0] == said[1]


@pytest.mark.parametrize("name", [name for name in ZOO if name.startswith(("mlp", "head", "conv", "resid", "lstm"))])
def test_pieces_compute_what_the_whole_does(name: str, tmp_path: Path) -> None:
    proto = ZOO[name]()
    model = reading.deserialized(proto)
    prepared = prepare(model.clone())
    given = [feeds.random_feed(model.graph, prepared.facts.shapes, seed) for seed in range(5)]
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    normalise(model)
    for some in (given[:1], given[:3], given):  # one, a few in one run of each piece, one after the other
        for feed, found in zip(some, in_pieces([packed(model)], some, 1, 64)[0], strict=True):
            for output, right in zip(found.values(), session.run(None, feed), strict=True):
                np.testing.assert_allclose(output, right, rtol=1e-4, atol=1e-4)


def test_values_beyond_the_room_lie_on_disk(tmp_path: Path) -> None:
    model = reading.read_model(wide(tmp_path, np.float32))[0]
    feed = {"x": np.random.default_rng(2).standard_normal((5, 67)).astype(np.float32)}
    results = []
    for size in (0, 1 << 20):
        room = Room(size)
        flow = Flow(model, [feed, feed], Sessions(), room=room)
        flow.values(["a"])
        assert room.taken == (2 * flow.live["a"][0].nbytes if size else 0)
        results.append(flow.values(["y"]))
        assert room.taken == (2 * flow.live["y"][0].nbytes if size else 0)
    assert all(np.array_equal(a, b) for a, b in zip(*(rows[0] for rows in results), strict=True))


@pytest.mark.parametrize("kind", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_weights_that_changed_lie_on_disk_beyond_the_room(kind: type, tmp_path: Path) -> None:
    model = reading.read_model(wide(tmp_path))[0]
    node = next(node for node in model.graph if node.op_type == "MatMul")
    slot = (str(node.outputs[0].name), 1)
    for size in (0, 1 << 20):
        room = Room(size)
        flow = Flow(model, [], Sessions(), room=room)
        for scale in (1, 2):
            array = (scale * np.arange(12, dtype=np.float32).reshape(3, 4)).astype(kind)
            kept = flow.change(slot, array)
            assert (kept is array) == bool(size)
            assert flow.array(slot) is kept
            np.testing.assert_array_equal(kept, array)
        del array, kept
        assert room.taken == flow.array(slot).nbytes * bool(size)


def test_many_arrays_share_a_file() -> None:
    room = Room(0)
    arrays = [np.full(k, k, np.float16) for k in range(1, 2000)]
    kept = [room.keep(array) for array in arrays]
    assert all(map(np.array_equal, arrays, kept))
    assert len({id(memory_behind(array)) for array in kept}) == 1
    large, stays, more = room.keep(np.ones(flow.SLAB)), room.keep(arrays[0], stays=True), room.keep(arrays[0])
    assert len({id(memory_behind(array)) for array in (large, stays, more)}) == 3
    assert memory_behind(more) is memory_behind(kept[0])


def memory_behind(array: np.ndarray) -> Any:
    """What an array is a view of."""
    found: Any = array
    while getattr(found, "base", None) is not None:
        found = found.base
    return found.obj if isinstance(found, memoryview) else found


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_little_memory_gives_the_same_model(kind: type[np.generic], tmp_path: Path) -> None:
    path = wide(tmp_path, kind, 4093)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    written = []
    for memory in ("1MB", "1GB"):
        folder = tmp_path / memory
        folder.mkdir()
        report = prune(path, folder / "o.onnx", ratio=0.5, memory=memory).report
        assert report.verification.proven
        assert (report.pruned.latency is None) == (memory == "1MB")
        assert any("raise --memory" in warning for warning in report.warnings) == (memory == "1MB")
        assert report.pruned.bytes == sum(file.stat().st_size for file in folder.iterdir())
        written.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert written[0] == written[1]
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}


def test_what_does_not_fit_has_no_latency_target(tmp_path: Path) -> None:
    path = wide(tmp_path, np.float32, 4093)
    with pytest.raises(ImpossibleError, match=r"latency was not measured.*raise --memory"):
        prune(path, tmp_path / "o.onnx", target={"latency": 0.8}, memory="1MB", no_cache=True)
    assert not (tmp_path / "o.onnx").exists()


@pytest.mark.parametrize("calibrated", [False, True])
def test_little_memory_is_enough_for_a_pattern(calibrated: bool, tmp_path: Path) -> None:
    path, data = wide(tmp_path, np.float32, 1024 if calibrated else 4096), tmp_path / "c.npz"
    np.savez(data, x=np.random.default_rng(3).standard_normal((64, 67)).astype(np.float32))
    written: list[dict[str, bytes]] = []
    for memory in ("1MB", "1GB"):
        folder = tmp_path / memory
        folder.mkdir()
        given = {"calibration": str(data), "criterion": "nm-wanda", "no_cache": True} if calibrated else {}
        result = sparsify(path, folder / "o.onnx", memory=memory, permute=not calibrated, **given)
        report = result.report
        stored = result.model.graph.initializers["v"].const_value
        assert isinstance(stored, weights.Mapped) == (memory == "1MB")
        assert (report.pruned.latency is None) == (memory == "1MB")
        written.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert written[0] == written[1]


def test_statistics_are_the_same_piece_by_piece(tmp_path: Path) -> None:
    model = Analysis(wide(tmp_path, np.float32)).prepared.model
    batches = [{"x": np.random.default_rng(k).standard_normal((7, 67)).astype(np.float32)} for k in range(3)]
    asked = [ProfileOf(Reads("y")), MomentsOf(Reads("a"), Columns("y")), RowsOf(Columns("b"), 5)]
    with Worker() as worker:
        whole, parts = (collect(worker, model, batches, asked, memory=memory) for memory in (None, 1000))
    for request in asked[:2]:
        found, right = (each[request] for each in (parts, whole))
        for name in ("mean", "variance", "xx", "xy", "yy", "largest"):
            if hasattr(right, name):
                np.testing.assert_array_equal(getattr(found, name), getattr(right, name))
    np.testing.assert_array_equal(parts[asked[2]], whole[asked[2]])


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_little_memory_is_enough_for_repair(kind: type[np.generic], tmp_path: Path) -> None:
    path, data = wide(tmp_path, kind), tmp_path / "c.npz"
    np.savez(data, x=np.random.default_rng(3).standard_normal((64, 67)).astype(kind))
    found = []
    for memory in ("1MB", "1GB"):
        folder = tmp_path / memory
        folder.mkdir()
        given = {"ratio": 0.5, "criterion": "mag", "memory": memory, "calibration": str(data), "no_cache": True}
        report = prune(path, folder / "o.onnx", **given).report
        assert report.verification.proven and "v" in report.repaired
        found.append(report)
    assert found[0].removed == found[1].removed
    errors = [report.quality["relative-error"] for report in found]
    assert errors[0] < 1.1 * errors[1]  # dampings are chosen for some outputs at a time


class Here:
    """Answers calls in this process."""

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


@pytest.mark.parametrize(("least", "repaired", "told"), [(1 << 20, [], "2 values were not repaired"),
                                                        (12 << 20, ["v"], "--memory leaves"),
                                                        (1 << 28, ["v"], "")])  # fmt: skip
def test_where_memory_is_short_values_are_fitted_to_fewer_rows_or_left_alone(
    least: int, repaired: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "LEAST", least)
    analysis, plan = Analysis(wide(tmp_path, np.float32)), Plan({0: np.arange(1023) % 2 == 0})
    given = [{"x": np.random.default_rng(3).standard_normal((2048, 67)).astype(np.float32)}]
    recovery = Recovery(analysis, given, Options(ratio=0.5, calibration="given", memory="1MB"), Here())
    found = recovery.repair(plan, analysis.rewrite(plan))
    assert found.names == repaired  # what w reads is what it read before
    assert any(told and told in text and "'y'" in text for text in found.warnings) == bool(told)


def test_where_memory_is_short_second_moments_are_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, data = wide(tmp_path, np.float32), tmp_path / "c.npz"
    np.savez(data, x=np.random.default_rng(3).standard_normal((600, 67)).astype(np.float32))
    given = {"ratio": 0.5, "calibration": str(data), "memory": "1MB", "no_cache": True}
    errors, asked, gather = [], [], Recovery.gather
    monkeypatch.setattr(Recovery, "gather", lambda self, requests: asked.append(requests) or gather(self, requests))
    for least, kind in ((1 << 28, MomentsOf), (1 << 24, RowsOf)):
        monkeypatch.setattr(evidence, "LEAST", least)
        asked.clear()
        errors.append(prune(path, tmp_path / f"{least}.onnx", **given).report.quality["relative-error"])
        assert [type(request) for requests in asked for request in requests] == [kind]
    assert errors[1] < 1.2 * errors[0]
    with pytest.raises(ImpossibleError, match=r"take 0.1 GB, more than half of --memory; fluct"):
        prune(path, tmp_path / "o.onnx", criterion="goa", **given)


@pytest.mark.parametrize(("feeds", "rows"), [(2000, 1), (1000, 3), (3, 1000), (1, 5000)])
def test_firm_rows_are_so_many_at_most(feeds: int, rows: int) -> None:
    shapes, masks = [(rows, 8)] * feeds, [None] * feeds
    for firm, most in ((True, 256), (False, 256 + feeds)):
        found = Rows(shapes, (1,), [1] * feeds, masks, Sampling(256, firm=firm))
        assert min(256, feeds * rows) <= len(found.held_out) <= most
        assert len(found.held_out) == sum(Sampling(256, firm=firm).shares(totals_of(shapes, (1,))))


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_what_changed_in_a_large_model_lies_in_a_file(kind: type[np.generic], tmp_path: Path) -> None:
    analysis = Analysis(wide(tmp_path, kind))
    given = [{"x": np.random.default_rng(3).standard_normal((64, 67)).astype(kind)}]
    options, plan = Options(ratio=0.5, calibration="given", memory="1MB"), Plan({0: np.arange(1023) % 2 == 0})
    with Worker() as worker:
        repaired = Recovery(analysis, given, options, worker).repair(plan, analysis.rewrite(plan))
        ready = Runner(worker, 1, 1000)(repaired.model, given)
    assert repaired.names == ["v"]
    tensor = repaired.model.graph.initializers["v"].const_value
    assert isinstance(tensor, weights.Mapped)
    file = Path(tensor.place.path)
    assert file.stat().st_size >= tensor.nbytes
    assert len(pickle.dumps(tensor)) < 1000
    whole = onnxruntime.InferenceSession(storage.dump(repaired.model, tmp_path, "whole"))
    np.testing.assert_allclose(ready[0]["y"], whole.run(["y"], given[0])[0], rtol=1e-2, atol=1e-2)
    del repaired, tensor
    gc.collect()
    assert not file.parent.exists()


@pytest.mark.parametrize("bounds", [(-np.inf, np.inf), (0.0, np.inf)])
def test_outputs_are_fitted_alike_some_at_a_time(bounds: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((1, 200, 7)).astype(np.float32), rng.standard_normal((1, 7, 11))
    wanted, current = (rng.standard_normal((200, 11)).astype(np.float32) for _ in range(2))
    held = np.arange(200) % 5 == 2
    problem = plugin.Problem(x, weight, wanted, current, held, bounds, intercept=True, ridge=0.01)
    solver = plugin.build("reconstructors", "sequential")
    whole = solver.solve(problem)
    seen = []
    for outputs, part in layerwise._by_outputs(problem, 8 * 7 * 4):
        solution = solver.solve(part)
        np.testing.assert_allclose(solution.weight, whole.weight[:, :, outputs], atol=1e-6)
        np.testing.assert_allclose(solution.shift, whole.shift[outputs], atol=1e-6)
        seen += range(11)[outputs]
    assert seen == [*range(11)]
    for most in (8 * 7 * 11, math.inf):
        assert [outputs for outputs, _ in layerwise._by_outputs(problem, most)] == [slice(None)]


def test_size_is_known_before_it_is_written(tmp_path: Path) -> None:
    for external in (False, True):
        model = Analysis(wide(tmp_path)).dense
        files = storage.write_model(model, tmp_path / "o.onnx", force=True, external=external)
        assert storage.size_of(model, "o.onnx", external=external) == sum(file.stat().st_size for file in files)


def test_a_runner_takes_pieces_where_the_whole_is_too_large(tmp_path: Path) -> None:
    model = reading.read_model(wide(tmp_path))[0]
    assert memory_of(model) == 2 * 2 * 2 * 1023 * (67 + 61)
    feed = {"x": np.ones((2, 67), np.float16)}
    said: list[tuple[str, int, int]] = []
    with Worker(progress=lambda *told: said.append(told)) as worker:
        whole, parts = (Runner(worker, 1, memory)(model, [feed])[0]["y"] for memory in (1 << 30, 1000))
    assert said == [("run it in pieces", done, 3) for done in (1, 2, 3)]
    with Worker() as worker:
        assert not Runner(worker, 1, 1000).fits(model)
    np.testing.assert_allclose(parts, whole, atol=2e-2)


def test_a_proof_in_pieces_says_how_far_both_of_its_runs_are(tmp_path: Path) -> None:
    analysis = Analysis(wide(tmp_path))
    prover, said = Prover(analysis, [], memory=1000), []
    with Worker(progress=lambda *told: said.append(told)) as worker:
        prover.check_dense(worker)
        said.clear()
        prover.compare(worker, analysis.dense.clone(), analysis.rewrite(Plan({})))
    assert [done for _, done, _ in said] == [*range(1, len(said) + 1)]
    assert {(stage, total) for stage, _, total in said} == {("run it in pieces", len(said))}


def test_writing_says_how_much_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MEGABYTE", 1)
    said: list[tuple[int, int]] = []
    model = Analysis(wide(tmp_path)).dense
    _, data = storage.write_model(
        model, tmp_path / "o.onnx", force=True, external=True, told=lambda *told: said.append(told)
    )
    assert len(said) > 1
    assert sorted(said) == said
    assert said[-1] == (data.stat().st_size, data.stat().st_size)


def test_magnitudes_of_blocks_are_those_of_the_whole(stored: weights.Mapped, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SHOWN", 1 << 12)
    seen = plugin.Weights(lambda name: stored.numpy().astype(np.float64), lambda name: weights.rows(stored))
    plain = plugin.Weights(lambda name: stored.numpy().astype(np.float64))
    for axis in (0, 1):
        at = np.arange(stored.numpy().shape[axis])[::-3]
        member = Member("w", "w", (), False, axis, at, np.arange(len(at)), "weight", "")
        for order in (1, 2):
            np.testing.assert_allclose(seen.power(member, order), plain.power(member, order), rtol=1e-12)


def test_magnitudes_of_half_floats_are_exact() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    for halves in (finite, finite[None, ::-1], every):
        with np.errstate(invalid="ignore"):
            found, wanted = plugin._magnitudes(halves), np.abs(halves.astype(np.float32))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, wanted)


def test_two_models_run_side_by_side(tmp_path: Path) -> None:
    model = reading.read_model(wide(tmp_path))[0]
    other = model.clone()
    whole = other.graph.initializers["w"].const_value
    assert isinstance(whole, weights.Mapped)
    other.graph.initializers["w"].const_value = weights.Part(whole, "w", zeroed={1: np.arange(0, 1023, 2)})
    batches = [{"x": np.random.default_rng(k).standard_normal((k + 1, 67)).astype(np.float16)} for k in range(2)]
    with Worker() as worker:
        run = Runner(worker, 1, 1000)
        for found, alone in zip(run.together([model, other], batches), (model, other), strict=True):
            for outputs, wanted in zip(found, run(alone, batches), strict=True):
                np.testing.assert_array_equal(outputs["y"], wanted["y"])
        whole_ones = Runner(worker, 1, 1 << 30).together([model, other], batches)
    np.testing.assert_allclose(whole_ones[1][0]["y"], found[0]["y"], atol=2e-2)


@pytest.mark.parametrize("first", [True, False])
def test_where_one_of_two_models_fails_the_other_stops(
    first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = reading.read_model(wide(tmp_path))[0]
    bad, real = model.clone(), Flow._run
    bad.graph.node(1).domain = "nobody"

    def run(self: Flow, todo: Any, wanted: Any) -> None:
        if self.model.graph.node(1).domain == "nobody":
            return real(self, todo, wanted)
        for _ in range(3000):  # it is told to stop when it says how far it is
            self.told(0, 1)
            time.sleep(0.01)
        return pytest.fail("it went on")

    monkeypatch.setattr(Flow, "_run", run)
    pair = [packed(bad), packed(model)] if first else [packed(model), packed(bad)]
    with pytest.raises(PruneError, match="nobody"):
        in_pieces(pair, [{"x": np.ones((1, 67), np.float16)}], 2, 1000)


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def _kept(sent: Any, batch: Any) -> tuple[int, int, int]:
    """In the child: memory before, with what pieces keep, and after that went."""
    before = anonymous()
    in_pieces([sent], [batch], 1, 1 << 30)
    between = anonymous()
    running.give_back()
    return before, between, anonymous()


def test_what_pieces_keep_is_given_back(tmp_path: Path) -> None:
    model = reading.read_model(wide(tmp_path, np.float16, 400_000))[0]  # 50 MB for each weight, twice that once cast
    with Worker() as worker:
        before, between, after = worker.call(_kept, packed(model), {"x": np.ones((1, 67), np.float16)})
    assert between - before > 9e7
    assert after - before < 4e7


def test_a_draft_is_what_would_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, streams = storage._stream, []
    model = Analysis(wide(tmp_path)).dense
    plain, early = tmp_path / "plain", tmp_path / "early"
    for folder in (plain, early):
        folder.mkdir()
    wanted = storage.write_model(model, plain / "o.onnx", force=True, external=True)
    monkeypatch.setattr(storage, "_stream", lambda *args: streams.append(args) or stream(*args))
    with storage.Drafts() as drafts:
        drafts.begin(model.clone(), early / "o.onnx", True)
        drafts.begin(model, early / "o.onnx", True)
        drafts.begin(model, early / "other.onnx", True)
        drafts.begin(model, early / "inside.onnx", False)
        assert drafts.take(model.clone(), early / "o.onnx") is None
        assert drafts.take(model, early / "inside.onnx") is None
        found = storage.write_model(model, early / "o.onnx", force=True, external=True, drafts=drafts)
    assert len(streams) == 3
    assert [path.read_bytes() for path in found] == [path.read_bytes() for path in wanted]
    assert found.sha256 == wanted.sha256 == reading.read_model(found[0])[1].sha256
    assert sorted(early.iterdir()) == sorted(found)


def test_a_draft_that_is_waited_for_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, heard = storage._stream, threading.Event()

    def halted(tensors: Any, starts: Any, file: Any, told: storage.Told) -> bytes:
        told(1, 7)
        assert heard.wait(30)
        return stream(tensors, starts, file, told)

    def hear(done: int, total: int) -> None:
        said.append((done, total))
        if (done, total) == (1, 7):
            heard.set()

    monkeypatch.setattr(storage, "_stream", halted)
    monkeypatch.setattr(storage, "SAYS", 0.01)
    model, said = Analysis(wide(tmp_path)).dense, []
    with storage.Drafts() as drafts:
        drafts.begin(model, tmp_path / "o.onnx", True)
        storage.write_model(model, tmp_path / "o.onnx", force=True, external=True, drafts=drafts, told=hear)
    assert (1, 7) in said


def test_what_is_begun_and_not_wanted_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = wide(tmp_path, np.float32, 4093)
    right, tried = Prover.prove, []

    def failing(self: Prover, worker: Worker, candidate: ir.Model, gone: Any, alive: Any) -> Any:
        tried.append([*tmp_path.glob("out/.*")])
        if len(tried) == 1:
            return [verify.Difference("y", 1.0, 0.1)]
        return right(self, worker, candidate, gone, alive)

    monkeypatch.setattr(Prover, "prove", failing)
    monkeypatch.setattr(verify, "blame", lambda suspects, holds: frozenset())
    (tmp_path / "out").mkdir()
    report = prune(path, tmp_path / "out" / "o.onnx", ratio=0.5, memory="1MB").report
    assert report.verification.proven
    assert len(tried) == 2
    assert len([*tmp_path.glob("out/*")]) == 2  # the model and its data

    def full(*args: Any) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "_stream", full)
    with pytest.raises(MachineError, match="No space left"):
        prune(path, tmp_path / "out" / "p.onnx", ratio=0.5, memory="1MB")
    assert len([*tmp_path.glob("out/*")]) == 2


def test_what_is_begun_ahead_answers_or_raises() -> None:
    assert ahead(lambda: 3).result() == 3
    with pytest.raises(ZeroDivisionError):
        ahead(lambda: 1 // 0).result()


def test_a_large_model_that_cannot_shrink_says_why(tmp_path: Path) -> None:
    with pytest.raises(ImpossibleError, match="nothing can be removed"):
        prune(wide(tmp_path), tmp_path / "o.onnx", ratio=0.5, memory="1MB", ignore=["w", "v"])


def test_a_child_reads_weights_where_they_lie(stored: weights.Mapped) -> None:
    part = weights.Part(stored, "w", taken={1: np.arange(3)})
    assert np.array_equal(call(_made, part), stored.numpy()[:, :3])


def _made(part: weights.Part) -> np.ndarray:
    return part.numpy()


@pytest.mark.big
def test_three_gigabytes_in_less_than_that_of_memory(tmp_path: Path) -> None:
    script = ROOT / "tools" / "benchmark_memory.py"
    done = subprocess.run([sys.executable, script, tmp_path / "m", "--size", "3GB"], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    row = json.loads(done.stdout)
    assert row["proven"]
    assert row["anonymous bytes"] < 3e9


def test_texts_go_piece_by_piece() -> None:
    graph = """<ir_version: 9, opset_import: ["": 18]> g (float[n,2] x) => (float[n,2] y, string[k] t)
    <string[3] names = {"a", "b", "c"}> { y = Relu(x) t = Identity(names) }"""
    model = reading.deserialized(parser.parse_model(graph))
    with Worker() as worker:
        (found,) = Runner(worker, 1, 1 << 30, pieces=True)(model, [{"x": np.ones((1, 2), np.float32)}])
    assert found["t"].tolist() == ["a", "b", "c"]


def test_sizes_at_which_an_output_is_empty_come_last(tmp_path: Path) -> None:
    """A slice from the eighth position on has nothing in the shortest sequences; another is empty at every length."""
    graph = """<ir_version: 9, opset_import: ["": 18]>
    g (float[n,t,4] x) => (float[n,u,2] y, float[n,m,4] none, float[n,t,6] z)
    <int64[1] eight = {8}, int64[1] last = {9223372036854775807}, int64[1] one = {1}> {
        h = MatMul(x, w) z = Relu(h) late = Slice(z, eight, last, one) y = MatMul(late, v) none = NOTHING
    }"""
    for nothing, lengths in (("Slice(x, one, eight, one)", [11, 19]), ("Slice(x, last, last, one)", [5, 7])):
        model, rng = parser.parse_model(graph.replace("NOTHING", nothing)), np.random.default_rng(0)
        for name, shape in {"w": (4, 6), "v": (6, 2)}.items():
            model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
        onnx.save(model, tmp_path / "m.onnx")
        prover = Prover(Analysis(tmp_path / "m.onnx"), [], memory=100)
        with Worker() as worker:
            prover.check_dense(worker)
        assert [feed["x"].shape[1] for feed in prover.feeds] == lengths


def test_an_interrupt_while_a_draft_is_waited_for_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = reading.read_model(wide(tmp_path))[0], tmp_path / "out" / "o.onnx"
    out.parent.mkdir()

    def interrupted(self: Any) -> None:
        real(self)  # written by now, and nobody's yet
        raise KeyboardInterrupt

    def waited() -> None:
        with storage.Drafts() as drafts:
            drafts.begin(model, out, external=True)
            monkeypatch.setattr(kind, "result", interrupted)
            try:
                drafts.take(model, out)
            finally:
                monkeypatch.undo()

    kind = futures.Future
    real = kind.result
    with pytest.raises(KeyboardInterrupt):
        waited()
    assert list(out.parent.iterdir()) == []
