"""Random inputs of the right type, shape and range, for proof and measurement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxprune.errors import ImpossibleError, InputError, MachineError, shown
from onnxprune.infer import true_inputs
from onnxprune.types import Array, Shape

DRAWN = 2**24  # numbers that are drawn for one random input; in a larger one they repeat
LIMIT = 2**31  # bytes that one random input may take
CARRIERS = frozenset("Cast Identity Reshape Unsqueeze Squeeze Flatten Transpose Concat Slice Expand Clip".split())


def index_bounds(graph: ir.Graph) -> dict[str, int]:
    """{graph input: rows of the smallest table that it indexes}, seen through operators that only carry it."""
    bounds: dict[str, int] = {}
    for source in true_inputs(graph):
        pending, seen = [source], {source}
        while pending:
            value = pending.pop()
            for use in value.uses():
                node, k = use.node, use.idx
                if node.op_type in ("Gather", "GatherElements") and k == 1:
                    data = node.inputs[0]
                    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
                    if data is not None and data.const_value is not None:
                        size = int(data.const_value.shape[axis])  # type: ignore[arg-type]
                        bounds[str(source.name)] = min(size, bounds.get(str(source.name), size))
                elif node.op_type in CARRIERS and k == 0:
                    fresh = [out for out in node.outputs if out not in seen]
                    seen.update(fresh)
                    pending += fresh
    return bounds


SUMS = CARRIERS | frozenset("ReduceSum Add Sub Mul Where".split())
LENGTHS = {("com.microsoft", "GroupQueryAttention"): 5}


def counted(graph: ir.Graph) -> set[str]:
    """Graph inputs of which the sum tells an attention how many keys there are: masks that may not be zero anywhere."""
    found: set[str] = set()
    for source in true_inputs(graph):
        pending, seen = [source], {source}
        while pending:
            for use in pending.pop().uses():
                if LENGTHS.get((use.node.domain, use.node.op_type)) == use.idx:
                    found.add(str(source.name))
                elif use.node.op_type in SUMS:
                    fresh = [out for out in use.node.outputs if out not in seen]
                    seen.update(fresh)
                    pending += fresh
    return found


def choices(graph: ir.Graph) -> dict[str, tuple[int, ...]]:
    """{graph input that chooses: the values that choose differently}: flags, and numbers that Equal asks for."""
    found: dict[str, tuple[int, ...]] = {}
    for source in true_inputs(graph):
        if source.dtype == ir.DataType.BOOL and _single(source):
            found[str(source.name)] = (1, 0)
        elif source.dtype in (ir.DataType.INT64, ir.DataType.INT32) and _single(source):
            asked = {
                int(np.asarray(other.numpy()).reshape(-1)[0])
                for use in source.uses()
                if use.node.op_type == "Equal"
                and (value := use.node.inputs[1 - use.idx]) is not None
                and (other := ir.convenience.get_const_tensor(value)) is not None
                and other.size == 1
            }
            if asked:
                found[str(source.name)] = (*sorted(asked), max(asked) + 1)
    return found


def _single(value: ir.Value) -> bool:
    return value.shape is not None and all(dim == 1 for dim in value.shape)


COMBINATIONS = 8  # of choices that a proof runs through at most


def combinations(graph: ir.Graph) -> int:
    """How many feeds it takes to try every combination of choices."""
    return min(COMBINATIONS, prod(len(values) for values in choices(graph).values()))


def combination(graph: ir.Graph, choice: int) -> dict[str, int]:
    """{graph input that chooses: its value} in one combination."""
    chosen: dict[str, int] = {}
    for name, values in choices(graph).items():
        choice, at = divmod(choice, len(values))
        chosen[name] = values[at]
    return chosen


def random_feed(graph: ir.Graph, shapes: Mapping[str, Shape], seed: int, choice: int | None = None) -> dict[str, Array]:
    """One feed: floats normal, indices within their tables, other integers and flags mostly one (as masks are).

    Inputs that choose between branches take what combination `choice` (by default `seed`) says. Raises ImpossibleError
    for an input that no random value can stand for, MachineError for one that is too large.
    """
    rng = np.random.default_rng(seed)
    bounds, whole = index_bounds(graph), counted(graph)
    chosen = combination(graph, seed if choice is None else choice)
    feed = {}
    for value in true_inputs(graph):
        name, kind = str(value.name), kind_of(value, shapes)
        shape = shapes[name]
        if (needed := prod(shape) * kind.itemsize) > LIMIT:
            raise MachineError(f"shape {list(shape)} needs {needed:,} bytes; try --input-shape", object=name)
        size = shape if prod(shape) <= DRAWN else (DRAWN,)
        if name in chosen:
            drawn: Array = np.full(size, chosen[name])
        elif name in bounds:
            drawn = rng.integers(0, bounds[name], size)
        elif name in whole and np.issubdtype(kind, np.integer):
            drawn = np.ones(size)
        elif np.issubdtype(kind, np.integer) or kind == np.bool_:
            drawn = (rng.random(size) < 0.9).astype(np.int64)
            if drawn.ndim:
                drawn.reshape(-1)[:1] = 1
        else:
            drawn = rng.standard_normal(size)
        made = np.asarray(drawn).astype(kind)
        feed[name] = made if size == shape else np.resize(made, shape)
    return feed


def kind_of(value: ir.Value, shapes: Mapping[str, Shape]) -> np.dtype[Any]:
    """What a random value for a graph input consists of. Raises ImpossibleError if none can stand for it."""
    numbers = value.dtype not in (None, ir.DataType.UNDEFINED, ir.DataType.STRING)
    if value.dtype is None or not numbers or str(value.name) not in shapes:
        raise ImpossibleError("no random value can stand for this input; pass --calibration", object=str(value.name))
    return value.dtype.numpy()


def bytes_of(graph: ir.Graph, shapes: Mapping[str, Shape]) -> int:
    """What a random feed takes in memory. Raises ImpossibleError as above."""
    return sum(kind_of(v, shapes).itemsize * prod(shapes[str(v.name)]) for v in true_inputs(graph))


def padding_of(graph: ir.Graph, feeds: Sequence[Mapping[str, Array]]) -> str | None:
    """The input [batch, length] that is one for tokens and, at an end of some rows, zero for padding; None without."""
    for value in true_inputs(graph):
        arrays = [np.asarray(feed[name]) for feed in feeds if (name := str(value.name)) in feed]
        if not arrays or any(a.ndim != 2 or not a.size or not np.isin(a, (0, 1)).all() for a in arrays):
            continue
        steps = [np.diff(a.astype(np.int8), axis=1) for a in arrays]
        ends = all(((s != 0).sum(axis=1) <= 1).all() for s in steps)
        if ends and any((a == 0).any() for a in arrays) and all((a != 0).any(axis=1).all() for a in arrays):
            return str(value.name)
    return None


def trimmed(
    graph: ir.Graph, feeds: Sequence[Mapping[str, Array]], padding: str, seed: int
) -> Sequence[Mapping[str, Array]]:
    """The samples sorted by length, each feed cut to its longest: padding at the end costs time and says nothing.

    `padding` is what `padding_of` found. Feeds stay as they are where padding comes first, where a length is fixed, or
    where some input's samples cannot be told apart. The order of the new feeds is random.
    """
    masks = [feed[padding] for feed in feeds]
    axes = {str(value.name): _lengths(value, padding, feeds) for value in true_inputs(graph)}
    if None in axes.values() or len({mask.shape[1] for mask in masks}) > 1 or any((m[:, 0] == 0).any() for m in masks):
        return feeds
    stacked = {name: np.concatenate([feed[name] for feed in feeds]) for name in axes}
    lengths = np.count_nonzero(stacked[padding], axis=1)
    ends = np.cumsum([len(mask) for mask in masks])
    parts = np.split(np.argsort(lengths, kind="stable"), ends[:-1])
    found = []
    for k in np.random.default_rng(seed).permutation(len(parts)):
        feed = {}
        for name, array in stacked.items():
            cut = [slice(lengths[parts[k]].max() if i in (axes[name] or ()) else None) for i in range(array.ndim)]
            feed[name] = array[parts[k]][tuple(cut)]
        found.append(feed)
    return found


def _lengths(value: ir.Value, padding: str, feeds: Sequence[Mapping[str, Array]]) -> list[int] | None:
    """Axes of an input that are as long as its samples, which lie along axis 0; None where that is not sure."""
    name, dims = str(value.name), list(value.shape or ())
    if not dims or isinstance(dims[0], int) or any(len(feed[name]) != len(feed[padding]) for feed in feeds):
        return None
    sizes = {size for feed in feeds for size in feed[padding].shape[1:]}
    axes = [k for k in range(1, len(dims)) if any(feed[name].shape[k] in sizes for feed in feeds)]
    return None if any(isinstance(dims[k], int) for k in axes) else axes


def samples_in(feed: Mapping[str, Array], graph: ir.Graph) -> int:
    """How many samples a feed stacks: the length of the first axis of the first input that leaves it open."""
    for value in graph.inputs:
        if value.name in feed and value.shape and not isinstance(value.shape[0], int):
            return max(1, len(feed[str(value.name)]))
    return 1


def noisy(feeds: Sequence[Mapping[str, Array]], share: float, seed: int) -> list[dict[str, Array]]:
    """Feeds whose float inputs carry noise of `share` of their standard deviation; none where no input is one.

    What takes two values at most, or is not finite, is a mask or a switch and carries none.
    """
    rng = np.random.default_rng(seed)
    spread = _spread(feeds)
    if not spread:
        return []
    return [
        {
            name: (array + rng.normal(0, share * spread[name], array.shape)).astype(array.dtype)
            if name in spread
            else array
            for name, array in feed.items()
        }
        for feed in feeds
    ]


def blended(feeds: Sequence[Mapping[str, Array]], seed: int) -> list[dict[str, Array]]:
    """Feeds whose float inputs are between their own and those of another feed of the same shapes, nearer to their own.

    None where no input is one that `noisy` would change, or no other feed is like them.
    """
    rng = np.random.default_rng(seed)
    names = set(_spread(feeds))
    found = []
    for k, feed in enumerate(feeds):
        like = [f for i, f in enumerate(feeds) if i != k and all(f[n].shape == feed[n].shape for n in names)]
        if not names or not like:
            continue
        other, share = like[rng.integers(len(like))], rng.uniform(0.2, 0.5)
        found.append(
            {n: ((1 - share) * a + share * other[n]).astype(a.dtype) if n in names else a for n, a in feed.items()}
        )
    return found


def _spread(feeds: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """Standard deviations of the float inputs that are no masks or switches, nor single rows."""
    found = {}
    for name, first in feeds[0].items() if feeds else ():
        if first.dtype.kind == "f" and first.ndim > 1:
            values = np.concatenate([np.asarray(f[name], np.float64).reshape(-1) for f in feeds])
            if np.isfinite(values).all() and len(np.unique(values)) > 2:
                found[name] = float(values.std())
    return found


BATCH = 32  # samples in one feed where the batch is dynamic, at most
FEEDS = 8  # feeds that samples make at least, where there are as many: some to fit to, others to judge by


def batches(
    graph: ir.Graph, arrays: Mapping[str, Array], file: str, batch: int | None = None
) -> list[dict[str, Array]]:
    """Feeds from stacked samples: one array for each graph input, samples along axis 0.

    An array of exactly the input's fixed shape stands for all samples. Raises InputError where arrays and inputs
    do not match.
    """
    inputs = {str(value.name): value for value in true_inputs(graph)}
    constant: dict[str, Array] = {}
    stacked: dict[str, Array] = {}
    for name, array, dims in _fitting(inputs, arrays, file, free=1):
        if (None not in dims and array.shape == tuple(dims)) or not dims:
            constant[name] = array
        else:
            stacked[name] = array
    counts = {name: len(array) for name, array in stacked.items()}
    if len(set(counts.values())) > 1:
        raise InputError(f"arrays hold different numbers of samples: {counts}", file=file)
    if not stacked:
        return [constant]
    count = next(iter(counts.values()))
    batch = batch or min(BATCH, max(1, -(-count // FEEDS)))
    fixed = {int(v.shape[0]) for n, v in inputs.items() if n in stacked and isinstance(v.shape[0], int) and v.shape[0]}  # type: ignore[index]
    if fixed and (len(fixed) > 1 or count % (batch := fixed.pop())):
        raise InputError(f"{count} samples do not fill batches of {batch}", file=file)
    if not count:
        raise InputError("it holds no samples", file=file)
    return [
        constant | {name: array[start : start + batch] for name, array in stacked.items()}
        for start in range(0, count, batch)
    ]


def complete(graph: ir.Graph, arrays: Mapping[str, Array], file: str) -> dict[str, Array]:
    """One feed as it is: every input's array has the input's shape. Raises InputError where it has not."""
    inputs = {str(value.name): value for value in true_inputs(graph)}
    feed = {name: array for name, array, _ in _fitting(inputs, arrays, file, free=0)}
    if empty := [name for name, array in feed.items() if not array.size and not _may_be_empty(inputs[name])]:
        raise InputError("it holds no samples", file=file, object=empty[0])
    return feed


def _may_be_empty(value: ir.Value) -> bool:
    """Whether an axis besides the first is dynamic, as the past tokens of a cache are."""
    return value.shape is not None and any(not isinstance(dim, int) for dim in value.shape[1:])


def _fitting(
    inputs: Mapping[str, ir.Value], arrays: Mapping[str, Array], file: str, free: int
) -> Iterator[tuple[str, Array, list[int | None]]]:
    """(graph input, its array, its dimensions), which fit each other but for the first `free` axes."""
    if set(arrays) == {""} and len(inputs) == 1:
        arrays = {next(iter(inputs)): arrays[""]}
    for name, value in inputs.items():
        if name not in arrays:
            there = ", ".join(map(shown, list(arrays)[:5])) or "none"
            raise InputError(f"no array for this graph input; it has {there}", file=file, object=name)
        array = _typed(arrays[name], value, file)
        dims = [int(d) if isinstance(d, int) and d > 0 else None for d in value.shape or ()]
        sizes = zip(dims[free:], array.shape[free:], strict=False)
        if array.ndim != len(dims) or any(d not in (None, s) for d, s in sizes):
            raise InputError(f"shape {list(array.shape)} does not fit {value.shape}", file=file, object=name)
        yield name, array, dims


def _typed(array: Array, value: ir.Value, file: str) -> Array:
    """The array in the input's type; kinds of numbers are never mixed."""
    assert value.dtype is not None
    kind = value.dtype.numpy()
    floats = (np.issubdtype(kind, np.floating) or kind.name == "bfloat16", np.issubdtype(array.dtype, np.floating))
    if floats[0] != floats[1] and array.dtype != kind:
        raise InputError(f"has type {array.dtype.name} where {kind.name} is needed", file=file, object=str(value.name))
    if floats[1] and np.isnan(array).any():
        raise InputError("holds values that are not a number", file=file, object=str(value.name))
    return array.astype(kind, copy=False)
