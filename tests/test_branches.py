"""Branches: which there are, that any set of them goes as the reference says, also together with channels."""

from __future__ import annotations

import time
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from test_zoo import analysed, run
from zoo import ZOO

from onnxprune import feeds, verify
from onnxprune.branches import Branches, drop, find_branches
from onnxprune.masked import narrowed
from onnxprune.rewrite import apply
from onnxprune.select import alive_labels
from onnxprune.types import Group, Plan

PLANS = 6


@cache
def layered(name: str, interface: bool = False) -> tuple[Branches, tuple[Group, ...]]:
    *_, found, groups = analysed(name, interface)
    return found, tuple(group for group in groups if group.kind == "layers")


def sums(name: str, interface: bool = False) -> list[list[str]]:
    """The operands that are branches, one list for each stream."""
    found, groups = layered(name, interface)
    first = min((int(group.units[0]) for group in groups), default=0)
    return [[found.found[unit - first].value for unit in group.units.tolist()] for group in groups]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("pre-norm blocks", [["a0", "f0", "a1", "f1"]]),
        ("post-norm block, its sum an output", [["a0", "f"]]),
        ("parallel blocks", [["a0", "f0", "a1", "f1"]]),
        ("residual convolutions, with and without projection", [["e", "k"]]),
        ("residuals in residuals", [["e", "i"], ["l", "q"]]),
        ("fused sums and norms", [["a0", "f0", "f1"]]),
        ("fused post-norm", [["a0", "f0"]]),
        ("branches that cache keys and values", [["f0"]]),
        ("one layer applied twice, and what is no branch", [["f0", "v2", "f1"]]),
        ("QLinear convolutions", [["c"]]),
        ("squeeze and excite", []),
        ("binary Add", []),
        ("U-Net with scales", []),
    ],
)
def test_branches_are_the_expected_ones(name: str, wanted: list[list[str]]) -> None:
    assert sums(name) == wanted


def test_a_cache_goes_with_its_branch_only_by_consent() -> None:
    name = "branches that cache keys and values"
    assert sums(name, interface=True) == [["a0", "f0", "a1"]]
    found, _ = layered(name, interface=True)
    assert found.found[0].inputs == ("past0", "past1")
    assert found.found[0].outputs == ("now0", "now1")
    refused = layered(name)[0].refused
    assert [str(row.axis.value) for row in refused] == ["a0", "a1"]
    assert "past0" in refused[0].reason


@pytest.mark.parametrize("name", sorted(ZOO))
def test_any_set_of_branches_is_removal(name: str) -> None:
    dense, prepared, seen, dims, found, both = analysed(name, True)
    layers = [group for group in both if group.kind == "layers"]
    rng = np.random.default_rng(len(name))
    first, count = len(dims.frozen), found.free
    others = [group for group in both if len(group.units) > group.least and group.kind != "layers"]
    shapes = (prepared.facts.shapes, prepared.other.shapes)
    inputs = [feeds.random_feed(dense.graph, s, seed) for seed, s in enumerate(shapes)]
    if not count:
        return
    every = [np.arange(count) == k for k in range(count)] + [np.ones(count, np.bool_)]
    for turn, goes in enumerate([*every, *(rng.random(count) < 0.5 for _ in range(PLANS))]):
        keep = {group.id: ~goes[group.units - first] for group in layers}
        if turn >= count:
            keep |= {group.id: some_stay(rng, len(group.units), group.least) for group in others}
        plan, groups = Plan(keep), (*others, *layers)
        alive = alive_labels(groups, plan, first + count)
        dropped = drop(found, groups, found.gone(alive), first)
        smaller = apply(prepared, dims, seen, alive, found)
        gone, mixed = verify.removals(groups, plan, dropped), narrowed(dims, seen, alive)
        wanted = run(verify.reference(dense, gone, mixed, prepared.facts.types, dropped), inputs)
        assert [v.name for v in smaller.graph.outputs] == [o for o in seen.outputs if o not in dropped.outputs]
        assert {str(v.name) for v in smaller.graph.inputs} == set(seen.inputs) - set(dropped.inputs)
        assert not dropped.initializers.keys() & smaller.graph.initializers.keys()
        used = {str(v.name) for v in smaller.graph.inputs}
        given = [{k: v for k, v in feed.items() if k in used} for feed in inputs]
        for a, b in zip(wanted, run(smaller, given), strict=True):
            differences = verify.differ(a, b, 1e-5 if "QLinear" not in name else 0.03)
            assert all(d.holds for d in differences), (goes, differences)
        if goes.any():
            assert len(smaller.graph) < len(prepared.model.graph) or dropped.bypass


def some_stay(rng: np.random.Generator, count: int, least: int) -> np.ndarray:
    keep = np.zeros(count, np.bool_)
    keep[rng.permutation(count)[: rng.integers(least, count + 1)]] = True
    return keep


def deep(layers: int) -> onnx.ModelProto:
    """A residual stack in which every block reads one shared mask, as decoders do."""
    nodes = [helper.make_node("Relu", ["x"], ["x0"]), helper.make_node("Sigmoid", ["mask"], ["m"])]
    for k in range(layers):
        parts = [f"x{k}"]
        for j in range(20):
            parts.append(f"h{k}_{j}")
            nodes.append(helper.make_node("Tanh", [parts[-2]], [parts[-1]]))
        nodes.append(helper.make_node("Mul", [parts[-1], "m"], [f"g{k}"]))
        nodes.append(helper.make_node("MatMul", [f"g{k}", f"w{k}"], [f"f{k}"]))
        nodes.append(helper.make_node("Add", [f"x{k}", f"f{k}"], [f"x{k + 1}"]))
    stored = [helper.make_tensor(f"w{k}", TensorProto.FLOAT, (3, 3), np.eye(3).ravel()) for k in range(layers)]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (2, 3)) for n in ("x", "mask", f"x{layers}")]
    return helper.make_model(helper.make_graph(nodes, "deep", ports[:2], ports[2:], stored), ir_version=9)


def test_deep_stacks_take_seconds() -> None:
    from onnxprune.model import prepare, view

    prepared = prepare(ir.serde.deserialize_model(deep(400)))
    seen = view(prepared)
    start = time.process_time()
    found = find_branches(seen, (prepared.facts.shapes, prepared.other.shapes), prepared.facts.types)
    assert len(found.found) == 400
    assert time.process_time() - start < 2
