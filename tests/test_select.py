"""Selection: ratios, targets, rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper, parser

from onnxprune import prune
from onnxprune.errors import ImpossibleError, InputError
from onnxprune.select import Rounding, alive_labels, by_ratio, by_target, parse_target
from onnxprune.types import Group


def groups(*sizes: int, width: int = 1) -> tuple[Group, ...]:
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return tuple(
        Group(k, "channels", np.arange(starts[k], starts[k + 1]), (), (), (width,), ()) for k in range(len(sizes))
    )


def left(plan, found) -> list[int]:
    return [int(plan.keep[g.id].sum()) for g in found]


@given(st.integers(1, 200), st.integers(1, 64), st.sampled_from([None, 1, 2, 4, 8, 16]), st.integers(1, 5))
def test_rounding_keeps_its_promises(units: int, width: int, multiple: int | None, least: int) -> None:
    (group,) = groups(units, width=width)
    table = Rounding(multiple, least).table(group, 0.0)
    kept = units - table
    assert (table <= np.arange(units + 1)).all()
    assert (np.diff(table) >= 0).all()
    assert table[0] == 0
    assert (kept >= min(units, least)).all()
    if multiple:
        assert all(k == units or k * width % multiple == 0 for k in kept)


def test_ratio_removes_the_floor_of_the_least_important() -> None:
    found = groups(8, 5)
    plan = by_ratio(found, [np.arange(8.0)[::-1], np.arange(5.0)], 0.5, Rounding(1))
    assert left(plan, found) == [4, 3]
    assert plan.keep[0].tolist() == [True] * 4 + [False] * 4


def test_auto_takes_eights_unless_that_undoes_the_pruning() -> None:
    (wide,), (narrow,) = groups(64), groups(12)
    assert 64 - Rounding(None).table(wide, 0.0)[20] == 48
    assert 12 - Rounding(None).table(narrow, 0.0)[6] == 6
    (head,) = groups(12, width=64)
    assert 12 - Rounding(8).table(head, 0.0)[5] == 7


def costs(found: tuple[Group, ...], *shares: float) -> list[np.ndarray]:
    """What each unit costs where groups are these shares of the model."""
    return [np.full(len(g.units), share / len(g.units)) for g, share in zip(found, shares, strict=True)]


def kept(rounding: Rounding, group: Group) -> set[int]:
    return set((len(group.units) - rounding.table(group, 0.0)).tolist())


@given(st.integers(1, 200), st.integers(1, 64), st.sampled_from([1, 2, 4, 8, 16, 32]), st.floats(0, 1), st.booleans())
def test_a_firm_multiple_is_kept_where_it_is_little(
    units: int, width: int, liked: int, share: float, deep: bool
) -> None:
    (group,) = found = groups(units, width=width)
    rounding = Rounding(None, liked=liked).firm(found, costs(found, share))
    table = (rounding.deepest() if deep else rounding).table(group, 0.0)
    kept = units - table
    assert (table <= np.arange(units + 1)).all()
    assert (np.diff(table) >= 0).all()
    if liked * 2 <= units * width and share * liked / (units * width) <= 0.0499:
        step = liked // np.gcd(liked, width)
        assert all(k == units or k % step == 0 or (deep and k < step and k & (k - 1) == 0) for k in kept)


FIRM = Rounding(None, liked=16, undo=True)


@pytest.mark.parametrize(
    ("units", "share", "step"),
    [
        (64, 0.2, 16),
        (64, 0.4, 8),
        (64, 0.9, 2),  # nothing else makes up for a step
        (64, 0.6, 8),
        (32, 0.09, 16),
        (32, 0.7, 2),
        (24, 0.09, 8),
        (24, 0.4, 2),
        (12, 0.11, 4),
    ],
)
def test_a_step_is_little_beside_the_group_and_the_model(units: int, share: float, step: int) -> None:
    found = groups(units, 160)
    rounding = FIRM.firm(found, costs(found, share, 1 - share))
    assert kept(rounding, found[0]) == set(range(step, units + 1, step))


def test_what_is_no_wider_than_a_multiple_stays_whole_where_it_is_little() -> None:
    found = groups(16, 12, 160)
    little = FIRM.firm(found, costs(found, 0.05, 0.04, 0.91))
    assert little.whole == {0, 1}
    assert kept(little, found[0]) == {16}
    assert kept(little.deepest(), found[0]) == {1, 2, 4, 8, 16}
    much = FIRM.firm(found, costs(found, 0.05, 0.06, 0.89))
    assert not much.whole
    assert kept(much, found[0]) == {8, 16}
    alone = groups(16, 12)
    assert not FIRM.firm(alone, costs(alone, 0.05, 0.04)).whole
    explicit = Rounding(16, undo=True)
    assert explicit.firm(found, costs(found, 0.1, 0.1, 0.8)) == explicit


def test_wide_layers_go_beside_the_width_that_they_share(tmp_path: Path) -> None:
    """Each unit of a residual width costs what many inner ones do, which is no reason that it goes first."""
    rng = np.random.default_rng(0)
    body, shapes, x = ["h0 = Conv(image, w)"], {"w": (64, 3, 1, 1)}, "h0"
    for k in range(1, 7):
        body.append(f"a{k} = Conv({x}, u{k})\nr{k} = Relu(a{k})\nb{k} = Conv(r{k}, v{k})\nh{k} = Add({x}, b{k})")
        shapes |= {f"u{k}": (96, 64, 1, 1), f"v{k}": (64, 96, 1, 1)}
        x = f"h{k}"
    body.append(f"g = GlobalAveragePool({x})\nf = Flatten(g)\ny = MatMul(f, c)")
    shapes["c"] = (64, 5)
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[n,3,6,6] image) => (float[n,5] y) {' + "\n".join(body) + "}"
    )
    for name, shape in shapes.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    onnx.save(model, tmp_path / "m.onnx")
    result = prune(tmp_path / "m.onnx", target={"macs": 0.5}, measure=False)
    report = result.report
    assert 0.45 <= report.pruned.macs / report.dense.macs <= 0.5
    left = {row.before: row.after for row in report.groups if row.kind == "channels"}
    assert left[64] >= 32
    assert left[96] >= 48
    assert all(row.after % 8 == 0 for row in report.groups if row.kind == "channels")


def test_what_is_not_to_be_undone_may_stay_whole() -> None:
    (wide,) = groups(64)
    assert 64 - Rounding(None, undo=True).table(wide, 0.0)[1] == 64
    assert 64 - Rounding(None).table(wide, 0.0)[1] == 63


def test_target_is_met_by_the_shortest_run_and_guards_every_group() -> None:
    found = groups(3, 3)
    priority = [np.array([0.1, 0.2, 0.3]), np.array([1.0, 2.0, 3.0])]

    def cost(alive: np.ndarray) -> dict[str, float]:
        return {"macs": float(alive.sum())}

    plan = by_target(found, priority, 0.1, Rounding(1), {"macs": 3.0}, cost, 6)
    assert [plan.keep[k].tolist() for k in (0, 1)] == [[False, False, True], [False, True, True]]
    assert alive_labels(found, plan, 6).sum() == 3


def test_what_rounding_takes_too_much_is_given_back() -> None:
    """The last unit in the line takes a step of four with it; a step of the other group is not needed then."""
    found = groups(8, 8)
    priority = [np.linspace(1, 2, 8), np.linspace(1.01, 2.01, 8)]

    def cost(alive: np.ndarray) -> dict[str, float]:
        return {"macs": float(alive[:8].sum() + 3 * alive[8:].sum())}

    plan = by_target(found, priority, 0.0, Rounding(4, undo=True), {"macs": 20.0}, cost, 16)
    assert left(plan, found) == [8, 4]
    exact = by_target(found, priority, 0.0, Rounding(1), {"macs": 20.0}, cost, 16)
    assert 17 < 1 * left(exact, found)[0] + 3 * left(exact, found)[1] <= 20


def test_a_target_out_of_reach_says_what_can_be_reached() -> None:
    found = groups(4)
    with pytest.raises(ImpossibleError, match=r"macs=0\.250"):
        by_target(found, [np.arange(4.0)], 0.0, Rounding(1), {"macs": 0.5}, lambda a: {"macs": float(a.sum())}, 4)


@pytest.mark.parametrize(
    ("metric", "text", "wanted"),
    [
        ("macs", 0.5, (0.5, True)),
        ("macs", "1.2G", (1.2e9, False)),
        ("size", "40MB", (4e7, False)),
        ("size", "1MiB", (2.0**20, False)),
        ("params", "300k", (3e5, False)),
    ],
)
def test_targets_are_shares_or_absolute(metric: str, text: float | str, wanted: tuple[float, bool]) -> None:
    assert parse_target(metric, text) == wanted


BAD = [
    ("macs", "0"),
    ("macs", "-1"),
    ("macs", "2"),
    ("macs", "nan"),
    ("macs", "x"),
    ("size", "3 parsecs"),
    ("speed", "1"),
]


@pytest.mark.parametrize(("metric", "text"), BAD)
def test_bad_targets_are_refused(metric: str, text: str) -> None:
    with pytest.raises(InputError):
        parse_target(metric, text)
