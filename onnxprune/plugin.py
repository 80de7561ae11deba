"""What a pass is: a criterion scores the units of a group, an allocator says which units go, a reconstructor repairs.

A sparsifier says which weights of every few stay (N:M), in which order they are put best, or which must stay. All are
frozen dataclasses whose fields are their options and whose docstring's first line is their help. They are found by
entry point, so a package of yours can bring its own. What a pass needs it says in class variables, of which TRAITS has
the defaults.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from onnxprune.errors import InputError
from onnxprune.types import Array, Group, Mask, Member, Positions

Feeds = Sequence[Mapping[str, Array]]
Levels = Mapping[int, Array]  # {group id: float64[units]}: how much of each unit is left, 1 all of it, 0 nothing
TRAITS: Mapping[str, Any] = {
    "calibrated": False,  # a criterion or sparsifier that is nothing without calibration data
    "kinds": (),  # the kinds of groups that a criterion scores, all of them where it is empty; others get the default
    "measures": True,  # a searcher that asks for `damage`, for which there must be calibration data and a repair
    "dense": False,  # a reconstructor that sees what the dense model feeds a site, not what the pruned one does
    "consumers": False,  # one that fits only operators that lost columns
    "synthetic": False,  # one that makes do with random inputs
    "masked": False,  # one that fits only the weights that `keep` leaves it
    "subspaces": False,  # one that fits producers and consumers, so that it can start from a change of basis
    "ln2rms": 0,  # one that lets LayerNorms over a width that it turns become norms by root mean square
}


def trait(one: object, name: str) -> Any:
    """What a pass says about itself, see TRAITS."""
    return getattr(one, name, TRAITS[name])


class Weights:
    """Initializers as float64, quantised ones by the values they stand for; each is read when first asked for.

    `blocks` has what is better not held in memory as a whole, a few rows at a time.
    """

    def __init__(
        self, read: Callable[[str], Array], blocks: Callable[[str], Iterator[Array] | None] = lambda name: None
    ) -> None:
        self._read, self._blocks = lru_cache(maxsize=8)(read), blocks
        self._large = read

    def array(self, initializer: str) -> Array:
        """The whole initializer, float64."""
        return self._read(initializer) if self._blocks(initializer) is None else self._large(initializer)

    def power(self, member: Member, order: int) -> Array:
        """float64[positions of the member]: sum of |w| to the power `order` over each position's slice."""
        if (blocks := self._blocks(member.initializer)) is not None:
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # reading takes as long as adding up
                rows = list(pool.map(lambda block: _sums(block, member.axis, order), blocks))
            return (np.sum(rows, axis=0) if member.axis else np.concatenate(rows))[member.positions]
        slices = np.moveaxis(self.array(member.initializer), member.axis, 0)[member.positions]
        return np.asarray((np.abs(slices.reshape(len(slices), -1)) ** order).sum(axis=1))

    def per_unit(self, member: Member, order: int, units: int) -> Array:
        """float64[units]: the same, summed over all positions of a unit."""
        return np.bincount(member.units, self.power(member, order), units)


def _sums(block: Array, axis: int, order: int) -> Array:
    """float64[positions of an axis]: sum of |w| to a power, in a type that holds the powers of half floats exactly."""
    wide = _magnitudes(block)
    powers = wide if order == 1 else np.square(wide, out=wide) if order == 2 else np.power(wide, order, out=wide)
    return np.asarray(powers.sum(axis=tuple(k for k in range(block.ndim) if k != axis), dtype=np.float64))


def _magnitudes(block: Array) -> Array:
    """|w| as float32 of two bytes each, else as float64; NumPy converts half floats one by one."""
    if block.dtype == np.float16:
        bits = block.view(np.uint16) & np.uint16(0x7FFF)
        if bits.max(initial=0) < INFINITE:  # the same digits under an exponent that is 112 less
            moved = bits.astype(np.uint32)
            moved <<= 13
            wide = moved.view(np.float32)
            wide *= np.float32(2.0**112)
            return wide
    wide = block.astype(np.float32 if block.dtype.itemsize <= 2 else np.float64)
    return np.abs(wide, out=wide)


INFINITE = 0x7C00  # bits of infinity as a half float; NaN has more


class Columns(Protocol):
    """Statistics of columns."""

    @property
    def count(self) -> int:
        """Rows."""
        ...

    @property
    def mean(self) -> Array:
        """float64[columns]."""
        ...

    @property
    def variance(self) -> Array:
        """float64[columns], divided by count - 1."""
        ...

    @property
    def l1(self) -> Array:
        """float64[columns]: the sum of |x|."""
        ...


@dataclass(frozen=True)
class Reader:
    """A linear operator that reads a group: it sums x W over columns, of which each unit owns as many.

    weight float64[columns, outputs], read anew each time, of this `shape`; columns int64[units, of each unit].
    `intercept` says that a constant costs nothing. What calibration data says of x is gathered when it is first asked
    for: `profile` gives statistics of each column, `second` the mean float64[columns] and the means of x x^T
    float64[columns, columns] over the same rows, `sample` so many rows themselves, float32[rows, columns].
    """

    node: str
    read: Callable[[], Array]
    shape: tuple[int, int]
    columns: Array
    intercept: bool
    profile: Callable[[], Columns]
    second: Callable[[], tuple[Array, Array]]
    sample: Callable[[int], Array]

    @property
    def weight(self) -> Array:
        """float64[columns, outputs]."""
        return self.read()

    @cached_property
    def _profile(self) -> Columns:
        return self.profile()

    @property
    def rows(self) -> int:
        """Rows of calibration data."""
        return self._profile.count

    @property
    def size(self) -> Array:
        """float64[columns]: the mean of |x|."""
        return self._profile.l1 / max(self.rows, 1)

    @property
    def variance(self) -> Array:
        """float64[columns], divided by rows - 1."""
        return self._profile.variance

    @property
    def mean_square(self) -> Array:
        """float64[columns]: the mean of x^2."""
        return np.asarray(self.variance * ((self.rows - 1) / max(self.rows, 1)) + self._profile.mean**2)

    @cached_property
    def _second(self) -> tuple[Array, Array]:
        return self.second()

    @property
    def uncentred(self) -> Array:
        """float64[columns, columns]: the means of x x^T."""
        return self._second[1]

    @cached_property
    def moments(self) -> Array:
        """float64[columns, columns]: the means of x x^T, of the centred x where a constant costs nothing."""
        mean, uncentred = self._second
        return uncentred - np.outer(mean, mean) if self.intercept else uncentred

    def energy(self) -> float:
        """The operator's mean squared output, summed over its outputs; without a constant where that costs nothing."""
        with np.errstate(all="ignore"):  # of moments beyond what numbers hold it is none
            return float(np.einsum("io,ij,jo->", self.weight, self.moments, self.weight, optimize=True))

    def of_units(self, values: Array) -> Array:
        """float64[units]: float64[columns] summed over the columns of each unit."""
        return np.asarray(values[self.columns].sum(axis=1))


@dataclass(frozen=True)
class Junction:
    """Where a branch joins its stream, over the same rows for all of them: float32[rows, channels].

    `before` is what the branch is added to, `after` the sum.
    """

    before: Array
    after: Array


@dataclass(frozen=True)
class Router:
    """What chooses among experts: its scores float32[rows, experts], of which each row takes the `top` highest.

    `places` int64[units] are the columns of the units.
    """

    scores: Array
    top: int
    places: Array

    def gates(self) -> Array:
        """float64[rows, units]: what each unit weighs: one for each row in all, zero where it is not taken."""
        scores = self.scores.astype(np.float64)
        if not ((scores >= 0).all() and np.allclose(scores.sum(axis=1), 1, atol=1e-3)):
            scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        taken = np.argsort(-scores, axis=1, kind="stable")[:, : self.top]
        found = np.zeros_like(scores)
        np.put_along_axis(found, taken, np.take_along_axis(scores, taken, axis=1), axis=1)
        return np.asarray((found / np.maximum(found.sum(axis=1, keepdims=True), 1e-30))[:, self.places])


COPIES = 6  # of second moments while something is made of them


class Evidence:
    """What criteria may look at: weights and a seed always, the rest where there is calibration data."""

    def __init__(
        self,
        weights: Weights,
        seed: int = 0,
        readers: Callable[[Group], Sequence[Reader]] | None = None,
        junctions: Callable[[Group], Sequence[Junction]] | None = None,
        router: Callable[[Group], Router | None] | None = None,
        loss: Callable[[Sequence[Levels], str], Array] | None = None,
        memory: float = math.inf,
    ) -> None:
        """`memory` is in bytes: what scoring one group may take."""
        self.weights, self.seed, self.memory = weights, seed, memory
        self._readers, self._junctions, self._router, self._loss = readers, junctions, router, loss

    def affords(self, columns: int) -> bool:
        """Whether second moments of so many columns are to be had, and a few matrices as large."""
        return COPIES * 8 * columns**2 <= self.memory

    @property
    def calibrated(self) -> bool:
        """Whether there is calibration data."""
        return self._readers is not None

    def readers(self, group: Group) -> Sequence[Reader]:
        """The linear operators that read a group; none without calibration data."""
        return self._readers(group) if self._readers is not None else ()

    def junctions(self, group: Group) -> Sequence[Junction]:
        """For each branch of a group of the kind `layers` where it joins; none without calibration data."""
        return self._junctions(group) if self._junctions is not None else ()

    def router(self, group: Group) -> Router | None:
        """What chooses among the units of a group of the kind `experts`, None where that is not found."""
        return self._router(group) if self._router is not None else None

    def loss(self, levels: Sequence[Levels], measure: str = "divergence") -> Array:
        """float64[levels]: how far the outputs are from the dense model's if this much of these units is left.

        `measure` is a name in quality.MEASURES. Nothing is repaired. No number where it cannot be known: units in
        parts (levels besides 0 and 1) only where the operators that read them have float weights.
        """
        return self._loss(levels, measure) if self._loss is not None else np.full(len(levels), np.nan)


@runtime_checkable
class Criterion(Protocol):
    """Scores units: `importance` answers float64[units], higher stays, or None where it has nothing to go by."""

    missing: ClassVar[str]

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """One number for each unit of a group, comparable between groups."""
        ...


@runtime_checkable
class Allocator(Protocol):
    """Orders units: `priority` answers float64[units] for each group, lower goes first."""

    floor: float

    def priority(self, importance: Sequence[Array], cost: Sequence[Array]) -> list[Array]:
        """`cost` is float64[units] for each group: what a unit costs, in the target's unit, as a share of the model."""
        ...


@dataclass(frozen=True)
class Knob:
    """What more or less of may go, a group or a branch: `table[r]` units really go where r are to go.

    `worth[r]` is the importance that r units take with them, the least important first.
    """

    kind: str
    table: Array
    worth: Array

    @property
    def most(self) -> int:
        """How many units can go."""
        return int(self.table[-1])

    @property
    def levels(self) -> list[int]:
        """How many units can go, all possible numbers, ascending."""
        return [int(r) for r in np.unique(self.table)]


@dataclass(frozen=True)
class Search:
    """Find how far to turn each knob: `cost` of a state (units gone, by knob) is at most 1 where every target is met.

    `damage` measures states: the divergence of the outputs from the dense model's, after repair, on samples that the
    repair does not see. What it costs is one repair each; `trials` is how many of these the effort pays for.
    `confirm` is a second opinion on states that were found so, on other samples; what the user should know goes to
    `tell`.
    """

    knobs: tuple[Knob, ...]
    cost: Callable[[Sequence[int]], float]
    damage: Callable[[Sequence[Sequence[int]]], Array]
    trials: float = float("inf")
    confirm: Callable[[Sequence[Sequence[int]]], Array] | None = None
    tell: Callable[[str], None] = lambda text: None


@runtime_checkable
class Searcher(Protocol):
    """An allocator that measures: `search` answers how many units of each knob go."""

    def search(self, problem: Search) -> list[int]:
        """See Search."""
        ...


@dataclass(frozen=True)
class Problem:
    """One site to fit: find a change of the weight with which `current` comes nearest to `wanted`.

    x float32[groups, rows, columns], weight float64[groups, columns, outputs] as it is, wanted and current
    float32[rows, groups * outputs]; `held_out` bool[rows] is not to be fitted to. Readers see only what lies between
    `bounds`. With `intercept` a constant may be added as well. `ridge` is a damping that was found before. `patch`
    columns in a row belong to one channel. `runs` int64[n, m] are columns of each group of which some are to go in each
    output, unless they are in `stays` bool[columns, groups * outputs]; `keep` bool[groups, columns, outputs] are the
    weights that are left.
    """

    x: Array
    weight: Array
    wanted: Array
    current: Array
    held_out: Array
    bounds: tuple[float, float]
    intercept: bool
    ridge: float | None = None
    patch: int = 1
    runs: Positions | None = None
    stays: Mask | None = None
    keep: Mask | None = None


@dataclass(frozen=True)
class Solution:
    """What is added: weight float64[groups, columns, outputs], shift float64[groups * outputs]; the damping taken.

    Afterwards all but `keep` is zero.
    """

    weight: Array
    shift: Array
    ridge: float
    keep: Mask | None = None

    def predict(self, x: Array) -> Array:
        """float32[rows, groups * outputs]: by how much a site changes."""
        product = x @ self.weight.astype(np.float32)
        return np.asarray(product.swapaxes(0, 1).reshape(x.shape[1], -1) + self.shift.astype(np.float32))


@runtime_checkable
class Reconstructor(Protocol):
    """Fits one site at a time: `solve` answers the change, or None where leaving it alone is better."""

    def solve(self, problem: Problem) -> Solution | None:
        """See Problem; called in the child process."""
        ...


@dataclass(frozen=True)
class Runs:
    """A weight of which each output is to keep at most n of every m consecutive columns: `count` runs of them.

    weight float64[columns, outputs]; columns behind the runs stay. With calibration data `size` float64[columns] is the
    root mean square of each column of x, and `moments` float64[columns, columns] are the means of x x^T, centred where
    a constant costs nothing. `stays` bool[columns, outputs] must be kept as they are.
    """

    weight: Array
    n: int
    m: int
    count: int
    stays: Mask
    size: Array | None = None
    moments: Array | None = None

    def keep(self, score: Array) -> Mask:
        """bool[columns, outputs]: the n highest of each run in each output, the first of equals."""
        kept = np.ones(score.shape, np.bool_)
        inside = slice(self.count * self.m)
        kept[inside] = strongest(np.where(self.stays, np.inf, score)[inside], self.n, self.m)
        return kept


def strongest(score: Array, n: int, m: int) -> Mask:
    """bool[columns, outputs]: the n highest of every m consecutive columns in each output, the first of equals."""
    parted = np.nan_to_num(score, nan=-np.inf, posinf=np.inf).reshape(len(score) // m, m, -1)
    kept = np.zeros(parted.shape, np.bool_)
    np.put_along_axis(kept, np.argsort(-parted, axis=1, kind="stable")[:, :n], True, axis=1)
    return kept.reshape(score.shape)


@dataclass(frozen=True)
class Thinned:
    """weight float64[columns, outputs], which is zero but for `keep` bool[columns, outputs]."""

    weight: Array
    keep: Mask


@runtime_checkable
class Sparsifier(Protocol):
    """Chooses what stays of every run, and may change it: `thin` answers the weight that is left."""

    def thin(self, runs: Runs) -> Thinned:
        """See Runs; called in the child process where there is calibration data."""
        ...


@dataclass(frozen=True)
class Seat:
    """What one operator reads of the units of a group: score float64[columns, rows] of all its columns.

    Every m consecutive columns are a run. Unit u has column `places[u]`; columns without a unit stay where they are.
    """

    score: Array
    places: Positions


@runtime_checkable
class Permuter(Protocol):
    """Finds an order of units in which N:M costs less: `order` answers the unit that takes each place."""

    def order(self, seats: Sequence[Seat], n: int, m: int, seed: int) -> Positions:
        """int64[units]: a permutation."""
        ...


@dataclass(frozen=True)
class Peak:
    """The largest |x| of each column that an operator reads, and of each output that it makes."""

    node: str
    inputs: Array
    outputs: Array


@runtime_checkable
class Protector(Protocol):
    """Finds weights that must stay: `protect` answers (node, column, output) of each."""

    def protect(self, peaks: Sequence[Peak]) -> list[tuple[str, int, int]]:
        """See Peak, one for each operator."""
        ...


KINDS = {
    "criteria": "criterion",
    "allocators": "allocator",
    "reconstructors": "reconstructor",
    "sparsifiers": "sparsifier",
}


def available(kind: str) -> dict[str, type[Any]]:
    """{name: class} of the installed criteria or allocators."""
    return {point.name: point.load() for point in sorted(entry_points(group=f"onnxprune.{kind}"), key=lambda p: p.name)}


def build(kind: str, text: str) -> Any:
    """An instance from `NAME[,key=value...]`. Raises InputError for an unknown name, key or value."""
    name, *options = [part.strip() for part in text.split(",")]
    classes = {point.name: point for point in entry_points(group=f"onnxprune.{kind}")}
    if name not in classes:
        raise InputError(f"unknown {KINDS[kind]}; there are {', '.join(sorted(classes))}", object=name)
    cls = classes[name].load()
    known: dict[str, type[Any]] = {f.name: type(f.default) for f in fields(cls)}
    values = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in known:
            raise InputError(f"unknown option; {name} takes {', '.join(known) or 'none'}", object=option)
        try:
            values[key] = known[key](value)
        except ValueError:
            raise InputError(f"{name} needs {known[key].__name__} here", object=option) from None
    try:
        return cls(**values)
    except ValueError as error:
        raise InputError(str(error), object=text) from None


def help_of(cls: type[Any]) -> str:
    """The first line of a pass's docstring."""
    return (cls.__doc__ or "").strip().split("\n")[0]


@dataclass(frozen=True)
class Row:
    """A line of `onnxprune list`."""

    name: str
    help: str
