"""Operators that pick positions: they say which positions of which axis they take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from onnxprune.ops import ANY, Edit, Resizing, frozen, resize, rule, stand_in, wants
from onnxprune.types import Axis, Freeze, Mask, Numbers, OpNode, Pattern, Positions, Relation, Take


def _others(rank: int, axis: int, inputs: int, outputs: int) -> Pattern:
    """Every axis but one is shared by all inputs and outputs; of that one nothing is said."""
    part = " ".join("_" if k == axis else f"a{k}" for k in range(rank))
    return Pattern(", ".join([part] * inputs) + " -> " + ", ".join([part] * outputs))


@rule("Concat", carries=range(1 << 16))
def concat(node: OpNode) -> Iterable[Relation]:
    """Each input is a run of positions of the output."""
    rank = len(node.out_shape(0))
    axis = node.attr("axis", 1) % rank
    yield _others(rank, axis, len(node.inputs), 1)
    start = 0
    for k, name in enumerate(node.inputs):
        size = node.shape(k)[axis]
        yield Take(name, axis, node.outputs[0], axis, np.arange(start, start + size))
        start += size


@rule("Compress", carries=(0,))
def compress(node: OpNode) -> Iterable[Relation]:
    """Any number of positions of one axis, which stay; every other axis passes through."""
    if node.attr("axis") is None:
        return  # all axes in a row
    rank = len(node.shape(0))
    part = " ".join("!" if k == node.attrs["axis"] % rank else f"a{k}" for k in range(rank))
    yield Pattern(f"{part}, ! -> {part}")


@wants("Concat")
def concat_wants(node: OpNode) -> Mapping[int, Sequence[int]]:
    """Inputs that are alike but for one axis: a cache is as wide as what is put behind it."""
    shapes = [node.shape(k) for k in range(len(node.inputs))]
    axis = node.attr("axis", 1) % max(len(shapes[0]), 1)
    alike = [tuple(ANY if k == axis else size for k, size in enumerate(shape)) for shape in shapes]
    return {k: alike[1 if k == 0 else 0] for k in range(len(alike))} if len(set(alike)) > 1 else {}


@rule("Split", carries=(0,))
def split(node: OpNode) -> Iterable[Relation]:
    """Each output is a run of positions of the input."""
    rank = len(node.shape(0))
    axis = node.attr("axis", 0) % rank
    yield _others(rank, axis, 1, len(node.outputs))
    start = 0
    for k, name in enumerate(node.outputs):
        size = node.out_shape(k)[axis]
        yield Take(name, axis, node.inputs[0], axis, np.arange(start, start + size))
        start += size


@resize("Split", slots=(1,))
def split_sizes(this: Resizing) -> Edit | None:
    """Sizes become the survivors of each piece, written down even where they were implied."""
    axis = this.node.attr("axis", 0) % len(this.dense.shape(0))
    dense = [this.dense.shapes[name][axis] for name in this.dense.outputs]
    sizes = [this.wanted[name][axis] for name in this.node.outputs]
    if sizes == dense:
        return None
    if this.node.opset < 13:
        return Edit(attrs={"split": tuple(sizes)})
    return Edit(inputs={1: np.array(sizes, np.int64)}, attrs={"num_outputs": None})


def _slices(node: OpNode) -> dict[int, slice | None] | None:
    """{axis: slice, or None where a bound follows a dynamic size}; None where not even the axes are known."""
    rank = len(node.shape(0))
    if "starts" in node.attrs:
        bounds = [np.ma.array(node.attrs["starts"]), np.ma.array(node.attrs["ends"])]
        axes, steps = node.attr("axes"), None
    else:
        if any(node.has(k) and node.const(k) is None for k in (3, 4)):
            return None
        length = (node.shapes[node.inputs[1]] or (1,))[0]
        unknown = np.ma.array(np.zeros(length, np.int64), mask=True)
        bounds = [unknown if (given := node.known(k)) is None else np.ma.atleast_1d(given) for k in (1, 2)]
        axes, steps = node.const(3), node.const(4)
    axes = np.arange(len(bounds[0])) if axes is None else np.atleast_1d(np.array(axes)) % rank
    steps = np.ones(len(bounds[0]), np.int64) if steps is None else np.atleast_1d(steps)
    found: dict[int, slice | None] = {}
    for k, (axis, step) in enumerate(zip(axes.tolist(), steps.tolist(), strict=True)):
        if any(np.ma.getmaskarray(bound)[k] for bound in bounds):
            found[axis] = None
            continue
        start, end = int(bounds[0][k]), int(bounds[1][k])
        size = node.shape(0)[axis]
        low = start if step > 0 or start >= -size else -size - 1
        # numpy has no way to say "before the first" but None
        found[axis] = slice(low, None if step < 0 and end < -size else end, step)
    return found


@rule("Slice", carries=(0,))
def slice_(node: OpNode) -> Iterable[Relation]:
    """The output is a run of positions of the input along each sliced axis; the others pass through."""
    before, after = node.shape(0), node.out_shape(0)
    slices = _slices(node)
    if slices is None:
        return
    left = ["_" if k in slices else f"a{k}" for k in range(len(before))]
    yield Pattern(" ".join(left) + " -> " + " ".join(left))
    for axis, cut in sorted(slices.items()):
        picked = np.arange(before[axis])[cut] if cut is not None else np.arange(0)
        if cut is None or len(picked) != after[axis]:
            why = "Slice with bounds that follow a dynamic size"
        elif abs(cut.step) != 1:
            why = "Slice with a stride"
        else:
            yield Take(node.outputs[0], axis, node.inputs[0], axis, picked)
            continue
        yield from (Freeze(name, axis, why) for name in (node.inputs[0], node.outputs[0]))


@resize("Slice", slots=(1, 2))
def slice_bounds(this: Resizing) -> Edit | None:
    """A bound becomes the number of survivors before it."""
    node, dense = this.node, this.dense
    slices = _slices(dense)
    if slices is None:
        return None
    bounds = {}
    for axis, cut in slices.items():
        keep = this.keep(Axis(dense.inputs[0], axis))
        if keep.all() or cut is None:
            continue
        picked = np.arange(len(keep))[cut]
        kept = np.flatnonzero(keep[picked])
        before = int(keep[: picked.min()].sum()) if len(picked) else 0
        bounds[axis] = (before, before + len(kept)) if cut.step == 1 else (before + len(kept) - 1, before - 1)
    if not bounds:
        return None
    axes = list(slices)
    far = -(2**31)
    old = (
        [np.atleast_1d(np.array(node.attrs[name])) for name in ("starts", "ends")]
        if "starts" in node.attrs
        else [np.atleast_1d(node.consts[node.inputs[k]]) for k in (1, 2)]
    )
    starts, ends = old[0].astype(np.int64).copy(), old[1].astype(np.int64).copy()
    for axis, (start, end) in bounds.items():
        starts[axes.index(axis)], ends[axes.index(axis)] = start, end if end >= 0 else far
    if "starts" in node.attrs:
        return Edit(attrs={"starts": tuple(starts.tolist()), "ends": tuple(ends.tolist())})
    return Edit(inputs={1: starts, 2: ends})


@rule("Gather", roles={1: "index"}, carries=(0,))
def gather(node: OpNode) -> Iterable[Relation]:
    """Data axes pass through around those of the indices; constant ones pick positions, others number them."""
    data, indices = node.shape(0), node.shape(1)
    axis = node.attr("axis", 0) % len(data)
    left = ["_" if k == axis else f"a{k}" for k in range(len(data))]
    middle = [f"b{k}" for k in range(len(indices))]
    out = left[:axis] + middle + left[axis + 1 :]
    yield Pattern(f"{' '.join(left)}, {' '.join(middle)} -> {' '.join(out)}")
    constant = node.const(1)
    if constant is None or constant.ndim > 1:
        yield Numbers(node.inputs[1], node.inputs[0], axis)
        return
    positions = constant.astype(np.int64) % data[axis]
    if constant.ndim == 0:
        yield Take(node.outputs[0], None, node.inputs[0], axis, positions.reshape(1))
    else:
        yield Take(node.outputs[0], axis, node.inputs[0], axis, positions)


@resize("Gather", slots=(1,))
def gather_indices(this: Resizing) -> Edit | None:
    """Indices are renumbered over the survivors; those of removed positions go."""
    rank = len(this.dense.shape(0))
    axis = this.dense.attr("axis", 0) % rank
    keep = this.keep(Axis(this.dense.inputs[0], axis))
    constant = this.dense.const(1)
    if keep.all() or constant is None:
        return None
    positions = constant.astype(np.int64) % len(keep)
    renumbered: Positions = np.cumsum(keep) - 1
    chosen = positions if constant.ndim == 0 else positions[keep[positions]]
    return Edit(inputs={1: np.asarray(renumbered[chosen], dtype=constant.dtype)})


def _pads(node: OpNode) -> np.ma.MaskedArray[Any, Any] | None:
    """[2, rank] of begins and ends, masked where they follow a dynamic size; None where nothing is known."""
    rank = len(node.shape(0))
    given = np.ma.array(node.attrs["pads"]) if "pads" in node.attrs else node.known(1)
    axes = node.const(3)
    if given is None or (node.has(3) and axes is None):
        return None
    pads = np.ma.zeros((2, rank), np.int64)
    pads[:, np.arange(rank) if axes is None else np.atleast_1d(axes) % rank] = given.reshape(2, -1)
    return pads


@rule("Pad", roles={2: "index"})
def pad(node: OpNode) -> Iterable[Relation]:
    """The input is a run of positions of the output where constants are added; other modes freeze a padded axis."""
    before, pads = node.shape(0), _pads(node)
    if pads is None:
        return
    amounts: Positions = pads.filled(0)
    follows = np.asarray(np.ma.getmaskarray(pads).any(axis=0))
    untouched = [not (follows[k] or amounts[:, k].any()) for k in range(len(before))]
    part = " ".join(f"a{k}" if same else "_" for k, same in enumerate(untouched))
    yield Pattern(f"{part} -> {part}")
    for k, same in enumerate(untouched):
        if same:
            continue
        if not follows[k] and node.attr("mode", "constant") == "constant" and (amounts[:, k] >= 0).all():
            yield Take(node.inputs[0], k, node.outputs[0], k, amounts[0, k] + np.arange(before[k]))
        else:
            text = "Pad that is not a constant border of known width"
            yield from (Freeze(name, k, text) for name in (node.inputs[0], node.outputs[0]))


@resize("Pad", slots=(1,))
def pad_amounts(this: Resizing) -> Edit | None:
    """A border shrinks to its survivors."""
    dense, pads = this.dense, _pads(this.dense)
    if pads is None:
        return None
    amounts: Positions = pads.filled(0)
    fresh = amounts.copy()
    for k, size in enumerate(dense.out_shape(0)):
        keep: Mask = this.keep(Axis(dense.outputs[0], k))
        if not keep.all() and amounts[:, k].any():
            fresh[0, k] = keep[: amounts[0, k]].sum()
            fresh[1, k] = keep[size - amounts[1, k] :].sum() if amounts[1, k] else 0
    if np.array_equal(fresh, amounts):
        return None
    axes = dense.const(3)
    chosen = np.arange(len(fresh[0])) if axes is None else np.atleast_1d(axes) % len(fresh[0])
    flat = fresh[:, chosen].reshape(-1)
    if "pads" in dense.attrs:
        return Edit(attrs={"pads": tuple(flat.tolist())})
    follows = np.asarray(np.ma.getmaskarray(pads))[:, chosen].reshape(-1)
    return Edit(inputs={1: np.where(follows, this.node.consts[this.node.inputs[1]], flat)})


@rule("DepthToSpace")
def depth_to_space(node: OpNode) -> Iterable[Relation]:
    """X (n, p c, h, w) (mode CRD: c p) -> Y (n, c, h b, w b): all p = b x b channels behind one output channel go."""
    sizes = {"p": node.attrs["blocksize"] ** 2, "c": node.out_shape(0)[1]}
    channels = "(p c)" if node.attr("mode", "DCR") == "DCR" else "(c p)"
    yield Pattern(f"n {channels} ! ! -> n c ! !", sizes, fixed=("p",))


@rule("SpaceToDepth")
def space_to_depth(node: OpNode) -> Iterable[Relation]:
    """X (n, c, h b, w b) -> Y (n, p c, h, w)."""
    sizes = {"p": node.attrs["blocksize"] ** 2, "c": node.shape(0)[1]}
    yield Pattern("n c ! ! -> n (p c) ! !", sizes, fixed=("p",))


@rule("TopK")
def top_k(node: OpNode) -> Iterable[Relation]:
    """X -> values, indices: the k largest along an axis, which mixes; the indices are its positions by number."""
    rank = len(node.shape(0))
    axis = node.attr("axis", -1) % rank
    k = node.attr("k") or node.const(1)
    left = [f"a{n}" for n in range(rank)]
    right = " ".join("!" if n == axis else name for n, name in enumerate(left))
    if k is None:  # as many as a feed says
        yield Freeze(node.inputs[0], axis, "TopK of a number that is known only at run time")
    else:
        chosen = {left[axis]: int(np.max(k))}
        yield Pattern(f"{' '.join(left)}, -> {right}, {right}", mixes=(left[axis],), least=chosen)
    yield Numbers(node.outputs[1], node.inputs[0], axis)


@rule("GatherElements", roles={1: "index"}, carries=(0,))
def gather_elements(node: OpNode) -> Iterable[Relation]:
    """Data, indices -> Y, shaped as the indices, which number `axis` of the data; axes of equal size pass through."""
    part, axis = _elements(node)
    data = " ".join("_" if k == axis else name for k, name in enumerate(part))
    yield Pattern(f"{data}, {' '.join(part)} -> {' '.join(part)}")
    yield Numbers(node.inputs[1], node.inputs[0], axis)


@rule("ScatterElements", roles={1: "index"})
def scatter_elements(node: OpNode) -> Iterable[Relation]:
    """Data, indices, updates -> Y, shaped as the data, whose `axis` is numbered; axes of equal size pass through."""
    part, axis = _elements(node)
    data = " ".join("d" if k == axis else name for k, name in enumerate(part))
    yield Pattern(f"{data}, {' '.join(part)}, {' '.join(part)} -> {data}")
    yield Numbers(node.inputs[1], node.inputs[0], axis)


def _elements(node: OpNode) -> tuple[list[str], int]:
    """Letters of the axes of the indices, `!` where the data is longer along another axis than the numbered one."""
    data, indices = node.shape(0), node.shape(1)
    axis = node.attr("axis", 0) % len(data)
    return [f"a{k}" if k == axis or data[k] == indices[k] else "!" for k in range(len(data))], axis


@rule("GatherND", roles={1: "index"}, carries=(0,))
def gather_nd(node: OpNode) -> Iterable[Relation]:
    """Data (b, indexed, rest), indices (b, i, m) -> Y (b, i, rest): constant ones pick positions, others number."""
    data, indices, batch = node.shape(0), node.shape(1), node.attr("batch_dims", 0)
    depth = batch + indices[-1]
    shared = [f"b{k}" for k in range(batch)]
    middle = [f"i{k}" for k in range(batch, len(indices) - 1)]
    rest = [f"a{k}" for k in range(depth, len(data))]
    constant = node.const(1)
    single = indices[-1] == 1
    indexed = ["!" if constant is None and not single else "_"] * indices[-1]
    if constant is not None and not batch and constant.ndim == 2 and constant.shape[1] == 1:
        yield Pattern(f"{' '.join([*indexed, *rest])}, _ ! -> {' '.join(['_', *rest])}")
        yield Take(node.outputs[0], 0, node.inputs[0], 0, constant.reshape(-1).astype(np.int64) % data[0])
        return
    left = " ".join([*shared, *indexed, *rest])
    yield Pattern(f"{left}, {' '.join([*shared, *middle, '!'])} -> {' '.join([*shared, *middle, *rest])}")
    if constant is None and single:
        yield Numbers(node.inputs[1], node.inputs[0], batch)
    for k in range(0 if constant is None else indices[-1]):
        picked = np.unique(np.asarray(constant)[..., k].astype(np.int64) % data[batch + k])
        yield Freeze(node.inputs[0], batch + k, "GatherND picks this position by its number", picked)


@resize("GatherND", slots=(1,))
def gather_nd_indices(this: Resizing) -> Edit | None:
    """Constant indices are renumbered over the survivors; rows that pick a removed position go."""
    constant, batch = this.dense.const(1), this.dense.attr("batch_dims", 0)
    if constant is None:
        return None
    fresh, alive = constant.astype(np.int64), np.ones(constant.shape[:-1], np.bool_)
    for k in range(constant.shape[-1]):
        keep = this.keep(Axis(this.dense.inputs[0], batch + k))
        positions = constant[..., k].astype(np.int64) % len(keep)
        fresh[..., k] = (np.cumsum(keep) - 1)[positions]
        alive &= keep[positions]
    if not alive.all():
        fresh = fresh[alive]  # only one column of positions can lose any: the others are frozen where they are picked
    return None if np.array_equal(fresh, constant) else Edit(inputs={1: fresh.astype(constant.dtype)})


@rule("ScatterND", roles={1: "index"})
def scatter_nd(node: OpNode) -> Iterable[Relation]:
    """Data (indexed, rest), indices (i, m), updates (i, rest) -> Y: the first m axes are numbered."""
    data, indices = node.shape(0), node.shape(1)
    middle = [f"i{k}" for k in range(len(indices) - 1)]
    rest = [f"a{k}" for k in range(indices[-1], len(data))]
    whole = " ".join([*("!" * indices[-1]), *rest])
    yield Pattern(f"{whole}, {' '.join([*middle, '!'])}, {' '.join([*middle, *rest])} -> {whole}")


@rule("OneHot")
def one_hot(node: OpNode) -> Iterable[Relation]:
    """Indices, depth, values -> Y with a new axis, of which the indices are positions by number."""
    rank = len(node.out_shape(0))
    axis = node.attr("axis", -1) % rank
    names = [f"a{k}" for k in range(rank - 1)]
    yield Pattern(f"{' '.join(names)}, _, ! -> {' '.join([*names[:axis], 'd', *names[axis:]])}")
    yield Numbers(node.inputs[0], node.outputs[0], axis)


@resize("OneHot", slots=(1,))
def one_hot_depth(this: Resizing) -> Edit | None:
    """As many numbers as positions are left."""
    axis = this.dense.attr("axis", -1) % len(this.dense.out_shape(0))
    depth = this.node.consts[this.node.inputs[1]]
    after = this.wanted[this.node.outputs[0]][axis]
    return None if after == this.dense.out_shape(0)[axis] else Edit(inputs={1: np.full_like(depth, after)})


@rule("Trilu")
def trilu(node: OpNode) -> Iterable[Relation]:
    """X -> Y: rows and columns are numbered and stay; leading axes pass through."""
    names = [*(f"a{k}" for k in range(len(node.shape(0)) - 2)), "!", "!"]
    yield Pattern(f"{' '.join(names)}, -> {' '.join(names)}")


@rule("ReverseSequence", carries=(0,))
def reverse_sequence(node: OpNode) -> Iterable[Relation]:
    """X, lengths (b) -> Y: what lies in time is numbered and stays; the other axes pass through."""
    names = [f"a{k}" for k in range(len(node.shape(0)))]
    names[node.attr("time_axis", 0)] = "!"
    yield Pattern(f"{' '.join(names)}, {names[node.attr('batch_axis', 1)]} -> {' '.join(names)}")


frozen("ai.onnx.ml::ArrayFeatureExtractor", "ArrayFeatureExtractor picks features by their numbers")
frozen("ai.onnx.ml::ZipMap", "ZipMap names classes by their positions")
frozen("ai.onnx.ml::Scaler", "the offsets and scales of Scaler are attributes")
stand_in("ai.onnx.ml::Scaler", "Identity", (0,))
