"""One operator of a site as repair sees it: its rows, and its weight as a matrix whichever way it is stored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune.flow import Flow
from onnxprune.infer import attributes
from onnxprune.operators import Operator, Slot
from onnxprune.sites import Site, scaled
from onnxprune.types import Array, Mask, Positions
from onnxprune.verify import spread

Key = str | Slot  # of a weight: what it is tied by, or where it alone is read
Levels = tuple[Array, Array]  # scale and zero point of each element that stands for another number


class Part:
    """One operator of a site: its rows, and its weight as a matrix whichever way it is stored."""

    def __init__(self, flow: Flow, operator: Operator, x: Array) -> None:
        """`x` is float32[groups, rows, columns], or one group for all."""
        self.operator, self.layout, self.key = operator, operator.layout, _key(operator)
        self.stored = flow.array(operator.weight)
        self.levels = _levels(flow, operator.weight)
        self.moved: dict[Slot, Array] = {}
        self.changed = False
        self.matrix = self.layout.matrix(_meant(self.stored, self.levels))
        self.groups, _, outputs = self.matrix.shape
        self.outputs = self.groups * outputs
        self.patch = self.layout.patch
        self.x = np.broadcast_to(x, (self.groups, *x.shape[1:]))
        self._chain(flow)

    def _vector(self, slot: Slot, array: Array) -> Array:
        """[outputs]: what is stored besides the weight, in the order of the outputs."""
        if slot == self.operator.bias:
            return np.broadcast_to(self.layout.bias(array), self.outputs)
        return self.layout.spread(array, self.stored.shape)

    def _chain(self, flow: Flow) -> None:
        """What the steps make of the product: product * gain + constant; where a shift can be put, and its gain."""
        gain, constant = np.ones(self.outputs), np.zeros(self.outputs)
        self.home: tuple[Slot, Array, Array] | None = None

        def read(slot: Slot) -> Array:
            return self._vector(slot, _meant(flow.array(slot), _levels(flow, slot)))

        def settle(slot: Slot) -> None:
            if len(np.unique(self._places(flow.array(slot), slot))) == self.outputs:
                self.home = (slot, flow.array(slot), np.ones(self.outputs))
                self.shades, self.settled = _levels(flow, slot), flow.name(slot)

        if self.operator.bias is not None:
            constant = constant + read(self.operator.bias)
            settle(self.operator.bias)
        for step in self.operator.steps:
            values = [read(slot) for slot in step.slots]
            if step.kind == "add":
                constant = constant + values[0]
                if self.home is None and not step.fixed:
                    settle(step.slots[0])
                continue
            factor, offset = values[0], np.zeros(self.outputs)
            if step.kind == "norm":
                factor = values[0] / np.sqrt(values[3] + step.epsilon)
                offset = values[1] - values[2] * factor
            gain, constant = gain * factor, constant * factor + offset
            if self.home is not None:
                self.home = (self.home[0], self.home[1], self.home[2] * factor)
            if step.kind == "norm" and not step.fixed:
                settle(step.slots[1])
        self.gain, self.constant = gain, constant

    def _places(self, array: Array, slot: Slot) -> Positions:
        """int64[outputs]: where in what is stored each output has its number."""
        return self._vector(slot, np.arange(array.size).reshape(array.shape))

    def effective(self) -> Array:
        """float64[groups, columns, outputs]: the weight with the gain of the steps; not to be written to."""
        return self.matrix if (self.gain == 1).all() else self.matrix * self.gain.reshape(self.groups, 1, -1)

    def output(self) -> Array:
        """float32[rows, outputs]: what the operator adds to the site."""
        product = self.x @ self.effective().astype(np.float32)
        return np.asarray(product.swapaxes(0, 1).reshape(product.shape[1], -1) + self.constant.astype(np.float32))

    def grid(self, outputs: slice = slice(None)) -> tuple[Array, Array, Array]:
        """step, low and high of the values that `effective` can have: float64[groups, columns, outputs] each."""
        if self.levels is None:
            nothing = np.zeros_like(self.matrix[:, :, outputs])
            return nothing, nothing, nothing
        step, point = (self.layout.matrix(array)[:, :, outputs] for array in self.levels)
        limits, gain = np.iinfo(self.stored.dtype), self.gain.reshape(self.groups, 1, -1)[:, :, outputs]
        return step * gain, limits.min - point, limits.max - point

    def runs(self, m: int) -> Positions:
        """int64[runs, m]: columns of which the channels follow one another, at one place of the patch."""
        channels = np.arange(self.x.shape[2] // self.patch).reshape(-1, m) * self.patch
        return np.asarray((channels[None] + np.arange(self.patch)[:, None, None]).reshape(-1, m))

    def add(self, change: Array, keep: Mask | None = None, outputs: slice = slice(None)) -> None:
        """Add float64[groups, columns, outputs], with the gain in it, to the weight; all but `keep` becomes zero.

        `outputs` says which ones these are.
        """
        gain = self.gain.reshape(self.groups, 1, -1)[:, :, outputs]
        usable = np.abs(gain) > 1e-6 * np.abs(self.gain).max()
        self.matrix[:, :, outputs] += np.divide(
            change, gain, out=np.zeros_like(change), where=np.broadcast_to(usable, change.shape)
        )
        if keep is not None:
            self.matrix = np.where(keep, self.matrix, 0)
        self.changed = True

    def changes(self) -> dict[Slot, Array]:
        """What is stored differently from now on."""
        if not self.changed:
            return self.moved
        weight = self.layout.stored(self.matrix, _meant(self.stored, self.levels))
        return self.moved | {self.operator.weight: _written(weight, self.stored, self.levels)}

    def shift(self, change: Array) -> None:
        """Add float64[outputs] to what the operator adds to the site."""
        if self.home is None:
            return
        slot, stored, gain = self.home
        usable = np.abs(gain) > 1e-6 * np.abs(gain).max()
        found = _meant(stored, self.shades).reshape(-1)
        found[self._places(stored, slot)] += np.divide(change, gain, out=np.zeros_like(change), where=usable)
        self.moved[slot] = _written(found.reshape(stored.shape), stored, self.shades)


def total(parts: Sequence[Part], others: Sequence[Array]) -> Array:
    """float32[rows, channels]: the sum of what operators make, and of other values."""
    return np.asarray(sum((*(part.output() for part in parts), *others), np.zeros(1, np.float32)))


def numbers(flow: Flow, operator: Operator, arrays: Sequence[Array]) -> Sequence[Array]:
    """What an operator reads, as numbers where it reads integers that stand for some."""
    if not operator.scaled:
        return arrays
    scale, point = (flow.array((operator.node, operator.reads + k)).astype(np.float32) for k in (1, 2))
    return [(array.astype(np.float32) - point) * scale for array in arrays]


def takes(site: Site, flow: Flow, whole: bool, rows: int) -> int:
    """Bytes that fitting a site takes, roughly: weights, products and rows, all a few times over.

    Products are of rows where there are fewer of them, unless second moments as a `whole` are needed, as codes do.
    """
    weights = columns = wide = width = 0
    for operator in site.operators:
        groups, reads, outputs = operator.layout.sizes(flow.shape(operator.weight))
        width = groups * outputs
        weights += groups * reads * outputs * (3 if operator.coded else 1)
        columns += reads
        wide += groups * reads
    whole |= any(operator.coded for operator in site.operators)
    products = columns if whole else min(columns, rows)
    return 8 * (3 * weights + 6 * products**2) + 32 * rows * (wide + width)


def _key(operator: Operator) -> Key:
    return operator.tie or operator.weight


def _meant(array: Array, levels: Levels | None) -> Array:
    """float64: the numbers that an array stands for."""
    return array.astype(np.float64) if levels is None else (array.astype(np.float64) - levels[1]) * levels[0]


def _written(values: Array, like: Array, levels: Levels | None) -> Array:
    """Numbers as they are stored, in the type of an array: the nearest codes, where codes stand for them."""
    if levels is not None:
        limits = np.iinfo(like.dtype)
        values = np.clip(np.rint(values / levels[0]) + levels[1], limits.min, limits.max)
    return np.ascontiguousarray(values, like.dtype)


def _levels(flow: Flow, slot: Slot) -> Levels | None:
    """Where what is stored for one input of one node are codes."""
    node, (name, k) = flow.nodes[flow.maker[slot[0]]], slot

    def stored(k: int) -> Array:
        return flow.array((name, k)).astype(np.float64)

    point = np.zeros(1)
    if node.op_type == "DequantizeLinear" and k == 0:
        scale, axis = stored(1), int(attributes(node).get("axis", 1))  # type: ignore[call-overload]
        point = stored(2) if len(node.inputs) > 2 and node.inputs[2] is not None else point
    elif (how := scaled(node)) is not None and k == 3:
        scale, point, axis = stored(4), stored(5), how[0]
    elif how is not None and k == how[1]:
        scale, axis = stored(1) * stored(4), -1
    else:
        return None
    array = flow.array(slot)
    return spread(scale, array, axis), spread(point, array, axis)
