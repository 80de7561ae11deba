"""What criteria are shown: masks that are removal, streams, routers, and weights by the values they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from zoo import ZOO

from onnxprune import calibrate, evidence, feeds, plugin, quality
from onnxprune.analysis import Analysis
from onnxprune.types import Array
from onnxprune.worker import Worker

BUDGET = 1 << 28


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(seconds=120) as found:
        yield found


class Case:
    """An entry of the zoo with random inputs and the evidence about all its groups."""

    def __init__(self, name: str, folder: Path, worker: Worker) -> None:
        path = folder / "model.onnx"
        onnx.save(ZOO[name](), path)
        self.analysis = Analysis(path)
        model, shapes = self.analysis.prepared.model, self.analysis.prepared.facts.shapes
        self.feeds = [feeds.random_feed(model.graph, shapes, seed, 0) for seed in range(3)]
        self.gather = lambda requests: calibrate.collect(worker, model, self.feeds, requests)
        self.runs = evidence.Runs(worker, self.feeds)
        self.found = evidence.evidence(self.analysis, self.analysis.groups, 0, self.gather, BUDGET, self.runs)
        operators = evidence.Operators(self.analysis)
        self.losses = evidence._Losses(self.analysis, self.analysis.groups, operators, self.runs)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_units_behind_a_mask_are_gone(name: str, tmp_path: Path, worker: Worker) -> None:
    case = Case(name, tmp_path, worker)
    for group in case.analysis.groups:
        level = np.ones(len(group.units))
        level[::2] = 0
        if case.losses._gates(group) is None or not level.any():
            continue
        (masked,) = case.losses.of([{group.id: level}], "divergence")
        cut = case.losses._cut({group.id: level}, quality.divergence)
        if np.isfinite(cut):
            assert masked == pytest.approx(cut, rel=1e-3, abs=1e-9), f"group {group.id}"
        (nothing,) = case.losses.of([{group.id: np.ones(len(level))}], "divergence")
        assert nothing == pytest.approx(0, abs=1e-9)


def experts() -> list[str]:
    return [name for name in ZOO if "expert" in name]


@pytest.mark.parametrize("name", experts())
def test_experts_are_scored_where_there_are_any(name: str, tmp_path: Path, worker: Worker) -> None:
    case = Case(name, tmp_path, worker)
    for group in case.analysis.groups:
        if group.kind != "experts":
            continue
        router = case.found.router(group)
        if router is not None:
            gates = router.gates()
            assert gates.shape == (len(router.scores), len(group.units))
            assert ((gates > 0).sum(axis=1) <= router.top).all()
        for criterion in ("moe-freq", "stun", "naee"):
            scores = plugin.build("criteria", criterion).importance(group, case.found)
            assert scores is None or (scores.shape == (len(group.units),) and np.isfinite(scores).all())


def test_a_branch_joins_its_stream(tmp_path: Path, worker: Worker) -> None:
    cases = (Case(name, tmp_path, worker) for name in ZOO if "stream" in name or "block" in name or "resid" in name)
    kinds = ((c, [g for g in c.analysis.groups if g.kind == "layers" and len(g.units) > 1]) for c in cases)
    case, groups = next((c, found) for c, found in kinds if found and c.found.junctions(found[0]))
    group = groups[0]
    junctions = case.found.junctions(group)
    assert len(junctions) == len(group.units)
    assert all(j.before.shape == j.after.shape and not np.array_equal(j.before, j.after) for j in junctions)
    for criterion in ("short-bi", "angular", "sleb", "blockpruner", "finercut", "laco", "tail"):
        scores = plugin.build("criteria", criterion).importance(group, case.found)
        assert scores.shape == (len(group.units),), criterion
        assert np.isfinite(scores).all(), criterion


def test_quantised_weights_count_by_the_values_they_stand_for(tmp_path: Path) -> None:
    codes = np.arange(12, dtype=np.int8).reshape(3, 4)
    scale, zero = np.array([0.5, 1, 2, 4], np.float32), np.array([1, 0, -1, 2], np.int8)
    arrays = {"w": codes, "s": scale, "z": zero, "v": np.ones((4, 2), np.float32)}
    body = "d = DequantizeLinear<axis = 1>(w, s, z) a = MatMul(x, d) y = MatMul(a, v)"
    nodes = onnx.parser.parse_graph(f"g (float[n,3] x) => (float[n,2] y) {{ {body} }}")
    nodes.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(nodes, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8), path)
    analysis = Analysis(path)
    wanted: Array = (codes.astype(np.float64) - zero) * scale
    np.testing.assert_allclose(analysis.weights.array("w"), wanted)
    (group,) = analysis.groups
    found = plugin.build("criteria", "mag").importance(group, plugin.Evidence(analysis.weights))
    raw = ((wanted**2).sum(axis=0) + 2) / 2
    np.testing.assert_allclose(found, raw / raw.mean())
