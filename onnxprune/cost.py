"""What a model costs, dense and for any set of survivors: parameters, bytes, multiply-accumulates.

Every cost is a sum of products of axis lengths, so the cost of a plan needs no rewritten model: only how many
positions of each class of axes survive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from onnxprune.branches import Branches, living
from onnxprune.dims import DimGraph
from onnxprune.types import Array, Axis, Group, Mask, OpNode, Shape, Stored, View

BITS = {"FLOAT": 32, "DOUBLE": 64, "FLOAT16": 16, "BFLOAT16": 16, "INT8": 8, "UINT8": 8, "INT16": 16, "UINT16": 16,
        "INT32": 32, "UINT32": 32, "INT64": 64, "UINT64": 64, "BOOL": 8, "INT4": 4, "UINT4": 4}  # fmt: skip


ROUNDS = 1 << 31  # a trip count from here on means: until the condition says stop


def mac_terms(node: OpNode) -> list[list[Axis]]:
    """For each product in a node, the axes whose lengths multiply to its MACs; none for operators that do not count."""
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


class Costs:
    """Cost as a function of which labels, and after them branches, are alive; MACs are counted at `shapes`."""

    def __init__(
        self, dims: DimGraph, view: View, shapes: Mapping[str, Shape], branches: Branches | None = None
    ) -> None:
        self.dims, self.branches = dims, branches
        self.labels = len(dims.frozen)
        macs: list[tuple[float, list[int]]] = []
        self.macs_nodes: list[int] = []
        homes: list[str] = []
        self.parts = [(node.within, node.op_type == "If", *_parts(node, shapes)) for node in view.nodes if node.bodies]
        before = np.cumsum([0, *(not node.within for node in view.nodes)])  # nodes of the main graph
        for i, node in enumerate(view.nodes):
            if any(name and name not in node.shapes for name in (*node.inputs, *node.outputs)):
                continue
            for axes in mac_terms(node):
                sizes = [_length(a, shapes, view.shapes) for a in axes]
                macs.append((float(prod(sizes)), self._moving(axes)))
                self.macs_nodes.append(int(before[i]))
                homes.append(node.within)
        self.bodies = {"": 0} | {name: k + 1 for k, name in enumerate(n for _, _, ns, _ in self.parts for n in ns)}
        self.homes = np.array([self.bodies[home] for home in homes], np.int64)
        self.macs_terms = self._pack(macs)
        stored: list[tuple[Stored, list[int]]] = []
        seen: set[str] = set()
        for name, item in view.stored.items():
            if item.initializer not in seen:  # copies made on write are as small as their originals
                seen.add(item.initializer)
                stored.append((item, self._moving([Axis(name, k) for k in range(len(item.shape))])))
        counted = [(float(prod(s.shape)) if s.role != "index" else 0.0, axes) for s, axes in stored]
        self.params_terms = self._pack(counted)
        sized = [(prod(s.shape) * BITS.get(s.dtype, 32) / 8, axes) for s, axes in stored]
        self.bytes_terms = self._pack(sized)
        place = {item.initializer: k for k, (item, _) in enumerate(stored)}
        self.stored_names = [(name, place[item.initializer]) for name, item in view.stored.items()]

    def _moving(self, axes: list[Axis]) -> list[int]:
        numbers = self.dims.relations.number
        return [int(self.dims.classes[numbers[a]]) for a in axes if a in numbers]

    @staticmethod
    def _pack(terms: list[tuple[float, list[int]]]) -> tuple[Array, Array, Array]:
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
    def _values(terms: tuple[Array, Array, Array], shares: Array, lives: Array) -> Array:
        factors, classes, owners = terms
        values = factors * lives
        np.multiply.at(values, owners, shares[classes])
        return np.asarray(values)

    def _macs(self, shares: Array, lives: Array) -> float:
        """Of an If the larger branch, of a loop's body as many as it has rounds."""
        totals = np.bincount(self.homes, self._values(self.macs_terms, shares, lives), len(self.bodies))
        for home, either, names, rounds in self.parts:  # inner bodies come first
            inner = totals[[self.bodies[name] for name in names]]
            totals[self.bodies[home]] += (inner.max() if either else inner.sum()) * rounds
        return float(totals[0])

    def of(self, alive: Mask) -> dict[str, float]:
        """{macs, params, size} for these survivors; size is the weights' bytes alone."""
        shares = self.shares(alive)
        nodes, stored = self._lives(alive)
        return {
            "macs": self._macs(shares, nodes),
            "params": float(self._values(self.params_terms, shares, stored).sum()),
            "size": float(self._values(self.bytes_terms, shares, stored).sum()),
        }

    def _lives(self, alive: Mask) -> tuple[Array, Array]:
        """(float64[MACs terms], float64[initializers]): one for what is left without branches that go, else zero."""
        if self.branches is None or not (goes := self.branches.gone(alive)).any():
            return np.ones(len(self.macs_terms[0])), np.ones(len(self.params_terms[0]))
        nodes, needed = living(self.branches, goes)
        stored = np.zeros(len(self.params_terms[0]))
        stored[[k for name, k in self.stored_names if name in needed]] = 1
        return nodes[self.macs_nodes].astype(np.float64), stored

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
