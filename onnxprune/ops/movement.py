"""Operators that move axes without looking at them: reshapes, permutations, broadcasts."""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd, prod

import numpy as np

from onnxprune.ops import Edit, Resizing, resize, rule
from onnxprune.types import Array, Freeze, OpNode, Pattern, Relation, Shape


def factor(before: list[int], after: list[int]) -> tuple[list[list[int]], list[list[int]]] | None:
    """Sizes of the common atoms of two axis lists with equal product, row-major; None if they share no factoring."""
    left: list[list[int]] = [[] for _ in before]
    right: list[list[int]] = [[] for _ in after]
    i, j, a, b = len(before) - 1, len(after) - 1, 0, 0
    while i >= 0 or j >= 0:  # innermost first
        a = a or (before[i] if i >= 0 else 1)
        b = b or (after[j] if j >= 0 else 1)
        atom = gcd(a, b)
        if atom != min(a, b):
            return None
        if i >= 0:
            left[i].insert(0, atom)
        if j >= 0:
            right[j].insert(0, atom)
        a, b = a // atom, b // atom
        if a == 1:
            i, a = i - 1, 0
        if b == 1:
            j, b = j - 1, 0
    return left, right


def _blocks(before: Shape, after: Shape) -> Iterable[tuple[list[int], list[int]]]:
    """Shortest runs of axes with equal products; axes of size one join none."""
    left = [k for k, size in enumerate(before) if size != 1]
    right = [k for k, size in enumerate(after) if size != 1]
    while left and right:
        a, b = [left.pop(0)], [right.pop(0)]
        while (x := prod(before[k] for k in a)) != (y := prod(after[k] for k in b)):
            if x < y and left:
                a.append(left.pop(0))
            elif y < x and right:
                b.append(right.pop(0))
            else:
                return
        yield a, b


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze", carries=(0,))
def reshape(node: OpNode) -> Iterable[Relation]:
    """Row-major axes in, row-major axes out: runs of axes with equal products share their atoms."""
    before, after = node.shape(0), node.out_shape(0)
    if 0 in before or prod(before) != prod(after):
        return
    left, right = ["!"] * len(before), ["!"] * len(after)
    sizes: dict[str, int] = {}
    for block, (a, b) in enumerate(_blocks(before, after)):
        atoms = factor([before[k] for k in a], [after[k] for k in b])
        if atoms is None:
            text = f"shapes {before} and {after} share no factoring"
            yield from (Freeze(node.inputs[0], k, text) for k in a)
            yield from (Freeze(node.outputs[0], k, text) for k in b)
            continue
        for side, axes, factors in ((left, a, atoms[0]), (right, b, atoms[1])):
            count = 0
            for k, parts in zip(axes, factors, strict=True):
                names = []
                for size in parts:
                    if size != 1:
                        names.append(f"a{block}_{count}")
                        sizes[names[-1]] = size
                        count += 1
                side[k] = names[0] if len(names) == 1 else "(" + " ".join(names) + ")"
    whole = node.op_type == "Squeeze" and not node.has(1) and not node.attr("axes")  # takes every axis of length one
    yield Pattern(" ".join(left) + " -> " + " ".join(right), sizes, least=dict.fromkeys(sizes, 2) if whole else {})


@resize("Reshape", slots=(1,))
def reshape_target(this: Resizing) -> Edit | None:
    """Explicit sizes become survivor counts; 0 and -1 stay where they still say the right thing."""
    target = this.node.consts[this.node.inputs[1]].astype(np.int64)
    before = this.node.shape(0)
    after = this.wanted[this.node.outputs[0]]
    zero_copies = not this.node.attr("allowzero", 0)
    if _resolved(target, before, zero_copies) == after:
        return None
    fresh = target.copy()
    for k, size in enumerate(after):
        copies = target[k] == 0 and zero_copies and k < len(before) and before[k] == size
        if target[k] != -1 and not copies:
            fresh[k] = size
    if _resolved(fresh, before, zero_copies) != after:
        fresh = np.array(after, np.int64)
    return Edit(inputs={1: fresh})


def _resolved(target: Array, before: Shape, zero_copies: bool) -> Shape | None:
    sizes = [before[k] if size == 0 and zero_copies else int(size) for k, size in enumerate(target)]
    known = prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if not known or prod(before) % known:
            return None
        sizes[sizes.index(-1)] = prod(before) // known
    return tuple(sizes) if prod(sizes) == prod(before) else None


@rule("Transpose", carries=(0,))
def transpose(node: OpNode) -> Iterable[Relation]:
    """Axes in, the same axes in another order out."""
    rank = len(node.shape(0))
    order = node.attr("perm", tuple(reversed(range(rank))))
    yield Pattern(" ".join(f"a{k}" for k in range(rank)) + " -> " + " ".join(f"a{k}" for k in order))


@rule("Expand", carries=(0,))
def expand(node: OpNode) -> Iterable[Relation]:
    """Axes of equal size pass through; a stretched one is new on the right."""
    before, after = node.shape(0), node.out_shape(0)
    shift = len(after) - len(before)
    names = [f"a{k}" for k in range(len(after))]
    left = [names[k + shift] if size == after[k + shift] else "_" for k, size in enumerate(before)]
    yield Pattern(" ".join(left) + " -> " + " ".join(names))


@resize("Expand", slots=(1,))
def expand_target(this: Resizing) -> Edit | None:
    """Sizes of pruned axes become survivor counts, as do computed ones that no longer say what is wanted."""
    target = this.node.consts[this.node.inputs[1]].astype(np.int64)
    before, after = this.dense.shape(0), this.wanted[this.node.outputs[0]]
    shift = len(after) - len(target)
    fresh = target.copy()
    for k, size in enumerate(target):
        own = k + shift - (len(after) - len(before))
        if size != 1 or own < 0 or before[own] == 1:
            fresh[k] = after[k + shift]
    return None if np.array_equal(fresh, target) else Edit(inputs={1: fresh})


@rule("Tile", carries=(0,))
def tile(node: OpNode) -> Iterable[Relation]:
    """Axes repeated r times become (r a); a repeated axis of size one is new on the right."""
    before, after = node.shape(0), node.out_shape(0)
    left, right = [], []
    sizes: dict[str, int] = {}
    for k, (size, tiled) in enumerate(zip(before, after, strict=True)):
        left.append(f"a{k}" if size > 1 else "_")
        right.append(f"a{k}" if size == tiled else f"(r{k} a{k})" if size > 1 else f"r{k}")
        sizes |= {f"a{k}": size, f"r{k}": tiled // size if size else 1}
    yield Pattern(f"{' '.join(left)}, ! -> {' '.join(right)}", sizes)


@resize("Tile", slots=(1,))
def tile_repeats(this: Resizing) -> Edit | None:
    """Repeats follow where copies of an axis went."""
    before, after = this.wanted[this.node.inputs[0]], this.wanted[this.node.outputs[0]]
    fresh = [y // x for x, y in zip(before, after, strict=True)]
    now = this.node.consts[this.node.inputs[1]]
    return None if fresh == now.tolist() else Edit(inputs={1: np.array(fresh, now.dtype)})


@rule("ConstantOfShape")
def constant_of_shape(node: OpNode) -> Iterable[Relation]:
    """Every position of the output is alike: its axes are free."""
    yield Pattern("! -> " + " ".join(f"a{k}" for k in range(len(node.out_shape(0)))))


@resize("ConstantOfShape", slots=(0,))
def constant_of_shape_target(this: Resizing) -> Edit | None:
    """Sizes become survivor counts."""
    after = np.array(this.wanted[this.node.outputs[0]], np.int64)
    target = this.node.consts[this.node.inputs[0]]
    return None if np.array_equal(after, target) else Edit(inputs={0: after})


@rule("Shape", "Size")
def shape_of(node: OpNode) -> Iterable[Relation]:
    """Reading a size ties nothing: sizes follow the survivors."""
    yield Pattern(" ".join("_" for _ in node.shape(0)) + " -> " + " ".join("!" for _ in node.out_shape(0)))


@rule("Range")
def range_(node: OpNode) -> Iterable[Relation]:
    """Numbers along a new axis, which stays."""
    yield Pattern(", , -> !")
