"""Relations of all nodes -> which positions go together, and which may not go, with the reason.

Identity ties stay at axis level: the axes that they join form a class, and only classes are expanded to positions.
A composite axis leaves one atom free (the cut); which one is decided for all composites that share atoms at once, so
that a channel shuffle frees the same atom on both of its sides. Then one connected-components call labels everything.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from onnxprune.relate import MOST, Pick, Relations, too_many
from onnxprune.types import Array, Axis, Mask, Positions, Side, View

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True)
class DimGraph:
    """Positions of every axis with their labels; positions with one label go together or stay together.

    `tied` are operands of sums and stacks that go with a label.
    """

    relations: Relations
    classes: Positions
    offsets: Positions
    labels: Positions
    frozen: Positions
    reasons: tuple[str, ...]
    inner: frozenset[int]
    tied: Mapping[Side, int] = field(default_factory=dict)

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
        import networkx as nx

        graph: nx.Graph[Axis] = nx.Graph()
        axes = self.relations.axes
        graph.add_nodes_from(axes)
        graph.add_edges_from((axes[a], axes[b], {"op": op}) for a, b, op in self.relations.edges)
        return graph

    def explain(self, a: Axis, b: Axis) -> list[tuple[Axis, str, Axis]] | None:
        """The shortest chain of ops between two axes, as (axis, op, axis) steps; None if nothing couples them."""
        import networkx as nx

        if a not in self.graph or b not in self.graph or not nx.has_path(self.graph, a, b):
            return None
        path = nx.shortest_path(self.graph, a, b)
        return [(x, self.graph.edges[x, y]["op"], y) for x, y in itertools.pairwise(path)]

    @cached_property
    def mixing(self) -> dict[int, tuple[str, ...]]:
        """{class: the ops and axes where its positions see each other}."""
        found: dict[int, list[str]] = defaultdict(list)
        for mark in self.relations.mixing:
            found[int(self.classes[mark.axis])].append(mark.text)
        return {c: tuple(texts) for c, texts in found.items()}

    @cached_property
    def least(self) -> dict[int, int]:
        """{class: positions that stay}, as many as an operator takes of it."""
        found: dict[int, int] = {}
        for number, count in self.relations.least.items():
            c = int(self.classes[number])
            found[c] = max(found.get(c, 0), count)
        return found

    @cached_property
    def batch(self) -> dict[int, bool]:
        """{class that is a batch axis of products: whether all of them are with weights stacked along it}."""
        found: dict[int, bool] = {}
        for number, stored in self.relations.batch.items():
            c = int(self.classes[number])
            found[c] = found.get(c, True) and stored
        return found


def couple(
    view: View,
    inside_heads: bool = False,
    around: Callable[[str], Sequence[Side]] = lambda value: (),
    inside_norms: bool = False,
    caches: Sequence[tuple[str, str]] = (),
) -> DimGraph:
    """Relate every node, decide the cuts, label all positions.

    On request an axis of heads is cut inside each head, and one of normalised groups inside each group.
    `around` says which operands a value serves alone, the innermost first: they may go with a position that it picks.
    `caches` are pairs of a graph input and output that may lose positions, of no dynamic axis.
    """
    relations = Relations(view, caches)
    sizes = np.array(relations.sizes, np.int64)
    classes, products = _classes(relations)
    composed = {merged for merged, _ in products}
    for axis in sorted(view.dynamic):  # (batch heads) is dynamic because batch is: its heads are not
        number = relations.number.get(axis)
        if number is not None and int(classes[number]) not in composed:
            relations.freezes.append((number, None, "dynamic size"))
    ties = _ties(relations, classes, around)
    heads = _heads(relations, classes, products)
    last = (heads if inside_heads else frozenset()) | (
        _normalised(relations, classes, products) - heads if inside_norms else frozenset()
    )
    cuts, cut_freezes = _cuts(relations, classes, products, last)
    count = int(classes.max()) + 1 if len(classes) else 0
    class_sizes = np.zeros(count, np.int64)
    class_sizes[classes] = sizes
    if (wanted := float(class_sizes.sum(dtype=np.float64))) > MOST:
        raise too_many(relations.axes[int(sizes.argmax())], int(sizes.max()), wanted)
    offsets = np.concatenate([[0], np.cumsum(class_sizes)])
    a, b = [], []
    for piece, whole, positions in relations.takes:
        a.append(offsets[classes[piece]] + np.arange(len(positions)))
        b.append(offsets[classes[whole]] + positions)
    for places in ties.values():  # what goes with one operand goes together
        a.append(offsets[classes[[axis for axis, _ in places]]] + [position for _, position in places])
        b.append(np.full(len(places), a[-1][0]))
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
    tied = {side: int(labels[offsets[classes[at[0][0]]] + at[0][1]]) for side, at in ties.items()}
    return DimGraph(
        relations,
        classes,
        offsets,
        labels,
        frozen,
        tuple(reasons),
        _inner(relations, classes, products, cuts, heads),
        {side: label for side, label in tied.items() if frozen[label] < 0},
    )


def _ties(
    relations: Relations, classes: Positions, around: Callable[[str], Sequence[Side]]
) -> dict[Side, list[tuple[int, int]]]:
    """{operand: the (axis, position) that go with it}: of an axis whose picked positions part there; others freeze."""
    picks: dict[int, list[tuple[Pick, Sequence[Side]]]] = defaultdict(list)
    for pick in relations.picks:
        picks[int(classes[pick.axis])].append((pick, around(pick.value)))
    ties: dict[Side, list[tuple[int, int]]] = defaultdict(list)
    for listed in picks.values():
        read: dict[Side, set[int]] = defaultdict(set)
        for pick, sides in listed:
            for side in sides:
                read[side].add(pick.position)
        most: dict[int, int] = {}
        for side, positions in read.items():
            most[side.root] = max(most.get(side.root, 0), len(positions))
        apart = Counter(side.root for side in read if most[side.root] == 1)
        root = max(apart, key=lambda root: (apart[root], -root), default=-1)
        for pick, sides in listed:
            side_or_none = next((side for side in sides if side.root == root), None)
            if side_or_none is not None and apart[root] > 1:
                ties[side_or_none].append((pick.axis, pick.position))
            else:
                relations.freezes.append((pick.axis, np.array([pick.position]), pick.text))
    return ties


def _heads(relations: Relations, classes: Positions, products: list[Product]) -> frozenset[int]:
    """Classes that count independent products of activations, alone or inside a composite axis."""
    batch = {int(classes[number]) for number in relations.batch}
    for merged, atoms in products:
        if merged in batch:
            batch.update(atom for atom, _, _ in atoms)
    return frozenset(batch)


def _normalised(relations: Relations, classes: Positions, products: list[Product]) -> frozenset[int]:
    """Classes that count groups of which the positions see each other, such as those of a GroupNorm."""
    mixed = {int(classes[mark.axis]) for mark in relations.mixing}
    mixed |= {atom for merged, atoms in products if merged in mixed for atom, _, _ in atoms}
    sets = [{atom for atom, _, _ in atoms} for _, atoms in products]
    return frozenset(atom for names in sets if names & mixed for atom in names - mixed)


def _inner(
    relations: Relations, classes: Positions, products: list[Product], cuts: list[Cut], batch: frozenset[int]
) -> frozenset[int]:
    """Classes that are cut inside every head: they take part in such products, beside the atom that counts these."""
    within = {int(classes[number]) for number in relations.multiplied}
    atoms_of: dict[int, set[int]] = defaultdict(set)
    for merged, atoms in products:
        atoms_of[merged].update(atom for atom, _, _ in atoms)
    return frozenset(atom for merged, atom, _, _ in cuts if atom in within - batch and atoms_of[merged] & batch)


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


def _cuts(
    relations: Relations, classes: Positions, products: list[Product], last: frozenset[int]
) -> tuple[list[Cut], list[tuple[int, str]]]:
    """For each composite class the one atom that stays free, `last` ones where no other can; reasons for the others."""
    blocked = {int(classes[number]) for number, positions, _ in relations.freezes if positions is None}
    poor = {int(classes[mark.axis]) for mark in relations.mixing}
    poor |= {int(classes[number]) for number, positions, _ in relations.freezes if positions is not None}
    avoid = {int(classes[number]) for number in relations.avoid}
    freezes: list[tuple[int, str]] = []
    for _, atoms in products:
        names = [atom for atom, _, _ in atoms]
        if len(set(names)) < len(names):
            blocked |= set(names)
            freezes += [(atom, "the same dimension twice in one axis") for atom in set(names)]

    chosen: set[int] = set()
    spread = Spread(products, {(int(classes[piece]), int(classes[whole])) for piece, whole, _ in relations.takes})
    spread.block(blocked, tuple(blocked))
    spread.impoverish(poor, blocked)
    sizes = {atom: size for _, atoms in products for atom, size, _ in atoms}

    def preference(atom: int) -> tuple[bool, bool, bool, bool, int, int]:
        """What mixes or stays in part comes last, then whole conv groups; what leads every composite (heads) first."""
        leads = all(
            next((a for a, _, _ in products[k][1] if a not in blocked and a not in poor), atom) == atom
            for k in spread.holders[atom]
        )
        return (atom in last, atom in poor, atom in avoid, not leads, -sizes[atom], atom)

    queue = [(preference(atom), atom) for atom in sizes if atom not in blocked]
    heapq.heapify(queue)
    while queue:  # the least is preferred most; what is blocked meanwhile can only let others lead: they come again
        _, best = heapq.heappop(queue)
        if best in blocked or best in chosen:
            continue
        chosen.add(best)
        fresh = {atom for k in spread.holders[best] for atom in spread.atoms[k]} - {best}
        fresh = {atom for atom in fresh if atom not in blocked}
        freezes += [(atom, "kept whole: its axis is cut along another dimension") for atom in sorted(fresh)]
        gone = spread.block(blocked, fresh)
        moved = {atom for one in gone for k in spread.holders.get(one, ()) for atom in spread.atoms[k]}
        for atom in moved:
            if atom not in blocked and atom not in chosen:
                heapq.heappush(queue, (preference(atom), atom))
    cuts: list[Cut] = []
    for merged, atoms in products:
        free = [item for item in atoms if item[0] in chosen and item[0] not in blocked]
        if free:
            cuts.append((merged, *free[0]))
        else:
            freezes += [(c, "no dimension of this axis is free") for c in (merged, *(a for a, _, _ in atoms))]
    return cuts, freezes


class Spread:
    """What the cut of one axis says about others: products with their atoms, and pieces with their wholes."""

    def __init__(self, products: list[Product], takes: set[tuple[int, int]]) -> None:
        self.atoms = [frozenset(atom for atom, _, _ in atoms) for _, atoms in products]
        self.merged = [merged for merged, _ in products]
        self.holders: dict[int, list[int]] = defaultdict(list)
        self.merges: dict[int, list[int]] = defaultdict(list)
        for k, atoms in enumerate(self.atoms):
            self.merges[self.merged[k]].append(k)
            for atom in atoms:
                self.holders[atom].append(k)
        self.pieces: dict[int, list[int]] = defaultdict(list)
        self.wholes: dict[int, list[int]] = defaultdict(list)
        for piece, whole in takes:
            self.pieces[whole].append(piece)
            self.wholes[piece].append(whole)

    def block(self, blocked: set[int], fresh: Iterable[int]) -> list[int]:
        """A frozen composite freezes its atoms, as a frozen whole its pieces; one without a free atom is frozen.

        Adds `fresh` and what follows to `blocked`; all that came from it.
        """
        gone = list(fresh)
        blocked.update(gone)
        for one in gone:  # grows on the way
            found = {atom for k in self.merges.get(one, ()) for atom in self.atoms[k]}
            found |= {self.merged[k] for k in self.holders.get(one, ()) if self.atoms[k] <= blocked}
            found |= set(self.pieces.get(one, ()))
            found = {name for name in found if name not in blocked}
            blocked |= found
            gone += found
        return gone

    def impoverish(self, poor: set[int], blocked: set[int]) -> None:
        """What has a piece that stays, stays in part, and so do the atoms of a composite or what is made of such atoms.

        Adds to `poor`.
        """
        pending = [*poor, *blocked]
        for one in pending:  # grows on the way
            found = set(self.wholes.get(one, ()))
            for k in self.holders.get(one, ()):
                if all(atom in poor or atom in blocked for atom in self.atoms[k]):
                    found.add(self.merged[k])
            if one in poor:
                found |= {atom for k in self.merges.get(one, ()) for atom in self.atoms[k]}
            found = {name for name in found if name not in poor}
            poor |= found
            pending += found


def keep_of(dims: DimGraph, alive: Mask, axis: Axis, size: int) -> Mask:
    """bool[n]: which positions of an axis survive, given which labels do."""
    labels = dims.labels_of(axis)
    return np.ones(size, np.bool_) if labels is None else alive[labels]
