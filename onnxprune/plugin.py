"""What a pass is: a criterion scores the units of a group, an allocator says in which order units go.

Both are frozen dataclasses whose fields are their options and whose docstring's first line is their help. They are
found by entry point, so a package of yours can bring its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from onnxprune.errors import InputError
from onnxprune.types import Array, Group, Member

Feeds = Sequence[Mapping[str, Array]]


class Weights:
    """Initializers as float64, dequantised by nothing but their own values; each is read when first asked for."""

    def __init__(self, read: Callable[[str], Array]) -> None:
        self._read = lru_cache(maxsize=8)(read)

    def array(self, initializer: str) -> Array:
        """The whole initializer, float64."""
        return self._read(initializer)

    def power(self, member: Member, order: int) -> Array:
        """float64[positions of the member]: sum of |w| to the power `order` over each position's slice."""
        slices = np.moveaxis(self.array(member.initializer), member.axis, 0)[member.positions]
        return np.asarray((np.abs(slices.reshape(len(slices), -1)) ** order).sum(axis=1))

    def per_unit(self, member: Member, order: int, units: int) -> Array:
        """float64[units]: the same, summed over all positions of a unit."""
        return np.bincount(member.units, self.power(member, order), units)


@dataclass(frozen=True)
class Reader:
    """A linear operator that reads a group: it sums x W over columns, of which each unit owns as many.

    weight float64[columns, outputs]; columns int64[units, of each unit]; moments float64[columns, columns]: the mean of
    x x^T over the calibration data, of the centred x where `intercept` says that a constant costs nothing.
    """

    node: str
    weight: Array
    columns: Array
    moments: Array
    intercept: bool

    def energy(self) -> float:
        """The operator's mean squared output, summed over its outputs."""
        return float(np.einsum("io,ij,jo->", self.weight, self.moments, self.weight, optimize=True))


class Evidence:
    """What criteria may look at: weights and a seed; readers and their inputs where there is calibration data."""

    def __init__(
        self, weights: Weights, seed: int = 0, readers: Callable[[Group], Sequence[Reader]] | None = None
    ) -> None:
        self.weights, self.seed, self._readers = weights, seed, readers

    @property
    def calibrated(self) -> bool:
        """Whether there is calibration data."""
        return self._readers is not None

    def readers(self, group: Group) -> Sequence[Reader]:
        """The linear operators that read a group; none without calibration data."""
        return self._readers(group) if self._readers is not None else ()


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
    """What more or less of may go, a group or a branch: `table[r]` units really go where r are to go."""

    kind: str
    table: Array

    @property
    def most(self) -> int:
        """How many units can go."""
        return int(self.table[-1])


@dataclass(frozen=True)
class Search:
    """Find how far to turn each knob: `cost` of a state (units gone, by knob) is at most 1 where every target is met.

    `damage` measures states: the divergence of the outputs from the dense model's, after repair, on samples that the
    repair does not see. What it costs is one repair each.
    """

    knobs: tuple[Knob, ...]
    cost: Callable[[Sequence[int]], float]
    damage: Callable[[Sequence[Sequence[int]]], Array]


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
    `bounds`. With `intercept` a constant may be added as well. `ridge` is a damping that was found before.
    """

    x: Array
    weight: Array
    wanted: Array
    current: Array
    held_out: Array
    bounds: tuple[float, float]
    intercept: bool
    ridge: float | None = None


@dataclass(frozen=True)
class Solution:
    """What is added: weight float64[groups, columns, outputs], shift float64[groups * outputs]; the damping taken."""

    weight: Array
    shift: Array
    ridge: float

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


KINDS = {"criteria": "criterion", "allocators": "allocator", "reconstructors": "reconstructor"}


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
