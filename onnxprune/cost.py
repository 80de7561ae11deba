"""What a model costs, dense and for any set of survivors: parameters, bytes, multiply-accumulates.

Every cost is a sum of products of axis lengths, so the cost of a plan needs no rewritten model: only how many
positions of each class of axes survive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np

from onnxprune.branches import Branches, living
from onnxprune.dims import DimGraph
from onnxprune.ops import ODD
from onnxprune.types import Array, Axis, Group, Mask, OpNode, Positions, Shape, Stored, View

BITS = {"FLOAT": 32, "DOUBLE": 64, "FLOAT16": 16, "BFLOAT16": 16, "INT8": 8, "UINT8": 8, "INT16": 16, "UINT16": 16,
        "INT32": 32, "UINT32": 32, "INT64": 64, "UINT64": 64, "BOOL": 8, "INT4": 4, "UINT4": 4}  # fmt: skip


ROUNDS = 1 << 31  # a trip count from here on means: until the condition says stop


def mac_terms(node: OpNode) -> list[list[Axis]]:
    """For each product in a node, the axes whose lengths multiply to its MACs; none for operators that do not count.

    None either for what reads something else than such an operator can.
    """
    try:
        found = _products(node)
        fits = all(0 <= axis.index < len(node.shapes[axis.value]) for axes in found for axis in axes)
    except (KeyError, *ODD):
        return []
    return found if fits else []


def _products(node: OpNode) -> list[list[Axis]]:
    x, y = node.inputs[0] if node.inputs else "", node.outputs[0]
    kind = node.op_type
    if kind in ("Conv", "ConvTranspose", "FusedConv", "ConvInteger", "QLinearConv"):
        weight = node.inputs[3 if kind == "QLinearConv" else 1]
        return [_all(node, x if kind == "ConvTranspose" else y) + _all(node, weight)[1:]]
    if kind in ("Gemm", "FusedGemm", "QGemm"):
        return [[*_all(node, y), Axis(x, 0 if node.attr("transA", 0) else 1)]]
    if kind == "FusedMatMul":
        return [[*_all(node, y), Axis(x, len(node.shape(0)) - (2 if node.attr("transA", 0) else 1))]]
    if kind in PRODUCTS:
        return [[*_all(node, y), Axis(x, len(node.shape(0)) - 1)]]
    if kind in ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"):
        return [[Axis(x, 0), Axis(x, 1), *_all(node, weight)] for weight in node.inputs[1:3]]
    if kind == "Einsum":
        return [_einsum(node)]
    if kind == "Attention" and node.domain == "com.microsoft":
        packed = [*_all(node, x)[:2], *_all(node, node.inputs[1])]
        return [packed, *[[*_all(node, y), Axis(x, 1)]] * 2]
    if kind in ("Attention", "MultiHeadAttention", "GroupQueryAttention"):
        keys = node.inputs[1] or x
        return [[*_all(node, y), Axis(keys, len(node.shapes[keys]) - 2)]] * 2
    return []


PRODUCTS = frozenset(
    "MatMul MatMulInteger QLinearMatMul MatMulIntegerToFloat DynamicQuantizeMatMul MatMulNBits".split()
)


def _einsum(node: OpNode) -> list[Axis]:
    """One axis for each letter of the equation."""
    terms = str(node.attrs["equation"]).replace(" ", "").partition("->")[0].split(",")
    found: dict[str, Axis] = {}
    for k, term in enumerate(terms):
        if "." not in term:
            for index, letter in enumerate(term):
                if node.shape(k)[index] > 1:
                    found.setdefault(letter, Axis(node.inputs[k], index))
    return list(found.values())


def _parts(node: OpNode, shapes: Mapping[str, Shape]) -> tuple[list[str], int]:
    """Bodies of a node by name, and how often they run: once where that is not known."""
    names = [body.name for body in node.bodies.values()]
    if node.op_type == "Scan" and node.inputs:
        axes = node.attr("scan_input_axes")
        shape, axis = shapes.get(node.inputs[-1], ()), axes[-1] if axes else 0
        return names, shape[axis] if -len(shape) <= axis < len(shape) else 1
    count = node.const(0) if node.op_type == "Loop" else None
    known = count is not None and count.size == 1 and count.reshape(-1)[0] < ROUNDS
    return names, max(0, int(count.reshape(-1)[0])) if known and count is not None else 1


def _length(axis: Axis, shapes: Mapping[str, Shape], usual: Mapping[str, Shape]) -> int:
    """How long an axis is at some sizes, or usually where the value is not known to have it there."""
    shape = shapes.get(axis.value, ())
    return shape[axis.index] if len(shape) == len(usual[axis.value]) else usual[axis.value][axis.index]


def _all(node: OpNode, value: str) -> list[Axis]:
    return [Axis(value, k) for k in range(len(node.shapes[value]))]


@dataclass(frozen=True)
class Cost:
    """A model's cost: parameters (elements of float and quantised initializers), bytes (decimal), MACs."""

    params: int
    bytes: int
    macs: int


class Timed(Protocol):
    """Latency as a sum over nodes, each a function of the shares of classes that survive."""

    @property
    def fixed(self) -> float:
        """ms that no node takes."""
        ...

    @property
    def nodes(self) -> Positions:
        """int64[terms]: the node of the view that each term belongs to."""
        ...

    def values(self, shares: Array) -> Array:
        """float64[terms]: ms of each term."""
        ...


class Costs:
    """Cost as a function of which labels, and after them branches, are alive; MACs are counted at `shapes`.

    There is a cost in `latency` once `timed` says what that is.
    """

    def __init__(
        self, dims: DimGraph, view: View, shapes: Mapping[str, Shape], branches: Branches | None = None
    ) -> None:
        self.dims, self.branches = dims, branches
        self.labels = len(dims.frozen)
        self.timed: Timed | None = None
        macs: list[tuple[float, list[int]]] = []
        macs_nodes: list[int] = []
        self.parts = [(node.within, node.op_type == "If", *_parts(node, shapes)) for node in view.nodes if node.bodies]
        self.before = np.cumsum([0, *(not node.within for node in view.nodes)])  # nodes of the main graph
        self.bodies = {"": 0} | {name: k + 1 for k, name in enumerate(n for _, _, ns, _ in self.parts for n in ns)}
        self.homes = np.array([self.bodies[node.within] for node in view.nodes], np.int64)
        for i, node in enumerate(view.nodes):
            if any(name and name not in node.shapes for name in (*node.inputs, *node.outputs)):
                continue
            for axes in mac_terms(node):
                sizes = [_length(a, shapes, view.shapes) for a in axes]
                macs.append((float(prod(sizes)), self.moving(axes)))
                macs_nodes.append(i)
        self.macs_nodes = np.array(macs_nodes, np.int64)
        self.macs_terms = self.pack(macs)
        stored: list[tuple[Stored, list[int]]] = []
        seen: set[str] = set()
        for name, item in view.stored.items():
            if item.initializer not in seen:  # copies made on write are as small as their originals
                seen.add(item.initializer)
                stored.append((item, self.moving([Axis(name, k) for k in range(len(item.shape))])))
        counted = [(float(prod(s.shape)) if s.role != "index" else 0.0, axes) for s, axes in stored]
        self.params_terms = self.pack(counted)
        sized = [(prod(s.shape) * BITS.get(s.dtype, 32) / 8, axes) for s, axes in stored]
        self.bytes_terms = self.pack(sized)
        place = {item.initializer: k for k, (item, _) in enumerate(stored)}
        self.stored_names = [(name, place[item.initializer]) for name, item in view.stored.items()]

    def moving(self, axes: list[Axis]) -> list[int]:
        """The classes of axes that can lose positions."""
        numbers = self.dims.relations.number
        return [int(self.dims.classes[numbers[a]]) for a in axes if a in numbers]

    @staticmethod
    def pack(terms: list[tuple[float, list[int]]]) -> tuple[Array, Array, Array]:
        """(factor of each term, classes of all terms in a row, which term each belongs to)."""
        factors = np.array([factor for factor, _ in terms], np.float64)
        classes = np.array([c for _, axes in terms for c in axes], np.int64)
        owners = np.array([k for k, (_, axes) in enumerate(terms) for _ in axes], np.int64)
        return factors, classes, owners

    def shares(self, alive: Mask) -> Array:
        """float64[classes]: the share of each class's positions that survive."""
        offsets = self.dims.offsets
        counts = np.concatenate([[0], np.cumsum(alive[self.dims.labels])])
        sizes = np.maximum(np.diff(offsets), 1)
        return np.asarray((counts[offsets[1:]] - counts[offsets[:-1]]) / sizes)

    @staticmethod
    def values(terms: tuple[Array, Array, Array], shares: Array, lives: Array | float = 1.0) -> Array:
        """float64[terms]: each factor times the shares of its classes."""
        factors, classes, owners = terms
        values = factors * lives
        np.multiply.at(values, owners, shares[classes])
        return np.asarray(values)

    def _total(self, values: Array, nodes: Positions, alive: Mask | None) -> float:
        """The sum over nodes that are left: of an If the larger branch, of a loop's body as many as it has rounds."""
        lives = values if alive is None else values * alive[self.before[nodes]]
        totals = np.bincount(self.homes[nodes], lives, len(self.bodies))
        for home, either, names, rounds in self.parts:  # inner bodies come first
            inner = totals[[self.bodies[name] for name in names]]
            totals[self.bodies[home]] += (inner.max() if either else inner.sum()) * rounds
        return float(totals[0])

    def of(self, alive: Mask) -> dict[str, float]:
        """{macs, params, size} for these survivors; size is the weights' bytes alone. `latency` where it is timed."""
        shares = self.shares(alive)
        nodes, stored = self._lives(alive)
        found = {
            "macs": self._total(self.values(self.macs_terms, shares), self.macs_nodes, nodes),
            "params": float(self.values(self.params_terms, shares, stored).sum()),
            "size": float(self.values(self.bytes_terms, shares, stored).sum()),
        }
        if self.timed is not None:
            found["latency"] = self.timed.fixed + self._total(self.timed.values(shares), self.timed.nodes, nodes)
        return found

    @property
    def runs(self) -> float:
        """How many nodes run, those of a loop's body in each round, where the number of rounds is written down."""
        return self._total(np.ones(len(self.homes)), np.arange(len(self.homes)), None)

    def _lives(self, alive: Mask) -> tuple[Mask | None, Array]:
        """(nodes of the main graph that are left, None for all; float64[initializers]: one where it is left)."""
        if self.branches is None or not (goes := self.branches.gone(alive)).any():
            return None, np.ones(len(self.params_terms[0]))
        nodes, needed = living(self.branches, goes)
        stored = np.zeros(len(self.params_terms[0]))
        stored[[k for name, k in self.stored_names if name in needed]] = 1
        return nodes, stored

    def of_units(self, groups: tuple[Group, ...], metric: str) -> list[Array]:
        """float64[units] for each group: the share of the model that goes when this unit goes.

        A branch counts for each of its slices, so that it compares with units that are one slice of each weight.
        """
        alive = np.ones(self.labels + (self.branches.free if self.branches else 0), np.bool_)
        dense = self.of(alive)[metric] or 1.0
        found = []
        for group in groups:
            costs = []
            for unit in group.units if group.kind == "layers" else group.units[:1]:  # others are all alike
                alive[unit] = False
                costs.append((dense - self.of(alive)[metric]) / dense)
                alive[unit] = True
            each = np.maximum(group.slices(), 1) if group.kind == "layers" else 1
            found.append(np.broadcast_to(np.array(costs) / each, len(group.units)))
        return found
