"""Every entry of the zoo: the groups are the expected ones, and any plan on them is removal."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from zoo import ZOO

from onnxprune import feeds, ops, verify
from onnxprune.analysis import cost_shapes
from onnxprune.branches import Branches, Sides, drop, find_branches, with_branches
from onnxprune.cost import Costs
from onnxprune.dims import DimGraph, couple
from onnxprune.groups import find_groups
from onnxprune.masked import narrowed
from onnxprune.model import Prepared, prepare, view
from onnxprune.reading import deserialized, serialized
from onnxprune.rewrite import apply
from onnxprune.select import alive_labels
from onnxprune.types import Group, Plan, View

GOLDEN = Path(__file__).parent / "golden" / "zoo.json"
INSIDE = " | inside heads"  # after a name: analysed with axes of heads cut inside each head
NORMS = " | inside norms"  # the same for axes of normalised groups
EXPECTED = json.loads(GOLDEN.read_text())
CASES = sorted(
    [
        *ZOO,
        *(f"{name}{INSIDE}" for name in ZOO if "heads " in str(EXPECTED.get(name))),
        *(f"{name}{NORMS}" for name in ZOO if "GroupNorm" in name),
    ]
)
PLANS = 4  # random plans over all groups of an entry together, besides one for each group alone

ort.set_default_logger_severity(4)


@cache
def analysed(
    name: str, interface: bool = False
) -> tuple[ir.Model, Prepared, View, DimGraph, Branches, tuple[Group, ...]]:
    dense = deserialized(ZOO[name.removesuffix(INSIDE).removesuffix(NORMS)]())
    prepared = prepare(dense.clone())
    seen = view(prepared)
    probes = (prepared.facts.shapes, prepared.other.shapes)
    around = Sides(seen, probes, prepared.facts.types).around
    dims = couple(seen, name.endswith(INSIDE), around, name.endswith(NORMS))
    branches = find_branches(seen, probes, prepared.facts.types, interface, dims.tied)
    return dense, prepared, seen, dims, branches, with_branches(find_groups(dims, seen), branches, len(dims.frozen))


def row(group: Group) -> str:
    """One line that says all about a group: kind, units, and where they live."""
    homes = sorted({f"{m.initializer}:{m.axis} {m.role} {len(m.positions)}" for m in group.members})
    return f"{group.kind}{'' if group.exact else ' (mixing)'} {len(group.units)}: {', '.join(homes)}"


@pytest.mark.parametrize("name", CASES)
def test_groups_are_the_expected_ones(name: str, update_golden: bool) -> None:
    *_, groups = analysed(name)
    golden = json.loads(GOLDEN.read_text())
    if update_golden:
        golden = {k: v for k, v in golden.items() if k in CASES} | {name: [row(group) for group in groups]}
        GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    assert [row(group) for group in groups] == golden[name]


@pytest.mark.parametrize("name", ZOO)
def test_every_unit_costs_a_share_of_the_model(name: str) -> None:
    _, prepared, seen, dims, branches, groups = analysed(name)
    costs = Costs(dims, seen, cost_shapes(prepared.model, {}, seen.shapes), branches)
    for metric in ("macs", "params", "size"):
        assert all((shares >= 0).all() and (shares <= 1).all() for shares in costs.of_units(groups, metric))


@pytest.mark.parametrize("name", CASES)
def test_any_plan_is_removal(name: str) -> None:
    dense, prepared, seen, dims, branches, groups = analysed(name)
    groups = tuple(group for group in groups if group.kind != "layers")
    rng = np.random.default_rng(len(name))
    several = [group for group in groups if len(group.units) > group.least]

    def draw(group: Group) -> np.ndarray:
        """Between the fewest units and all but one of them stay."""
        keep = np.zeros(len(group.units), np.bool_)
        keep[rng.permutation(len(keep))[: rng.integers(group.least, len(keep))]] = True
        return keep

    plans = [Plan({group.id: draw(group)}) for group in several]
    plans += [Plan({group.id: draw(group) for group in several}) for _ in range(PLANS)]
    shapes = (prepared.facts.shapes, prepared.other.shapes)
    inputs = [feeds.random_feed(dense.graph, s, seed) for seed, s in enumerate(shapes)]
    for plan in plans:
        alive = alive_labels(groups, plan, len(dims.frozen) + branches.free)
        smaller = apply(prepared, dims, seen, alive, branches)
        mixed = narrowed(dims, seen, alive)
        dropped = drop(branches, groups, branches.gone(alive), len(dims.frozen))
        gone = verify.removals(groups, plan, dropped)
        constants = prepared.constants(removal.initializer for removal in gone)
        reference = verify.reference(dense, gone, mixed, prepared.facts.types, dropped, constants)
        wanted = run(reference, inputs)
        for a, b in zip(wanted, run(smaller, inputs), strict=True):
            differences = verify.differ(a, b, 1e-5)
            assert all(d.holds for d in differences), (plan, differences)


def run(model: ir.Model, inputs: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    session = ort.InferenceSession(serialized(model).SerializeToString())
    names = [output.name for output in session.get_outputs()]
    found = [dict(zip(names, session.run(None, feed), strict=True)) for feed in inputs]
    return [{k: np.array([[*row.values()] for row in v]) if isinstance(v, list) else v for k, v in values.items()}
            for values in found]  # fmt: skip


def test_the_zoo_has_every_registered_operator() -> None:
    used = {(node.domain, node.op_type) for build in ZOO.values() for node in build().graph.node}
    missing = [name for name, _ in ops.known() if tuple(name.rpartition("::")[::2]) not in used]
    assert missing == []


def test_outputs_of_the_zoo_say_something() -> None:
    """A network whose outputs are constant or not finite would pass any proof."""
    for name in ZOO:
        dense, prepared, *_ = analysed(name)
        (found,) = run(dense, [feeds.random_feed(dense.graph, prepared.facts.shapes, 0)])
        for output, value in found.items():
            assert np.isfinite(value).all(), (name, output)
            assert value.min() < value.max() or value.dtype.kind != "f", (name, output)


def test_every_entry_of_the_zoo_is_legal() -> None:
    for build in ZOO.values():
        model = build()
        if not any(node.domain or node.op_type == "SimplifiedLayerNormalization" for node in model.graph.node):
            onnx.checker.check_model(model)
