"""Bounds without data: between which numbers each position of each axis of each value lies, whatever the input.

One walk over the nodes with intervals. A position whose two bounds agree is a constant: a filter of zeros behind a
bias, a channel with gain zero, a ReLU whose argument is never positive. What no function here knows is unbounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from math import prod

import numpy as np

from onnxprune.outcome import run_node
from onnxprune.types import Array, Axis, OpNode, Shape, View

Range = tuple[Array, Array]  # lowest and highest, float64
MOST = 1 << 24  # elements of a value that is moved about as a whole
LARGE = 1 << 20  # elements of bounds that are kept
ANY = (np.array(-np.inf), np.array(np.inf))

MONOTONE = frozenset(
    """Atan Ceil Celu Clip Elu Erf Exp Floor HardSigmoid Identity LeakyRelu Log Relu Round Selu Sigmoid Sign Softplus
    Softsign Sqrt Tanh ThresholdedRelu""".split()
)
POSITIVE = frozenset("Abs Cosh".split())
UNARY = MONOTONE | POSITIVE | frozenset(
    """Acos Acosh Asin Asinh Atanh Cast Cos HardSwish Mish Neg Reciprocal Shrink Sin Sinh Swish Tan
    QuickGelu""".split()
)  # fmt: skip
MOVES = frozenset("Reshape Flatten Squeeze Unsqueeze Transpose Concat".split())  # right at every dynamic size
PICKS = frozenset("Slice Split Gather Tile DepthToSpace SpaceToDepth".split())


class Bounds:
    """`read` gives the whole of an initializer, by its name for coupling; None where its numbers are of no use.

    Bounds have as many axes as the value, of length one where nothing is told apart: along dynamic axes always.
    """

    def __init__(self, view: View, read: Callable[[str], Array | None]) -> None:
        self.view, self.read = view, read
        self.makers = {name: node for node in view.nodes for name in node.outputs if name}
        self.known: dict[str, Range] = {}
        self.arrays: dict[str, Array | None] = {}
        self.sums_to_one: set[str] = set()  # along the last axis
        for node in view.nodes:
            if not node.bodies and not any(name and name not in view.shapes for name in (*node.inputs, *node.outputs)):
                self.visit(node)

    # What is known ---------------------------------------------------------------------------------------------------

    def array(self, name: str) -> Array | None:
        """A value that is the same for every input, as a whole."""
        if name not in self.arrays:
            self.arrays[name] = None  # until it is found: no value follows from itself
            self.arrays[name] = self._array(name)
        return self.arrays[name]

    def _array(self, name: str) -> Array | None:
        found: Array | None = None
        if name in self.view.stored:
            found = self.read(name)
        elif (node := self.makers.get(name)) is not None and not node.bodies and prod(self.shape(name)) <= MOST:
            inputs = {k: self.array(k) for k in node.inputs if k}
            known = {k: v for k, v in inputs.items() if v is not None}
            if inputs and len(known) == len(inputs) and node.op_type == "DequantizeLinear":
                found = _dequantised(node, *known.values())
            elif inputs and len(known) == len(inputs):
                results = run_node(node, known)
                found = results[node.outputs.index(name)] if results is not None else None
        return found

    def shape(self, name: str) -> Shape:
        """Sizes at the probe."""
        return self.view.shapes.get(name, ())

    def of(self, name: str) -> Range:
        """Bounds of a value, of its rank, or of none where nothing is known."""
        array = self.array(name) if name not in self.known else None
        if array is not None and array.dtype.kind in "fiub" and array.size:
            number = array.astype(np.float64)
            low, high = (np.where(np.isnan(number), end, number) for end in (-np.inf, np.inf))
            self.known[name] = self._short((low, high))
        return self.known.get(name, ANY)

    def at(self, name: str, axis: int) -> Range:
        """Bounds of each position of an axis, float64[n]."""
        low, high = self.of(name)
        if low.ndim:
            others = tuple(k for k in range(low.ndim) if k != axis)
            low, high = low.min(axis=others), high.max(axis=others)
        size = self.shape(name)[axis]
        return np.broadcast_to(low, size), np.broadcast_to(high, size)

    def constant(self, name: str, axis: int) -> Array:
        """float64[n]: the number that a position is, NaN where it is not one number."""
        low, high = self.at(name, axis)
        return np.where((low == high) & np.isfinite(low), low, np.nan)

    def whole(self, name: str) -> Array | None:
        """A computed value that is a constant, as an array that broadcasts to it."""
        low, high = self.known.get(name, ANY)
        return low if low.ndim and (low == high).all() and np.isfinite(low).all() else None

    def note(self, name: str, bounds: Range) -> None:
        """Keep what is known of a value, if it is anything, on top of what was known before."""
        shape = self.shape(name)
        low, high = (b.reshape((1,) * (len(shape) - b.ndim) + b.shape) for b in map(np.asarray, bounds))
        low, high = np.where(np.isnan(low), -np.inf, low), np.where(np.isnan(high), np.inf, high)
        moving = tuple(k for k in range(len(shape)) if self._moves(name, k))
        low, high = low.min(axis=moving, keepdims=True), high.max(axis=moving, keepdims=True)
        if any(n not in (1, size) for n, size in zip(low.shape, shape, strict=True)):
            return  # broadcast in a way that was not foreseen
        if name in self.known:
            low, high = np.maximum(low, self.known[name][0]), np.minimum(high, self.known[name][1])
        if np.isfinite(low).any() or np.isfinite(high).any():
            self.known[name] = self._short((low, high))

    def note_axis(self, name: str, axis: int, bounds: Range) -> None:
        """Keep what is known of the positions of one axis."""
        behind = len(self.shape(name)) - 1 - axis
        low, high = (np.broadcast_to(side, self.shape(name)[axis]) for side in bounds)
        self.note(name, (low.reshape(-1, *(1,) * behind), high.reshape(-1, *(1,) * behind)))

    def _moves(self, name: str, axis: int) -> bool:
        return Axis(name, axis) in self.view.dynamic

    @staticmethod
    def _short(bounds: Range) -> Range:
        """The same with axes of equal positions, and the longest until it is small enough, drawn together."""
        low, high = bounds
        low, high = np.broadcast_arrays(low, high)
        for axis in sorted(range(low.ndim), key=lambda k: -low.shape[k]):
            if low.shape[axis] > 1:
                least, most = low.min(axis=axis, keepdims=True), high.max(axis=axis, keepdims=True)
                if low.size > LARGE or ((low == least).all() and (high == most).all()):
                    low, high = least, most
        return low, high

    # One node --------------------------------------------------------------------------------------------------------

    def visit(self, node: OpNode) -> None:
        """Add what follows for the outputs of a node."""
        kind, y = node.op_type, node.outputs[0]
        if node.domain not in ("", "ai.onnx", "com.microsoft") or not y or not self.shape(y):
            return
        with np.errstate(all="ignore"):
            if kind in RULES:
                RULES[kind](self, node)
            elif kind in UNARY:
                self.note(y, _unary(node, self.of(node.inputs[0]), self))
            elif kind == "Gather" and self.array(node.inputs[1]) is None:
                self.fetch(node)
            elif kind in MOVES or (kind in PICKS and self._settled(node.inputs[0], y)):
                self.move(node)
            elif kind in PICKS and kind != "Tile" and len(self.shape(y)) == len(node.shape(0)):
                same = [m == n and not self._moves(y, k)
                        for k, (m, n) in enumerate(zip(node.shape(0), self.shape(y), strict=True))]  # fmt: skip
                self.note(y, self.drawn(self.of(node.inputs[0]), tuple(k for k, kept in enumerate(same) if not kept)))

    @staticmethod
    def drawn(bounds: Range, axes: tuple[int, ...]) -> Range:
        """Positions of these axes drawn together."""
        low, high = bounds
        return (low.min(axis=axes, keepdims=True), high.max(axis=axes, keepdims=True)) if low.ndim else bounds

    def _settled(self, x: str, y: str) -> bool:
        """Whether what happens between two values happens on static axes."""
        a, b = (self.shape(name) for name in (x, y))
        moving = [[self._moves(name, axis) for axis in range(len(self.shape(name)))] for name in (x, y)]
        return not any(map(any, moving)) or (
            moving[0] == moving[1] and all(m == n for m, n, moves in zip(a, b, moving[0], strict=True) if moves)
        )

    def move(self, node: OpNode) -> None:
        """An operator whose outputs hold elements of its inputs: run it on the bounds of every element."""
        data = [name for name in (node.inputs if node.op_type == "Concat" else node.inputs[:1]) if name]
        if not any(self.of(name)[0].ndim for name in data):
            return
        if any(prod(self.shape(name)) > MOST for name in (*data, *node.outputs) if name):
            return
        given = {name: self.array(name) for name in node.inputs if name and name not in data}
        given |= {name: node.consts[name] for name in given if name in node.consts}
        if any(value is None for value in given.values()):
            if node.op_type != "Reshape":
                return
            given = {node.inputs[1]: np.array(self.shape(node.outputs[0]), np.int64)}
        fixed = {name: value for name, value in given.items() if value is not None}
        sides = [{name: np.broadcast_to(self.of(name)[k], self.shape(name)) for name in data} for k in (0, 1)]
        lowest, highest = (run_node(node, fixed | side) for side in sides)
        if lowest is None or highest is None:
            return
        for name, low, high in zip(node.outputs, lowest, highest, strict=False):
            if name and low.shape == self.shape(name):
                self.note(name, (low, high))
        same = node.op_type in ("Squeeze", "Unsqueeze", "Reshape") and node.shape(0)[-1:] == node.out_shape(0)[-1:]
        if same and node.inputs[0] in self.sums_to_one:
            self.sums_to_one.add(node.outputs[0])

    def fetch(self, node: OpNode) -> None:
        """Gather of rows that are not known: the other axes pass through."""
        low, high = self.of(node.inputs[0])
        if low.ndim:
            axis, rank = node.attr("axis", 0) % low.ndim, len(node.shape(1))
            low, high = self.drawn((low, high), (axis,))
            shape = (*low.shape[:axis], *(1,) * rank, *low.shape[axis + 1 :])
            self.note(node.outputs[0], (low.reshape(shape), high.reshape(shape)))


def _unary(node: OpNode, bounds: Range, known: Bounds) -> Range:
    """f(x), where f is known to the reference implementation or spelled out here."""
    low, high = bounds
    kind = node.op_type
    extra = {name: known.array(name) for name in node.inputs[1:] if name}
    if kind == "Cast" and node.attr("to", 1) in (1, 10, 11, 16):
        return bounds
    if kind == "Neg":
        return -high, -low
    if any(value is None for value in extra.values()):
        return ANY
    fixed = {name: value for name, value in extra.items() if value is not None}

    def f(x: Array) -> Array:
        if kind == "QuickGelu":
            return np.asarray(x / (1 + np.exp(-node.attr("alpha", 1.702) * x)))
        results = run_node(node, fixed | {node.inputs[0]: np.atleast_1d(x).astype(np.float32)})
        return np.full(np.shape(x), np.nan) if results is None else results[0].astype(np.float64).reshape(np.shape(x))

    same = low == high
    falling = kind in ("LeakyRelu", "Elu", "Celu", "HardSigmoid") and node.attr("alpha", 1.0) < 0
    if kind in MONOTONE and not falling and not (kind == "Selu" and node.attr("gamma", 1.0) < 0):
        return f(low), np.where(same, f(low), f(high))
    value = f(np.where(same, low, 0.0))
    least = 0.0 if kind in POSITIVE else -np.inf
    return np.where(same, value, least), np.where(same, value, np.inf)


def span(bounds: Range) -> Range:
    """The lowest and the highest of all."""
    return bounds[0].min(), bounds[1].max()


def _times(a: Range, b: Range) -> Range:
    """Interval product; nothing times anything is nothing."""
    corners = [np.where((x == 0) | (y == 0), 0.0, x * y) for x in a for y in b]
    return np.minimum.reduce(corners), np.maximum.reduce(corners)


def _add(ranges: list[Range]) -> Range:
    low, high = ranges[0]
    for a, b in ranges[1:]:
        low, high = low + a, high + b
    return low, high


def _sub(ranges: list[Range]) -> Range:
    (a, b), (c, d) = ranges
    return a - d, b - c


def _mul(ranges: list[Range]) -> Range:
    return _times(ranges[0], ranges[1])


def _div(ranges: list[Range]) -> Range:
    (a, b), (c, d) = ranges
    apart = (c > 0) | (d < 0)
    low, high = _times((a, b), (np.where(apart, 1 / d, -np.inf), np.where(apart, 1 / c, np.inf)))
    unsure = (c == 0) & (d == 0)  # 0 / 0 is not 0
    return np.where(unsure, -np.inf, low), np.where(unsure, np.inf, high)


def _pow(ranges: list[Range]) -> Range:
    (a, b), (c, d) = ranges
    same = (a == b) & (c == d)
    value = np.power(np.where(same, a, 1.0), np.where(same, c, 1.0))
    even = (c == d) & (c > 0) & (c % 2 == 0)
    return np.where(same, value, np.where(even, 0.0, -np.inf)), np.where(same, value, np.inf)


def _prelu(ranges: list[Range]) -> Range:
    (a, b), slope = ranges
    low, high = _times((np.minimum(a, 0), np.minimum(b, 0)), slope)
    return low + np.maximum(a, 0), high + np.maximum(b, 0)


def _hull(ranges: list[Range]) -> Range:
    return reduce(np.minimum, [low for low, _ in ranges]), reduce(np.maximum, [high for _, high in ranges])


NARY: Mapping[str, Callable[[list[Range]], Range]] = {
    "Add": _add,
    "Sum": _add,
    "Sub": _sub,
    "Mul": _mul,
    "Div": _div,
    "Pow": _pow,
    "PRelu": _prelu,
    "Max": lambda ranges: (reduce(np.maximum, [r[0] for r in ranges]), reduce(np.maximum, [r[1] for r in ranges])),
    "Min": lambda ranges: (reduce(np.minimum, [r[0] for r in ranges]), reduce(np.minimum, [r[1] for r in ranges])),
}


def _nary(bounds: Bounds, node: OpNode) -> None:
    if node.opset >= 7:
        bounds.note(node.outputs[0], NARY[node.op_type]([bounds.of(name) for name in node.inputs]))


def _where(bounds: Bounds, node: OpNode) -> None:
    bounds.note(node.outputs[0], _hull([bounds.of(name) for name in node.inputs[1:]]))


def _pass(bounds: Bounds, node: OpNode) -> None:
    """Y = X, perhaps stretched."""
    bounds.note(node.outputs[0], bounds.of(node.inputs[0]))
    if node.inputs[0] in bounds.sums_to_one and node.out_shape(0)[-1] == node.shape(0)[-1]:
        bounds.sums_to_one.add(node.outputs[0])


def _dropout(bounds: Bounds, node: OpNode) -> None:
    """Y = X, unless it is told to train."""
    if not node.has(2) and (node.opset >= 7 or node.attr("is_test", 0)):
        _pass(bounds, node)


def _gelu(bounds: Bounds, node: OpNode) -> None:
    """gelu(X + bias) where both are numbers, by one formula or the other."""
    attrs = {"approximate": "tanh"} if node.op_type == "FastGelu" else dict(node.attrs)
    plain = OpNode("", "Gelu", "", 20, attrs, ("x",), ("y",), {}, {})
    bounds.note(node.outputs[0], _unary(plain, _add([bounds.of(name) for name in node.inputs[:2] if name]), bounds))


def _dequantised(node: OpNode, codes: Array, scale: Array, *zero: Array) -> Array | None:
    """(codes - zero) * scale, one of each for all or for each position of an axis."""
    if scale.size > 1 and (scale.ndim != 1 or node.attr("block_size", 0)):
        return None
    shape = [1] * codes.ndim
    if scale.size > 1:
        shape[node.attr("axis", 1) % codes.ndim] = scale.size
    point = zero[0].reshape(shape) if zero else np.zeros(shape)
    return np.asarray((codes.astype(np.float64) - point) * scale.reshape(shape))


def _quantise(bounds: Bounds, node: OpNode) -> None:
    """Codes grow with what they stand for; there is one scale for all."""
    scale, point = bounds.array(node.inputs[1]), bounds.array(node.inputs[2]) if node.has(2) else None
    if scale is None or scale.size > 1 or point is None or point.dtype.kind not in "iu" or float(scale.min()) <= 0:
        return
    step, zero, ends = float(scale.min()), float(point.min()), np.iinfo(point.dtype)

    def code(x: Array) -> Array:
        return np.asarray(np.clip(np.rint(x / step) + zero, ends.min, ends.max))

    low, high = bounds.of(node.inputs[0])
    bounds.note(node.outputs[0], (code(low), code(high)))


def _dequantise(bounds: Bounds, node: OpNode) -> None:
    scale, point = bounds.array(node.inputs[1]), bounds.array(node.inputs[2]) if node.has(2) else np.zeros(1)
    if scale is None or scale.size > 1 or point is None or float(scale.min()) <= 0:
        return
    step, zero = float(scale.min()), float(point.min())
    low, high = bounds.of(node.inputs[0])
    bounds.note(node.outputs[0], ((low - zero) * step, (high - zero) * step))


def _einsum(bounds: Bounds, node: OpNode) -> None:
    """Where one factor is nothing, the product is."""
    left, _, right = str(node.attrs["equation"]).replace(" ", "").partition("->")
    terms = left.split(",")
    if "." in left or not right or any(len(set(term)) < len(term) for term in terms):
        return
    for axis, letter in enumerate(right):
        zero = np.zeros(node.out_shape(0)[axis], np.bool_)
        for name, term in zip(node.inputs, terms, strict=True):
            low, high = bounds.at(name, term.index(letter)) if letter in term else span(bounds.of(name))
            zero |= (low == 0) & (high == 0)
        bounds.note_axis(node.outputs[0], axis, (np.where(zero, 0.0, -np.inf), np.where(zero, 0.0, np.inf)))


def _softmax(bounds: Bounds, node: OpNode) -> None:
    y, rank = node.outputs[0], len(node.shape(0))
    bounds.note(y, (np.array(0.0), np.array(1.0)))
    if node.attr("axis", 1 if node.opset < 13 else -1) % rank == rank - 1:
        bounds.sums_to_one.add(y)


def contract(x: Range, positive: Array, negative: Array) -> Range:
    """Bounds of W x: `positive` and `negative` are float64[out, in], sums of what is above and below zero in W."""
    some = (positive != 0) | (negative != 0)
    low, high = (np.where(np.isfinite(side), side, 0.0) for side in x)
    open_low, open_high = (~np.isfinite(side) for side in x)
    constant = ~(some & (x[0] != x[1])).any(axis=1)
    least, most = positive @ low + negative @ high, positive @ high + negative @ low
    least[((positive > 0) & open_low).any(axis=1) | ((negative < 0) & open_high).any(axis=1)] = -np.inf
    most[((positive > 0) & open_high).any(axis=1) | ((negative < 0) & open_low).any(axis=1)] = np.inf
    value = (positive + negative) @ np.where(x[0] == x[1], low, 0.0)
    return np.where(constant, value, least), np.where(constant, value, most)


def pads(node: OpNode) -> bool:
    """Whether a convolution reads zeros beyond the border."""
    auto = node.attr("auto_pad", "NOTSET")
    auto = auto.decode() if isinstance(auto, bytes) else auto
    return auto not in ("NOTSET", "VALID") or any(node.attr("pads", ()))


def _conv(bounds: Bounds, node: OpNode) -> None:
    """Each output channel: bias plus the sum over inputs and taps; zeros beyond the border are an input too."""
    weight = bounds.array(node.inputs[1])
    bias = bounds.array(node.inputs[2]) if node.has(2) else np.zeros(1)
    if weight is None or bias is None or node.has(3) or node.attr("activation", ""):
        return
    groups, (out, inside) = node.attr("group", 1), weight.shape[:2]
    taps = weight.reshape(out, inside, -1).astype(np.float64)
    low, high = bounds.at(node.inputs[0], 1)
    if pads(node):
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    parts = []
    for g in range(groups):
        rows, columns = slice(g * out // groups, (g + 1) * out // groups), slice(g * inside, (g + 1) * inside)
        positive, negative = np.maximum(taps[rows], 0).sum(axis=2), np.minimum(taps[rows], 0).sum(axis=2)
        parts.append(contract((low[columns], high[columns]), positive, negative))
    sides = [np.concatenate(side) + bias for side in zip(*parts, strict=True)]
    bounds.note_axis(node.outputs[0], 1, (sides[0], sides[1]))


def _gemm(bounds: Bounds, node: OpNode) -> None:
    weight = bounds.array(node.inputs[1])
    if weight is None or node.attr("activation", ""):
        return
    weight = (weight if node.attr("transB", 0) else weight.T).astype(np.float64) * node.attr("alpha", 1.0)
    x = bounds.at(node.inputs[0], 0 if node.attr("transA", 0) else 1)
    low, high = contract(x, np.maximum(weight, 0), np.minimum(weight, 0))
    if node.has(2):
        shape, beta = node.shape(2), np.array(node.attr("beta", 1.0))
        own = bool(shape) and shape[-1] == len(low) > 1
        more = bounds.at(node.inputs[2], len(shape) - 1) if own else span(bounds.of(node.inputs[2]))
        low, high = _add([(low, high), _times(more, (beta, beta))])
    bounds.note_axis(node.outputs[0], 1, (low, high))


def _matmul(bounds: Bounds, node: OpNode) -> None:
    """Weights on either side; of two activations, zeros stay zeros, and rows that sum to one take means."""
    (a, b), y = node.inputs[:2], node.outputs[0]
    m, n = len(node.shape(0)), len(node.shape(1))
    right, left = bounds.array(b), bounds.array(a)
    rank = len(bounds.shape(y))
    if right is not None and n == 2:
        weight = right.T.astype(np.float64)
        found = contract(bounds.at(a, m - 1), np.maximum(weight, 0), np.minimum(weight, 0))
        bounds.note_axis(y, rank - 1, found)
    if left is not None and m == 2 and n > 1:
        weight = left.astype(np.float64)
        found = contract(bounds.at(b, n - 2), np.maximum(weight, 0), np.minimum(weight, 0))
        bounds.note_axis(y, rank - 2, found)
    if m < 2 or n < 2:
        return
    rows, columns = (bounds.of(name) for name in (a, b))
    rows = bounds.drawn(rows, (rows[0].ndim - 1,))
    columns = bounds.drawn(columns, (columns[0].ndim - 2,))
    zero = ((rows[0] == 0) & (rows[1] == 0)) | ((columns[0] == 0) & (columns[1] == 0))
    low, high = columns if a in bounds.sums_to_one else ANY
    bounds.note(y, (np.where(zero, 0.0, low), np.where(zero, 0.0, high)))


def _batch_norm(bounds: Bounds, node: OpNode) -> None:
    arrays = [bounds.array(name) for name in node.inputs[1:5]]
    if node.attr("training_mode", 0) or any(array is None for array in arrays):
        return
    scale, shift, mean, variance = (np.asarray(array, np.float64) for array in arrays)
    scale = np.where(scale == 0, 0.0, scale / np.sqrt(variance + node.attr("epsilon", 1e-5)))
    low, high = _times(_sub([bounds.at(node.inputs[0], 1), (mean, mean)]), (scale, scale))
    bounds.note_axis(node.outputs[0], 1, (low + shift, high + shift))


def _norm(bounds: Bounds, node: OpNode) -> None:
    """What is normalised over n numbers is at most sqrt(n) in size; a gain of zero leaves the shift."""
    rank, gain = len(node.shape(0)), len(node.shape(1))
    over = node.shape(0)[node.attr("axis", -1) % rank :]
    own = node.op_type == "InstanceNormalization"
    most = np.array(np.inf if own else float(prod(over)) ** 0.5)
    if gain not in (1, rank) or (not own and len(over) != 1):
        return
    size = node.shape(0)[1 if own else -1]
    ranges = [bounds.at(name, gain - 1) for name in node.inputs[1:3] if name]
    low, high = _times((-most, most), ranges[0]) if len(ranges[0][0]) == size else ANY
    if len(ranges) > 1:
        low, high = low + ranges[1][0], high + ranges[1][1]
    bounds.note_axis(node.outputs[0], 1 if own else rank - 1, (low, high))


def _pool(bounds: Bounds, node: OpNode) -> None:
    low, high = bounds.at(node.inputs[0], 1)
    if node.op_type == "AveragePool" and pads(node) and node.attr("count_include_pad", 0):
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    bounds.note_axis(node.outputs[0], 1, (low, high))


def _resize(bounds: Bounds, node: OpNode) -> None:
    """Weights between neighbours sum to one, and lie between zero and one unless they are cubic."""
    if node.attr("coordinate_transformation_mode") == "tf_crop_and_resize":
        return
    changed = tuple(k for k, size in enumerate(node.shape(0)) if size != node.out_shape(0)[k])
    low, high = bounds.drawn(bounds.of(node.inputs[0]), changed)
    cubic = (low != high) & (node.attr("mode", "nearest") == "cubic")
    bounds.note(node.outputs[0], (np.where(cubic, -np.inf, low), np.where(cubic, np.inf, high)))


def _reduce(bounds: Bounds, node: OpNode) -> None:
    """Means, maxima and minima stay between the bounds; sums of nothing are nothing."""
    rank = len(node.shape(0))
    axes = node.attrs["axes"] if "axes" in node.attrs else node.const(1)
    low, high = bounds.of(node.inputs[0])
    if not low.ndim or (axes is None and (node.has(1) or node.attr("noop_with_empty_axes", 0))):
        return
    reduced = tuple(sorted({int(a) % rank for a in (range(rank) if axes is None else np.atleast_1d(axes))}))
    low, high = bounds.drawn((low, high), reduced)
    if not node.attr("keepdims", 1):
        low, high = np.squeeze(low, reduced), np.squeeze(high, reduced)
    if node.op_type not in ("ReduceMean", "ReduceMax", "ReduceMin"):
        zero = (low == 0) & (high == 0)
        low, high = np.where(zero, 0.0, -np.inf), np.where(zero, 0.0, np.inf)
    bounds.note(node.outputs[0], (low, high))


RULES: dict[str, Callable[[Bounds, OpNode], None]] = {
    **dict.fromkeys(NARY, _nary),
    "Expand": _pass,
    "Dropout": _dropout,
    **dict.fromkeys(("BiasGelu", "FastGelu", "Gelu"), _gelu),
    **dict.fromkeys(("Conv", "FusedConv"), _conv),
    **dict.fromkeys(("Gemm", "FusedGemm"), _gemm),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"), _norm),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _pool),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    **dict.fromkeys((f"Reduce{kind}" for kind in "Mean Max Min Sum L1 L2 SumSquare".split()), _reduce),
    "DequantizeLinear": _dequantise,
    "Einsum": _einsum,
    "InstanceNormalization": _norm,
    "QuantizeLinear": _quantise,
    "BatchNormalization": _batch_norm,
    "MatMul": _matmul,
    "Softmax": _softmax,
    "Where": _where,
}
