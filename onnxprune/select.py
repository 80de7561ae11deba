"""Importance and a budget -> keep masks, rounded to what the backend likes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd, lcm

import numpy as np

from onnxprune.errors import ImpossibleError, InputError
from onnxprune.types import Array, Group, Mask, Plan, Positions

METRICS = ("macs", "params", "size", "latency")
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9,
         "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}  # fmt: skip
MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
LIKED = 16  # positions that runtimes compute at once: lanes of AVX-512, rows of tensor cores; with AVX2 twice 8
TWICE = 2  # times that a firm multiple must fit into a group,
FEW = 8  # or so often if
STEP = 0.05  # it is more than this share of the model,
ROOM = 4  # and more than that only where the other groups are so many times as much, to make up for it
BACK = 32  # steps that each group may get back
NARROW = 0.1  # share of the model that may stay whole because no more than one multiple fits into it
SLACK = 1.1  # what is not firm takes a coarser multiple only while it keeps at most this many times what was asked


@dataclass(frozen=True)
class Rounding:
    """Kept positions become multiples of `multiple` (None: of `liked`, less where that keeps too many, yet of `runs`).

    `undo` lets a group keep everything for it; without, what is to shrink shrinks, to odd sizes if need be. With
    `costs`, shares of the model for one unit of each group, and `shares` for all of them, the liking is firm: it is
    kept however much that keeps, since other groups make up for it, but for a half or less of it where it is much
    of a group or of the model. What is `whole` then stays so, and of others one multiple stays, or with `deep` a
    power of two below it.
    """

    multiple: int | None
    min_keep: int = 1
    runs: int = 1
    liked: int = 8
    undo: bool = False
    costs: Mapping[int, float] | None = None
    shares: Mapping[int, float] = field(default_factory=dict)
    whole: frozenset[int] = frozenset()
    deep: bool = False

    def firm(self, groups: Sequence[Group], costs: Sequence[Array]) -> Rounding:
        """Firm where no multiple is given; `costs` float64[units] for each group are shares of the model."""
        if self.multiple is not None:
            return self
        each = {group.id: float(cost.max()) for group, cost in zip(groups, costs, strict=True)}
        shares = {group.id: len(group.units) * each[group.id] for group in groups}
        narrow = [g for g in groups if 0 < len(g.units) * gcd(*g.unit_positions) <= self.liked]
        little = len(narrow) < len(groups) and sum(shares[g.id] for g in narrow) <= NARROW
        return replace(self, costs=each, shares=shares, whole=frozenset(g.id for g in narrow if little))

    def deepest(self) -> Rounding:
        """For a target that is out of reach otherwise."""
        return replace(self, whole=frozenset(), deep=True)

    def table(self, group: Group, floor: float) -> Positions:
        """int64[units + 1]: how many units really go when r are to go; rises with r and never exceeds it."""
        count = len(group.units)
        least = min(count, max(self.min_keep, group.least, int(np.ceil(floor * count))))
        kept = np.maximum(count - np.arange(count + 1), least)
        width = gcd(*group.unit_positions)  # zero for branches, whose number is free
        if self.costs is not None:
            return _risen(count, self._firmly(group, kept, width, self.costs[group.id]))
        chosen = np.full(count + 1, count)
        done = np.zeros(count + 1, np.bool_)
        steps = sorted({lcm(self.liked >> k, self.runs) for k in range(self.liked.bit_length())}, reverse=True)
        for multiple in steps if self.multiple is None else [self.multiple]:
            step = multiple // gcd(multiple, width)
            rounded = -(-kept // step) * step
            fits = ~done & (rounded <= count)
            if self.multiple is None and multiple > self.runs:
                fits &= rounded <= SLACK * kept
            chosen = np.where(fits, rounded, chosen)
            done |= fits & (self.undo | (rounded < count))
        return _risen(count, chosen)

    def _firmly(self, group: Group, kept: Positions, width: int, cost: float) -> Positions:
        """int64[units + 1]: how many units stay; a unit has `width` positions and costs this share of the model."""
        count = len(group.units)
        if group.id in self.whole:
            return np.full_like(kept, count)
        multiple = self.liked
        others = sum(self.shares.values()) - self.shares[group.id]
        most = max(STEP, others / ROOM) * width
        while multiple > 1 and (
            multiple * cost > most or multiple * (FEW if multiple * cost > STEP * width else TWICE) > count * width
        ):
            multiple //= 2
        multiple = lcm(multiple, self.runs)
        step = multiple // gcd(multiple, width)
        powers = np.exp2(np.ceil(np.log2(np.maximum(kept, 1)))).astype(np.int64)
        below = (kept < step) & (self.runs == 1) & self.deep
        return np.minimum(np.where(below, powers, -(-kept // step) * step), count)


def _risen(count: int, kept: Positions) -> Positions:
    """How many of `count` units go if so many stay, never fewer where more were to go."""
    return np.asarray(np.maximum.accumulate(count - kept), np.int64)


def _keep(group: Group, order: Positions, goes: int) -> Mask:
    keep = np.ones(len(group.units), np.bool_)
    keep[order[:goes]] = False
    return keep


class OutOfReachError(ImpossibleError):
    """Some target cannot be met; `plan` is what comes closest, `missed` what it misses."""

    def __init__(self, message: str, plan: Plan, missed: Collection[str]) -> None:
        super().__init__(message)
        self.plan, self.missed = plan, frozenset(missed)


def by_ratio(groups: Sequence[Group], importance: Sequence[Array], ratio: float, rounding: Rounding) -> Plan:
    """floor(ratio x n) units of every group go, least important first."""
    keep = {}
    for group, scores in zip(groups, importance, strict=True):
        order = np.argsort(scores, kind="stable")
        wish = int(np.floor(ratio * len(order) + 1e-9))
        keep[group.id] = _keep(group, order, int(rounding.table(group, 0.0)[wish]))
    return Plan(keep)


def by_target(
    groups: Sequence[Group],
    priority: Sequence[Array],
    floor: float,
    rounding: Rounding,
    targets: Mapping[str, float],
    cost: Callable[[Mask], Mapping[str, float]],
    labels: int,
) -> Plan:
    """The shortest run of units, in order of priority, without which every target is met.

    What rounding makes of it may be more than is needed: then each group gets some steps back while that holds, the
    last unit in that order first.
    `targets` and `cost` are in absolute numbers. Raises OutOfReachError, with what can be reached.
    """
    orders = [np.argsort(scores, kind="stable") for scores in priority]
    tables = [rounding.table(group, floor) for group in groups]
    rank = np.concatenate([np.zeros(0), *(scores[order] for scores, order in zip(priority, orders, strict=True))])
    owner = np.concatenate([np.zeros(0, np.int64), *(np.full(len(o), k) for k, o in enumerate(orders))])
    line = owner[np.argsort(rank, kind="stable")]

    def goes(length: int) -> list[int]:
        wishes = np.bincount(line[:length].astype(np.int64), minlength=len(groups))
        return [int(t[w]) for t, w in zip(tables, wishes, strict=True)]

    def plan(gone: Sequence[int]) -> Plan:
        return Plan({g.id: _keep(g, o, count) for g, o, count in zip(groups, orders, gone, strict=True)})

    def missed(gone: Sequence[int]) -> dict[str, float]:
        reached = cost(alive_labels(groups, plan(gone), labels))
        return {metric: reached[metric] for metric, most in targets.items() if reached[metric] > most * (1 + 1e-9)}

    if short := missed(goes(len(line))):
        dense = cost(np.ones(labels, np.bool_))
        best = ", ".join(f"{metric}={value / dense[metric]:.3f} ({value:.4g})" for metric, value in short.items())
        text = f"the target is out of reach; the least that can be reached is {best}"
        raise OutOfReachError(text, plan(goes(len(line))), short)
    low, high = -1, len(line)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if missed(goes(middle)) else (low, middle)
    found = goes(high)
    live = [k for k, count in enumerate(found) if count]
    for _ in range(BACK):
        fits = []
        for k in sorted(live, key=lambda k: float(priority[k][orders[k][found[k] - 1]]), reverse=True):
            gone = [*found[:k], _before(tables[k], found[k]), *found[k + 1 :]]
            if not missed(gone):  # what does not fit now never will
                found = gone
                fits += [k] if gone[k] else []
        live = fits
    return plan(found)


def _before(table: Positions, count: int) -> int:
    """How many units go one step before so many do."""
    return int(table[table < count].max())


def alive_labels(groups: Sequence[Group], plan: Plan, labels: int) -> Mask:
    """bool[labels]: what survives a plan; labels outside its groups do."""
    alive = np.ones(labels, np.bool_)
    for group in groups:
        if group.id in plan.keep:
            alive[group.units[~plan.keep[group.id]]] = False
    return alive


def parse_size(text: str) -> int:
    """Bytes, as in 512MB or 2GiB. Raises InputError."""
    digits = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text.strip()[len(digits) :].strip().lower()
    try:
        number = float(digits) * UNITS[unit]
    except (ValueError, KeyError):
        number = float("nan")
    if not np.isfinite(number) or number < 1_000_000:
        raise InputError("a size of at least 1MB, as in 512MB or 2GiB", object=f"--memory {text}")
    return int(number)


def parse_target(metric: str, value: float | str) -> tuple[float, bool]:
    """(number, latency in ms; whether it is a share of the dense model). Raises InputError."""
    text = str(value).strip()
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text[len(digits) :].strip().lower()
    try:
        number = float(digits)
    except ValueError:
        number = float("nan")
    if metric not in METRICS:
        raise InputError(f"unknown target metric; there are {', '.join(METRICS)}", object=metric)
    units, example = (UNITS, "macs=0.5 or size=40MB")
    if metric == "latency":
        units, example = (MILLISECONDS, "latency=0.6 or latency=8ms")
    if not np.isfinite(number) or number <= 0 or (unit and unit not in units) or (not unit and number > 1):
        raise InputError(f"a target is a share in (0, 1] or a number with a unit, as in {example}",
                         object=f"{metric}={text}")  # fmt: skip
    return number * (units[unit] if unit else 1.0), not unit
