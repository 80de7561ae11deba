"""Which rows of a value repair fits to: the same for the dense and the pruned model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxprune.layouts import Layout
from onnxprune.types import Array, Mask, Positions, Shape

ROWS = 20_000  # rows of one site that are enough
NUMBERS = 1 << 27  # of one site that are fitted to at most, which takes rows off an operator over a vocabulary


@dataclass(frozen=True)
class Sampling:
    """How many rows of each site are used, drawn with `seed`; `padding` names the input that is zero for padding."""

    rows: int = ROWS
    seed: int = 0
    padding: str | None = None

    def within(self, channels: int) -> Sampling:
        """As many rows of so many channels as there is room for."""
        return replace(self, rows=min(self.rows, max(NUMBERS // channels, 1)))

    def shared(self, sites: int) -> Sampling:
        """As many rows of each of so many sites that are fitted together."""
        return replace(self, rows=max(self.rows // sites, 1))


class Rows:
    """Which rows of a value are used: the same for every value that has as many, dense or pruned.

    `chosen` has the numbers of the rows for each feed; `held_out` bool[rows] marks a fifth of the samples.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        axes: tuple[int, ...],
        counts: Sequence[int],
        masks: Sequence[Array | None],
        sampling: Sampling,
    ) -> None:
        totals = [math.prod(shape) // math.prod(shape[k] for k in axes) for shape in shapes]
        whole = max(sum(totals), 1)
        rng = np.random.default_rng([sampling.seed, whole])
        self.chosen: list[Positions] = []
        held, first = [], 0
        for shape, total, count, mask in zip(shapes, totals, counts, masks, strict=True):
            real = _real(shape, axes, mask, total)
            wanted = min(len(real), -(-sampling.rows * total // whole))
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
