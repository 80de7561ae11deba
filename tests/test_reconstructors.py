"""Reconstructors: the numbers of their sources, and that none makes its site worse on the rows it was fitted to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxprune import plugin, prune
from onnxprune.passes.bias_comp import BiasCompensation
from onnxprune.passes.bn_reest import MomentMatching
from onnxprune.passes.lsq import LeastSquares
from onnxprune.passes.mask_tune import MaskTuning, scales
from onnxprune.passes.obs_block import ObsBlock
from onnxprune.passes.obs_struct import ObsUpdate
from onnxprune.passes.obspa import ObsPa
from onnxprune.plugin import Problem

X, W = np.array([[1, 0], [0, 1], [1, 1]], np.float32), np.array([[1.0], [1.0]])  # the example of METHODS D


def problem(x: np.ndarray, w: np.ndarray, kept: list[int], intercept: bool = False, patch: int = 1) -> Problem:
    """Of x [rows, columns] by w [columns, outputs] these columns are left."""
    x, part = x.astype(np.float32), x[:, kept].astype(np.float32)
    return Problem(
        x=part[None],
        weight=w[kept][None],
        wanted=(x @ w).astype(np.float32),
        current=(part @ w[kept]).astype(np.float32),
        held_out=np.arange(len(x)) % 5 == 2,
        bounds=(-np.inf, np.inf),
        intercept=intercept,
        patch=patch,
    )


def error(given: Problem, reconstructor: plugin.Reconstructor | None) -> float:
    """Squared error, summed, after a solution."""
    solution = reconstructor.solve(given) if reconstructor is not None else None
    found = given.current + (solution.predict(given.x) if solution is not None else 0)
    return float(((given.wanted - found) ** 2).sum())


@pytest.mark.parametrize("one", [LeastSquares(ridge=0.0), ObsUpdate(1e-9), ObsBlock(1e-9), ObsPa(1e-9)])
def test_what_is_left_takes_over(one: plugin.Reconstructor) -> None:
    given = problem(X, W, [0])
    assert error(given, None) == pytest.approx(2.0)
    solution = one.solve(given)
    np.testing.assert_allclose(given.weight[0] + solution.weight[0], [[1.5]], atol=1e-5)
    assert error(given, one) == pytest.approx(1.5, rel=1e-5)


def test_means_go_into_the_bias() -> None:
    flap = problem(np.array([[1.0, 2], [3, 2]]), np.array([[1.0, 2], [10, 0]]), [0], intercept=True)
    np.testing.assert_allclose(BiasCompensation().solve(flap).shift, [20, 0])
    assert error(flap, BiasCompensation()) == pytest.approx(0, abs=1e-8)
    assert BiasCompensation().solve(problem(X, W, [0])) is None


def test_an_intercept_subsumes_the_mean() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((200, 7)) + 3, rng.standard_normal((7, 3))
    given = problem(x, w, [0, 2, 3, 5], intercept=True)
    assert error(given, LeastSquares(ridge=1e-6)) <= error(given, BiasCompensation()) + 1e-3


def test_the_update_is_that_of_columns_removed_one_by_one() -> None:
    rng = np.random.default_rng(2)
    x, w = rng.standard_normal((50, 6)) @ rng.standard_normal((6, 6)), rng.standard_normal((6, 4))
    damp, kept = 1e-2, [0, 3, 4]
    moments = x.T @ x / len(x)
    inverse = np.linalg.inv(moments + damp * np.trace(moments[np.ix_(kept, kept)]) / len(kept) * np.eye(6))
    weight = w.copy()
    for j in (5, 1, 2):
        weight -= np.outer(inverse[:, j], weight[j]) / inverse[j, j]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    solution = ObsUpdate(damp).solve(problem(x, w, kept))
    np.testing.assert_allclose(w[kept] + solution.weight[0], weight[kept], rtol=1e-3, atol=1e-4)


def test_a_scale_for_each_unit() -> None:
    found = scales(np.array([[1.0], [2.0]]), np.array([[1.0]]), np.array([[1.0], [2.0]]), 1, False, 1e-12)
    np.testing.assert_allclose(found, [2.0])
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((300, 12)), rng.standard_normal((12, 5))
    x[:, 6:] = x[:, :6]  # the second half says the same
    given = problem(x, w, list(range(6)), patch=3)
    solution = MaskTuning().solve(given)
    ratio = (given.weight[0] + solution.weight[0]) / given.weight[0]
    assert np.ptp(ratio.reshape(2, -1), axis=1).max() < 1e-6  # one scale for all columns of a channel
    assert error(given, MaskTuning()) < error(given, None)


def test_mean_and_variance_come_back() -> None:
    rng = np.random.default_rng(4)
    given = problem(rng.standard_normal((100, 8)) + 1, rng.standard_normal((8, 3)), [1, 2, 6], intercept=True)
    found = given.current + MomentMatching().solve(given).predict(given.x)
    np.testing.assert_allclose(found.mean(axis=0), given.wanted.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(found.std(axis=0), given.wanted.std(axis=0), rtol=1e-4)


def test_variance_is_that_of_all_rows() -> None:
    given = problem(np.array([[1.0, 0], [3, 0], [5, 0]]), np.array([[1.0], [1.0]]), [0], intercept=True)
    assert given.wanted.mean() == 3
    assert given.wanted.var() == pytest.approx(8 / 3)
    assert error(given, MomentMatching()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", sorted(plugin.available("reconstructors")))
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("intercept", [False, True])
def test_no_reconstructor_makes_its_rows_worse(name: str, groups: int, intercept: bool) -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((groups, 400, 6)).astype(np.float32)
    weight = rng.standard_normal((groups, 6, 4))
    lost = rng.standard_normal((400, groups * 4)).astype(np.float32) * 0.3 + 1
    current = np.concatenate([x[g] @ weight[g].astype(np.float32) for g in range(groups)], axis=1)
    wanted = 1.3 * current + lost
    held = np.arange(400) % 5 == 2
    given = Problem(x, weight, wanted, current, held, (-np.inf, np.inf), intercept)
    reconstructor = plugin.build("reconstructors", name)
    assert error(given, reconstructor) <= error(given, None) * 1.0001


@pytest.mark.parametrize("name", sorted(plugin.available("reconstructors")))
def test_dead_columns_are_no_trouble(name: str) -> None:
    zero = problem(np.zeros((20, 3)), np.ones((3, 2)), [0, 1], intercept=True)
    solution = plugin.build("reconstructors", name).solve(zero)
    assert solution is None or (np.isfinite(solution.weight).all() and np.isfinite(solution.shift).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*plugin.available("reconstructors")} - {"slicegpt"}))  # which needs subspaces
def test_every_reconstructor_brings_a_network_nearer_to_the_dense_one(name: str) -> None:
    models = Path(__file__).resolve().parents[1] / "models"

    def error(reconstruct: str) -> float:
        found = prune(
            models / "digits_cnn.onnx",
            ratio=0.4,
            criterion="mag",
            reconstruct=reconstruct,
            calibration=str(models / "digits_calibration.npz"),
            evaluation=str(models / "digits_evaluation.npz"),
            measure=False,
        )
        return float(found.report.quality["relative-error"])

    assert error(name) < 0.9 * error("none")
