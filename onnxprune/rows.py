"""Which rows of a value repair fits to: the same for the dense and the pruned model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from onnxprune.layouts import Layout
from onnxprune.types import Array, Mask, Positions, Shape

ROWS = 20_000  # rows of one site that are enough
NUMBERS = 1 << 27  # of one site that are fitted to at most, which takes rows off an operator over a vocabulary


@dataclass(frozen=True)
class Sampling:
    """How many rows of each site are used, drawn with `seed`; `padding` names the input that is zero for padding.

    Each feed has its share of them, rounded up unless `firm`.
    """

    rows: int = ROWS
    seed: int = 0
    padding: str | None = None
    firm: bool = False

    def shares(self, totals: Sequence[int]) -> list[int]:
        """How many of each feed's rows are used, where none is padding."""
        whole = max(sum(totals), 1)
        if self.firm:
            ends = [self.rows * end // whole for end in accumulate(totals, initial=0)]
            return [min(end - start, total) for start, end, total in zip(ends, ends[1:], totals, strict=False)]
        return [min(-(-self.rows * total // whole), total) for total in totals]

    def within(self, channels: int) -> Sampling:
        """As many rows of so many channels as there is room for."""
        return replace(self, rows=min(self.rows, max(NUMBERS // channels, 1)))

    def shared(self, sites: int) -> Sampling:
        """As many rows of each of so many sites that are fitted together."""
        return replace(self, rows=max(self.rows // sites, 1))


class Rows:
    """Which rows of a value are used: the same for every value that has as many, dense or pruned.

    `chosen` has the numbers of the rows for each feed; `held_out` bool[rows] marks a fifth of the samples. What was
    given for the same `sampling` of one value is the same.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        axes: tuple[int, ...],
        counts: Sequence[int],
        masks: Sequence[Array | None],
        sampling: Sampling,
    ) -> None:
        self.sampling = sampling
        totals = totals_of(shapes, axes)
        whole = max(sum(totals), 1)
        rng = np.random.default_rng([sampling.seed, whole])
        self.chosen: list[Positions] = []
        held, first = [], 0
        shares = sampling.shares(totals)
        for shape, total, count, mask, share in zip(shapes, totals, counts, masks, shares, strict=True):
            real = _real(shape, axes, mask, total)
            wanted = min(len(real), share)
            picked = real if wanted == len(real) else np.sort(rng.choice(real, wanted, replace=False))
            self.chosen.append(picked)
            held.append(first + picked * count // max(total, 1))
            first += count
        sample = np.concatenate(held)
        by = sample if first >= 10 else np.arange(len(sample))
        self.held_out: Mask = by % 5 == 2

    def of(self, arrays: Sequence[Array], axes: tuple[int, ...]) -> Array:
        """float32[rows, channels] of a value."""
        found = []
        for array, rows in zip(arrays, self.chosen, strict=True):
            flat = np.moveaxis(array, axes, range(-len(axes), 0))
            flat = flat.reshape(-1, math.prod(array.shape[k] for k in axes))
            found.append(flat[rows].astype(np.float32))
        return np.concatenate(found)

    def read(self, arrays: Sequence[Array], layout: Layout) -> Array:
        """float32[groups, rows, columns] of what an operator reads."""
        pairs = zip(arrays, self.chosen, strict=True)
        return np.concatenate([layout.rows(array, rows) for array, rows in pairs], axis=1)


def totals_of(shapes: Sequence[Shape], axes: tuple[int, ...]) -> list[int]:
    """Rows of a value for each feed; its channels lie along these axes."""
    return [math.prod(shape) // math.prod(shape[k] for k in axes) for shape in shapes]


def _real(shape: Shape, axes: tuple[int, ...], mask: Array | None, total: int) -> Positions:
    """Numbers of the rows that are not padding, where a value's leading axes are batch and length."""
    every = np.arange(total)
    if mask is None:
        return every
    flat = mask.reshape(-1) != 0
    rest = [size for k, size in enumerate(shape) if k not in axes]
    if tuple(rest[:2]) == mask.shape or (rest and rest[0] == flat.size):
        return np.asarray(every[np.repeat(flat, total // flat.size)])
    return np.asarray(every)
