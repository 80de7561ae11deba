"""Weights that are stored as integers: what was fitted in real numbers, on the grid that their scales leave."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from onnxprune.lsq import Regression, inverse_factor, missed
from onnxprune.plugin import Problem, Solution
from onnxprune.types import Array, Mask, Positions

DAMP = 1e-2  # share of the mean diagonal
BLOCK = 128  # columns behind which work is done at once


@dataclass(frozen=True)
class Grid:
    """Values that weights can have: whole multiples from `low` to `high` of `step`, any where that is zero.

    All float64 in one shape.
    """

    step: Array
    low: Array
    high: Array

    def nearest(self, values: Array) -> Array:
        """The nearest values that there are."""
        usable = self.step != 0
        count = np.divide(values, self.step, out=np.zeros_like(values), where=usable)
        return np.asarray(np.where(usable, np.clip(np.rint(count), self.low, self.high) * self.step, values))

    def at(self, place: int | Positions) -> Grid:
        """The grid of some of the weights."""
        return Grid(self.step[place], self.low[place], self.high[place])


def on_grid(problem: Problem, solution: Solution, grid: Grid) -> Solution | None:
    """A solution after which every weight has a value of the grid, float64[groups, columns, outputs].

    None where that is no better on held-out rows than leaving everything alone, unless a mask has to be kept.
    Raises LinAlgError where moments are beyond what numbers hold.
    """
    wanted = problem.weight + solution.weight
    found, shift = np.empty_like(wanted), solution.shift.copy()
    width = wanted.shape[2]
    for g, x in enumerate(problem.x):
        moments = Regression(x, problem.intercept)
        keep = None if solution.keep is None else solution.keep[g]
        found[g] = fed_back(wanted[g], grid.at(g), moments.moments, keep)
        if problem.intercept:
            shift[g * width : (g + 1) * width] += moments.mean @ (wanted[g] - found[g])
    rounded = replace(solution, weight=found - problem.weight, shift=shift)
    if solution.keep is not None or not problem.held_out.any():
        return rounded
    held = problem.held_out
    known, before = problem.wanted[held], problem.current[held]
    after = before + rounded.predict(problem.x[:, held])
    return rounded if missed(known, after, problem.bounds) < missed(known, before, problem.bounds) else None


def fed_back(weight: Array, grid: Grid, moments: Array, keep: Mask | None = None) -> Array:
    """float64[columns, outputs] on the grid: columns are rounded one by one, and those still to come take over.

    With U the upper Cholesky factor of H^-1, H the damped second moments, column j leaves e = (w_j - q_j) / U_jj, and
    every later column k loses e U_jk; those with the largest moments come first. All but `keep` is zero.
    Source: GPTQ (Frantar et al. 2023), section 3.
    """
    order = np.argsort(-np.diag(moments), kind="stable")
    upper = inverse_factor(moments[np.ix_(order, order)], DAMP)
    left, grid = weight[order], grid.at(order)
    kept = np.ones(left.shape, np.bool_) if keep is None else keep[order]
    for start in range(0, len(left), BLOCK):
        end = min(start + BLOCK, len(left))
        inner = upper[start:end, start:end]
        part, errors = left[start:end], np.zeros((end - start, left.shape[1]))
        for j in range(end - start):
            rounded = np.where(kept[start + j], grid.at(start + j).nearest(part[j]), 0)
            errors[j] = (part[j] - rounded) / inner[j, j]
            part[j + 1 :] -= np.outer(inner[j, j + 1 :], errors[j])
            part[j] = rounded
        left[end:] -= upper[start:end, end:].T @ errors
    return np.asarray(left[np.argsort(order)])
