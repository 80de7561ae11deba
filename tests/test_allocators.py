"""Allocators: the numbers of their sources, orders that follow importance, and budgets that are met and used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from onnxprune import budget, plugin
from onnxprune.passes.darwin_evo import Evolution
from onnxprune.passes.flap_std import Standardised
from onnxprune.passes.global_rank import GlobalRank
from onnxprune.passes.knapsack import Knapsack
from onnxprune.passes.mask_search import MaskSearch
from onnxprune.passes.measured import Measured
from onnxprune.passes.rd_dp import RateDistortion
from onnxprune.passes.uniform import Uniform
from onnxprune.plugin import Knob, Search

SEARCHERS = [name for name, cls in plugin.available("allocators").items() if isinstance(cls(), plugin.Searcher)]
ORDERS = [name for name in plugin.available("allocators") if name not in SEARCHERS]


def knob(*importance: float, kind: str = "channels", table: Sequence[int] | None = None) -> Knob:
    """A knob of units of this importance, ascending, which can all go one by one."""
    steps = np.arange(len(importance) + 1) if table is None else np.array(table)
    return Knob(kind, steps, np.concatenate([[0.0], np.cumsum(importance)]))


def linear(knobs: Sequence[Knob], units: Sequence[float], most: float, damage: object = None) -> Search:
    """A search whose cost is the sum of what each knob's units cost."""
    whole = sum(cost * (len(k.worth) - 1) for k, cost in zip(knobs, units, strict=True))

    def cost(state: Sequence[int]) -> float:
        return (whole - float(np.dot(state, units))) / most

    def nothing(states: Sequence[Sequence[int]]) -> np.ndarray:
        return np.array([sum(k.worth[r] for k, r in zip(knobs, state, strict=True)) for state in states])

    return Search(tuple(knobs), cost, damage or nothing)  # type: ignore[arg-type]


def test_uniform_takes_the_same_share_everywhere() -> None:
    priority = Uniform().priority([np.arange(8.0), np.arange(16.0)[::-1]], [np.ones(8), np.ones(16)])
    assert [int((p <= 0.25).sum()) for p in priority] == [2, 4]
    assert priority[1].argmin() == 15


def test_global_rank_knows_both_orders() -> None:
    scores, cost = [np.array([0.1]), np.array([0.2]), np.array([0.3])], [np.array([c]) for c in (1.0, 1.0, 4.0)]
    by_score = GlobalRank(power=0.0).priority(scores, cost)
    by_density = GlobalRank(power=1.0).priority(scores, cost)
    assert int(np.argmin(by_score)) == 0
    assert int(np.argmin(by_density)) == 2


def test_standardised_scores_compare() -> None:
    found = Standardised().priority([np.array([1.0, 2, 3]), np.array([10.0, 20, 30]), np.ones(4)], [])
    np.testing.assert_allclose(found[0], [-1, 0, 1])
    np.testing.assert_allclose(found[1], [-1, 0, 1])
    np.testing.assert_allclose(found[2], 0)


def test_an_equal_share_does_not_overshoot_where_knobs_jump_together() -> None:
    heads = [knob(*[1.0 + k] * 12, kind="heads") for k in range(6)]
    channels = [knob(*[1.0] * 100) for _ in range(6)]
    problem = linear([*heads, *channels], [20] * 6 + [1] * 6, 1400)
    found = Measured(rounds=0).search(problem)
    assert 1 - 6 / 1400 <= problem.cost(found) <= 1  # one channel of each group, though six heads would go at once
    assert max(found[:6]) - min(found[:6]) == 1
    assert found[:6] == sorted(found[:6], reverse=True)  # of what costs the same, the least worth goes


def test_one_round_goes_far() -> None:
    knobs = [knob(*[1.0] * 200), knob(*[1.0] * 200)]

    def damage(states: Sequence[Sequence[int]]) -> np.ndarray:
        return np.array([0.01 * a + b for a, b in states])  # all is better taken from the first

    problem = Search(tuple(knobs), linear(knobs, [1, 1], 200).cost, damage, 7)  # one round
    found = Measured().search(problem)
    assert problem.cost(found) <= 1
    assert 200 - found[0] <= 100 * np.exp(-2 * Measured().step) + 1


def test_knapsack_beats_density() -> None:
    items = [knob(6), knob(10), knob(12)]
    assert Knapsack().search(linear(items, [1, 2, 3], 5)) == [1, 0, 0]  # 22 stays; by density 16 would


def test_rate_and_distortion() -> None:
    table, lost = [0, 0, 2, 2, 4], [{0: 0, 2: 1, 4: 9}, {0: 0, 2: 4, 4: 6}]
    knobs = [knob(1, 1, 1, 1, table=table), knob(1, 1, 1, 1, table=table)]
    asked = []

    def damage(states: Sequence[Sequence[int]]) -> np.ndarray:
        asked.extend(states)
        return np.array([sum(each[r] for each, r in zip(lost, state, strict=True)) for state in states], float)

    assert RateDistortion(checks=0).search(linear(knobs, [1, 1], 4, damage)) == [2, 2]
    assert len(asked) == 4  # two sizes of each, and none of both together
    assert RateDistortion().search(linear(knobs, [1, 1], 4, damage)) == [2, 2]


@pytest.mark.parametrize("together", [0.0, 4.0])
def test_damages_that_do_not_add_up_are_searched(together: float) -> None:
    knobs, told = [knob(*[1.0] * 8) for _ in range(3)], []

    def damage(states: Sequence[Sequence[int]]) -> np.ndarray:
        return np.array([a + 1.1 * b + 1.2 * c + together * min(a, b) for a, b, c in states], float)

    problem = replace(linear(knobs, [1, 1, 1], 12, damage), tell=told.append)
    found = RateDistortion(levels=9).search(problem)
    assert problem.cost(found) <= 1
    assert ["darwin-evo" in text for text in told] == ([True] if together else [])
    assert damage([found])[0] <= (1.1 * damage([[8, 0, 4]])[0] if together else damage([[8, 4, 0]])[0])


def test_two_kinds_are_split_exactly() -> None:
    heads, neurons = knob(1, 5, kind="heads"), knob(1, 2, 3)
    state = MaskSearch().search(linear([heads, neurons], [4, 2], 8))
    assert state == [1, 1]
    assert 6 + 6 - heads.worth[state[0]] - neurons.worth[state[1]] == 10


def test_evolution_keeps_the_total_and_finds_the_better_split() -> None:
    rng = np.random.default_rng(1)
    good, poor = knob(*np.full(16, 0.1)), knob(*np.full(16, 2.0))
    search = linear([good, poor, good], [1, 1, 1], 24)
    start = search.damage([budget.uniform(search)])[0]
    found = Evolution(generations=12, offspring=8).search(search)
    assert search.cost(found) <= 1
    assert search.damage([found])[0] < start
    child = Evolution._child(search, budget.uniform(search), budget.tables(search, 17), rng)
    assert sum(child) == sum(budget.uniform(search))


def test_dynamic_programme_against_every_choice() -> None:
    rng = np.random.default_rng(0)
    losses = [np.sort(rng.random(4)) for _ in range(4)]
    savings = [np.sort(rng.integers(0, 9, 4)).astype(float) for _ in range(4)]
    need = 18.0
    choice = np.array(np.meshgrid(*[range(4)] * 4)).reshape(4, -1).T
    total = np.array([sum(savings[k][c] for k, c in enumerate(row)) for row in choice])
    loss = np.array([sum(losses[k][c] for k, c in enumerate(row)) for row in choice])
    found = budget.choose(losses, savings, need, bins=18)
    assert sum(losses[k][c] for k, c in enumerate(found)) == pytest.approx(loss[total >= need].min())


@pytest.mark.parametrize("name", SEARCHERS)
@pytest.mark.parametrize("seed", range(6))
def test_every_searcher_meets_the_budget_and_uses_it(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, step, share = int(rng.integers(2, 5)), int(rng.choice([1, 2, 4])), rng.uniform(0.3, 0.9)
    knobs = []
    for k in range(count):
        n = int(rng.integers(8, 33))
        table = (np.arange(n + 1) // step * step).clip(max=n - 1)
        knobs.append(knob(*np.sort(rng.random(n)), kind=("channels", "heads")[k % 2], table=table // step * step))
    sizes = np.array([len(k.worth) - 1 for k in knobs])
    weights = rng.uniform(0.5, 2, count)

    def cost(state: Sequence[int]) -> float:  # pairs of neighbours, as layers are
        left = (sizes - np.array(state)) / sizes
        return float((weights * left * np.roll(left, 1)).sum() / weights.sum() / share)

    def damage(states: Sequence[Sequence[int]]) -> np.ndarray:
        return np.array([sum(k.worth[r] ** 2 for k, r in zip(knobs, state, strict=True)) for state in states])

    found = plugin.build("allocators", name).search(Search(tuple(knobs), cost, damage))
    assert cost(found) <= 1 + 1e-9
    assert all(r in k.levels for k, r in zip(knobs, found, strict=True))
    if name != "measured":  # nothing more can be given back: it is a rounding step from the target
        for k, gone in enumerate(found):
            if gone:
                before = max(level for level in knobs[k].levels if level < gone)
                assert cost([before if i == k else r for i, r in enumerate(found)]) > 1


def test_two_knobs_trade_where_moving_all_of_them_gains_nothing() -> None:
    """Two knobs at the top of a narrow ridge, one step of each away from the best state; the others only lose."""
    knobs = [knob(*np.linspace(1, 2, 12), kind="channels") for _ in range(6)]
    free = linear(knobs, [1.0] * 6, 36)

    def damage(states: Sequence[Sequence[int]]) -> np.ndarray:
        gone = np.array(states, float)
        return 9 + 3 * (gone[:, 2:] != 6).sum(axis=1) - np.minimum(gone[:, 0] - 6, 3) + 2 * gone[:, 1]

    state = plugin.build("allocators", "measured").search(Search(free.knobs, free.cost, damage))
    assert state[0] > 6 > state[1]
    assert state[2:] == [6, 6, 6, 6]


@pytest.mark.parametrize("holds", [True, False])
def test_a_second_opinion_decides_between_the_start_and_what_was_found(holds: bool) -> None:
    rng = np.random.default_rng(0)
    knobs = [knob(*np.sort(rng.random(20)), kind="channels") for _ in range(5)]
    free = linear(knobs, [1.0] * 5, 60)
    asked: list[list[int]] = []

    def damage(states: Sequence[Sequence[int]]) -> np.ndarray:
        return np.array([sum((k + 1) * gone**2 for k, gone in enumerate(state)) for state in states], float)

    def confirm(states: Sequence[Sequence[int]]) -> np.ndarray:
        asked.extend(map(list, states))
        return damage(states) if holds else np.arange(len(states), dtype=float)

    found = plugin.build("allocators", "measured").search(Search(free.knobs, free.cost, damage, confirm=confirm))
    assert len(set(asked[0])) == 1  # the equal share
    assert len(asked) > 2
    assert found == (min(asked, key=lambda state: damage([state])[0]) if holds else asked[0])


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("trials", [0, 1, 4, 9, 40, 80])
def test_no_more_is_measured_than_the_effort_pays_for(trials: int, second: bool) -> None:
    rng, measured = np.random.default_rng(0), []
    knobs = [knob(*np.sort(rng.random(20)), kind=("channels", "heads")[k % 2]) for k in range(5)]
    free = linear(knobs, [1.0] * 5, 60)

    def damage(states: Sequence[Sequence[int]]) -> np.ndarray:
        measured.extend(states)
        return free.damage(states)

    problem = Search(free.knobs, free.cost, damage, trials, damage if second else None)
    found = plugin.build("allocators", "measured").search(problem)
    assert free.cost(found) <= 1
    assert len(measured) <= trials


@pytest.mark.parametrize("name", ORDERS)
def test_every_order_follows_importance_within_a_group(name: str) -> None:
    scores = [np.array([3.0, 1.0, 2.0]), np.array([0.5, 0.6])]
    found = plugin.build("allocators", name).priority(scores, [np.full(3, 0.1), np.full(2, 0.2)])
    for priority, importance in zip(found, scores, strict=True):
        np.testing.assert_array_equal(np.argsort(priority), np.argsort(importance))
