"""Relations of all nodes -> which positions go together, and which may not go, with the reason.

Identity ties stay at axis level: the axes that they join form a class, and only classes are expanded to positions.
A composite axis leaves one atom free (the cut); which one is decided for all composites that share atoms at once, so
that a channel shuffle frees the same atom on both of its sides. Then one connected-components call labels everything.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import networkx as nx
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from onnxprune import ops
from onnxprune.types import Array, Axis, Freeze, Mask, OpNode, Pattern, Positions, Shape, Take, View

Token = str | tuple[str, ...]


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


class Relations:
    """Everything that the rules said, with axes numbered; axes of size one carry nothing and have no number."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.axes: list[Axis] = []
        self.sizes: list[int] = []
        self.number: dict[Axis, int] = {}
        self.ties: list[tuple[int, int]] = []
        self.composites: list[Composite] = []
        self.takes: list[tuple[int, int, Positions]] = []
        self.freezes: list[tuple[int, Positions | None, str]] = []
        self.mixing: dict[int, list[str]] = defaultdict(list)
        self.batch: dict[int, bool] = {}
        self.avoid: set[int] = set()
        self.edges: list[tuple[int, int, str]] = []
        self.unknown: dict[str, str] = {}
        for value, shape in view.shapes.items():
            for index, size in enumerate(shape):
                if size > 1:
                    self.add(Axis(value, index), size)
        for name in view.outputs:
            self.freeze(name, None, "graph output")
        for name in view.inputs:
            self.freeze(name, None, "graph input")
        for name in sorted(view.captured):
            self.freeze(name, None, "read inside a subgraph")
        for name, stored in view.stored.items():
            if stored.role == "index" and "INT" in stored.dtype and stored.slot != "Gather.1":
                self.freeze(name, None, "an integer table numbers these positions")
        for node in view.nodes:
            self.relate(node)

    def add(self, axis: Axis, size: int) -> int:
        """Number an axis."""
        self.number[axis] = len(self.axes)
        self.axes.append(axis)
        self.sizes.append(size)
        return self.number[axis]

    def axes_of(self, value: str) -> list[int]:
        """Numbers of the axes of a value that carry anything."""
        rank = len(self.view.shapes.get(value, ()))
        return [self.number[a] for k in range(rank) if (a := Axis(value, k)) in self.number]

    def freeze(self, value: str, axis: int | None, reason: str, positions: Positions | None = None) -> None:
        """Record that positions of a value's axis (None: of all axes) stay."""
        for number in self.axes_of(value):
            if axis is None or self.axes[number].index == axis:
                self.freezes.append((number, positions, reason))

    def relate(self, node: OpNode) -> None:
        """Apply a node's rule; freeze what it does not mention."""
        operands = [name for name in (*node.inputs, *node.outputs) if name]
        unknown = [name for name in operands if name not in self.view.shapes]
        answer = ops.relations(node)
        if unknown:
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
                case Pattern():
                    mentioned |= self.pattern(node, relation, label)
                case Take():
                    mentioned |= self.take(relation, label)
                case Freeze():
                    self.freeze(relation.value, relation.axis, relation.reason, relation.positions)
                    mentioned |= {
                        n for n in self.axes_of(relation.value) if relation.axis in (None, self.axes[n].index)
                    }
        for name in operands:
            for number in self.axes_of(name):
                if number not in mentioned:
                    self.freezes.append((number, None, f"{node.op_type} says nothing about this axis"))

    def take(self, take: Take, label: str) -> set[int]:
        """Link positions of a piece with those of the whole."""
        piece = self.number.get(Axis(take.piece, take.piece_axis))
        whole = self.number.get(Axis(take.whole, take.whole_axis))
        if piece is None and whole is None:
            return set()
        if piece is None or whole is None:  # one position of an axis of size one: nothing of it can go
            kept = piece if whole is None else whole
            assert kept is not None
            positions = np.zeros(1, np.int64) if whole is None else take.positions
            self.freezes.append((kept, positions, f"{label}: the only position of an axis"))
            return {kept}
        self.takes.append((piece, whole, take.positions))
        self.edges.append((piece, whole, label))
        return {piece, whole}

    def pattern(self, node: OpNode, pattern: Pattern, label: str) -> set[int]:
        """Expand axis notation to ties, composites, freezes and mixing marks."""
        left, right = parse(pattern.text)
        pairs = [(name, tokens) for name, tokens in zip(node.inputs, left, strict=False) if name]
        pairs += [(name, tokens) for name, tokens in zip(node.outputs, right, strict=False) if name]
        mentioned: set[int] = set()
        letters: dict[str, list[int]] = defaultdict(list)
        products: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for name, tokens in pairs:
            shape = self.view.shapes.get(name)
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
        for letter, numbers in letters.items():
            self.tie(numbers, label)
            dots = letter.startswith("...")
            if letter in pattern.mixes:
                for number in numbers[:1]:
                    self.mixing[number].append(f"{label} over {self.axes[number]}")
            if letter in pattern.batch or (dots and "..." in pattern.batch):
                stored = any(self.axes[number].value in self.view.stored for number in numbers)
                self.batch[numbers[0]] = stored
        for names, numbers in products.items():
            self.tie(numbers, label)
            self.compose(node, names, pattern, letters, numbers[0], label)
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
            if name in pattern.avoid:
                self.avoid.add(atom)
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


@dataclass(frozen=True)
class DimGraph:
    """Positions of every axis with their labels; positions with one label go together or stay together."""

    relations: Relations
    classes: Positions
    offsets: Positions
    labels: Positions
    frozen: Positions
    reasons: tuple[str, ...]
    inner: frozenset[int]

    def labels_of(self, axis: Axis) -> Positions | None:
        """int64[n] labels of an axis's positions; None for an axis of size one, which carries nothing."""
        number = self.relations.number.get(axis)
        if number is None:
            return None
        start = self.offsets[self.classes[number]]
        return self.labels[start : start + self.relations.sizes[number]]

    def reason(self, label: int) -> str | None:
        """Why a label is frozen, or None if it may go."""
        return self.reasons[self.frozen[label]] if self.frozen[label] >= 0 else None

    @cached_property
    def graph(self) -> nx.Graph[Axis]:
        """The dependency graph: axes as nodes, the ops that couple them as edges."""
        graph: nx.Graph[Axis] = nx.Graph()
        axes = self.relations.axes
        graph.add_nodes_from(axes)
        graph.add_edges_from((axes[a], axes[b], {"op": op}) for a, b, op in self.relations.edges)
        return graph

    def explain(self, a: Axis, b: Axis) -> list[tuple[Axis, str, Axis]] | None:
        """The shortest chain of ops between two axes, as (axis, op, axis) steps; None if nothing couples them."""
        if a not in self.graph or b not in self.graph or not nx.has_path(self.graph, a, b):
            return None
        path = nx.shortest_path(self.graph, a, b)
        return [(x, self.graph.edges[x, y]["op"], y) for x, y in itertools.pairwise(path)]

    @cached_property
    def mixing(self) -> dict[int, tuple[str, ...]]:
        """{class: the ops and axes where its positions see each other}."""
        found: dict[int, list[str]] = defaultdict(list)
        for number, texts in self.relations.mixing.items():
            found[int(self.classes[number])] += texts
        return {c: tuple(texts) for c, texts in found.items()}

    @cached_property
    def batch(self) -> dict[int, bool]:
        """{class that is a batch axis of a product of activations: whether a weight is stacked along it}."""
        found: dict[int, bool] = {}
        for number, stored in self.relations.batch.items():
            c = int(self.classes[number])
            found[c] = found.get(c, False) or stored
        return found


def couple(view: View) -> DimGraph:
    """Relate every node, decide the cuts, label all positions."""
    relations = Relations(view)
    sizes = np.array(relations.sizes, np.int64)
    classes, products = _classes(relations)
    composed = {merged for merged, _ in products}
    for axis in sorted(view.dynamic):  # (batch heads) is dynamic because batch is: its heads are not
        number = relations.number.get(axis)
        if number is not None and int(classes[number]) not in composed:
            relations.freezes.append((number, None, "dynamic size"))
    cuts, cut_freezes = _cuts(relations, classes, products)
    count = int(classes.max()) + 1 if len(classes) else 0
    class_sizes = np.zeros(count, np.int64)
    class_sizes[classes] = sizes
    offsets = np.concatenate([[0], np.cumsum(class_sizes)])
    a, b = [], []
    for piece, whole, positions in relations.takes:
        a.append(offsets[classes[piece]] + np.arange(len(positions)))
        b.append(offsets[classes[whole]] + positions)
    for merged, atom, size, step in cuts:
        positions = np.arange(class_sizes[merged])
        a.append(offsets[merged] + positions)
        b.append(offsets[atom] + positions // step % size)
    total = int(offsets[-1])
    labels = _components(total, a, b)
    reasons: dict[str, int] = {}
    frozen = np.full(int(labels.max()) + 1 if total else 0, np.iinfo(np.int64).max)
    seeds = [(int(classes[number]), positions, reason) for number, positions, reason in relations.freezes]
    for c, positions_or_none, reason in [*seeds, *((c, None, reason) for c, reason in cut_freezes)]:
        number = reasons.setdefault(reason, len(reasons))
        at = np.arange(class_sizes[c]) if positions_or_none is None else positions_or_none
        np.minimum.at(frozen, labels[offsets[c] + at], number)
    frozen[frozen == np.iinfo(np.int64).max] = -1
    return DimGraph(
        relations, classes, offsets, labels, frozen, tuple(reasons), _inner(relations, classes, products, cuts)
    )


def _inner(relations: Relations, classes: Positions, products: list[Product], cuts: list[Cut]) -> frozenset[int]:
    """Classes that are cut inside every head: the free atom stands beside one that attention runs along in a batch."""
    batch = {int(classes[number]) for number in relations.batch}
    for merged, atoms in products:
        if merged in batch:
            batch.update(atom for atom, _, _ in atoms)
    atoms_of: dict[int, set[int]] = defaultdict(set)
    for merged, atoms in products:
        atoms_of[merged].update(atom for atom, _, _ in atoms)
    return frozenset(atom for merged, atom, _, _ in cuts if atom not in batch and atoms_of[merged] & batch)


def _components(total: int, a: list[Array], b: list[Array]) -> Positions:
    if not total:
        return np.zeros(0, np.int64)
    left = np.concatenate([*a, np.zeros(0, np.int64)])
    right = np.concatenate([*b, np.zeros(0, np.int64)])
    links = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(total, total))
    return np.asarray(connected_components(links, directed=False)[1], np.int64)


Cut = tuple[int, int, int, int]
Product = tuple[int, tuple[tuple[int, int, int], ...]]


def _classes(relations: Relations) -> tuple[Positions, list[Product]]:
    """Classes of tied axes; atoms at the same place of the same composite class are one class too."""
    total = len(relations.axes)
    ties = list(relations.ties)
    while True:
        left = [np.array([a for a, _ in ties], np.int64)]
        right = [np.array([b for _, b in ties], np.int64)]
        classes = _components(total, left, right)
        seen: dict[tuple[int, int, int], int] = {}
        fresh = []
        for composite in relations.composites:
            for atom, size, step in composite.atoms:
                other = seen.setdefault((int(classes[composite.axis]), size, step), atom)
                if classes[other] != classes[atom]:
                    fresh.append((other, atom))
        if not fresh:
            break
        ties += fresh
    products = {
        (int(classes[c.axis]), tuple((int(classes[atom]), size, step) for atom, size, step in c.atoms))
        for c in relations.composites
    }
    return classes, sorted(products)


def _cuts(relations: Relations, classes: Positions, products: list[Product]) -> tuple[list[Cut], list[tuple[int, str]]]:
    """For each composite class the one atom that stays free; the other atoms are frozen with their reason."""
    blocked = {int(classes[number]) for number, positions, _ in relations.freezes if positions is None}
    poor = {int(classes[number]) for number in relations.mixing}
    poor |= {int(classes[number]) for number, positions, _ in relations.freezes if positions is not None}
    avoid = {int(classes[number]) for number in relations.avoid}
    freezes: list[tuple[int, str]] = []
    holders: dict[int, list[int]] = defaultdict(list)
    for k, (_, atoms) in enumerate(products):
        for atom, _, _ in atoms:
            holders[atom].append(k)
        names = [atom for atom, _, _ in atoms]
        if len(set(names)) < len(names):
            blocked |= set(names)
            freezes += [(atom, "the same dimension twice in one axis") for atom in set(names)]

    chosen: set[int] = set()

    def spread() -> None:
        """A frozen composite freezes its atoms; one without a free atom is frozen."""
        changed = True
        while changed:
            changed = False
            for merged, atoms in products:
                names = {atom for atom, _, _ in atoms}
                if merged in blocked and not names <= blocked:
                    blocked.update(names)
                    changed = True
                if merged not in blocked and names <= blocked:
                    blocked.add(merged)
                    changed = True

    spread()
    sizes = {atom: size for _, atoms in products for atom, size, _ in atoms}

    def preference(atom: int) -> tuple[bool, bool, bool, int, int]:
        """What mixes or stays in part comes last, then whole conv groups; what leads every composite (heads) first."""
        leads = all(
            next((a for a, _, _ in products[k][1] if a not in blocked and a not in poor), atom) == atom
            for k in holders[atom]
        )
        return (atom not in poor, atom not in avoid, leads, sizes[atom], -atom)

    open_atoms = [atom for atom in sizes if atom not in blocked]
    while open_atoms:
        best = max(open_atoms, key=preference)
        chosen.add(best)
        for k in holders[best]:
            for atom, _, _ in products[k][1]:
                if atom != best and atom not in blocked:
                    blocked.add(atom)
                    freezes.append((atom, "kept whole: its axis is cut along another dimension"))
        spread()
        open_atoms = [atom for atom in open_atoms if atom not in blocked and atom not in chosen]
    cuts: list[Cut] = []
    for merged, atoms in products:
        free = [item for item in atoms if item[0] in chosen and item[0] not in blocked]
        if free:
            cuts.append((merged, *free[0]))
        else:
            freezes += [(c, "no dimension of this axis is free") for c in (merged, *(a for a, _, _ in atoms))]
    return cuts, freezes


def keep_of(dims: DimGraph, alive: Mask, axis: Axis, size: int) -> Mask:
    """bool[n]: which positions of an axis survive, given which labels do."""
    labels = dims.labels_of(axis)
    return np.ones(size, np.bool_) if labels is None else alive[labels]
