"""The nouns: frozen dataclasses without behaviour beyond looking things up in themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Positions = NDArray[np.int64]
Mask = NDArray[np.bool_]
Shape = tuple[int, ...]


class Progress(Protocol):
    """Told what a run is at, and how much of that is done where it can be counted."""

    def __call__(self, stage: str, done: int = 0, total: int = 0, /) -> None:
        """`total` is 0 where nobody knows."""


def quietly(stage: str, done: int = 0, total: int = 0, /) -> None:
    """A Progress that nobody watches."""


class Axis(NamedTuple):
    """One axis of one value: what gets coupled."""

    value: str
    index: int  # type: ignore[assignment]  # tuple.index is never wanted here

    def __str__(self) -> str:
        return f"{self.value}:{self.index}"


class Profile(NamedTuple):
    """Shapes of a graph input that an engine is built for: the smallest, the one to be fast at, the largest."""

    least: Shape
    usual: Shape
    most: Shape


class Signature(NamedTuple):
    """An operator's types: variable or type of each input and output, the last one repeats; what variables allow."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    allowed: Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Body:
    """A graph inside a node: its name, and its inputs and outputs, which the node's rule relates to its own."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class OpNode:
    """One node as a rule sees it. `shapes` are concrete: dynamic sizes stand at the probe's values.

    `consts` are whole values; `partly` are computed ones of which some elements are masked, as they follow a dynamic
    size. `bodies` are the graphs inside it by attribute, `within` names the body that it stands in itself.
    """

    name: str
    op_type: str
    domain: str
    opset: int
    attrs: Mapping[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: Mapping[str, Shape]
    consts: Mapping[str, Array]
    partly: Mapping[str, np.ma.MaskedArray[Any, Any]] = field(default_factory=dict)
    bodies: Mapping[str, Body] = field(default_factory=dict)
    within: str = ""

    def attr(self, name: str, default: Any = None) -> Any:
        """The attribute as a Python value, or `default`."""
        return self.attrs.get(name, default)

    def has(self, k: int) -> bool:
        """Whether input `k` is connected."""
        return k < len(self.inputs) and bool(self.inputs[k])

    def shape(self, k: int = 0) -> Shape:
        """Shape of input `k`; KeyError if it is unknown."""
        return self.shapes[self.inputs[k]]

    def out_shape(self, k: int = 0) -> Shape:
        """Shape of output `k`; KeyError if it is unknown."""
        return self.shapes[self.outputs[k]]

    def const(self, k: int) -> Array | None:
        """The value of input `k` where it is the same for every feed of the model, else None."""
        return self.consts.get(self.inputs[k]) if self.has(k) else None

    def known(self, k: int) -> np.ma.MaskedArray[Any, Any] | None:
        """The value of input `k` with what follows a dynamic size masked, or None if nothing is known of it."""
        value = self.const(k)
        return np.ma.array(value) if value is not None else self.partly.get(self.inputs[k]) if self.has(k) else None


# What a rule answers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pattern:
    """How the axes of one node share dimensions, in axis notation.

    The same letter is the same dimension; `(g o)` is a composite axis, outer atom first; `*` is every axis that is
    left, kept whole; `...` are broadcast axes; `_` is an axis of which nothing is said here, `!` one that is frozen.
    A letter that is missing on the right is summed over. Parts for absent optional inputs are skipped. Positions of
    letters in `mixes` see each other, `batch` letters count independent products (heads, experts), those in `avoid` are
    cut only where nothing else is free, those in `fixed` never; of those in `least` so many stay. `operands` are the
    values that the parts speak of, if they are not the node's inputs and outputs.
    """

    text: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    mixes: tuple[str, ...] = ()
    batch: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    operands: tuple[str, ...] = ()
    least: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Virtual:
    """A value that no file holds, of use to say what an operator does inside: one piece of a packed input."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Take:
    """`piece` is `positions` of `whole`, in order, along axis `piece_axis` and `whole_axis`.

    `piece_axis` None: the piece is one position, and has no such axis.
    """

    piece: str
    piece_axis: int | None
    whole: str
    whole_axis: int
    positions: Positions


@dataclass(frozen=True)
class Freeze:
    """These positions of an axis may not go (`positions` None: the whole axis; `axis` None: every axis)."""

    value: str
    axis: int | None
    reason: str
    positions: Positions | None = None


@dataclass(frozen=True)
class Numbers:
    """The elements of `value` are positions of `axis` of `whole`, by number."""

    value: str
    whole: str
    axis: int


@dataclass(frozen=True)
class Named:
    """`value`, or each position along `axis` of it, speaks of those `positions` that `numbers` count."""

    value: str
    axis: int | None
    numbers: str
    positions: Positions


Relation = Pattern | Take | Freeze | Virtual | Numbers | Named


# What coupling gives -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """Where the units of a group live in one initializer axis: position `positions[i]` belongs to unit `units[i]`.

    `value` is the initializer as coupling names it, `initializer` as the file does; `readers` are (first output of
    the node, input index) of those that see this slice, all of them unless `shared`. `slot` is the first reader's
    operator and input, as in `BatchNormalization.1`.
    """

    value: str
    initializer: str
    readers: tuple[tuple[str, int], ...]
    shared: bool
    axis: int
    positions: Positions
    units: Positions
    role: str
    slot: str


@dataclass(frozen=True)
class Group:
    """Units that touch the same axes; `units` are their labels.

    `unit_positions` is how many positions one unit has on each axis that it touches (distinct counts, ascending);
    at least `least` units stay.
    """

    id: int
    kind: str
    units: Positions
    members: tuple[Member, ...]
    mixing: tuple[str, ...]
    unit_positions: tuple[int, ...]
    nodes: tuple[str, ...]
    least: int = 1

    @property
    def exact(self) -> bool:
        """Removal is proven by zeroing: no position of these axes sees another."""
        return not self.mixing

    def slices(self) -> Array:
        """int64[units]: how many positions of weights and norms each unit owns."""
        found = np.zeros(len(self.units), np.int64)
        for member in self.members:
            if member.role in ("weight", "norm"):
                found += np.bincount(member.units, minlength=len(found))
        return found


@dataclass(frozen=True)
class Frozen:
    """An initializer axis that stays, why, and how many parameters that initializer has."""

    axis: Axis
    reason: str
    parameters: int


class Side(NamedTuple):
    """Input `operand` of node `sum`, `value`, if what leads to it serves nothing else.

    `root` is the node whose operands all are, in the end: the last one of a chain of sums, or a stack. Nodes count
    without those of bodies.
    """

    root: int
    sum: int
    operand: int
    value: str


@dataclass(frozen=True)
class Branch:
    """What is added to a stream: input `operand` of node `sum`, `value`, and the `nodes` that serve nothing else.

    Branches with the same `stream` follow one another; `inputs` and `outputs` are those of the graph that lie inside.
    """

    sum: int
    operand: int
    value: str
    nodes: Positions
    stream: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What stays: a keep mask over the units of each group (True stays); the units of `layers` are branches."""

    keep: Mapping[int, Mask]


# What a model looks like to coupling -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """An initializer as some of its readers see it; exporters merge equal tensors, and storage is not coupling.

    `uses` (first output of the node, input index) names the readers when they are not all of them.
    """

    initializer: str
    shape: Shape
    dtype: str
    role: str
    slot: str
    uses: tuple[tuple[str, int], ...]
    shared: bool


@dataclass(frozen=True)
class View:
    """A model as coupling sees it: nodes in topological order, concrete shapes, what is stored, what is fixed.

    Nodes inside the bodies of a node come before it.
    """

    nodes: tuple[OpNode, ...]
    shapes: Mapping[str, Shape]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    stored: Mapping[str, Stored]
    dynamic: frozenset[Axis]
