"""Rules -> relations: every node's answer in axis notation, with axes numbered and their ties, takes and freezes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from onnxprune import ops
from onnxprune.errors import MachineError
from onnxprune.indexing import numbered
from onnxprune.types import Axis, Freeze, Named, Numbers, OpNode, Pattern, Positions, Shape, Take, View, Virtual

Token = str | tuple[str, ...]
MOST = 1 << 26  # positions of all axes together: a few arrays of this length must fit in memory
RENUMBERED = frozenset({"Gather.1", "Equal.0", "Equal.1"})  # tables of numbers that follow the survivors


@lru_cache(maxsize=4096)
def parse(text: str) -> tuple[tuple[tuple[Token, ...], ...], tuple[tuple[Token, ...], ...]]:
    """Axis notation -> tokens of each input and of each output; a composite axis is a tuple of letters."""
    left, right = text.split("->")
    return _operands(left), _operands(right)


def _operands(side: str) -> tuple[tuple[Token, ...], ...]:
    found = []
    for part in side.split(","):
        tokens: list[Token] = []
        for composite, single in re.findall(r"\(([^)]*)\)|(\S+)", part):
            tokens.append(tuple(composite.split()) if composite else single)
        found.append(tuple(tokens))
    return tuple(found)


@dataclass(frozen=True)
class Composite:
    """One axis that is an ordered product of atoms: (axis of the atom, its size, steps between its positions)."""

    axis: int
    atoms: tuple[tuple[int, int, int], ...]


class Mixing(NamedTuple):
    """An axis along which a node, by its first output, lets positions see each other; and how to say so."""

    axis: int
    node: str
    text: str


class Pick(NamedTuple):
    """One position of an axis that is a value by itself: taken out, or stacked there; and how to say so."""

    value: str
    axis: int
    position: int
    text: str


def too_many(axis: Axis, size: int, total: float) -> MachineError:
    """The error for axes of which the positions do not fit into memory."""
    text = f"an axis of {size:,} positions; {total:,.0f} in all are too many to tell apart"
    return MachineError(text, object=str(axis))


class Relations:
    """Everything that the rules said, with axes numbered; axes of size one carry nothing and have no number.

    Graph inputs and outputs stay as they are, but for `caches`, pairs of an input and an output.
    """

    def __init__(self, view: View, caches: Sequence[tuple[str, str]] = ()) -> None:
        self.view = view
        self.shapes: dict[str, Shape] = dict(view.shapes)
        self.axes: list[Axis] = []
        self.sizes: list[int] = []
        self.number: dict[Axis, int] = {}
        self.ties: list[tuple[int, int]] = []
        self.composites: list[Composite] = []
        self.takes: list[tuple[int, int, Positions]] = []
        self.taken = 0
        self.picks: list[Pick] = []
        self.freezes: list[tuple[int, Positions | None, str]] = []
        self.mixing: list[Mixing] = []
        self.batch: dict[int, bool] = {}
        self.multiplied: set[int] = set()
        self.avoid: set[int] = set()
        self.least: dict[int, int] = {}
        self.numbers: list[tuple[OpNode, Numbers | Named]] = []
        self.counted: dict[str, Axis] = {}
        self.edges: list[tuple[int, int, str]] = []
        self.unknown: dict[str, str] = {}
        for value, shape in self.shapes.items():
            for index, size in enumerate(shape):
                if size > 1:
                    self.add(Axis(value, index), size)
        if self.sizes and (longest := max(self.sizes)) > MOST:
            raise too_many(self.axes[self.sizes.index(longest)], longest, longest)
        free = self.narrowing(caches)
        for name in view.outputs:
            self.freeze(name, None, "graph output", free=free)
        for name in view.inputs:
            self.freeze(name, None, "graph input", free=free)
        for name, stored in view.stored.items():
            if stored.role == "index" and "INT" in stored.dtype and stored.slot not in RENUMBERED:
                self.freeze(name, None, "an integer table numbers these positions")
        for node in view.nodes:
            self.relate(node)
        self.follow_numbers()

    def add(self, axis: Axis, size: int) -> int:
        """Number an axis."""
        self.number[axis] = len(self.axes)
        self.axes.append(axis)
        self.sizes.append(size)
        return self.number[axis]

    def axes_of(self, value: str) -> list[int]:
        """Numbers of the axes of a value that carry anything."""
        rank = len(self.shapes.get(value, ()))
        return [self.number[a] for k in range(rank) if (a := Axis(value, k)) in self.number]

    def narrowing(self, caches: Sequence[tuple[str, str]]) -> set[int]:
        """Axes that a cache has going in and coming out: tied, they may lose positions together."""
        found: set[int] = set()
        for given, made in caches:
            for a in self.axes_of(given):
                b = self.number.get(Axis(made, self.axes[a].index))
                if b is not None and self.sizes[a] == self.sizes[b]:
                    self.tie([a, b], f"a cache, '{given}' and '{made}'")
                    found |= {a, b}
        return found

    def freeze(
        self,
        value: str,
        axis: int | None,
        reason: str,
        positions: Positions | None = None,
        free: Collection[int] = (),
    ) -> None:
        """Record that positions of a value's axis (None: of all axes but `free` ones) stay."""
        for number in self.axes_of(value):
            if (axis is None or self.axes[number].index == axis) and number not in free:
                self.freezes.append((number, positions, reason))

    def relate(self, node: OpNode) -> None:
        """Apply a node's rule; freeze what it does not mention."""
        inner = [name for body in node.bodies.values() for name in (*body.inputs, *body.outputs)]
        operands = [name for name in (*node.inputs, *node.outputs, *inner) if name]
        unknown = [name for name in operands if name not in self.shapes]
        try:
            answer = ops.relations(node)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # attributes that contradict the shapes
            answer = f"{node.op_type}: its attributes and shapes do not go together ({type(error).__name__})"
        if unknown and not node.bodies and not isinstance(answer, str):
            answer = f"{node.op_type}: the shape of '{unknown[0].split(chr(0))[0]}' is not known"
        label = f"{node.op_type} {node.name}".strip()
        if isinstance(answer, str):
            self.unknown[node.name or node.outputs[0]] = answer
            for name in operands:
                self.freeze(name, None, answer)
            return
        mentioned: set[int] = set()
        for relation in answer:
            match relation:
                case Virtual():
                    self.shapes[relation.name] = relation.shape
                    for index, size in enumerate(relation.shape):
                        if size > 1:
                            self.add(Axis(relation.name, index), size)
                case Pattern():
                    mentioned |= self.pattern(node, relation, label)
                case Take():
                    mentioned |= self.take(relation, label)
                case Numbers():
                    self.numbers.append((node, relation))
                    if (picked := self.number.get(Axis(relation.whole, relation.axis))) is not None:
                        mentioned.add(picked)
                case Named():
                    self.numbers.append((node, relation))
                case Freeze():
                    self.freeze(relation.value, relation.axis, relation.reason, relation.positions)
                    mentioned |= {
                        n for n in self.axes_of(relation.value) if relation.axis in (None, self.axes[n].index)
                    }
        for name in operands:
            for number in self.axes_of(name):
                if number not in mentioned:
                    self.freezes.append((number, None, f"{node.op_type} says nothing about this axis"))

    def follow_numbers(self) -> None:
        """Tie the axes that the same numbers speak of, or freeze them where the numbers may not change."""
        for found in numbered(self.view, self.numbers):
            axes = [number for axis in found.axes if (number := self.number.get(axis)) is not None]
            ends = [Axis(said.value, said.axis) for said in found.named if said.axis is not None] if axes else []
            names = [self.number[axis] for axis in ends if axis in self.number]
            wide = any((said.positions % self.sizes[n] != said.positions).any() for n in axes for said in found.named)
            if found.reasons or wide:
                why = found.reasons[0] if found.reasons else "and compared with others"
                reason = f"its positions are picked by number, {why}"
                self.freezes += [(number, None, reason) for number in (*axes, *names)]
                continue
            self.tie(axes, "positions by number")
            for said in found.named if axes else ():
                named = Take(said.value, said.axis, *self.axes[axes[0]], said.positions)
                self.take(named, "positions by number")
            self.counted |= dict.fromkeys(found.values, self.axes[axes[0]]) if axes else {}
            for number in axes:  # a table of weights from which rows are fetched by choice holds experts
                stored = self.view.stored.get(self.axes[number].value)
                if found.chosen and stored is not None and len(stored.shape) > 2:
                    self.batch[number] = True

    def take(self, take: Take, label: str) -> set[int]:
        """Link positions of a piece with those of the whole."""
        piece = None if take.piece_axis is None else self.number.get(Axis(take.piece, take.piece_axis))
        whole = self.number.get(Axis(take.whole, take.whole_axis))
        if piece is None and whole is None:
            return set()
        if whole is None:  # the only position of an axis, several times
            assert piece is not None
            self.freezes.append((piece, None, f"{label}: the only position of an axis"))
            return {piece}
        if piece is None:
            if len(take.positions):
                self.picks.append(Pick(take.piece, whole, int(take.positions[0]), f"{label}: a position by itself"))
            return {whole}
        self.taken += len(take.positions)
        if self.taken > MOST:
            raise too_many(self.axes[whole], self.sizes[whole], self.taken)
        self.takes.append((piece, whole, take.positions))
        self.edges.append((piece, whole, label))
        return {piece, whole}

    def pattern(self, node: OpNode, pattern: Pattern, label: str) -> set[int]:
        """Expand axis notation to ties, composites, freezes and mixing marks."""
        left, right = parse(pattern.text)
        inputs = pattern.operands[: len(left)] if pattern.operands else node.inputs
        outputs = pattern.operands[len(left) :] if pattern.operands else node.outputs
        pairs = [(name, tokens) for name, tokens in zip(inputs, left, strict=False) if name]
        pairs += [(name, tokens) for name, tokens in zip(outputs, right, strict=False) if name]
        mentioned: set[int] = set()
        letters: dict[str, list[int]] = defaultdict(list)
        products: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for name, tokens in pairs:
            shape = self.shapes.get(name)
            if shape is None:
                continue
            for index, token in _spread(tokens, shape):
                number = self.number.get(Axis(name, index))
                if number is None:
                    continue
                mentioned.add(number)
                if isinstance(token, tuple):
                    names = tuple(a for a in token if pattern.sizes[a] > 1)
                    (letters[names[0]] if len(names) == 1 else products[names]).append(number)
                elif token == "*":
                    kernel = name in self.view.stored
                    self.freezes.append((number, None, "" if kernel else f"kept whole by {node.op_type}"))
                elif token == "!":
                    self.freezes.append((number, None, f"fixed by {node.op_type}"))
                elif token != "_":
                    letters[token].append(number)
        for numbers in letters.values():
            self.tie(numbers, label)
        for names, numbers in products.items():
            self.tie(numbers, label)
            self.compose(node, names, pattern, letters, numbers[0], label)
        for letter, numbers in letters.items():
            dots = letter.startswith("...")
            if pattern.batch:
                self.multiplied.add(numbers[0])
            if letter in pattern.mixes:
                text = f"{label} over {self.axes[numbers[0]]}"
                self.mixing.append(Mixing(numbers[0], node.outputs[0], text))
            if letter in pattern.batch or (dots and "..." in pattern.batch):
                stored = [self.view.stored.get(self.axes[number].value) for number in numbers]
                self.batch[numbers[0]] = any(item is not None and item.role == "weight" for item in stored)
            if letter in pattern.avoid:
                self.avoid.add(numbers[0])
            if letter in pattern.least:
                self.least[numbers[0]] = max(pattern.least[letter], self.least.get(numbers[0], 1))
            if letter in pattern.fixed:
                self.freezes.append((numbers[0], None, f"kept whole by {node.op_type}"))
        return mentioned

    def compose(
        self,
        node: OpNode,
        names: tuple[str, ...],
        pattern: Pattern,
        letters: dict[str, list[int]],
        axis: int,
        label: str,
    ) -> None:
        """Record a composite axis; atoms that no axis shows alone get an axis of their own."""
        atoms: list[tuple[int, int, int]] = []
        step = 1
        for name in reversed(names):
            size = pattern.sizes[name]
            if not letters.get(name):
                letters[name].append(self.add(Axis(f"{node.outputs[0]}#{name}", 0), size))
            atom = letters[name][0]
            atoms.insert(0, (atom, size, step))
            self.edges.append((axis, atom, label))
            step *= size
        if step != self.sizes[axis]:
            self.freezes.append((axis, None, f"{label}: sizes do not match"))
            return
        self.composites.append(Composite(axis, tuple(atoms)))

    def tie(self, numbers: Sequence[int], label: str) -> None:
        """The same dimension: position i with position i."""
        for number in numbers[1:]:
            if self.sizes[number] != self.sizes[numbers[0]]:
                for k in (number, numbers[0]):
                    self.freezes.append((k, None, f"{label}: sizes do not match"))
            else:
                self.ties.append((numbers[0], number))
                self.edges.append((numbers[0], number, label))


def _spread(tokens: tuple[Token, ...], shape: Shape) -> Iterable[tuple[int, Token]]:
    """(axis, token), with `*` and `...` spread over the axes that are left; broadcast axes count from the right."""
    rest = next((k for k, token in enumerate(tokens) if token in ("*", "...")), None)
    if rest is None:
        return enumerate(tokens[: len(shape)])
    width = len(shape) - len(tokens) + 1
    dots = tokens[rest] == "..."
    middle: list[Token] = [f"...{width - k}" if dots else "*" for k in range(width)]
    return enumerate([*tokens[:rest], *middle, *tokens[rest + 1 :]])
