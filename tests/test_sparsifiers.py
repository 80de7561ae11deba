"""Sparsifiers: the numbers of their sources, and that every one keeps the pattern and what must stay."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune import plugin
from onnxprune.passes.admm import Admm
from onnxprune.passes.nm_mag import Magnitude
from onnxprune.passes.nm_perm import ChannelPermutation
from onnxprune.passes.nm_sparsegpt import SparseGpt
from onnxprune.passes.nm_wanda import Wanda
from onnxprune.passes.superweight import SuperWeight
from onnxprune.plugin import Peak, Problem, Runs, Seat

X, W = np.array([[1, 0], [0, 1], [1, 1]], np.float32), np.array([[1.0], [1.0]])  # the example of METHODS D
THIN = [Magnitude(), Wanda(), SparseGpt()]


def runs(weight: np.ndarray, n: int, m: int, x: np.ndarray | None = None, stays: tuple[int, int] | None = None) -> Runs:
    """A weight [columns, outputs] with all columns in runs; statistics of x [rows, columns]."""
    weight = np.asarray(weight, np.float64)
    held = np.zeros(weight.shape, np.bool_)
    if stays is not None:
        held[stays] = True
    size = None if x is None else np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=0))
    moments = None if x is None else x.T.astype(np.float64) @ x / len(x)
    return Runs(weight, n, m, len(weight) // m, held, size, moments)


def column(*values: float) -> np.ndarray:
    return np.array(values)[:, None]


def test_the_largest_stay() -> None:
    found = Magnitude().thin(runs(column(0.1, -0.5, 0.3, 0.2), 2, 4))
    np.testing.assert_array_equal(found.weight[:, 0], [0, -0.5, 0.3, 0])


def test_of_equal_weights_the_first_stay() -> None:
    found = Magnitude().thin(runs(column(1, 1, -1, 1), 2, 4))
    np.testing.assert_array_equal(found.keep[:, 0], [True, True, False, False])


def test_a_large_input_makes_a_small_weight_count() -> None:
    x = np.diag([10.0, 1, 1, 1])
    found = Wanda().thin(runs(column(0.1, -0.5, 0.3, 0.2), 2, 4, x))
    np.testing.assert_array_equal(found.weight[:, 0], [0.1, -0.5, 0, 0])


def test_what_goes_is_taken_over() -> None:
    found = SparseGpt(damp=1e-12).thin(runs(W, 1, 2, X))
    np.testing.assert_allclose(found.weight, [[0], [1.5]], atol=1e-6)


def test_blocks_make_no_difference_to_the_surgeon() -> None:
    rng = np.random.default_rng(0)
    given = runs(rng.standard_normal((24, 5)), 2, 4, rng.standard_normal((60, 24)))
    wide, narrow = SparseGpt(block=128).thin(given), SparseGpt(block=4).thin(given)
    np.testing.assert_array_equal(wide.keep, narrow.keep)
    np.testing.assert_allclose(wide.weight, narrow.weight, atol=1e-9)


def test_dead_columns_do_no_harm() -> None:
    x = np.random.default_rng(1).standard_normal((50, 8))
    x[:, [1, 6]] = 0
    found = SparseGpt().thin(runs(np.ones((8, 3)), 2, 4, x))
    assert np.isfinite(found.weight).all()
    assert not found.weight[[1, 6]].any()


@pytest.mark.parametrize("one", THIN)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 5)])
def test_every_run_keeps_n_of_m_and_what_must_stay(one: plugin.Sparsifier, n: int, m: int) -> None:
    rng = np.random.default_rng(2)
    weight, x = rng.standard_normal((6 * m, 7)), rng.standard_normal((200, 6 * m))
    weight[m - 1, 3] = 1e-3
    found = one.thin(runs(weight, n, m, x, stays=(m - 1, 3)))
    np.testing.assert_array_equal(found.keep.reshape(6, m, 7).sum(axis=1), n)
    assert not found.weight[~found.keep].any()
    assert found.weight[m - 1, 3] == 1e-3


@pytest.mark.parametrize("one", THIN)
def test_columns_behind_the_runs_stay(one: plugin.Sparsifier) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((90, 11))
    whole = runs(rng.standard_normal((11, 4)), 2, 4, x)
    found = one.thin(Runs(whole.weight, 2, 4, 2, whole.stays, whole.size, whole.moments))
    assert found.keep[8:].all()
    np.testing.assert_array_equal(found.keep[:8].reshape(2, 4, 4).sum(axis=1), 2)


def test_the_surgeon_errs_less_than_magnitude() -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((300, 32)) @ rng.standard_normal((32, 32))
    given = runs(rng.standard_normal((32, 16)), 2, 4, x)
    errors = [np.square(x @ (one.thin(given).weight - given.weight)).sum() for one in THIN]
    assert errors[2] < errors[1] < errors[0]


def masked(keep: np.ndarray, x: np.ndarray = X, w: np.ndarray = W, ridge: float | None = 1e-12) -> Problem:
    """A weight of which only `keep` is left, to be fitted to what all of it gives."""
    left = np.where(keep, w, 0)
    wanted, current = (x @ w).astype(np.float32), (x @ left).astype(np.float32)
    held = np.arange(len(x)) % 5 == 2
    return Problem(x.astype(np.float32)[None], left[None], wanted, current, held, (-np.inf, np.inf), False, ridge,
                   keep=keep[None])  # fmt: skip


def test_admm_ends_where_least_squares_under_the_mask_does() -> None:
    given = masked(np.array([[True], [False]]))
    found = Admm(iterations=200).solve(given)
    np.testing.assert_allclose(given.weight[0] + found.weight[0], [[1.5], [0]], atol=1e-5)
    rng = np.random.default_rng(5)
    x, w, keep = rng.standard_normal((80, 9)), rng.standard_normal((9, 6)), rng.random((9, 6)) < 0.5
    given = masked(keep, x, w)
    found = Admm(iterations=500).solve(given)
    for k in range(6):
        best = np.linalg.lstsq(x[:, keep[:, k]], x @ w[:, k], rcond=None)[0]
        np.testing.assert_allclose((given.weight[0] + found.weight[0])[keep[:, k], k], best, atol=1e-3)
    assert not found.weight[0][~keep].any()


def test_swaps_deal_out_what_is_strong() -> None:
    score = column(9, 8, 7, 6, 1, 1, 1, 1)
    order = ChannelPermutation().order([Seat(score, np.arange(8))], 2, 4, 0)
    assert sorted(order) == [*range(8)]
    kept = np.sort(score[order].reshape(2, 4), axis=1)[:, 2:]
    assert kept.sum() == 30


def test_all_readers_of_one_order_are_heard() -> None:
    rng = np.random.default_rng(6)
    seats = [Seat(rng.random((24, rows)) ** 4, np.arange(24)) for rows in (5, 3)]
    order = ChannelPermutation().order(seats, 2, 4, 0)

    def kept(order: np.ndarray) -> float:
        return sum(np.sort(s.score[order].reshape(6, 4, -1), axis=1)[:, 2:].sum() for s in seats)

    assert kept(order) > 1.03 * kept(np.arange(24))


def test_columns_of_others_stay_where_they_are() -> None:
    score = column(9, 1, 8, 1, 7, 1, 6, 1)
    places = np.array([0, 2, 5, 7])  # two of each run are not to move
    order = ChannelPermutation().order([Seat(score, places)], 1, 4, 0)
    moved = score[:, 0].copy()
    moved[places] = moved[places[order]]
    np.testing.assert_array_equal(moved[[1, 3, 4, 6]], score[[1, 3, 4, 6], 0])
    assert moved.reshape(2, 4).max(axis=1).sum() >= score.reshape(2, 4).max(axis=1).sum()


def test_one_weight_between_two_spikes_is_protected() -> None:
    calm = [Peak(f"layer {k}", np.ones(3), np.ones(4)) for k in range(5)]
    spike = Peak("down", np.array([1.0, 1, 90]), np.array([70.0, 1, 1, 1]))
    assert SuperWeight().protect([*calm, spike]) == [("down", 2, 0)]
    assert SuperWeight().protect(calm) == []
    assert SuperWeight().protect([]) == []
    found = Magnitude().thin(runs(column(5, 4, 0.1, 3), 2, 4, stays=(2, 0)))
    np.testing.assert_array_equal(found.keep[:, 0], [True, False, True, False])


def test_every_sparsifier_is_found_and_says_what_it_does() -> None:
    found = plugin.available("sparsifiers")
    assert set(found) == {"nm-mag", "nm-wanda", "nm-sparsegpt", "nm-perm", "superweight"}
    assert all(len(plugin.help_of(cls)) > 20 for cls in found.values())
