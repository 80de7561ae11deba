"""Selection: ratios, targets, rounding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@given(st.integers(1, 200), st.integers(1, 64), st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_a_firm_multiple_is_kept_where_it_fits_often(units: int, width: int, liked: int) -> None:
    (group,) = groups(units, width=width)
    table = Rounding(None, liked=liked, firm=True).table(group, 0.0)
    kept = units - table
    assert (table <= np.arange(units + 1)).all()
    assert (np.diff(table) >= 0).all()
    if liked * 4 <= units * width:
        step = liked // np.gcd(liked, width)
        assert all(k == units or k % step == 0 or (k < step and k & (k - 1) == 0) for k in kept)


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
