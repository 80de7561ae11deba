"""Criteria and allocators: the numbers of their sources, and the contract that every installed one keeps."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune import plugin
from onnxprune.errors import InputError
from onnxprune.passes.bn_scale import BatchNormScale
from onnxprune.passes.global_rank import GlobalRank
from onnxprune.passes.mag import Magnitude
from onnxprune.passes.random_erk import RandomErk, erk_density
from onnxprune.passes.uniform import Uniform
from onnxprune.types import Group, Member


def member(name: str, axis: int, units: int, role: str = "weight", slot: str = "Gemm.1") -> Member:
    positions = np.arange(units)
    return Member(name, name, (("y", 1),), False, axis, positions, positions, role, slot)


def group(units: int, *members: Member, id: int = 0) -> Group:
    return Group(id, "channels", np.arange(units), members, (), (1,), ())


def weights(**arrays: list) -> plugin.Weights:
    return plugin.Weights(lambda name: np.array(arrays[name], np.float64))


PRODUCER = [[1, -2], [3, 0]]


def test_magnitude_of_rows_and_columns() -> None:
    pair = group(2, member("w", 0, 2), member("v", 1, 2))
    found = Magnitude(order=2).importance(pair, weights(w=PRODUCER, v=[[1, 1]]), 0)
    np.testing.assert_allclose(found, [0.75, 1.25])


def test_magnitude_l1_normalises_by_the_mean() -> None:
    found = Magnitude(order=1).importance(group(2, member("w", 0, 2)), weights(w=[[1, -2], [5, 4]]), 0)
    np.testing.assert_allclose(found, [0.5, 1.5])


def test_magnitude_counts_every_position_of_a_unit() -> None:
    flat = Member("w", "w", (("y", 1),), False, 0, np.arange(4), np.array([0, 0, 1, 1]), "weight", "Gemm.1")
    found = Magnitude(order=1).importance(group(2, flat), weights(w=[[1], [1], [3], [3]]), 0)
    np.testing.assert_allclose(found, [0.5, 1.5])


def test_bn_scale_takes_the_smallest_gamma_first_and_says_when_there_is_none() -> None:
    scale = member("gamma", 0, 3, "norm", "BatchNormalization.1")
    found = BatchNormScale().importance(group(3, scale), weights(gamma=[0.9, -0.05, 0.4]), 0)
    assert found is not None
    assert int(found.argmin()) == 1
    assert BatchNormScale().importance(group(2, member("w", 0, 2)), weights(w=PRODUCER), 0) is None


def test_erk_density() -> None:
    assert erk_density((64, 32, 3, 3)) == pytest.approx(0.005534, abs=1e-6)


def test_random_erk_keeps_layers_in_proportion() -> None:
    wide, narrow = np.zeros((400, 400)), np.zeros((400, 40))
    store = plugin.Weights({"wide": wide, "narrow": narrow}.__getitem__)
    a = RandomErk().importance(group(400, member("wide", 0, 400), id=0), store, 7)
    b = RandomErk().importance(group(400, member("narrow", 0, 400), id=1), store, 7)
    threshold = np.quantile(np.concatenate([a, b]), 0.7)
    kept = (a > threshold).mean() / (b > threshold).mean()
    assert kept == pytest.approx(erk_density(wide.shape) / erk_density(narrow.shape), rel=0.25)
    again = RandomErk().importance(group(400, member("wide", 0, 400), id=0), store, 7)
    np.testing.assert_array_equal(a, again)


def test_uniform_takes_the_same_share_everywhere() -> None:
    priority = Uniform().priority([np.arange(8.0), np.arange(16.0)[::-1]], np.ones(2))
    assert [int((p <= 0.25).sum()) for p in priority] == [2, 4]
    assert priority[1].argmin() == 15


def test_global_rank_knows_both_orders() -> None:
    scores, cost = [np.array([0.1]), np.array([0.2]), np.array([0.3])], np.array([1.0, 1.0, 4.0])
    by_score = GlobalRank(power=0.0).priority(scores, cost)
    by_density = GlobalRank(power=1.0).priority(scores, cost)
    assert int(np.argmin(by_score)) == 0
    assert int(np.argmin(by_density)) == 2


@pytest.mark.parametrize("name", sorted(plugin.available("criteria")))
def test_every_criterion_is_finite_and_follows_a_permutation_of_units(name: str) -> None:
    rng = np.random.default_rng(0)
    w, gamma, order = rng.standard_normal((6, 5)), rng.standard_normal(6), rng.permutation(6)
    criterion = plugin.build("criteria", name)
    scale = member("gamma", 0, 6, "norm", "BatchNormalization.1")

    def scores(w: np.ndarray, gamma: np.ndarray) -> np.ndarray:
        store = plugin.Weights({"w": w, "gamma": gamma}.__getitem__)
        found = criterion.importance(group(6, member("w", 0, 6), scale), store, 3)
        assert found is not None
        return found

    found = scores(w, gamma)
    assert found.shape == (6,)
    assert np.isfinite(found).all()
    if name != "random-erk":
        np.testing.assert_allclose(scores(w[order], gamma[order]), found[order])


@pytest.mark.parametrize("name", sorted(plugin.available("allocators")))
def test_every_allocator_orders_units_of_a_group_by_importance(name: str) -> None:
    scores = [np.array([3.0, 1.0, 2.0]), np.array([0.5, 0.6])]
    found = plugin.build("allocators", name).priority(scores, np.array([0.1, 0.2]))
    for priority, importance in zip(found, scores, strict=True):
        np.testing.assert_array_equal(np.argsort(priority), np.argsort(importance))


@pytest.mark.parametrize(
    ("kind", "text", "culprit"),
    [
        ("criteria", "nope", "nope"),
        ("criteria", "mag,order=3", "mag,order=3"),
        ("criteria", "mag,power=2", "power=2"),
        ("criteria", "mag,order=x", "order=x"),
        ("allocators", "global-rank,floor=1", "global-rank,floor=1"),
    ],
)
def test_bad_names_and_options_are_named(kind: str, text: str, culprit: str) -> None:
    with pytest.raises(InputError) as error:
        plugin.build(kind, text)
    assert error.value.object == culprit
