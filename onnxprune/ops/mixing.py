"""Operators where positions of one axis see each other: normalisations, reductions, pooling, softmax."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from onnxprune.ops import Edit, Resizing, frozen, resize, rule, shape
from onnxprune.types import Axis, Freeze, Numbers, OpNode, Pattern, Relation, Shape


def _letters(rank: int) -> list[str]:
    return [f"a{k}" for k in range(rank)]


@rule("BatchNormalization", roles={1: "norm", 2: "norm", 3: "norm", 4: "divisor"})
def batch_norm(node: OpNode) -> Iterable[Relation]:
    """X (n, c, *s), scale, shift, mean, variance (c) -> Y: channels are independent; in training, the rest mixes."""
    names = _letters(len(node.shape(0)))
    channel = names[1] if len(names) > 1 else names[0]
    text = f"{' '.join(names)}, {channel}, {channel}, {channel}, {channel} -> {' '.join(names)}"
    mixes = tuple(name for name in names if name != channel) if node.attr("training_mode", 0) else ()
    yield Pattern(text + f", {channel}" * (len(node.outputs) - 1), mixes=mixes)


@rule("InstanceNormalization", roles={1: "norm", 2: "norm"})
def instance_norm(node: OpNode) -> Iterable[Relation]:
    """X (n, c, *s), scale, shift (c) -> Y: averaged over space, which mixes, in each channel by itself."""
    space = [f"s{k}" for k in range(len(node.shape(0)) - 2)]
    text = " ".join(["n", "c", *space])
    yield Pattern(f"{text}, c, c -> {text}", mixes=tuple(space))


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", roles={1: "norm", 2: "norm"})
def layer_norm(node: OpNode) -> Iterable[Relation]:
    """X, scale, shift -> Y: the axes from `axis` on are averaged over, and mix."""
    names = _letters(len(node.shape(0)))
    axis = node.attr("axis", -1) % len(names)
    text = " ".join(names)
    shift = ", ..." if node.has(2) else ""
    inner = " ".join(names[axis:])
    gain = inner if len(node.shape(1)) == len(names) - axis else " ".join("!" for _ in node.shape(1))
    yield Pattern(f"{text}, {gain}{shift.replace('...', gain)} -> {text}", mixes=tuple(names[axis:]))


@shape("LayerNormalization", "SimplifiedLayerNormalization", "GroupNormalization")
def same(node: OpNode) -> tuple[Shape, ...]:
    """Y has the shape of X."""
    return (node.shape(0),)


@rule("Softmax", "LogSoftmax", "Hardmax")
def softmax(node: OpNode) -> Iterable[Relation]:
    """X -> Y: the axis (before opset 13: all axes from it on) is normalised, and mixes."""
    names = _letters(len(node.shape(0)))
    axis = node.attr("axis", 1 if node.opset < 13 else -1) % len(names)
    text = " ".join(names)
    yield Pattern(f"{text} -> {text}", mixes=tuple(names[axis:] if node.opset < 13 else names[axis : axis + 1]))


@rule("LpNormalization")
def lp_norm(node: OpNode) -> Iterable[Relation]:
    """X -> Y: divided by a norm along the axis, which mixes."""
    names = _letters(len(node.shape(0)))
    text = " ".join(names)
    yield Pattern(f"{text} -> {text}", mixes=(names[node.attr("axis", -1) % len(names)],))


@rule(*(f"Reduce{kind}" for kind in "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare".split()))
def reduce(node: OpNode) -> Iterable[Relation]:
    """X -> Y without the reduced axes, which mix; the others pass through."""
    rank = len(node.shape(0))
    axes = node.attrs["axes"] if "axes" in node.attrs else node.const(1)
    if axes is None:
        if node.has(1):
            yield Freeze(node.inputs[0], None, f"{node.op_type} over axes known only at run time")
            return
        everything = not node.attr("noop_with_empty_axes", 0)
        axes = range(rank) if everything else ()
    reduced = {int(axis) % rank for axis in np.atleast_1d(np.array(axes, dtype=np.int64))}
    names = _letters(rank)
    keepdims = node.attr("keepdims", 1)
    out = [("_" if k in reduced else name) for k, name in enumerate(names) if keepdims or k not in reduced]
    yield Pattern(" ".join(names) + " -> " + " ".join(out), mixes=tuple(names[k] for k in sorted(reduced)))


@rule("ArgMax", "ArgMin")
def arg_reduce(node: OpNode) -> Iterable[Relation]:
    """X -> indices: positions of the reduced axis, which mixes, by number; the others pass through."""
    rank = len(node.shape(0))
    axis = node.attr("axis", 0) % rank
    names = _letters(rank)
    out = [("_" if k == axis else name) for k, name in enumerate(names) if node.attr("keepdims", 1) or k != axis]
    yield Pattern(f"{' '.join(names)} -> {' '.join(out)}", mixes=(names[axis],))
    yield Numbers(node.outputs[0], node.inputs[0], axis)


@rule("MaxPool", "AveragePool", "LpPool")
def pool(node: OpNode) -> Iterable[Relation]:
    """X (n, c, *s) -> Y (n, c, *s): each channel by itself, space kept whole."""
    yield Pattern("n c * -> n c *")


@rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(node: OpNode) -> Iterable[Relation]:
    """X (n, c, *s) -> Y (n, c, 1, ...): a reduction over space, which mixes; some exporters write every mean so."""
    names = _letters(len(node.shape(0)))
    pooled = names[2:]
    yield Pattern(f"{' '.join(names)} -> {' '.join(names[:2] + ['_'] * len(pooled))}", mixes=tuple(pooled))


@rule("Resize", "Upsample")
def resize_space(node: OpNode) -> Iterable[Relation]:
    """X -> Y: axes that keep their size pass through, the others are interpolated along and stay."""
    before, after = node.shape(0), node.out_shape(0)
    if node.attr("coordinate_transformation_mode") == "tf_crop_and_resize":
        return
    scales = _scales(node, len(before))
    names = [f"a{k}" if size == after[k] and scales[k] == 1 else "!" for k, size in enumerate(before)]
    yield Pattern(" ".join(names) + " -> " + " ".join(names))


def _scales(node: OpNode, rank: int) -> list[float]:
    """One factor for each axis; 1 where sizes are given instead or an axis is not listed."""
    given = node.attrs.get("scales")
    if given is None:
        k = 1 if node.op_type == "Upsample" or node.opset < 11 else 2
        given = node.const(k)
        if given is None and node.has(k) and node.shapes.get(node.inputs[k], (0,)) != (0,):
            raise KeyError(node.inputs[k])
    if given is None or len(given) == 0:
        return [1.0] * rank
    axes = node.attr("axes", range(rank))
    factors = dict(zip((int(a) % rank for a in axes), given, strict=True))
    return [float(factors.get(k, 1.0)) for k in range(rank)]


@resize("Resize", slots=(3,))
def resize_sizes(this: Resizing) -> Edit | None:
    """Where sizes are given, those of pruned axes become survivor counts."""
    if not this.node.has(3):
        return None
    sizes = this.node.consts[this.node.inputs[3]].astype(np.int64)
    after = this.wanted[this.node.outputs[0]]
    axes = [int(a) % len(after) for a in this.node.attr("axes", range(len(after)))]
    dense = this.dense.out_shape(0)
    fresh = np.array([after[a] if dense[a] != after[a] else sizes[k] for k, a in enumerate(axes)], np.int64)
    return None if np.array_equal(fresh, sizes) else Edit(inputs={3: fresh})


frozen("LRN", "LRN reads neighbouring channels")


@rule("GroupNormalization", roles={1: "norm", 2: "norm"})
def group_norm(node: OpNode) -> Iterable[Relation]:
    """X (n, g c, *s), gain and shift (g c), once (g) -> Y: averaged over c and space; whole groups may go."""
    channels, groups = node.shape(0)[1], node.attrs["num_groups"]
    vector = "(g c)" if node.shape(1)[0] == channels else "g"
    sizes = {"g": groups, "c": channels // groups}
    yield Pattern(f"n (g c) *, {vector}, {vector} -> n (g c) *", sizes, mixes=("c",))


@resize("GroupNormalization")
def num_groups(this: Resizing) -> Edit | None:
    """Groups of which something is left."""
    groups = this.dense.attrs["num_groups"]
    left = int(this.keep(Axis(this.dense.inputs[0], 1)).reshape(groups, -1).any(axis=1).sum())
    return None if left == groups else Edit(attrs={"num_groups": left})


@rule("CumSum")
def cumsum(node: OpNode) -> Iterable[Relation]:
    """X -> Y of the same axes; along `axis` later positions see earlier ones, which mixes."""
    names = _letters(len(node.shape(0)))
    axis = node.const(1)
    if axis is not None:
        text = " ".join(names)
        yield Pattern(f"{text}, -> {text}", mixes=(names[int(axis.reshape(-1)[0]) % len(names)],))
