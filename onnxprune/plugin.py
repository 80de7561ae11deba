"""What a pass is: a criterion scores the units of a group, an allocator says in which order units go.

Both are frozen dataclasses whose fields are their options and whose docstring's first line is their help. They are
found by entry point, so a package of yours can bring its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from onnxprune.errors import InputError
from onnxprune.types import Array, Group, Member


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


@runtime_checkable
class Criterion(Protocol):
    """Scores units: `importance` answers float64[units], higher stays, or None where it has nothing to go by."""

    missing: ClassVar[str]

    def importance(self, group: Group, weights: Weights, seed: int) -> Array | None:
        """One number for each unit of a group, comparable between groups."""
        ...


@runtime_checkable
class Allocator(Protocol):
    """Orders units: `priority` answers float64[units] for each group, lower goes first."""

    floor: float

    def priority(self, importance: Sequence[Array], cost: Sequence[Array]) -> list[Array]:
        """`cost` is float64[units] for each group: what a unit costs, in the target's unit, as a share of the model."""
        ...


KINDS = {"criteria": "criterion", "allocators": "allocator"}


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
