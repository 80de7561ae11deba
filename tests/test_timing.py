"""Tables of latency and targets in it, with clocks that are made up: no test here depends on a time."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from zoo import ZOO

from onnxprune.analysis import Analysis, cost_shapes
from onnxprune.cache import Cache
from onnxprune.pace import CLOSE, MOST, Verdict, alone, converge
from onnxprune.recipe import Options
from onnxprune.runtime import ort
from onnxprune.timing import DIMENSIONS, EMPTY, PLACES, Operators, Piece, Table, counts, singly, smooth, tabulate
from onnxprune.types import Array, Mask

DIGITS = Path(__file__).resolve().parents[1] / "models" / "digits_cnn.onnx"


def operators(path: Path) -> Operators:
    analysis = Analysis(path)
    movable = np.zeros(analysis.labels, np.bool_)
    for group in analysis.groups:
        if group.kind != "layers":
            movable[group.units] = True
    shapes = cost_shapes(analysis.prepared.model, analysis.given, analysis.view.shapes)
    return Operators(analysis, dict(shapes), movable)


@pytest.fixture(scope="module")
def digits() -> Operators:
    return operators(DIGITS)


# the table -----------------------------------------------------------------------------------------------------------


def test_times_are_interpolated_between_levels_and_held_beyond() -> None:
    levels = np.ones((1, DIMENSIONS, PLACES))
    levels[0, 0, :3] = 0.25, 0.5, 1.0
    levels[0, 1, :2] = 0.5, 1.0
    times = np.zeros((1, PLACES, PLACES, PLACES))
    times[0, :, :, :] = np.array([1.0, 2.0, 8.0, 8.0, 8.0])[:, None, None]
    times[0] *= np.array([0.5, 1.0, 1.0, 1.0, 1.0])[None, :, None]
    none = np.zeros(0, np.int64)
    table = Table(np.array([3]), np.array([[0, 1, 2]]), levels, times, none, (np.zeros(0), none, none), 0.0)
    at = {
        (1, 1): 8,
        (0.5, 1): 2,
        (0.75, 1): 5,
        (0.25, 1): 1,
        (0.1, 1): 1,
        (1, 0.5): 4,
        (1, 0.75): 6,
        (0.75, 0.75): 3.75,
    }
    for shares, wanted in at.items():
        assert table.values(np.array(shares)) == pytest.approx([wanted])


def test_times_never_fall_with_width() -> None:
    found = smooth(np.array([[1.0, 3.0, 2.0], [2.0, 2.0, 5.0]]))
    assert (np.diff(found, axis=0) >= 0).all()
    assert (np.diff(found, axis=1) >= 0).all()
    assert np.array_equal(smooth(np.arange(5.0)), np.arange(5.0))


def macs(piece: Piece) -> float:
    """A clock that counts the multiplications of a convolution or a product, and nothing else."""
    inputs = [given["shape"] for given in piece.what["inputs"] if given]
    if piece is EMPTY:
        return 0.0
    if piece.what["op"][1] == "Conv":
        return float(prod(inputs[1]) * prod(inputs[0][2:]))
    return float(prod(inputs[1]) * prod(inputs[0][:-1]))


def test_a_table_of_a_clock_that_counts_macs_counts_macs(digits: Operators) -> None:
    asked: list[str] = []

    def clock(piece: Piece, seconds: float) -> float:
        asked.append(piece.key)
        return macs(piece)

    table, multiple = tabulate(digits, clock)
    costs = digits.analysis.costs
    rng = np.random.default_rng(0)
    whole = np.ones(digits.analysis.labels, np.bool_)

    def counted(alive: Mask) -> Array:
        order = np.argsort(table.linear)
        return np.asarray(table.operators(costs.shares(alive))[order])

    def alone(alive: Mask) -> list[float]:
        pieces = (digits.piece(i, alive) for i in sorted(table.linear.tolist()))
        return [macs(piece) for piece in pieces if piece is not None]

    assert counted(whole) == pytest.approx(alone(whole))
    for _ in range(3):
        alive = whole & (~digits.movable | (rng.random(len(whole)) < 0.7))
        assert counted(alive) == pytest.approx(alone(alive), rel=1e-6)
    assert multiple == 8
    assert len(table.linear) > len(set(asked)) / PLACES**2


def test_the_multiple_that_pays_is_found(digits: Operators) -> None:
    def stairs(piece: Piece, seconds: float) -> float:
        """Filters are computed sixteen at a time."""
        inputs = [given["shape"] for given in piece.what["inputs"] if given]
        width = inputs[1][0] if len(inputs) > 1 else 1
        return macs(piece) / width * (-(-width // 16) * 16)

    _, multiple = tabulate(digits, stairs)
    assert multiple == 16


def test_what_a_run_costs_that_computes_nothing_is_counted_once(digits: Operators) -> None:
    table, _ = tabulate(digits, lambda piece, seconds: 7.0 if piece is EMPTY else 9.0)
    assert table.fixed == 7.0
    assert table.times == pytest.approx(2.0)


def test_an_operator_that_does_not_run_alone_is_left_out(digits: Operators) -> None:
    table, _ = tabulate(digits, lambda piece, seconds: None if piece.what["op"][1] == "Gemm" else 1.0)
    kinds = {digits.view.nodes[i].op_type for i in table.linear.tolist()}
    assert kinds == {"Conv"}


def test_an_operator_that_fails_once_is_asked_again(tmp_path: Path) -> None:
    """By the next run: a failure is not kept in the cache, a time is."""
    asked: list[str] = []

    def piece(name: str, fails: bool) -> Piece:
        def build() -> tuple[bytes, dict[str, Array]]:
            asked.append(name)
            if fails:
                raise ValueError(name)
            return EMPTY.build()

        return Piece({"an": "operator"}, build)

    found = []
    for name, fails in (("first", True), ("second", False), ("third", False)):
        with alone(Options(ratio=0.5), Cache(tmp_path)) as clock:
            found.append([clock(piece(name, fails), 0.001) for _ in range(2)])
    assert found[0] == [None, None]
    assert found[1][0] is not None
    assert found[1][0] > 0
    assert found[1] == [found[1][0]] * 2 == found[2]
    assert asked == ["first", "second"]


def test_operators_by_themselves_take_what_the_clock_says(digits: Operators) -> None:
    asked: list[str] = []

    def clock(piece: Piece, seconds: float) -> float | None:
        asked.append(piece.key)
        return None if piece.what["op"][1] == "Gemm" else 7.0 if piece is EMPTY else 7.0 + macs(piece)

    alive = digits.alive(digits.dimensions(digits.found[0]), [8])
    found = singly(digits, clock, alive)
    nodes = {digits.view.nodes[i].outputs[0]: i for i in digits.found}
    wanted = {name: macs(piece) for name, i in nodes.items() if (piece := digits.piece(i, alive)) is not None}
    assert found == pytest.approx({name: wanted[name] for name in found})
    assert {digits.view.nodes[nodes[name]].op_type for name in wanted.keys() - found.keys()} == {"Gemm"}
    assert len(asked) == len(set(asked))


def test_levels_are_whole_numbers_of_units_and_rise(digits: Operators) -> None:
    for i in digits.found:
        for dimension in digits.dimensions(i):
            found = counts(dimension, (1.0, 0.75, 0.5, 0.25, 0.0))
            assert found == sorted(set(found))
            assert found[0] == 1
            assert found[-1] == len(dimension.labels)
            assert len(found) <= PLACES


LINEAR = {
    "Conv", "ConvTranspose", "FusedConv", "ConvInteger", "QLinearConv", "Gemm", "FusedMatMul", "MatMul",
    "MatMulInteger", "QLinearMatMul", "MatMulNBits", "LSTM", "GRU", "RNN", "Einsum", "Attention", "MultiHeadAttention",
}  # fmt: skip


def first_of_each() -> list[str]:
    """The first entry of the zoo for each kind of linear operator."""
    left, found = set(LINEAR), []
    for name, make in ZOO.items():
        if here := {node.op_type for node in make().graph.node} & left:
            left -= here
            found.append(name)
    return found


@pytest.mark.parametrize("name", first_of_each())
def test_every_linear_operator_runs_alone_dense_and_halved(name: str, tmp_path: Path) -> None:
    onnx.save(ZOO[name](), tmp_path / "m.onnx")
    made = operators(tmp_path / "m.onnx")
    for i in made.found:
        dimensions = made.dimensions(i)
        for halved in (False, True):
            kept = [-(-len(d.labels) // 2) if halved else len(d.labels) for d in dimensions]
            piece = made.piece(i, made.alive(dimensions, kept))
            assert piece is not None
            content, feed = piece.build()
            assert ort.BACKENDS["cpu"].session(content).run(feed)


# targets -------------------------------------------------------------------------------------------------------------


def judged(measured: Callable[[int], float], goal: float = 50.0) -> Callable[[int], Verdict]:
    return lambda width: Verdict(str(width), float(width), measured(width), goal)


def widest(factor: float, step: int = 1) -> int:
    """As a table chooses: the widest of a hundred that takes 50 ms, as far as it knows."""
    return max(1, min(100, int(50 / factor))) // step * step


@pytest.mark.parametrize(
    "measured",
    [lambda w: float(w), lambda w: 10 + 0.9 * w, lambda w: 0.4 * w, lambda w: 20 + w**2 / 200, lambda w: 1.3 * w],
)
def test_predictions_are_corrected_until_the_goal_is_met(measured: Callable[[int], float]) -> None:
    found, _ = converge(widest, judged(measured))
    assert found is not None
    assert measured(found) <= MOST * 50
    assert found == 100 or measured(found) >= CLOSE[0] * 50 * 0.98


def test_a_staircase_is_taken_at_the_highest_step_that_meets_it() -> None:
    found, _ = converge(lambda f: widest(f, 20), judged(lambda w: w * 0.8))
    assert found == 60


def test_the_factor_serves_the_next_target() -> None:
    rounds: list[float] = []

    def choose(factor: float) -> int:
        rounds.append(factor)
        return widest(factor)

    _, factor = converge(choose, judged(lambda w: 0.7 * w))
    first = len(rounds)
    assert converge(choose, judged(lambda w: 0.7 * w), factor)[0] is not None
    assert len(rounds) == first + 1


def test_a_goal_that_nothing_meets_is_given_up() -> None:
    count: list[Any] = []

    def choose(factor: float) -> int:
        count.append(factor)
        return widest(factor)

    assert converge(choose, judged(lambda w: 200.0))[0] is None
    assert len(count) <= 8
