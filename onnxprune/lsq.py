"""Least squares in closed form: centred, damped, pulled towards nothing; how much damping is found on held-out rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve, cholesky

from onnxprune.plugin import Problem, Solution
from onnxprune.types import Array, Mask

RIDGES = (1e-3, 1e-2, 1e-1, 5e-1)  # shares of the mean diagonal of the second moments


@dataclass(frozen=True)
class Fit:
    """x @ weight + shift, where x is [rows, columns]: weight float64[columns, outputs], shift float64[outputs].

    With a `basis`, float64[columns, k], the weight is basis @ share, and not made before somebody wants it.
    """

    share: Array
    shift: Array
    basis: Array | None = None

    @cached_property
    def weight(self) -> Array:
        """float64[columns, outputs]."""
        return self.share if self.basis is None else np.asarray(self.basis @ self.share)

    def __call__(self, x: Array) -> Array:
        """float32[rows, outputs]."""
        if self.basis is None:
            return np.asarray(x @ self.share.astype(np.float32) + self.shift.astype(np.float32))
        return np.asarray((x @ self.basis) @ self.share + self.shift, np.float32)


@dataclass(frozen=True)
class Aim:
    """What rows `x` are to become: float32[rows, columns], centred; y float32[rows, outputs] and its means float64."""

    x: Array
    y: Array
    mean: Array

    @cached_property
    def cross(self) -> Array:
        """float64[columns, outputs]: products of x and y."""
        return (self.x.T @ self.y).astype(np.float64) / max(len(self.y), 1)


class Regression:
    """Second moments of the rows of x (float32[rows, columns]); solves for any number of targets and dampings.

    With `intercept` the moments are centred and the shift is not damped, else it is zero. Where there are fewer rows
    than columns, products of rows take the place of those of columns: the damped weight is a sum of rows, since
    (X^T X + r)^-1 X^T = X^T (X X^T + r)^-1.
    """

    def __init__(self, x: Array, intercept: bool = True) -> None:
        self.x = x
        self.mean = x.mean(axis=0, dtype=np.float64) if intercept and len(x) else np.zeros(x.shape[1])
        self._centred = x - self.mean.astype(np.float32) if intercept else x
        self._rows = self._centred.astype(np.float64) if len(x) < x.shape[1] else None
        self._products = self.moments if self._rows is None else self._rows @ self._rows.T / max(len(x), 1)
        self.scale = float(np.trace(self._products)) / max(x.shape[1], 1)
        self._intercept = intercept
        self._factors: dict[float, tuple[Array, bool]] = {}  # the last alone: each is as large as the products

    @cached_property
    def moments(self) -> Array:
        """float64[columns, columns]."""
        return (self._centred.T @ self._centred).astype(np.float64) / max(len(self.x), 1)

    def solve(self, y: Array, ridge: float) -> Fit:
        """The weights that bring x nearest to y, float32[rows, outputs], damped by `ridge` x the mean diagonal.

        Raises LinAlgError for what is not finite.
        """
        return self.towards(self.aim(y), ridge)

    def aim(self, y: Array) -> Aim:
        """For `towards`: one aim serves every damping."""
        return Aim(self._centred, y, y.mean(axis=0, dtype=np.float64) if self._intercept else np.zeros(y.shape[1]))

    def towards(self, aim: Aim, ridge: float) -> Fit:
        """`solve` for what `aim` made of y."""
        wanted = aim.cross if self._rows is None else (aim.y - aim.mean) / max(len(aim.y), 1)
        if not np.isfinite(self.scale) or not np.isfinite(wanted).all():
            raise LinAlgError("moments are beyond what numbers hold")
        share = np.asarray(cho_solve(self._factor(ridge), wanted)) if self.scale > 0 else np.zeros_like(wanted)
        if self._rows is None:
            return Fit(share, aim.mean - self.mean @ share)
        return Fit(share, aim.mean - (self._rows @ self.mean) @ share, self._rows.T)

    def _factor(self, ridge: float) -> tuple[Array, bool]:
        """Cholesky factor of the damped products; more damping where it fails."""
        while ridge not in self._factors:
            self._factors.clear()
            damped = self._products.copy()
            damped[np.diag_indices_from(damped)] += ridge * self.scale
            try:
                self._factors[ridge] = cho_factor(damped, overwrite_a=True, check_finite=False)
            except LinAlgError:
                return self._factor(max(ridge, 1e-8) * 10)
        return self._factors[ridge]


def inverse_factor(moments: Array, damp: float) -> Array:
    """float64[columns, columns]: the upper Cholesky factor of the inverse of moments, damped by a share of their mean.

    Ten times as much where it fails; columns that are always zero stand alone. Raises LinAlgError for what is not
    finite.
    """
    if not np.isfinite(moments).all():
        raise LinAlgError("moments are beyond what numbers hold")
    diagonal = np.diag(moments)
    scale = float(diagonal.mean()) or 1.0
    while True:
        damped = moments + np.diag(np.where(diagonal <= 0, scale, 0) + damp * scale)
        try:
            inverse = cho_solve(cho_factor(damped), np.eye(len(damped)))
            return np.asarray(cholesky((inverse + inverse.T) / 2))
        except LinAlgError:
            if damp > 1e6:
                raise
            damp *= 10


Solve = Callable[[Regression, Aim, float], Fit]  # as Regression.towards


def by_groups(problem: Problem, ridge: float, solve: Callable[[Array, Array, Array], Fit]) -> Solution:
    """A solution whose change of each group is solve(x, weight, wanted - current), shapes as in Problem."""
    groups, outputs = len(problem.x), problem.wanted.shape[1] // len(problem.x)
    lacks = (problem.wanted - problem.current).reshape(len(problem.wanted), groups, outputs)
    fits = [solve(problem.x[g], problem.weight[g], lacks[:, g]) for g in range(groups)]
    return Solution(np.stack([fit.weight for fit in fits]), np.concatenate([fit.shift for fit in fits]), ridge)


def surgeon(problem: Problem, damp: float) -> Solution:
    """What optimal brain surgeon leaves of the weight once all columns that go are gone.

    Each removal minimises tr(D^T H D), D the change so far and H the damped second moments, under what went before, so
    the end is the minimum under all of them, whatever the order: H_SS D_S = H_SP W_P. Blocks make no difference to it.
    """
    return by_groups(problem, damp, lambda x, weight, lacks: Regression(x, intercept=False).solve(lacks, damp))


def seen(value: Array, bounds: tuple[float, float]) -> Array:
    """What readers see of a value behind a ReLU or Clip."""
    return value if bounds == (-np.inf, np.inf) else np.clip(value, *bounds)


PULL = 0.05  # towards the wanted value where readers do not see it: it steadies what the samples leave open


def goal(wanted: Array, predicted: Array, bounds: tuple[float, float]) -> Array:
    """What to aim at: where readers see the wanted value, that; elsewhere nearly anything that is unseen as well."""

    def free(edge: Array) -> Array:
        return np.asarray(edge + np.float32(PULL) * (wanted - edge))

    low, high = bounds
    found = np.where(wanted <= low, free(np.minimum(predicted, low)), wanted) if np.isfinite(low) else wanted
    return np.where(wanted >= high, free(np.maximum(predicted, high)), found) if np.isfinite(high) else found


def fit(
    x: Array,
    wanted: Array,
    current: Array,
    held_out: Mask,
    *,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    ridge: float | None = None,
    rounds: int = 5,
    intercept: bool = True,
    solve: Solve | None = None,
) -> tuple[Fit, float] | None:
    """(change, ridge) that brings `current` + change(x) nearest to `wanted`, as its readers see it.

    All float32[rows, ...]. Unless it is given, the damping is the one of RIDGES that does best on the held-out rows
    (bool[rows]) when fitted to the others, and the change is then fitted to all of them. `solve` takes the place of the
    closed form, where weights may not change freely. None where leaving everything alone does better there, where no
    row is held out, or where moments are beyond what numbers hold.
    """
    if ridge is None and (held_out.all() or not held_out.any()):
        return None
    try:
        return _fit(x, wanted, current, held_out, bounds, ridge, rounds, intercept, solve or Regression.towards)
    except LinAlgError:
        return None


def fitted(
    problem: Problem, rounds: int, solver: Callable[[int], Solve | None] = lambda group: None
) -> Solution | None:
    """`fit` for each group of a problem by itself; `solver` says how one is solved, None for plainly."""
    groups, _, columns = problem.x.shape
    outputs = problem.wanted.shape[1] // groups
    weight, shift = np.zeros((groups, columns, outputs)), np.zeros((groups, outputs))
    taken = []
    for g in range(groups):
        part = slice(g * outputs, (g + 1) * outputs)
        found = fit(
            problem.x[g],
            problem.wanted[:, part],
            problem.current[:, part],
            problem.held_out,
            bounds=problem.bounds,
            ridge=problem.ridge,
            rounds=rounds,
            intercept=problem.intercept,
            solve=solver(g),
        )
        if found is not None:
            weight[g], shift[g] = found[0].weight, found[0].shift
            taken.append(found[1])
    return Solution(weight, shift.reshape(-1), float(np.median(taken))) if taken else None


def _fit(
    x: Array,
    wanted: Array,
    current: Array,
    held_out: Mask,
    bounds: tuple[float, float],
    ridge: float | None,
    rounds: int,
    intercept: bool,
    solve: Solve,
) -> tuple[Fit, float] | None:
    if ridge is None:
        part = Regression(x[~held_out], intercept)
        known, probe = ((wanted[rows], current[rows]) for rows in (~held_out, held_out))
        aim = part.aim(goal(*known, bounds) - known[1])

        def tried(ridge: float) -> float:
            change = _rounds(part, aim, *known, bounds, ridge, min(rounds, 2), solve)
            return missed(probe[0], probe[1] + change(x[held_out]), bounds)

        errors = [tried(each) for each in RIDGES]  # one at a time: a large weight takes most memory
        best = int(np.argmin(np.nan_to_num(errors, nan=np.inf)))
        if not errors[best] < missed(probe[0], probe[1], bounds):
            return None
        ridge = RIDGES[best]
    whole = Regression(x, intercept)
    aim = whole.aim(goal(wanted, current, bounds) - current)
    return _rounds(whole, aim, wanted, current, bounds, ridge, rounds, solve), ridge


def missed(wanted: Array, found: Array, bounds: tuple[float, float]) -> float:
    """The mean squared difference that readers see."""
    return float(np.mean((seen(wanted, bounds) - seen(found, bounds)) ** 2, dtype=np.float64))


def _rounds(
    moments: Regression,
    aim: Aim,
    wanted: Array,
    current: Array,
    bounds: tuple[float, float],
    ridge: float,
    rounds: int,
    solve: Solve,
) -> Fit:
    """Solve, aim anew where readers do not look, and again; the moments of x stay the same."""
    change = solve(moments, aim, ridge)
    for _ in range(rounds if bounds != (-np.inf, np.inf) else 0):
        predicted = current + change(moments.x)
        change = solve(moments, moments.aim(goal(wanted, predicted, bounds) - current), ridge)
    return change
