"""In the child process: sites fitted one after the other, from the first of the model to the last.

Each is fitted on what the pruned model, repaired so far, feeds it, towards what the dense model has in its place. The
dense side stays from one call to the next.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from onnxprune import interface, quality
from onnxprune.codes import Grid, on_grid
from onnxprune.feeds import samples_in
from onnxprune.flow import Flow, Room, Sessions
from onnxprune.lsq import Regression, missed
from onnxprune.model import Model
from onnxprune.operators import Slot, State
from onnxprune.parts import Key, Part, numbers, takes, total
from onnxprune.plugin import Problem, Reconstructor, Runs, Solution, Sparsifier, trait
from onnxprune.rows import Rows, Sampling, totals_of
from onnxprune.running import Packed, give_back, limits, memory_of, trim, unpacked
from onnxprune.sites import Site, Visit, visits
from onnxprune.storage import read_model
from onnxprune.types import Array, Mask, Positions, Shape
from onnxprune.weights import Mapped, shelved

Feeds = Sequence[Mapping[str, Array]]
T = TypeVar("T")
S = TypeVar("S")
LEAST = 1 << 28  # bytes that fitting one site may take in any case
FEW = 256  # rows that a site is worth fitting to
NOTHING = 1e-9  # share of a site's variance below which it is not off
AGAIN = 8  # times at most that weights are fitted of which some readers lie behind others
WORTH = 0.03  # share of what is off that one more time must have taken away
BOTH = 2  # parts of a large weight that are fitted at once
FREE = 10  # a column for a constant is as many times as large as others, so that damping hardly counts


@dataclass(frozen=True)
class Repair:
    """What a repair changed, {slot: array}, the damping that each site took, and the divergence that is left.

    `rows` has (rows, columns) that each site was fitted with, fewer than there are for those in `short` of memory;
    `large` the bytes that others would have taken.
    """

    changes: Mapping[Slot, Array | Mapped]
    ridges: Mapping[str, float]
    divergence: float = float("nan")
    rows: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    large: Mapping[str, int] = field(default_factory=dict)
    short: Collection[str] = ()


@dataclass(frozen=True)
class Thinning:
    """A reconstructor that leaves n of every m weights, and has what is kept of them repaired by another.

    `slots` are the weights that this is for, each with the columns and outputs of those that must stay.
    """

    n: int
    m: int
    sparsifier: Sparsifier
    repair: Reconstructor | None
    slots: Mapping[Slot, tuple[Positions, Positions]]

    def solve(self, problem: Problem) -> Solution | None:
        """Choose what goes, and let the rest take over; then the repair of what is kept."""
        if problem.runs is None or problem.stays is None:
            return self.repair.solve(problem) if self.repair is not None else None
        groups, _, columns = problem.x.shape
        stays = problem.stays.reshape(columns, groups, -1).swapaxes(0, 1)
        thinned = [self._thin(problem, g, stays[g]) for g in range(groups)]
        left, keep = (np.stack([each[k] for each in thinned]) for k in (0, 1))
        first = Solution(left - problem.weight, np.concatenate([each[2] for each in thinned]), 0.0, keep)
        if self.repair is None:
            return first
        current = problem.current + first.predict(problem.x)
        more = self.repair.solve(replace(problem, weight=left, current=current, keep=keep, runs=None))
        if more is None:
            return first
        weight = np.where(stays, 0, first.weight + more.weight)
        return Solution(weight, first.shift + more.shift, more.ridge, keep)

    def _thin(self, problem: Problem, group: int, stays: Mask) -> tuple[Array, Mask, Array]:
        """(what is left of a group's weight, which weights that is, the shift that makes up for the means)."""
        assert problem.runs is not None
        first = problem.runs.reshape(-1)
        order = np.concatenate([first, np.setdiff1d(np.arange(problem.x.shape[2]), first)])
        x, weight = problem.x[group], problem.weight[group]
        moments = Regression(x, problem.intercept and self.repair is not None)
        size = np.sqrt(np.mean(np.square(x), axis=0, dtype=np.float64))
        seen = Runs(weight[order], self.n, self.m, len(problem.runs), stays[order], size[order],
                    moments.moments[np.ix_(order, order)])  # fmt: skip
        found = self.sparsifier.thin(seen)
        back = np.argsort(order)
        left, keep = found.weight[back], found.keep[back]
        return left, keep, -(moments.mean @ (left - weight))


class _Dense:
    """The dense model over all samples: rows of its values, each computed once."""

    def __init__(
        self,
        sent: str | Packed,
        fitted: Feeds,
        judged: Feeds,
        aside: frozenset[str],
        sampling: Sampling,
        threads: int,
        memory: int,
    ) -> None:
        self.model, self.feeds, self.sampling = _received(sent), [*fitted, *judged], sampling
        outputs = {str(value.name) for value in self.model.graph.outputs if value.type is not None}  # not maps
        self.counted = outputs - aside or outputs
        self.fitted = len(fitted)
        self.large = memory_of(self.model) > memory
        self.room = Room(memory // (6 if self.large else 3))  # of all flows, and of the rows that are kept
        self.share = memory // 2 if self.large else memory  # for fitting what belongs together
        self.limits: Mapping[str, Any] = limits(memory // 8) if self.large else {}
        self.sessions = Sessions(threads, 2) if self.large else Sessions(threads)  # each piece runs once there
        self.counts = [samples_in(feed, self.model.graph) for feed in fitted]
        self._outputs: list[dict[str, Array]] = []
        self.rows: dict[tuple[str, tuple[int, ...]], tuple[Sampling, Array]] = {}
        self.states: dict[State, list[Array]] = {}
        self.flow: Flow | None = None

    def run(self, model: Model, feeds: Feeds, pinned: Collection[str] = ()) -> Flow:
        """A model that is run on these feeds, within the limits."""
        return Flow(model, feeds, self.sessions, pinned, room=self.room, **self.limits)

    def values(
        self, wanted: Sequence[str | State], pinned: Collection[str], keep: bool = False
    ) -> list[list[Array]] | None:
        """For each value its arrays, None where one is not the dense model's; those of `pinned` stay for later.

        With `keep` states of recurrent operators are remembered.
        """
        states = [one for one in wanted if isinstance(one, State) and one not in self.states]
        names = [one for one in wanted if isinstance(one, str)] + [name for one in states for name in one.reads]
        if self.flow is None or any(map(self.flow.gone, names)):
            self.flow = self.run(self.model, self.feeds[: self.fitted], pinned)
        flow = self.flow
        if not all(map(flow.knows, names)):
            return None
        found = dict(zip(names, flow.values(names), strict=True))
        feeds = [{name: arrays[k] for name, arrays in found.items()} for k in range(self.fitted)]
        fresh = {one: [one.of(values, flow.array) for values in feeds] for one in states}
        self.states |= fresh if keep else {}
        fresh = self.states | fresh
        return [found[one][: self.fitted] if isinstance(one, str) else fresh[one] for one in wanted]

    def take(self, site: Site, rows: Rows, keep: bool, pinned: Collection[str]) -> Array:
        """float32[rows, channels of the dense value]."""
        key = site.dense or site.value, site.axes
        sampling, found = self.rows.get(key, (None, np.zeros(0)))
        if sampling != rows.sampling:
            found = self._target(site, rows, keep, pinned)
            if keep:
                self.rows[key] = rows.sampling, (found := self.room.keep(found, stays=True))
        return found

    def _target(self, site: Site, rows: Rows, keep: bool, pinned: Collection[str]) -> Array:
        """The dense value; inside an operator what the site's operators make of what they read in the dense model."""
        if site.dense:
            return rows.of((self.values([site.dense], pinned) or [[]])[0], site.axes)
        arrays = self.values([*(operator.source for operator in site.operators), *site.rest], pinned, keep)
        assert self.flow is not None and arrays is not None
        parts = [
            Part(self.flow, operator, rows.read(numbers(self.flow, operator, x), operator.layout))
            for operator, x in zip(site.operators, arrays, strict=False)
        ]
        return total(parts, [rows.of(value, site.axes) for value in arrays[len(parts) :]])

    def divergence(self, flow: Flow) -> float:
        """How far a model's outputs are from the dense ones on the samples that are judged by."""
        if not self._outputs:
            self._outputs = self._results(self.run(self.model, self.feeds[self.fitted :]))
        if not self._outputs:
            return float("nan")  # every output is a map
        names = set(flow.outputs) & set(self._outputs[0])
        found = [{name: row[name] for name in names} for row in self._results(flow)]
        narrowed = interface.noted(flow.model.metadata_props)
        dense = [interface.narrow(outputs, narrowed) for outputs in self._outputs]
        return quality.divergence(found[-len(dense) :], dense)

    def _results(self, flow: Flow) -> list[dict[str, Array]]:
        names = [str(value.name) for value in flow.model.graph.outputs if value.name in self.counted]
        return [dict(zip(names, row, strict=True)) for row in zip(*flow.values(names), strict=True)]


@dataclass
class _Task:
    flow: Flow
    sites: Sequence[Site]
    visits: Sequence[Visit]
    keep: bool
    changes: dict[Slot, Array] = field(default_factory=dict)
    ridges: dict[str, float] = field(default_factory=dict)
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    large: dict[str, int] = field(default_factory=dict)
    short: set[str] = field(default_factory=set)


_dense: _Dense | None = None
_task: _Task | None = None


def begin(
    sent: str | Packed,
    fitted: Feeds,
    judged: Feeds,
    aside: frozenset[str],
    sampling: Sampling,
    threads: int,
    memory: int,
) -> None:
    """See reconstruct.begin."""
    global _dense
    give_back()
    _dense = _Dense(sent, fitted, judged, aside, sampling, threads, memory)


def load(sent: str | Packed, sites: Sequence[Site], start: Mapping[Slot, Array], keep: bool) -> int:
    """How many visits there are to make."""
    global _task
    assert _dense is not None
    flow = _dense.run(_received(sent), _dense.feeds)
    _task = _Task(flow, sites, visits(flow.model.graph, sites), keep)
    for slot, array in start.items():
        _task.changes[slot] = flow.change(slot, np.ascontiguousarray(array, flow.array(slot).dtype))
    return len(_task.visits)


def finish(judge: bool, folder: str = "") -> Repair:
    """What all visits changed, large arrays in this folder, or how far off the model is."""
    global _task
    assert _task is not None and _dense is not None
    task, _task = _task, None
    divergence = _dense.divergence(task.flow) if judge else math.nan
    changes: Mapping[Slot, Array | Mapped] = {} if judge else task.changes
    if changes and _dense.large:
        changes = shelved(task.changes, folder)
    return Repair(changes, task.ridges, divergence, task.rows, task.large, task.short)


@dataclass
class _Place:
    """A site on its rows: what it should be and is, float32[rows, channels], and its operators that are fitted."""

    site: Site
    wanted: Array
    current: Array
    held_out: Mask
    parts: Sequence[Part]

    @property
    def off(self) -> bool:
        """Whether anything is to be repaired."""
        error = float(np.mean((self.wanted - self.current) ** 2, dtype=np.float64))
        return error > NOTHING * float(np.var(self.wanted, axis=0, dtype=np.float64).mean() + 1e-30)


def visit(k: int, reconstructor: Reconstructor, ridges: Mapping[str, float]) -> None:
    """Fit what a visit is for, and leave no memory behind."""
    _fit(k, reconstructor, ridges)
    if _dense is not None and _dense.large:
        trim()


def _fit(k: int, reconstructor: Reconstructor, ridges: Mapping[str, float]) -> None:
    """Fit the sites of a visit and change their weights; once more where what some read depends on the others."""
    assert _task is not None
    task, visit = _task, _task.visits[k]
    local, consumers = trait(reconstructor, "dense"), trait(reconstructor, "consumers")
    thin = reconstructor if isinstance(reconstructor, Thinning) else None
    every = [operator for n in visit.sites for operator in task.sites[n].operators]
    marked = thin is not None and any(operator.weight in thin.slots for operator in every)
    if thin is not None and thin.repair is None and not marked:
        return
    if consumers and not any(operator.lost for operator in every):
        return
    whole = thin is not None or trait(reconstructor, "masked")
    places = _places(k, local, whole)
    if not marked and not any(place.off for place in places):
        return
    for _ in range(AGAIN if visit.behind else 1):
        last = _missed(places)
        changes = _changes(places, reconstructor, ridges)
        before = {slot: task.flow.array(slot) for slot in changes} if visit.behind else {}
        _put(changes)
        if not changes or not visit.behind:
            return
        places = _places(k, local, whole)
        if not (left := _missed(places)) < last:
            _put(before)
            return
        if left > (1 - WORTH) * last:
            return


def _put(changes: Mapping[Slot, Array]) -> None:
    """Let the pruned model have these arrays from now on."""
    assert _task is not None
    for slot, array in changes.items():
        _task.changes[slot] = _task.flow.change(slot, array)


def _missed(places: Sequence[_Place]) -> float:
    """What is off on held-out rows of all places."""
    return sum(missed(p.wanted[p.held_out], p.current[p.held_out], p.site.bounds) for p in places if p.held_out.any())


def _changes(places: Sequence[_Place], reconstructor: Reconstructor, ridges: Mapping[str, float]) -> dict[Slot, Array]:
    """New arrays for what the places of a visit read."""
    for place in places if trait(reconstructor, "consumers") else ():
        place.parts = [part for part in place.parts if part.operator.lost]
    parts = [part for place in places for part in place.parts]
    keys = list(dict.fromkeys(part.key for part in parts))
    for batch in [keys] if len({part.groups for part in parts}) == 1 else [[key] for key in keys]:
        _solve(_Batch(places, batch), reconstructor, ridges)
    return {slot: array for part in parts for slot, array in part.changes().items()}


def _places(k: int, local: bool, whole: bool) -> list[_Place]:
    """The sites of a visit on their rows; none where one cannot be fitted."""
    assert _task is not None and _dense is not None
    task, dense, flow, visit = _task, _dense, _task.flow, _task.visits[k]
    later = [task.sites[n] for other in task.visits[k:] for n in other.sites]
    pinned = {name for s in later for name in ((*s.needs, *s.reads) if local else s.needs)}
    sites = [task.sites[n] for n in visit.sites]
    if local and any(site.project is not None for site in sites):
        return []
    ahead = _ahead(task) if visit.behind and not local else flow
    found: list[tuple[Site, list[list[Array]], Rows]] = []
    most = max(dense.share, LEAST) // len(sites)
    for n, site in zip(visit.sites, sites, strict=True):
        arrays = _read(None if local else ahead if n in visit.behind else flow, dense, site, pinned, task.keep)
        if arrays is None:
            return []
        first = site.operators[0]
        shapes = [first.layout.shape(array.shape, flow.shape(first.weight)) for array in arrays[0]]
        sampling = dense.sampling.within(math.prod(shapes[0][k] for k in site.axes)).shared(len(sites))
        count = sum(sampling.shares(totals_of(shapes, site.axes)))
        fitting = bisect_right(range(1, count + 1), most, key=partial(takes, site, flow, whole))
        if fitting < min(count, FEW):
            task.large |= {one.value: takes(one, flow, whole, FEW) * len(sites) for one in sites}
            return []
        if fitting < count:
            task.short.add(site.value)
            sampling = replace(sampling, rows=fitting, firm=True)
        rows = Rows(shapes, site.axes, dense.counts, _masks(dense, site, shapes, pinned), sampling)
        found.append((site, arrays, rows))
    places = []
    for site, arrays, rows in found:
        wanted = dense.take(site, rows, task.keep, pinned)
        if site.project is not None:
            wanted = wanted @ site.project.astype(np.float32)
        elif site.kept is not None:
            wanted = wanted[:, site.kept]
        parts = []
        for operator, x in zip(site.operators, arrays, strict=False):
            for axis, positions in operator.left if local or not operator.x else ():
                x = [np.take(array, positions, axis) for array in x]
            parts.append(Part(flow, operator, rows.read(numbers(flow, operator, x), operator.layout)))
        others = [rows.of(value, site.axes) for value in arrays[len(parts) :]]
        others = [other[:, site.kept] for other in others] if local and site.kept is not None else others
        places.append(_Place(site, wanted, total(parts, others), rows.held_out, parts))
    return places


def _ahead(task: _Task) -> Flow:
    """The pruned model, repaired so far, from the start: what it computes behind weights that are yet to change."""
    assert _dense is not None
    flow = _dense.run(task.flow.model, _dense.feeds[: _dense.fitted])
    flow.changed(task.changes)
    return flow


class _Batch:
    """Weights by their keys that are fitted at once, each with the same columns wherever it is read.

    A constant that all places share is an intercept; where places have some of their own, each is a column.
    """

    def __init__(self, places: Sequence[_Place], keys: Sequence[Key]) -> None:
        chosen = [(place, [part for part in place.parts if part.key in keys]) for place in places]
        self.members = [(place, parts) for place, parts in chosen if parts]
        self.first = {part.key: part for _, parts in reversed(self.members) for part in reversed(parts)}
        self.first = {key: self.first[key] for key in keys}
        self.homes = [next((part for part in parts if part.home is not None), None) for _, parts in self.members]
        names = {None if home is None else home.settled for home in self.homes}
        self.intercept = len(names) == 1 and None not in names
        self.constants = [] if self.intercept else sorted(name for name in names if name is not None)
        ends = np.cumsum([part.x.shape[2] for part in self.first.values()]).tolist()
        self.columns = {key: slice(a, b) for key, a, b in zip(keys, [0, *ends], ends, strict=False)}
        self.width: int = ends[-1]
        self.one = FREE * math.sqrt(np.mean([np.mean(np.square(part.x)) for part in self.first.values()]) or 1.0)

    def x(self) -> Array:
        """float32[groups, rows, columns] of all places, one below the other."""
        return _together([self._rows(n) for n in range(len(self.members))], 1)

    def _rows(self, n: int) -> Array:
        (_, parts), home = self.members[n], self.homes[n]
        if not self.constants and [part.key for part in parts] == list(self.first):
            return _together([part.x for part in parts], 2)
        found = np.zeros((*parts[0].x.shape[:2], self.width + len(self.constants)), np.float32)
        for part in parts:
            found[:, :, self.columns[part.key]] += part.x
        if home is not None and self.constants:
            found[:, :, self.width + self.constants.index(home.settled)] = self.one
        return found

    def weight(self) -> Array:
        """float64[groups, columns, outputs]."""
        groups, _, outputs = next(iter(self.first.values())).matrix.shape
        more = [np.zeros((groups, len(self.constants), outputs))] if self.constants else []
        return _together([*(part.effective() for part in self.first.values()), *more], 1)

    def grid(self, outputs: slice) -> Grid:
        """The values that the weights can have, for these outputs."""
        every = zip(*(part.grid(outputs) for part in self.first.values()), strict=True)
        more = [(0, 0), (0, len(self.constants)), (0, 0)]
        return Grid(*(np.pad(_together(arrays, 1), more) for arrays in every))

    def add(self, solution: Solution, outputs: slice) -> None:
        """Change the weights wherever they are read."""
        for part in (part for _, parts in self.members for part in parts):
            columns = self.columns[part.key]
            keep = None if solution.keep is None else solution.keep[:, columns]
            if solution.weight[:, columns].any():
                part.add(solution.weight[:, columns], keep, outputs)

    def shift(self, change: Array, own: Array) -> None:
        """Add float64[outputs] to the shared constant, or float64[constants, outputs] to those of places."""
        for home in filter(None, self.homes):
            moved = change if self.intercept else own[self.constants.index(home.settled)]
            if moved.any():
                home.shift(moved)


def _together(arrays: Sequence[Array], axis: int = 0) -> Array:
    """One array as it is, several behind one another."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis)


def _solve(batch: _Batch, reconstructor: Reconstructor, ridges: Mapping[str, float]) -> None:
    """Fit weights on all places that read them."""
    assert _task is not None and _dense is not None
    task, places, parts = _task, [place for place, _ in batch.members], list(batch.first.values())
    thin = reconstructor if isinstance(reconstructor, Thinning) else None
    runs, stays = _runs(parts, thin) if thin is not None else (None, None)
    value, bounds = places[0].site.value, {place.site.bounds for place in places}
    current = _together([place.current for place in places])
    problem = Problem(
        x=batch.x(),
        weight=batch.weight(),
        wanted=_together([place.wanted for place in places]),
        current=current,
        held_out=_together([place.held_out for place in places]),
        bounds=bounds.pop() if len(bounds) == 1 else (-np.inf, np.inf),
        intercept=batch.intercept,
        ridge=ridges.get(value),
        patch=parts[0].patch if len({part.patch for part in parts}) == 1 and not batch.constants else 1,
        runs=runs,
        stays=stays,
    )
    shift = np.zeros(problem.wanted.shape[1])
    own = np.zeros((len(batch.constants), len(shift)))

    def solved(some: tuple[slice, Problem]) -> Solution | None:
        outputs, piece = some
        try:
            solution = reconstructor.solve(piece)
            if solution is not None and coded:
                solution = on_grid(piece, solution, batch.grid(outputs))
        except np.linalg.LinAlgError:  # what is beyond numbers stays as it is
            return None
        return solution

    coded = any(part.operator.coded for part in parts)
    pieces = [*_by_outputs(problem, _dense.limits.get("most", math.inf) / BOTH)]
    for (outputs, _), solution in zip(pieces, _side_by_side(solved, pieces, 1 if coded else BOTH), strict=True):
        if solution is None:
            continue
        task.ridges[value] = solution.ridge
        task.rows[value] = problem.x.shape[1], problem.x.shape[2]
        current[:, outputs] += solution.predict(problem.x)
        shift[outputs] = solution.shift
        for row, constant in zip(own, np.moveaxis(solution.weight[:, batch.width :], 1, 0), strict=True):
            row[outputs] = batch.one * constant.reshape(-1)
        batch.add(solution, outputs)
    batch.shift(shift, own)
    start = 0
    for place in places:
        place.current = current[start : start + len(place.current)]
        start += len(place.current)


def _side_by_side(function: Callable[[T], S], items: Sequence[T], most: int) -> Iterator[S]:
    """What becomes of each, in order; so many are worked on at once."""
    if min(len(items), most) == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(most) as pool:
        for k in range(0, len(items), most):
            yield from pool.map(function, items[k : k + most])


def _read(
    flow: Flow | None, dense: _Dense, site: Site, pinned: Collection[str], keep: bool
) -> list[list[Array]] | None:
    """Arrays of what each operator of a site reads, and of its rest; None where the dense model does not know one.

    Without a flow they are those of the dense model, where some positions have yet to go.
    """
    if flow is None:
        return dense.values([*(operator.source for operator in site.operators), *site.rest], pinned, keep)
    theirs = [operator.source for operator in site.operators if not operator.x]
    states = dense.values(theirs, pinned, keep) if theirs else []
    names = [operator.x for operator in site.operators if operator.x]
    mine = iter([found[: dense.fitted] for found in flow.values([*names, *site.rest])])
    known = iter(states or ())
    return [next(mine if operator.x else known) for operator in site.operators] + list(mine)


def _masks(dense: _Dense, site: Site, shapes: Sequence[Shape], pinned: Collection[str]) -> Sequence[Array | None]:
    """For each feed what is zero where a row is padding, or lies behind the end of its sequence."""
    padding = dense.sampling.padding
    masks = [feed.get(padding) if padding else None for feed in dense.feeds[: dense.fitted]]
    lengths = dense.values([site.lengths], pinned) if site.lengths else None
    if lengths is None:
        return masks
    found = []
    for shape, mask, ends in zip(shapes, masks, lengths[0], strict=True):
        inside = np.arange(shape[1]) < ends.reshape(-1, 1)
        found.append(inside & (mask != 0) if mask is not None and mask.shape == inside.shape else inside)
    return found


def _by_outputs(problem: Problem, most: float) -> Iterator[tuple[slice, Problem]]:
    """A problem in parts of some outputs each, if its weight takes more than `most` bytes; outputs are independent."""
    _, columns, outputs = problem.weight.shape
    step = outputs if most >= 8 * columns * outputs else max(1, int(most // (8 * columns)))
    if step == outputs or len(problem.weight) > 1 or problem.runs is not None:
        yield slice(None), problem
        return
    for start in range(0, outputs, step):
        some = slice(start, start + step)
        weight, wanted, current = problem.weight[:, :, some], problem.wanted[:, some], problem.current[:, some]
        yield some, replace(problem, weight=weight, wanted=wanted, current=current)


def _runs(parts: Sequence[Part], thin: Thinning) -> tuple[Positions | None, Mask | None]:
    """(int64[runs, m], bool[columns, outputs] that must stay) of the columns of all parts side by side."""
    if not any(part.operator.weight in thin.slots for part in parts):
        return None, None
    found = []
    stays = np.zeros((sum(part.x.shape[2] for part in parts), parts[0].outputs), np.bool_)
    start = 0
    for part in parts:
        if part.operator.weight in thin.slots:
            columns, outputs = thin.slots[part.operator.weight]
            stays[start + columns, outputs] = True
            found.append(start + part.runs(thin.m))
        start += part.x.shape[2]
    return np.concatenate(found), stays


def _received(sent: str | Packed) -> Model:
    """In the child: the model again."""
    return read_model(sent)[0] if isinstance(sent, str) else unpacked(sent)
