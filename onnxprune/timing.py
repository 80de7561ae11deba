"""Latency as a function of survivors, from measuring: each linear operator alone, at a grid of widths.

An operator's time is interpolated between the widths that it was measured at; operators that are alike share a table.
All else (norms, activations, what moves data) is what the whole model takes beyond that, spread over elements. That
share may be negative: alone, an operator also pays for layouts that it has for nothing inside the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

import numpy as np
import onnx

from onnxprune import ops
from onnxprune.analysis import Analysis
from onnxprune.cache import key_of
from onnxprune.cost import Costs, mac_terms
from onnxprune.dims import keep_of
from onnxprune.infer import initializers
from onnxprune.types import Array, Axis, Mask, OpNode, Positions, Shape

FINE = (1.0, 0.75, 0.5, 0.25, 0.0)  # shares of the units of a dimension; zero stands for one unit
COARSE = (1.0, 0.4, 0.0)
PLACES = len(FINE)
DIMENSIONS = 3  # of an operator, that are told apart
SMALL = 0.01  # share of the time of all operators below which one is measured coarsely
WIDTH = 32  # positions of which the measured widths are multiples where they can be
MULTIPLES = (8, 16, 32)  # of positions; finer ones are never faster
PAYS = 0.05  # share of the time that a coarser multiple must save
COVERED = 0.8  # share of the time that the operators have by which the multiple is found,
PROBED = 6  # and how many these are at most
FREE = frozenset("Identity Reshape Flatten Squeeze Unsqueeze Shape Size Constant Dropout".split())  # move no data
SECONDS = 0.06  # for one operator at one width
CAREFUL = 0.3  # where a few percent decide
LEAST = 0.02  # share of a measurement that an operator takes at least, beside the run
KNOWN = 1024  # elements up to which an initializer keeps its values
DRAWN = 8  # integers are drawn below this


@dataclass(frozen=True)
class Piece:
    """A model of one operator: what it is as JSON data, and what makes it and its inputs from that."""

    what: Mapping[str, Any]
    build: Callable[[], tuple[bytes, dict[str, Array]]]

    @property
    def key(self) -> str:
        """A name for its content."""
        return key_of(self.what)


NOTHING: Mapping[str, Any] = {
    "op": ["", "Identity", 17],
    "attributes": {},
    "inputs": [{"type": 1, "shape": (1,), "fixed": False}],
    "values": {},
    "outputs": [[1, 1]],
}
Clock = Callable[[Piece, float], float | None]  # ms of one run, found in so many seconds; None if it does not run alone


EMPTY = Piece(NOTHING, lambda: built(NOTHING, {}))


@dataclass(frozen=True)
class Table:
    """float64 ms of terms at levels of the shares of up to three classes each, and ms for each element of the rest.

    `fixed` is what a run costs that computes nothing.

    `classes` int64[terms, 3], one behind the last for none; `levels` float64[terms, 3, places], rising;
    `times` float64[terms, places, places, places].
    """

    linear: Positions
    classes: Positions
    levels: Array
    times: Array
    others: Positions
    elements: tuple[Array, Array, Array]
    fixed: float
    rate: float = 0.0

    @cached_property
    def nodes(self) -> Positions:
        """int64[terms]: the node of the view that each term belongs to."""
        return np.concatenate([self.linear, self.others])

    def values(self, shares: Array) -> Array:
        """float64[terms]: ms where these shares of the classes survive."""
        rest = Costs.values(self.elements, shares) * self.rate
        return np.concatenate([self.operators(shares), rest])

    def operators(self, shares: Array) -> Array:
        """float64[linear]: ms of each linear operator, interpolated in every dimension."""
        at = np.append(shares, 1.0)[self.classes]
        high = np.clip((self.levels < at[..., None]).sum(axis=2), 1, self.levels.shape[2] - 1)
        low = np.take_along_axis(self.levels, high[..., None] - 1, 2)[..., 0]
        gap = np.take_along_axis(self.levels, high[..., None], 2)[..., 0] - low
        weight = np.clip(np.divide(at - low, gap, out=np.zeros_like(at), where=gap > 0), 0, 1)
        rows = np.arange(len(at))
        total = np.zeros(len(at))
        for corner in product((0, 1), repeat=DIMENSIONS):
            places = high - 1 + np.array(corner)
            part = np.where(corner, weight, 1 - weight).prod(axis=1)
            total += part * self.times[rows, places[:, 0], places[:, 1], places[:, 2]]
        return total


@dataclass(frozen=True)
class Dimension:
    """What one operator can lose: units by their labels, all classes of its axes that hold them, positions of each."""

    labels: Positions
    number: int
    width: int


class Operators:
    """The linear operators of a model, each as a small model of its own for any number of survivors.

    Only labels in `movable` (bool[labels]) go; sizes are those at which cost is counted.
    """

    def __init__(self, analysis: Analysis, shapes: Mapping[str, Shape], movable: Mask) -> None:
        self.analysis, self.shapes, self.movable = analysis, shapes, movable
        self.dims, self.view = analysis.dims, analysis.view
        self.stored = initializers(analysis.prepared.model.graph)
        self._free: dict[int, Positions] = {}
        fixed = set(self.view.stored)
        for node in self.view.nodes:  # what follows from weights alone is a weight
            if node.inputs and not node.bodies and all(not name or name in fixed for name in node.inputs):
                fixed.update(node.outputs)
        self.fixed = fixed
        self.found = [
            i
            for i, node in enumerate(self.view.nodes)
            if mac_terms_known(node) and all(name in shapes for name in (*node.inputs, *node.outputs) if name)
        ]

    def dimensions(self, i: int) -> list[Dimension]:
        """What a node can lose, the widest first."""
        node = self.view.nodes[i]
        found: dict[bytes, Dimension] = {}
        for name in dict.fromkeys((*node.inputs, *node.outputs)):
            for k, size in enumerate(self.view.shapes.get(name, ()) if name else ()):
                number = self.dims.relations.number.get(Axis(name, k))
                if number is None:
                    continue
                c = int(self.dims.classes[number])
                if c not in self._free:
                    labels = np.unique(self.dims.labels[self.dims.offsets[c] : self.dims.offsets[c + 1]])
                    self._free[c] = labels[self.movable[labels]]
                free = self._free[c]
                if len(free) > 1:
                    found.setdefault(free.tobytes(), Dimension(free, c, max(size // len(free), 1)))
        return sorted(found.values(), key=lambda d: -len(d.labels) * d.width)[:DIMENSIONS]

    def alive(self, dimensions: Sequence[Dimension], kept: Sequence[int]) -> Mask:
        """bool[labels] with so many units of each dimension left, spread over it."""
        alive = np.ones(self.analysis.labels, np.bool_)
        for dimension, count in zip(dimensions, kept, strict=True):
            stays = np.linspace(0, len(dimension.labels) - 1, count).round().astype(np.int64)
            alive[np.delete(dimension.labels, stays)] = False
        return alive

    def piece(self, i: int, alive: Mask) -> Piece | None:
        """A node alone, with what is alive; None where it cannot stand alone."""
        node, view = self.view.nodes[i], self.view

        def keep(axis: Axis) -> Mask:
            return keep_of(self.dims, alive, axis, view.shapes[axis.value][axis.index])

        names = [name for name in dict.fromkeys((*node.inputs, *node.outputs)) if name]
        wanted = {name: tuple(int(keep(Axis(name, k)).sum()) for k in range(len(node.shapes[name]))) for name in names}
        sizes = {
            name: tuple(
                round(size * left / whole) if whole else size
                for size, left, whole in zip(self.shapes[name], wanted[name], node.shapes[name], strict=True)
            )
            for name in names
            if len(self.shapes[name]) == len(node.shapes[name])
        }
        types = self.analysis.prepared.facts.types
        kinds = {name: types.get(name.split("\0")[0]) for name in names}
        if node.bodies or len(sizes) < len(names) or any(kinds[name] is None for name in names if name in node.inputs):
            return None
        attrs = {key: value for key, value in node.attrs.items() if value is not None}
        values: dict[int, Array] = {}
        if (resize := ops.resize_of(node.domain, node.op_type)) is not None:
            now = replace(node, shapes=wanted)
            edit = resize(ops.Resizing(now, node, wanted, keep, self.dims.relations.counted.get))
            if edit is not None:
                attrs = {k: v for k, v in (attrs | dict(edit.attrs)).items() if v is not None}
                values |= edit.inputs
        if not all(isinstance(value, int | float | str | list | tuple) for value in attrs.values()):
            return None
        for k, name in enumerate(node.inputs):
            item = view.stored.get(name)
            if k not in values and item is not None and prod(item.shape) <= KNOWN:
                tensor = self.stored[item.initializer].const_value
                array = np.asarray(tensor.numpy()) if tensor is not None else np.zeros(item.shape)
                for axis in range(array.ndim):
                    array = np.compress(keep(Axis(name, axis)), array, axis)
                values[k] = array
            elif k not in values and name in node.consts and name not in view.stored:
                values[k] = node.consts[name]
        inputs = [
            None
            if not name
            else {"type": kinds[name], "shape": sizes[name], "fixed": name in self.fixed or k in values}
            for k, name in enumerate(node.inputs)
        ]
        what = {
            "op": [node.domain, node.op_type, node.opset],
            "attributes": attrs,
            "inputs": inputs,
            "values": {k: [str(a.dtype), a.shape, a.tolist()] for k, a in values.items() if a.dtype.kind in "iub"},
            "outputs": [[kinds[name], len(sizes[name])] if name else None for name in node.outputs],
        }
        return Piece(what, lambda: built(what, values))


def mac_terms_known(node: OpNode) -> bool:
    """Whether a node is a linear operator of which all shapes are known."""
    return all(name in node.shapes for name in (*node.inputs, *node.outputs) if name) and bool(mac_terms(node))


def built(what: Mapping[str, Any], values: Mapping[int, Array]) -> tuple[bytes, dict[str, Array]]:
    """(the model of an operator, its inputs); what is not given is drawn at random, always alike."""
    rng = np.random.default_rng(0)
    domain, op_type, opset = what["op"]
    graph = onnx.GraphProto(name="piece")
    feed = {}
    for k, given in enumerate(what["inputs"]):
        if given is None:
            continue
        kind = onnx.helper.tensor_dtype_to_np_dtype(given["type"])
        array = values.get(k)
        if array is None:
            if kind.kind in "iub":
                array = rng.integers(0, 2 if kind.kind == "b" else DRAWN, given["shape"]).astype(kind)
            else:
                array = (rng.standard_normal(given["shape"], np.float32) / 8).astype(kind)
        if given["fixed"]:
            graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), f"in{k}"))
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(f"in{k}", given["type"], given["shape"]))
            feed[f"in{k}"] = array
    names = [f"in{k}" if given else "" for k, given in enumerate(what["inputs"])]
    outputs = [f"out{k}" if given else "" for k, given in enumerate(what["outputs"])]
    graph.node.append(onnx.helper.make_node(op_type, names, outputs, domain=domain, **what["attributes"]))
    for name, given in zip(outputs, what["outputs"], strict=True):
        if given and given[0] is not None:
            graph.output.append(onnx.helper.make_tensor_value_info(name, given[0], [None] * given[1]))
        elif given:
            graph.output.append(onnx.ValueInfoProto(name=name))
    opsets = [onnx.helper.make_opsetid(name, number) for name, number in {domain: opset}.items()]
    if domain:
        opsets.append(onnx.helper.make_opsetid("", 17))
    model = onnx.ModelProto(ir_version=8 if opset < 21 else 10, opset_import=opsets, graph=graph)
    return model.SerializeToString(deterministic=True), feed


def counts(dimension: Dimension, levels: Sequence[float]) -> list[int]:
    """Units at these levels, rising; of a number of positions that backends like, where that is near."""
    total = len(dimension.labels)
    found = {total}
    for level in levels:
        count = max(1, round(level * total))
        step = WIDTH // np.gcd(WIDTH, dimension.width)
        near = int(round(count / step) * step)
        found.add(near if step <= near <= total and abs(near - count) <= total / 10 else count)
    return sorted(found)


def smooth(times: Array) -> Array:
    """Times that never fall when a dimension grows: what is halfway between the lowest and the highest such."""
    for axis in range(times.ndim):
        up = np.maximum.accumulate(times, axis)
        down = np.flip(np.minimum.accumulate(np.flip(times, axis), axis), axis)
        times = (up + down) / 2
    return times


@dataclass
class _Entry:
    """Operators that are alike: what stands for them, and their grid once it is measured."""

    nodes: list[int]
    dimensions: list[Dimension]
    dense: float
    places: list[list[int]]
    times: Array


def tabulate(
    operators: Operators, clock: Clock, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Table, int]:
    """(the table, the multiple of positions that pays), measured where the time is."""
    fixed, alone = _net(clock)
    entries = _alike(operators, alone)
    total = sum(entry.dense * len(entry.nodes) for entry in entries) or 1.0
    for entry in entries:
        fine = len(entry.dimensions) < DIMENSIONS and entry.dense * len(entry.nodes) >= SMALL * total
        entry.places = [counts(d, FINE if fine else COARSE) for d in entry.dimensions]
    done, whole = 0, sum(prod(len(places) for places in entry.places) for entry in entries)
    for entry in entries:
        entry.times = np.zeros([len(places) for places in entry.places])
        for index in np.ndindex(*entry.times.shape):
            kept = [places[k] for places, k in zip(entry.places, index, strict=True)]
            entry.times[index] = _timed(operators, alone, entry, kept)
            done += 1
            progress(done, whole)
        entry.times = smooth(entry.times)
    return _assembled(operators, entries, fixed), _multiple(operators, alone, entries, total)


def singly(operators: Operators, clock: Clock, alive: Mask) -> dict[str, float]:
    """{first output: ms} of linear operators outside of bodies, each by itself with what is alive; equal ones once."""
    _, net = _net(clock)
    known: dict[str, float | None] = {}
    found = {}
    for i in operators.found:
        node = operators.view.nodes[i]
        piece = operators.piece(i, alive) if not node.within else None
        if piece is not None:
            if piece.key not in known:
                known[piece.key] = net(piece, SECONDS)
            if (ms := known[piece.key]) is not None:
                found[node.outputs[0]] = ms
    return found


def _net(clock: Clock) -> tuple[float, Clock]:
    """(what a run costs that computes nothing, the clock without it)."""
    fixed = clock(EMPTY, CAREFUL) or 0.0

    def net(piece: Piece, seconds: float) -> float | None:
        found = clock(piece, seconds)
        return None if found is None else max(found - fixed, LEAST * found)

    return fixed, net


def _alike(operators: Operators, clock: Clock) -> list[_Entry]:
    """Operators with one content and the same dimensions, by the time that all of them take."""
    whole = np.ones(operators.analysis.labels, np.bool_)
    entries: dict[str, _Entry] = {}
    for i in operators.found:
        piece = operators.piece(i, whole)
        if piece is None:
            continue
        dimensions = operators.dimensions(i)
        halves = [operators.piece(i, operators.alive([d], [(len(d.labels) + 1) // 2])) for d in dimensions]
        key = key_of(piece.key, [half.key if half else None for half in halves])
        if key in entries:
            entries[key].nodes.append(i)
        elif (dense := clock(piece, SECONDS)) is not None:
            entries[key] = _Entry([i], dimensions, dense, [], np.zeros(0))
    return sorted(entries.values(), key=lambda entry: -entry.dense * len(entry.nodes))


def _timed(operators: Operators, clock: Clock, entry: _Entry, kept: Sequence[int], seconds: float = SECONDS) -> float:
    """ms with so many units left; where that does not run, in proportion to them."""
    piece = operators.piece(entry.nodes[0], operators.alive(entry.dimensions, kept))
    found = clock(piece, seconds) if piece is not None else None
    share = prod(count / len(d.labels) for count, d in zip(kept, entry.dimensions, strict=True))
    return entry.dense * share if found is None else found


def _assembled(operators: Operators, entries: Sequence[_Entry], fixed: float) -> Table:
    """The table of all nodes: those alike have equal grids, over classes of their own."""
    costs, view, shapes = operators.analysis.costs, operators.view, operators.shapes
    none = len(operators.dims.offsets) - 1
    linear, classes, levels, times = [], [], [], []
    for entry in entries:
        grid = np.ones((DIMENSIONS, PLACES))
        padded = entry.times.reshape([*entry.times.shape, *[1] * (DIMENSIONS - entry.times.ndim)])
        widths: list[tuple[int, int]] = [(0, PLACES - length) for length in padded.shape]
        padded = np.pad(padded, widths, mode="edge")
        for k, (dimension, places) in enumerate(zip(entry.dimensions, entry.places, strict=True)):
            for m, count in enumerate(places):
                alive = operators.alive([dimension], [count])
                grid[k, m] = costs.shares(alive)[dimension.number]
        for i in entry.nodes:
            own = [dimension.number for dimension in operators.dimensions(i)]
            linear.append(i)
            classes.append(own + [none] * (DIMENSIONS - len(own)))
            levels.append(grid)
            times.append(padded)
    others: list[int] = []
    terms: list[tuple[float, list[int]]] = []
    for i, node in enumerate(view.nodes):
        if node.op_type in FREE or node.bodies or not any(name not in operators.fixed for name in node.outputs):
            continue
        for name in node.outputs:
            if name in shapes and len(shapes[name]) == len(view.shapes.get(name, ())):
                terms.append(
                    (float(prod(shapes[name])), costs.moving([Axis(name, k) for k in range(len(shapes[name]))]))
                )
                others.append(i)
    return Table(
        np.array(linear, np.int64),
        np.array(classes, np.int64).reshape(-1, DIMENSIONS),
        np.array(levels).reshape(-1, DIMENSIONS, PLACES),
        np.array(times).reshape(-1, *[PLACES] * DIMENSIONS),
        np.array(others, np.int64),
        Costs.pack(terms),
        fixed,
    )


def _multiple(operators: Operators, clock: Clock, entries: Sequence[_Entry], total: float) -> int:
    """The least multiple of positions of which no coarser one saves more: what lies between is compared with a line."""
    extra: dict[int, float] = defaultdict(float)
    base = covered = 0.0
    for entry in entries[:PROBED]:
        if covered > COVERED * total:
            break
        covered += entry.dense * len(entry.nodes)
        for k, dimension in enumerate(entry.dimensions[:1]):
            units = WIDTH // np.gcd(WIDTH, dimension.width)  # that make a multiple of the widest
            start = len(dimension.labels) // 2 // units * units
            if units == 1 or start < units or start + units > len(dimension.labels):
                continue

            def at(count: int, k: int = k, entry: _Entry = entry) -> float:
                kept = [len(d.labels) for d in entry.dimensions]
                kept[k] = count
                return _timed(operators, clock, entry, kept, CAREFUL)

            low, high = at(start), at(start + units)
            base += low * len(entry.nodes)
            for multiple in MULTIPLES[:-1]:
                step = max(multiple // int(np.gcd(multiple, dimension.width)), 1)
                if step < units:
                    line = low + (high - low) * step / units
                    extra[multiple] += (at(start + step) - line) * len(entry.nodes)
    if not base:
        return 8
    found, coarser = WIDTH, 0.0
    for multiple in reversed(MULTIPLES[:-1]):
        if extra.get(multiple, 0.0) <= coarser + PAYS * base:
            found = multiple
        coarser = min(coarser, extra.get(multiple, 0.0))
    return found
