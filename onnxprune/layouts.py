"""How linear operators multiply: a weight as a matrix and an input as rows, whichever way the two are laid out.

There is one class for each family. All of them answer the same questions, so that whoever fits a matrix need not know
what operator it belongs to. A layout holds no size that a removal changes but the number of conv groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Protocol

import numpy as np

from onnxprune.types import Array, Positions, Shape

ONE = "1"  # in place of a letter: an axis of length one, stretched


class Layout(Protocol):
    """One way to multiply. The result's channels lie along `axes`, in this order; all other axes in order are rows.

    `patch` columns in a row belong to one channel of the input.
    """

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes of the result that are made by the weight."""
        ...

    @property
    def summed(self) -> tuple[int, ...]:
        """Axes of the input of which each output sums over all positions."""
        ...

    @property
    def inner(self) -> tuple[int, ...]:
        """Axes of the weight that belong to these."""
        ...

    @property
    def patch(self) -> int:
        """Columns of one channel."""
        return 1

    def sizes(self, weight: Shape) -> tuple[int, int, int]:
        """(groups, columns, outputs) of `matrix`."""
        ...

    def matrix(self, weight: Array) -> Array:
        """[groups, columns, outputs]: what the rows are multiplied by, group by group."""
        ...

    def stored(self, matrix: Array, weight: Array) -> Array:
        """The weight, with this matrix in the place of its own."""
        ...

    def bias(self, array: Array) -> Array:
        """What is stored as the operator's own bias, in the order of the channels; one number where it is one."""
        return array.reshape(-1)

    def spread(self, array: Array, weight: Shape) -> Array:
        """[channels]: what is stored for the steps behind the operator, one number for each channel or for all."""
        groups, _, outputs = self.sizes(weight)
        return np.broadcast_to(array.reshape(-1), groups * outputs)

    def rows(self, x: Array, chosen: Positions) -> Array:
        """float32[groups, rows, columns]: these rows of what the operator reads."""
        ...

    def shape(self, x: Shape, weight: Shape) -> Shape:
        """The shape of the result."""
        ...


@dataclass(frozen=True)
class Contraction(Layout):
    """A sum of products in letters, one for each axis of x, weight and result: Gemm, MatMul, Einsum.

    Letters of x and weight that the result lacks are columns, those of all three are groups, those that x lacks are
    outputs, and those that the weight lacks are rows. ONE stands for an axis of length one that is stretched.
    """

    x: str
    weight: str
    y: str

    @cached_property
    def groups(self) -> str:
        """Letters of groups."""
        return "".join(a for a in self.y if a in self.x and a in self.weight)

    @cached_property
    def columns(self) -> str:
        """Letters that are summed over."""
        return "".join(a for a in self.weight if a in self.x and a not in self.y and a != ONE)

    @cached_property
    def outputs(self) -> str:
        """Letters of the weight and the result alone."""
        return "".join(a for a in self.y if a in self.weight and a not in self.x)

    @cached_property
    def kept(self) -> str:
        """Letters of rows."""
        return "".join(a for a in self.y if a in self.x and a not in self.weight)

    @property
    def valid(self) -> bool:
        """Whether every letter is one of these, and none comes twice."""
        terms = [[a for a in term if a != ONE] for term in (self.x, self.weight, self.y)]
        known = {*self.groups, *self.columns, *self.outputs, *self.kept}
        return all(len(set(term)) == len(term) and known.issuperset(term) for term in terms) and ONE not in self.y

    @property
    def plain(self) -> bool:
        """Whether x [..., columns] is multiplied by one matrix, to [..., outputs]."""
        ends = self.x[-1] == self.columns and self.y[-1] == self.outputs
        return ends and len(self.weight) == 2 and not self.groups

    @property
    def transposed(self) -> bool:
        """Whether one matrix is stored as [outputs, columns]."""
        return self.weight == self.outputs + self.columns

    @property
    def axes(self) -> tuple[int, ...]:
        """See Layout: groups before outputs."""
        return tuple(self.y.index(a) for a in self.groups + self.outputs)

    @property
    def summed(self) -> tuple[int, ...]:
        """See Layout."""
        return tuple(self.x.index(a) for a in self.columns)

    @property
    def inner(self) -> tuple[int, ...]:
        """See Layout."""
        return tuple(self.weight.index(a) for a in self.columns)

    def sizes(self, weight: Shape) -> tuple[int, int, int]:
        """See Layout."""
        size = dict(zip(self.weight, weight, strict=True))
        groups, columns, outputs = (
            prod(size[a] for a in letters) for letters in (self.groups, self.columns, self.outputs)
        )
        return groups, columns, outputs

    def matrix(self, weight: Array) -> Array:
        """See Layout."""
        return _in_order(weight, self.weight, self.groups + self.columns + self.outputs).reshape(
            self.sizes(weight.shape)
        )

    def stored(self, matrix: Array, weight: Array) -> Array:
        """See Layout."""
        size = dict(zip(self.weight, weight.shape, strict=True))
        letters = self.groups + self.columns + self.outputs
        apart = matrix.reshape([size[a] for a in letters])
        return _in_order(apart, letters, self.weight.replace(ONE, "")).reshape(weight.shape)

    def spread(self, array: Array, weight: Shape) -> Array:
        """See Layout."""
        size, axes = dict(zip(self.weight, weight, strict=True)), self.axes
        if len(axes) == 1:
            return super().spread(array, weight)
        array = array.reshape((1,) * (len(self.y) - array.ndim) + array.shape)
        array = np.moveaxis(array, axes, range(-len(axes), 0)).reshape([array.shape[k] for k in axes])
        return np.broadcast_to(array, [size[a] for a in self.groups + self.outputs]).reshape(-1)

    def rows(self, x: Array, chosen: Positions) -> Array:
        """See Layout."""
        moved = _in_order(x, self.x, self.groups + self.kept + self.columns)
        groups, columns = moved.shape[: len(self.groups)], moved.shape[len(self.groups + self.kept) :]
        flat = moved.reshape(prod(groups), -1, prod(columns))
        return np.asarray(flat[:, chosen].astype(np.float32))

    def shape(self, x: Shape, weight: Shape) -> Shape:
        """See Layout."""
        size = dict(zip(self.x, x, strict=True)) | dict(zip(self.weight, weight, strict=True))
        return tuple(size[a] for a in self.y)


def _in_order(array: Array, letters: str, wanted: str) -> Array:
    """The axes of an array in another order, without those of length one."""
    real = letters.replace(ONE, "")
    array = array.reshape([n for n, a in zip(array.shape, letters, strict=True) if a != ONE])
    return array.transpose([real.index(a) for a in wanted])


def matmul(
    x: Shape, weight: Shape, *, left: bool = False, turned: tuple[bool, bool] = (False, False)
) -> Contraction | None:
    """numpy.matmul of an input and a weight of at least two axes each, with `left` of the weight and the input.

    Of what is `turned` (input, weight) the last two axes change places first. None where the result has an axis that
    neither has.
    """
    batch = [chr(ord("a") + k) for k in range(max(len(x), len(weight)) - 2)]
    found = _stretched(x[:-2], weight[:-2], batch)
    if found is None or not {*found[0], *found[1]}.issuperset(batch):
        return None
    inside, outside = found
    inner, outer = ("YZ", "XY") if left else ("XY", "YZ")
    inner, outer = (pair[::-1] if turns else pair for pair, turns in zip((inner, outer), turned, strict=True))
    return Contraction(inside + inner, outside + outer, "".join(batch) + "XZ")


def einsum(equation: str, k: int, x: Shape, weight: Shape) -> Contraction | None:
    """An equation of two operands, of which the weight is number `k`; None where it is no plain product."""
    left, _, y = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not y or len(terms) != 2:
        return None
    mine, others = terms[1 - k], terms[k]
    counts = [len(shape) - len(term.replace("...", "")) for term, shape in ((mine, x), (others, weight))]
    dots = [chr(0x3B1 + n) for n in range(max(counts) if "..." in left else 0)]
    starts = [term.index("...") if "..." in term else 0 for term in (mine, others)]
    own = [shape[at : at + n] for at, n, shape in zip(starts, counts, (x, weight), strict=True)]
    if (pair := _stretched(own[0], own[1], dots)) is None:
        return None
    inside, outside = pair
    found = Contraction(mine.replace("...", inside), others.replace("...", outside), y.replace("...", "".join(dots)))
    if len(found.x) != len(x) or len(found.weight) != len(weight):
        return None
    sizes = dict(zip(found.x, x, strict=True))
    return found if all(sizes.get(a, size) == size for a, size in zip(found.weight, weight, strict=True)) else None


def _stretched(x: Shape, weight: Shape, letters: Sequence[str]) -> tuple[str, str] | None:
    """The letters of two shapes that broadcast against each other; ONE for what is stretched, or one in both."""
    count = len(letters)
    mine, other = ((1,) * (count - len(shape)) + shape for shape in (x, weight))
    if any(a != b and 1 not in (a, b) for a, b in zip(mine, other, strict=True)):
        return None
    inside = [ONE if a == 1 < b else letter for letter, a, b in zip(letters, mine, other, strict=True)]
    outside = [ONE if b == 1 else letter for letter, b in zip(letters, other, strict=True)]
    return "".join(inside[count - len(x) :]), "".join(outside[count - len(weight) :])


@dataclass(frozen=True)
class Convolution(Layout):
    """Conv in any number of dimensions: X (n, c, *s), W (m, c / groups, *kernel) -> Y (n, m, *t).

    `auto_pad` as in ONNX; where it is a SAME, `pads` do not count.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    groups: int = 1
    auto_pad: str = "NOTSET"

    @property
    def axes(self) -> tuple[int, ...]:
        """See Layout."""
        return (1,)

    @property
    def summed(self) -> tuple[int, ...]:
        """See Layout."""
        return (1,) if self.groups == 1 else ()

    @property
    def inner(self) -> tuple[int, ...]:
        """See Layout."""
        return self.summed

    @property
    def patch(self) -> int:
        """See Layout."""
        return prod(self.kernel)

    @property
    def _extents(self) -> list[int]:
        return [d * (k - 1) + 1 for d, k in zip(self.dilations, self.kernel, strict=True)]

    def sizes(self, weight: Shape) -> tuple[int, int, int]:
        """See Layout."""
        return self.groups, weight[1] * self.patch, weight[0] // self.groups

    def matrix(self, weight: Array) -> Array:
        """See Layout."""
        return np.asarray(weight.reshape(self.groups, len(weight) // self.groups, -1).swapaxes(1, 2))

    def stored(self, matrix: Array, weight: Array) -> Array:
        """See Layout."""
        return np.asarray(matrix.swapaxes(1, 2).reshape(weight.shape))

    def rows(self, x: Array, chosen: Positions) -> Array:
        """See Layout."""
        return self._windows(_padded(x, self._around(x.shape[2:])), self.strides, chosen)

    def shape(self, x: Shape, weight: Shape) -> Shape:
        """See Layout."""
        around = self._around(x[2:])
        sizes = [
            (size + before + after - extent) // stride + 1
            for size, (before, after), extent, stride in zip(x[2:], around, self._extents, self.strides, strict=True)
        ]
        return (x[0], weight[0], *sizes)

    def _around(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """(before, after) of each spatial axis that is as long as this."""
        if not self.auto_pad.startswith("SAME"):
            return _pairs(self.pads)
        totals = [
            max((-(-size // stride) - 1) * stride + extent - size, 0)
            for size, stride, extent in zip(sizes, self.strides, self._extents, strict=True)
        ]
        return [_shared(total, self.auto_pad) for total in totals]

    def _windows(self, x: Array, strides: Sequence[int], chosen: Positions) -> Array:
        """float32[groups, rows, columns] of an input with its padding."""
        spatial = len(self.kernel)
        windows = np.lib.stride_tricks.sliding_window_view(x, self._extents, axis=tuple(range(2, 2 + spatial)))
        step = (slice(None), slice(None), *(slice(None, None, s) for s in strides))
        inner = (*(slice(None) for _ in range(spatial)), *(slice(None, None, d) for d in self.dilations))
        windows = windows[step][(slice(None), slice(None), *inner)]
        place = np.unravel_index(chosen, (windows.shape[0], *windows.shape[2 : 2 + spatial]))
        taken = np.moveaxis(windows, 1, 1 + spatial)[place]
        return np.asarray(taken.reshape(len(chosen), self.groups, -1).astype(np.float32).swapaxes(0, 1))


@dataclass(frozen=True)
class TransposedConvolution(Convolution):
    """ConvTranspose: a convolution of x with zeros between its elements by the kernel turned round.

    X (n, c, *s), W (c, m / groups, *kernel) -> Y (n, m, *t); `output_shape` says t, and padding follows.
    """

    output_padding: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()

    @property
    def inner(self) -> tuple[int, ...]:
        """See Layout."""
        return (0,) if self.groups == 1 else ()

    def sizes(self, weight: Shape) -> tuple[int, int, int]:
        """See Layout."""
        return self.groups, weight[0] // self.groups * self.patch, weight[1]

    def matrix(self, weight: Array) -> Array:
        """See Layout."""
        turned = np.flip(weight, tuple(range(2, weight.ndim)))
        apart = turned.reshape(self.groups, -1, *weight.shape[1:])
        return np.asarray(np.moveaxis(apart, 2, -1).reshape(self.sizes(weight.shape)))

    def stored(self, matrix: Array, weight: Array) -> Array:
        """See Layout."""
        apart = matrix.reshape(self.groups, -1, *self.kernel, weight.shape[1])
        return np.asarray(np.flip(np.moveaxis(apart, -1, 2).reshape(weight.shape), tuple(range(2, weight.ndim))))

    def rows(self, x: Array, chosen: Positions) -> Array:
        """See Layout."""
        lengths = [stride * (size - 1) + 1 for size, stride in zip(x.shape[2:], self.strides, strict=True)]
        apart = np.zeros((*x.shape[:2], *lengths), x.dtype)
        apart[(slice(None), slice(None), *(slice(None, None, stride) for stride in self.strides))] = x
        around = [
            (extent - 1 - before, extent - 1 - after + more)
            for extent, (before, after), more in zip(
                self._extents, self._around(x.shape[2:]), self.output_padding, strict=True
            )
        ]
        return self._windows(_padded(apart, around), [1] * len(self.kernel), chosen)

    def shape(self, x: Shape, weight: Shape) -> Shape:
        """See Layout."""
        around = self._around(x[2:])
        lengths = [whole - sum(pair) for whole, pair in zip(self._whole(x[2:]), around, strict=True)]
        return (x[0], weight[1] * self.groups, *lengths)

    def _whole(self, sizes: Sequence[int]) -> list[int]:
        """The result's length along each spatial axis, before padding is taken off."""
        return [
            stride * (size - 1) + more + extent
            for size, stride, more, extent in zip(sizes, self.strides, self.output_padding, self._extents, strict=True)
        ]

    def _around(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """(before, after) that each spatial axis of the result loses."""
        same = self.auto_pad.startswith("SAME")
        if not self.output_shape and not same:
            return _pairs(self.pads)
        wanted = self.output_shape or [size * stride for size, stride in zip(sizes, self.strides, strict=True)]
        totals = [max(whole - size, 0) for whole, size in zip(self._whole(sizes), wanted, strict=True)]
        return [_shared(total, self.auto_pad) for total in totals]


def _pairs(pads: Sequence[int]) -> list[tuple[int, int]]:
    half = len(pads) // 2
    return list(zip(pads[:half], pads[half:], strict=True))


def _shared(total: int, auto_pad: str) -> tuple[int, int]:
    """Padding on both sides, the odd one behind for SAME_UPPER, in front for others."""
    less, more = total // 2, total - total // 2
    return (less, more) if auto_pad == "SAME_UPPER" else (more, less)


def _padded(x: Array, around: Sequence[tuple[int, int]]) -> Array:
    """x with zeros around its spatial axes, cut where there are fewer than none."""
    cut = tuple(
        slice(max(-before, 0), size - max(-after, 0)) for size, (before, after) in zip(x.shape[2:], around, strict=True)
    )
    pads = [(max(before, 0), max(after, 0)) for before, after in around]
    return np.pad(x[(slice(None), slice(None), *cut)], [(0, 0), (0, 0), *pads])


@dataclass(frozen=True)
class Gates(Layout):
    """Some gates of a recurrent operator: W (directions, gates hidden, i) of its input, R of its state.

    The result (n, t, directions, gates hidden) is no value of a graph: what activations get. Each direction is a group.
    Of all `count` gates these are the `chosen` ones. The input is (t, n, i); the state, with `of_state`, is
    (n, t, directions, hidden).
    """

    count: int
    chosen: tuple[int, ...]
    of_state: bool = False

    @property
    def axes(self) -> tuple[int, ...]:
        """See Layout."""
        return 2, 3

    @property
    def summed(self) -> tuple[int, ...]:
        """See Layout."""
        return (3,) if self.of_state else (2,)

    @property
    def inner(self) -> tuple[int, ...]:
        """See Layout."""
        return (2,)

    def sizes(self, weight: Shape) -> tuple[int, int, int]:
        """See Layout."""
        return weight[0], weight[2], weight[1] // self.count * len(self.chosen)

    def matrix(self, weight: Array) -> Array:
        """See Layout."""
        apart = weight.reshape(len(weight), self.count, -1, weight.shape[2])[:, list(self.chosen)]
        return np.asarray(apart.reshape(len(weight), -1, weight.shape[2]).swapaxes(1, 2))

    def stored(self, matrix: Array, weight: Array) -> Array:
        """See Layout."""
        apart = weight.reshape(len(weight), self.count, -1, weight.shape[2]).copy()
        apart[:, list(self.chosen)] = matrix.swapaxes(1, 2).reshape(len(weight), len(self.chosen), *apart.shape[2:])
        return apart.reshape(weight.shape)

    def bias(self, array: Array) -> Array:
        """See Layout: (directions, 2 gates hidden), for the input and for the state."""
        apart = array.reshape(len(array), 2, self.count, -1)[:, int(self.of_state)]
        return apart[:, list(self.chosen)].reshape(-1)

    def rows(self, x: Array, chosen: Positions) -> Array:
        """See Layout; one group for all directions where they read the same."""
        if self.of_state:
            return np.asarray(x.reshape(-1, *x.shape[2:])[chosen].swapaxes(0, 1).astype(np.float32))
        return np.asarray(x.swapaxes(0, 1).reshape(-1, x.shape[2])[chosen][None].astype(np.float32))

    def shape(self, x: Shape, weight: Shape) -> Shape:
        """See Layout."""
        n, t = x[:2] if self.of_state else x[1::-1]
        return n, t, weight[0], weight[1] // self.count * len(self.chosen)


def before(y: Array, initial: Array | None, lengths: Array | None, backward: Sequence[bool]) -> Array:
    """What each step of a recurrent operator gets from the one before it: (n, t, directions, hidden).

    y (t, directions, n, hidden) is what all steps hand on, initial (directions, n, hidden), lengths (n). What lies
    behind the end of a sequence has no meaning.
    """
    t, directions, n, hidden = y.shape
    start = np.zeros((directions, n, hidden), y.dtype) if initial is None else initial
    found = np.empty((n, t, directions, hidden), y.dtype)
    for d, turned in enumerate(backward):
        own = y[:, d].swapaxes(0, 1)
        if turned:
            found[:, :-1, d] = own[:, 1:]
            found[np.arange(n), t - 1 if lengths is None else np.maximum(lengths, 1) - 1, d] = start[d]
        else:
            found[:, 1:, d] = own[:, :-1]
            found[:, 0, d] = start[d]
    return found
