"""Statistics and masks from throw-away copies of the graph, streamed over batches in the child process.

Activations never leave the child: the copy reduces each batch to sums in the graph, and only these come back, to be
added up here in float64. Source: METHODS 0.4.

A *source* turns what flows through a graph into a matrix with rows (samples, tokens, pixels) and columns, in `groups`
where a convolution has them. A *request* says what is wanted of one source, or of two whose rows belong together;
`collect` answers all requests at once. Sources of a second graph (`graph=1`) see the same batches: both graphs are
merged into one copy, so that X of one and Y of the other meet in one product.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod
from typing import Any, Generic, TypeVar, cast

import numpy as np
import onnx_ir as ir

from onnxprune import bfloat
from onnxprune.cache import Kept
from onnxprune.errors import ImpossibleError, InputError
from onnxprune.infer import Facts, Inference, symbols, true_inputs
from onnxprune.model import Model, free_name, register
from onnxprune.probes import cost_facts, probes
from onnxprune.running import give_back, in_pieces, memory_of, packed
from onnxprune.runtime import ort
from onnxprune.storage import dump
from onnxprune.types import Array, Shape
from onnxprune.worker import Worker

Feed = Mapping[str, Array]
T = TypeVar("T")
NOTHING_KEPT = Kept()
BUDGET = 1 << 30  # bytes
MOMENT = 24  # bytes for each element of a second moment: float32 here and in the child, a float64 sum and its update
ALIVE, WORK = 4, 24  # bytes for each element of a matrix while it waits, and while it is reduced
FLOAT, DOUBLE, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.INT64, ir.DataType.BOOL
PICK = {"place": DOUBLE, "quota": DOUBLE, "step": INT64, "tokens": INT64, "before": INT64, "total": INT64}
THIN = 64  # columns
BLOCK = 1 << 22  # elements of a second moment that are added to at a time
AXES_AS_INPUT = {"ReduceSum": 13, "ReduceMean": 18, "ReduceMax": 18}  # opset since which
OLDEST = 9  # the oldest opset that has what the copies need


# What can be asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """A value: its positions along `axis` are the columns, all other axes, in order, the rows. One group."""

    value: str
    axis: int = -1
    graph: int = 0


@dataclass(frozen=True)
class Reads:
    """What a node multiplies by its weight; `node` is the name of its first output.

    Rows are in the order of that output's other axes, so `Columns(node, axis of the weight's outputs)` belongs to it.
    MatMul: the axis that is summed over, of the operand that depends on the graph's inputs. Gemm: the same after
    transA and transB, times alpha, so that the output is X W + beta C. Conv (1-D to 3-D): patches with real zero
    padding, columns as in `W.reshape(m, -1)`, one matrix for each conv group.
    """

    node: str
    graph: int = 0


Source = Columns | Reads


class Request(Generic[T]):
    """What `collect` can be asked; T is the answer."""


@dataclass(frozen=True)
class ProfileOf(Request["Profile"]):
    """Statistics of each column."""

    x: Source


@dataclass(frozen=True)
class MomentsOf(Request["Moments"]):
    """Second moments of x, and of x with y, over all rows or over a sample of at most `rows`.

    If x has several groups and y one, y's columns are dealt out to the groups in order, as a Conv's output channels.
    """

    x: Source
    y: Source | None = None
    rows: int | None = None


@dataclass(frozen=True)
class RowsOf(Request[Array]):
    """At most `rows` rows themselves, float32[groups, rows, columns].

    Equal numbers choose the same rows of every source, here and in MomentsOf. Of a value with padding, `rows` counts
    tokens, each of which may be several rows.
    """

    x: Source
    rows: int


# What is answered ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """Mean, variance (divided by count - 1), max |x|, L1 and L2 norm of each column, float64[groups * columns]."""

    count: int
    mean: Array
    variance: Array
    largest: Array
    l1: Array
    l2: Array


@dataclass(frozen=True)
class Moments:
    """Centred second moments as sums over `count` rows; `outputs` are y's columns in a group, 0 without y.

    mean float64[groups, columns], xx float64[groups, columns, columns], y_mean float64[groups, outputs],
    xy float64[groups, columns, outputs], yy float64[groups, outputs]: only the diagonal.
    """

    count: int
    mean: Array
    xx: Array
    y_mean: Array
    xy: Array
    yy: Array

    def augmented(self) -> tuple[Array, Array]:
        """([X 1]^T [X 1], [X 1]^T Y), not centred, the constant last.

        float64[groups, columns + 1, columns + 1] and float64[groups, columns + 1, outputs].
        """
        ones = np.ones((len(self.mean), 1))
        x = np.concatenate([self.mean, ones], axis=1)
        left, right = self.count * _outer(x, x), self.count * _outer(x, self.y_mean)
        left[:, :-1, :-1] += self.xx
        right[:, :-1] += self.xy
        return left, right


class Answers:
    """The answer to each request: `answers[MomentsOf(...)]` is a Moments."""

    def __init__(self, found: Mapping[Request[Any], Any]) -> None:
        self._found = found

    def __getitem__(self, request: Request[T]) -> T:
        return cast(T, self._found[request])


Gather = Callable[[Sequence[Request[Any]]], Answers]  # `collect`, with everything but the requests settled


def collect(
    worker: Worker,
    models: Model | Sequence[Model],
    feeds: Sequence[Feed],
    requests: Iterable[Request[Any]],
    *,
    padding: str | None = None,
    seed: int = 0,
    budget: int = BUDGET,
    threads: int = 1,
    memory: int | None = None,
    kept: Kept = NOTHING_KEPT,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Answers:
    """Run the samples through a copy of each model and answer all requests, in as many passes as `budget` asks for.

    Samples lie along axis 0 of the inputs whose first dimension is dynamic. The answers do not depend on how they are
    split into batches, nor on the passes, but for the rounding of float32 sums: some 1e-6 of the largest element.
    `padding` names an input [batch, length] that is zero for padded tokens: such rows are left out of every value whose
    leading axes are batch and length (or their product), and samples without any token altogether. A sample of rows
    takes its share from every sample, evenly spread over its rows, drawn with `seed`. `budget` is in bytes: second
    moments and rows take half of it in one pass, the matrices of one batch the other half; what is larger alone is
    run alone. Copies whose weights would take more than `memory` bytes run piece by piece.
    `kept` has the answers of passes that ran before, over the same samples of the same models.
    `progress(done, total)` counts batches.

    Raises InputError for a name that is not there or samples that do not fit, ImpossibleError for a node that has no
    such matrix, and what Worker.call raises. Source: METHODS 0.4.
    """
    wanted = list(dict.fromkeys(requests))
    graphs = [models] if isinstance(models, ir.Model) else list(models)
    samples = _Samples(graphs[0].graph, feeds, padding)
    sizes = _Sizes(graphs, samples.largest, padding)
    passes = list(_passes(wanted, sizes, budget // 2))
    jobs = [(part, samples.batches(sizes.batch(part, samples.largest_count, budget // 2))) for part in passes]
    total, done = sum(len(batches) for _, batches in jobs), 0
    found: dict[Request[Any], Any] = {}
    for part, batches in jobs:
        asked = [padding, seed, threads, [repr(request) for request in part], [batch.count for batch in batches]]
        if (before := kept.get("statistics", *asked)) is not None:
            found |= {request: _joined(request, f"{k}.", before) for k, request in enumerate(part)}
            done += len(batches)
            progress(done, total)
            continue
        copy = _Copy(graphs, sizes)
        for request in part:
            copy.add(request)
        totals = _Totals(copy)
        with _running(worker, copy.finished(), threads, memory) as run:
            for batch in batches:
                totals.add(run(batch.feed | samples.picks(batch, copy.pickers, seed)))
                done += 1
                progress(done, total)
        answers = {request: totals.answer(request) for request in part}
        apart = {n: array for k, one in enumerate(answers.values()) for n, array in _apart(one, f"{k}.")}
        kept.put("statistics", apart, *asked)
        found |= answers
    return Answers(found)


def _apart(answer: Any, prefix: str) -> Iterator[tuple[str, Array]]:
    """(name, array) of all that is in an answer."""
    parts = {"rows": answer} if isinstance(answer, np.ndarray) else vars(answer)
    yield from ((prefix + name, np.asarray(part)) for name, part in parts.items())


def _joined(request: Request[Any], prefix: str, arrays: Mapping[str, Array]) -> Any:
    """An answer from its arrays."""
    parts: dict[str, Any] = {n.removeprefix(prefix): array for n, array in arrays.items() if n.startswith(prefix)}
    if isinstance(request, RowsOf):
        return parts["rows"]
    parts["count"] = int(parts["count"])
    return Profile(**parts) if isinstance(request, ProfileOf) else Moments(**parts)


# Masks as inputs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """A value that is multiplied by a mask along `axis`, or as a whole by one number where `axis` is None."""

    value: str
    axis: int | None = -1


Masked = Callable[[Feed, Sequence[Array]], dict[str, Array]]


@contextmanager
def masked(
    worker: Worker,
    model: Model,
    gates: Sequence[Gate],
    *,
    outputs: Sequence[str] | None = None,
    threads: int = 1,
    memory: int | None = None,
) -> Iterator[Masked]:
    """A function (feed, masks) -> {output: array}, of one loaded copy in which each gate's mask is an input.

    A mask is float32[length of the axis], or one number without an axis; ones change nothing, and what is no number
    stays so behind a zero. The copy runs all of the model: it measures quality, never latency.

    Raises InputError for a name or axis that is not there, or a mask that does not fit.
    """
    copy = model.clone()
    graph = copy.graph
    graph.meta.pop("names", None)
    values = _values(graph)
    facts = cost_facts(model, {})
    ports = [_gate(graph, facts, _known(values, gate.value), gate, k) for k, gate in enumerate(gates)]
    with _running(worker, copy, threads, memory) as run:

        def call(feed: Feed, masks: Sequence[Array]) -> dict[str, Array]:
            given = {port: np.asarray(mask, np.float32) for port, mask in zip(ports, masks, strict=True)}
            for port, gate in zip(ports, gates, strict=True):
                if given[port].ndim != (gate.axis is not None):
                    raise InputError("a mask has one number for each position of its axis", object=gate.value)
            return run({**feed, **given}, outputs)

        yield call


def _gate(graph: ir.Graph, facts: Facts, value: ir.Value, gate: Gate, k: int) -> str:
    """Multiply what all readers see of a value by a new input; the input's name."""
    mask = scale = _input(graph, f"gate_{k}", FLOAT, 0 if gate.axis is None else 1)
    fresh: list[ir.Node] = []

    def node(op: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        out = ir.Value(name=free_name(graph, f"gate_{k}_{op.lower()}"))
        fresh.append(ir.node(op, inputs, attributes, outputs=[out], name=out.name))
        return out

    dtype = facts.types.get(gate.value, int(FLOAT))
    if dtype != FLOAT:
        scale = node("Cast", [scale], to=dtype)
    if gate.axis is not None:
        rank = len(facts.shapes.get(gate.value, ()))
        if not -rank <= gate.axis < rank:
            raise InputError(f"has {rank or 'an unknown number of'} axes, not axis {gate.axis}", object=gate.value)
        behind = [1] * (rank - 1 - gate.axis % rank)
        scale = node("Reshape", [scale, register(graph, "gate_shape", np.array([-1, *behind], np.int64))])
    gated = node("Mul", [value, scale])
    gated.shape, gated.type = value.shape, value.type
    value.replace_all_uses_with(gated, replace_graph_outputs=True)
    fresh[-1].replace_input_with(0, value)
    if gated.is_graph_output():
        name = str(value.name)
        value.name = free_name(graph, f"{name}_whole")
        gated.name = name
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, fresh)
    elif len(graph):
        graph.insert_before(graph[0], fresh)
    else:
        graph.extend(fresh)
    return str(mask.name)


# Running a copy in the child -----------------------------------------------------------------------------------------

Run = Callable[..., dict[str, Array]]


@contextmanager
def _running(worker: Worker, model: Model, threads: int, memory: int | None) -> Iterator[Run]:
    """A function (feed, outputs=None) that runs the model in the child, where it stays loaded until the end.

    Where its weights would take more than `memory` bytes, they are read anew for each feed, a few nodes' at a time.
    """
    if memory is not None and memory_of(model) > memory:
        sent = packed(model)

        def run_in_pieces(feed: Feed, outputs: Sequence[str] | None = None) -> dict[str, Array]:
            ((found,),) = worker.call(in_pieces, [sent], [dict(feed)], threads, memory)
            return {name: array for name, array in found.items() if outputs is None or name in outputs}

        yield run_in_pieces
        worker.call(give_back)
        return
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        made = bfloat.single(model)
        path = str(dump(made, folder, "copy"))

        def run(feed: Feed, outputs: Sequence[str] | None = None) -> dict[str, Array]:
            given = dict(feed) if made is model else bfloat.fed(feed)
            found: dict[str, Array] = worker.call(answer, path, given, outputs, threads)
            return found

        yield run
        worker.call(forget)


@lru_cache(maxsize=2)
def _session(path: str, threads: int) -> ort.OrtSession:
    # As written: a fused or folded graph rounds differently, and a copy packed for speed costs its weights again.
    return ort.BACKENDS["cpu"].session(path, threads=threads, optimise=False, arena=False)


def answer(path: str, feed: Feed, outputs: Sequence[str] | None, threads: int) -> dict[str, Array]:
    """One run of the copy at a path, which stays loaded; called in the child."""
    return _session(path, threads).run(feed, outputs)


def forget() -> None:
    """Unload all copies; called in the child."""
    _session.cache_clear()


# Samples and batches -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Samples `start` to `start + count` of all, and how many tokens each has (one, where nothing is padded)."""

    feed: dict[str, Array]
    start: int
    count: int
    tokens: Array


class _Samples:
    """The user's feeds without samples that are padding alone."""

    def __init__(self, graph: ir.Graph, feeds: Sequence[Feed], padding: str | None) -> None:
        inputs = {str(value.name): value for value in true_inputs(graph)}
        self.padding = padding
        self.stacked = frozenset(
            name for name, value in inputs.items() if value.shape and not isinstance(value.shape[0], int)
        )
        if padding is not None and padding not in inputs:
            raise InputError(f"no such graph input; there are {', '.join(inputs)}", object=padding)
        self.feeds: list[dict[str, Array]] = []
        for feed in feeds:
            if absent := sorted(inputs.keys() - feed.keys()):
                raise InputError("there is no value for this input", object=absent[0])
            kept = {name: np.asarray(feed[name]) for name in inputs}
            if padding is not None:
                if kept[padding].ndim != 2:
                    raise InputError("a mask of padded tokens has the shape [batch, length]", object=padding)
                full = (kept[padding] != 0).any(axis=1)
                if self._splits(kept):
                    kept = {name: array[full] if name in self.stacked else array for name, array in kept.items()}
                if not full.any():
                    continue
            self.feeds.append(kept)
        if not self.feeds:
            raise InputError("there are no samples", object=padding or "")

    def _splits(self, feed: Feed) -> bool:
        """Whether all stacked inputs hold the same number of samples."""
        return len({len(feed[name]) for name in self.stacked}) == 1

    def _count(self, feed: Feed) -> int:
        if self._splits(feed):
            return len(feed[next(iter(self.stacked))])
        return len(feed[self.padding]) if self.padding is not None else 1

    @property
    def largest(self) -> Feed:
        """The feed that takes most memory."""
        return max(self.feeds, key=lambda feed: sum(array.size for array in feed.values()))

    @property
    def largest_count(self) -> int:
        """Samples in it."""
        return self._count(self.largest)

    def batches(self, size: int) -> list[_Batch]:
        """All samples in batches of at most `size`, as far as the feeds can be split."""
        found, start = [], 0
        for feed in self.feeds:
            count = self._count(feed)
            step = size if self._splits(feed) else count
            for k in range(0, count, step):
                part = {n: array[k : k + step] if n in self.stacked else array for n, array in feed.items()}
                n = min(step, count - k)
                tokens = np.ones(n, np.int64) if self.padding is None else np.count_nonzero(part[self.padding], axis=1)
                found.append(_Batch(part, start + k, n, np.asarray(tokens, np.int64)))
            start += count
        return found

    @cached_property
    def total(self) -> int:
        """Samples in all feeds."""
        return sum(self._count(feed) for feed in self.feeds)

    def picks(self, batch: _Batch, pickers: Mapping[tuple[int, bool], str], seed: int) -> dict[str, Array]:
        """Which rows of this batch to take, for each (rows, padded): what `_Copy.picked` reads.

        Sample i gives quota[i] of its rows: one from each of as many strata, at `place` between its ends.
        """
        found: dict[str, Array] = {}
        inside = slice(batch.start, batch.start + batch.count)
        for (rows, padded), name in pickers.items():
            rng = np.random.default_rng([seed, rows])
            whole, left = divmod(rows, self.total)
            quota = whole + (rng.permutation(self.total) < left)
            most = whole + (left > 0)
            place = rng.random((self.total, most)) * (1 - 1e-6)
            tokens = batch.tokens if padded else np.ones(batch.count, np.int64)
            found |= {
                f"{name}_place": place[inside],
                f"{name}_quota": quota[inside, None].astype(np.float64),
                f"{name}_step": np.arange(most)[None],
                f"{name}_tokens": tokens[:, None],
                f"{name}_before": (np.cumsum(tokens) - tokens)[:, None],
                f"{name}_total": tokens.sum(keepdims=True),
            }
        return found


# Sizes ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """A source that is an axis of a value, times a factor."""

    value: ir.Value
    axis: int
    rank: int
    scale: float = 1.0


@dataclass(frozen=True)
class _Patches:
    """A source that is the patches of a convolution over `channels`, in `groups`."""

    node: ir.Node
    channels: int
    groups: int
    kernel: Shape


class _Sizes:
    """Shapes of the graphs at the sizes of one feed, and what sources and requests take there."""

    def __init__(self, models: Sequence[Model], feed: Feed, padding: str | None) -> None:
        self.models, self.padding = models, padding
        self.facts: list[Facts] = []
        self.other: list[Facts] = []
        for model in models:
            places = {key: where[0] for key, where in symbols(model.graph).items()}
            own = {key: feed[name].shape[axis] for key, (name, axis) in places.items()}
            inference = Inference(model)
            self.facts.append(inference.at(own))
            self.other.append(inference.at(probes(inference, own)[1]) if padding else self.facts[-1])
        self._nodes = [{str(node.outputs[0].name): node for node in model.graph} for model in models]
        self._values = [_values(model.graph) for model in models]
        self._moving = [_moving(model.graph) for model in models]

    def shape(self, graph: int, value: ir.Value) -> Shape:
        """Raises ImpossibleError where it is unknown."""
        found = self.facts[graph].shapes.get(str(value.name))
        if found is None:
            raise ImpossibleError("its shape cannot be inferred", object=str(value.name))
        return found

    def form(self, source: Source) -> _Axis | _Patches:
        """What a source stands for, in the models as they were given. Raises InputError, ImpossibleError."""
        if not 0 <= source.graph < len(self.models):
            raise InputError(f"there are {len(self.models)} graphs, not graph {source.graph}", object=str(source))
        if isinstance(source, Columns):
            return self._along(source.graph, _known(self._values[source.graph], source.value), source.axis)
        node = self._nodes[source.graph].get(source.node)
        if node is None:
            raise InputError("no node has this as its first output", object=source.node)
        if node.op_type == "Conv" and not node.domain:
            return self._patches(source.graph, node)
        if node.op_type not in ("MatMul", "Gemm") or node.domain:
            raise ImpossibleError(
                f"{node.op_type} has no matrix of inputs; MatMul, Gemm and Conv have", object=source.node
            )
        return self._operand(source.graph, node)

    def _along(self, graph: int, value: ir.Value, axis: int, scale: float = 1.0) -> _Axis:
        rank = len(self.shape(graph, value))
        if not -rank <= axis < rank:
            raise InputError(f"has {rank} axes, not axis {axis}", object=str(value.name))
        return _Axis(value, axis % rank, rank, scale)

    def _operand(self, graph: int, node: ir.Node) -> _Axis:
        """The operand of a product that depends on the graph's inputs, along the axis that is summed over."""
        moving = [k for k in (0, 1) if node.inputs[k] in self._moving[graph]]
        if len(moving) != 1:
            raise ImpossibleError("it multiplies two activations", object=str(node.outputs[0].name))
        (k,) = moving
        x, weight = cast(ir.Value, node.inputs[k]), cast(ir.Value, node.inputs[1 - k])
        if prod(self.shape(graph, weight)[:-2]) != 1:
            raise ImpossibleError("its weight is a batch of matrices", object=str(node.outputs[0].name))
        if node.op_type == "MatMul":
            return self._along(graph, x, -1 if k == 0 or len(self.shape(graph, x)) == 1 else -2)
        turned = bool(_attribute(node, "transA" if k == 0 else "transB", 0))
        return self._along(graph, x, int(turned == (k == 1)), float(_attribute(node, "alpha", 1.0)))

    def _patches(self, graph: int, node: ir.Node) -> _Patches:
        _, inside, *kernel = self.shape(graph, cast(ir.Value, node.inputs[1]))
        groups = int(_attribute(node, "group", 1))
        return _Patches(node, inside * groups, groups, tuple(kernel))

    def padded(self, source: Source) -> bool:
        """Whether the rows of a source are tokens of which some may be padding."""
        form = self.form(source)
        if self.padding is None or isinstance(form, _Patches):
            return False
        pairs = []
        for facts in (self.facts[source.graph], self.other[source.graph]):
            shape, mask = facts.shapes.get(str(form.value.name), ()), facts.shapes.get(self.padding, (0, 0))
            pairs.append([k for k in range(1, form.axis + 1) if prod(shape[:k]) == prod(mask)])
        return bool(set(pairs[0]) & set(pairs[1]))

    def groups(self, source: Source) -> int:
        """How many matrices a source is."""
        form = self.form(source)
        return form.groups if isinstance(form, _Patches) else 1

    def columns(self, source: Source) -> int:
        """Columns in one group."""
        form = self.form(source)
        if isinstance(form, _Patches):
            return form.channels // form.groups * prod(form.kernel)
        return self.shape(source.graph, form.value)[form.axis]

    def elements(self, source: Source) -> int:
        """Elements of all groups' matrices for one run of the feed; 0 where that is unknown."""
        form = self.form(source)
        if isinstance(form, _Axis):
            return prod(self.shape(source.graph, form.value))
        out = self.facts[source.graph].shapes.get(str(form.node.outputs[0].name), (0, 0))
        return out[0] * prod(out[2:]) * form.channels * prod(form.kernel)

    def rows(self, source: Source) -> int:
        """Rows for one run of the feed, padding included; 0 where that is unknown."""
        return self.elements(source) // max(1, self.groups(source) * self.columns(source))

    def moment(self, request: Request[Any]) -> int:
        """Bytes of what comes back, besides vectors."""
        if isinstance(request, MomentsOf):
            width = self.columns(request.x)
            outputs = self.columns(request.y) if request.y is not None else 0
            return MOMENT * (self.groups(request.x) * width * width + width * outputs)
        if isinstance(request, RowsOf):
            return 3 * 4 * request.rows * self.groups(request.x) * self.columns(request.x)
        return 0

    def batch(self, requests: Sequence[Request[Any]], count: int, budget: int) -> int:
        """How many samples may run at once, where the feed has `count`."""
        sources = {self.form(source): source for request in requests for source in _sources(request)}
        elements = [self.elements(source) for source in sources.values()]
        return max(1, count * budget // max(1, ALIVE * sum(elements) + WORK * max(elements, default=0)))


def _sources(request: Request[Any]) -> list[Source]:
    if isinstance(request, MomentsOf):
        return [request.x] if request.y is None else [request.x, request.y]
    if isinstance(request, ProfileOf | RowsOf):
        return [request.x]
    raise TypeError(f"not a request: {request!r}")


def _passes(requests: Sequence[Request[Any]], sizes: _Sizes, budget: int) -> Iterator[list[Request[Any]]]:
    """Requests in runs whose second moments and rows stay within the budget."""
    part: list[Request[Any]] = []
    taken = 0
    for request in requests:
        more = sizes.moment(request)
        if part and more and taken + more > budget:
            yield part
            part, taken = [], 0
        part.append(request)
        taken += more
    if part:
        yield part


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    """The values of the main graph by name."""
    found = {str(value.name): value for value in (*graph.inputs, *graph.initializers.values())}
    return found | {str(value.name): value for node in graph for value in node.outputs if value.name}


def _known(values: Mapping[str, ir.Value], name: str) -> ir.Value:
    if name not in values:
        raise InputError("there is no such value", object=name)
    return values[name]


def _moving(graph: ir.Graph) -> set[ir.Value]:
    """Values that depend on the graph's inputs, also through what a subgraph captures."""
    found = set(true_inputs(graph))
    for node in graph:
        inside = [n for key in node.attributes.values() for graph in _subgraphs(key) for n in graph.all_nodes()]
        if any(value in found for inner in (node, *inside) for value in inner.inputs):
            found.update(node.outputs)
    return found


def _subgraphs(attribute: ir.Attr) -> tuple[ir.Graph, ...]:
    """The graphs in an attribute."""
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return tuple(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else ()


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    return node.attributes[name].value if name in node.attributes else default


# The copy ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """One output of the copy: what it is of which matrices, and how batches of it are added up."""

    how: str  # square, product, sum, largest, rows
    x: int
    y: int


class _Copy:
    """A throw-away graph that ends in reductions instead of outputs.

    A matrix is float32[groups, rows, columns]. It is centred on the batch's own mean before it is squared, which
    float32 sums of squares need; `rows`, `means` and `rests` (the sum of what is left after centring, for the mean's
    own rounding) go out with it.
    """

    def __init__(self, models: Sequence[Model], sizes: _Sizes) -> None:
        self.sizes = sizes
        self.model, self._found = _merged(models)
        self.graph = self.model.graph
        self.opset = self.model.opset_imports.get("", 1)
        if self.opset < OLDEST:
            raise ImpossibleError(f"calibration needs opset {OLDEST}; this is opset {self.opset}")
        self.parts: dict[str, _Part] = {}
        self.centres: list[tuple[str, str, str]] = []  # names of rows, means, rests
        self.pickers: dict[tuple[int, bool], str] = {}
        self._outputs: list[ir.Value] = []
        self._made: dict[Any, Any] = {}

    def add(self, request: Request[Any]) -> None:
        """Append what answers a request."""
        if isinstance(request, RowsOf):
            key = ("rows", self.sizes.form(request.x), request.rows)
            self.output(self.matrix(request.x, request.rows), key, "rows", 0, 0)
        elif isinstance(request, ProfileOf):
            k, _ = self.centred(request.x, None)
            x = self.matrix(request.x, None)
            size = self.node("Abs", [x])
            self.output(self.reduce("ReduceMax", size), ("largest", k), "largest", k, k)
            self.output(self.total(size), ("sum", k), "sum", k, k)
            self.square(request.x, None)
        elif isinstance(request, MomentsOf):
            k, x = self.centred(request.x, request.rows)
            turned = self.node("Transpose", [x], perm=[0, 2, 1])
            self.output(self.product(turned, x, request.x), ("product", k, k), "product", k, k)
            if request.y is not None:
                other, y = self.centred(request.y, request.rows)
                if self.sizes.rows(request.x) != self.sizes.rows(request.y):
                    raise InputError(
                        "has not the rows of the inputs that it is to be paired with", object=str(request.y)
                    )
                groups, given = self.sizes.groups(request.x), self.sizes.groups(request.y)
                if given not in (1, groups) or self.sizes.columns(request.y) * given % groups:
                    raise ImpossibleError(f"cannot be dealt out to {groups} groups", object=str(request.y))
                if given != groups:
                    y = self.node("Transpose", [y], perm=[0, 2, 1])
                    y = self.node("Reshape", [y, self.constant([groups, -1, 0])])
                    y = self.node("Transpose", [y], perm=[0, 2, 1])
                self.output(self.product(turned, y, request.x), ("product", k, other), "product", k, other)
                self.square(request.y, request.rows)

    def product(self, turned: ir.Value, y: ir.Value, x: Source) -> ir.Value:
        """X^T Y from X^T and Y; in double where X is thin, which costs little and is where float32 kernels err most."""
        if self.sizes.columns(x) > THIN:
            return self.node("MatMul", [turned, y])
        return self.node("MatMul", [self.cast(turned, DOUBLE), self.cast(y, DOUBLE)])

    def square(self, source: Source, rows: int | None) -> None:
        """Ask for the sum of squares of the centred columns."""
        k, x = self.centred(source, rows)
        self.output(self.total(self.node("Mul", [x, x])), ("square", k), "square", k, k)

    def finished(self) -> Model:
        """The copy with the requested outputs only, and without what they do not need."""
        self.graph.outputs.clear()
        self.graph.outputs.extend(self._outputs)
        outputs = set(self._outputs)
        for node in reversed(self.graph):  # outputs that nobody reads keep their names: some operators need them all
            if not any(out.uses() or out in outputs for out in node.outputs):
                self.graph.remove(node, safe=True)
        for value in [value for value in self.graph.inputs if not value.uses()]:
            self.graph.inputs.remove(value)
        for name in [name for name, value in self.graph.initializers.items() if not value.uses()]:
            del self.graph.initializers[name]
        return self.model

    def name_of(self, key: Any) -> str:
        """The output of a key that `add` made."""
        return str(self._made[key].name)

    # Matrices

    def matrix(self, source: Source, rows: int | None) -> ir.Value:
        """float32[groups, rows, columns]: the source without padding, of which `rows` are chosen."""
        key = ("matrix", self.sizes.form(source), rows)  # what several nodes read is one matrix
        if key not in self._made:
            padded = self.sizes.padded(source)
            if rows is not None:
                x = self.picked(self.matrix(source, None), rows, padded)
            else:
                form = self.sizes.form(source)
                x = self.patches(source, form) if isinstance(form, _Patches) else self.along(source, form)
                x = self.unpadded(x) if padded else x
            self._made[key] = x
        return cast(ir.Value, self._made[key])

    def centred(self, source: Source, rows: int | None) -> tuple[int, ir.Value]:
        """(number of its centre, the matrix minus the batch's mean)."""
        key = ("centred", self.sizes.form(source), rows)
        if key not in self._made:
            x = self.matrix(source, rows)
            mean = self.reduce("ReduceMean", x)
            rest = self.node("Sub", [x, mean])
            found = [self.node("Shape", [x]), mean, self.reduce("ReduceSum", rest)]
            self._outputs += found
            self.centres.append(cast(tuple[str, str, str], tuple(str(value.name) for value in found)))
            self._made[key] = (len(self.centres) - 1, rest)
        return cast(tuple[int, ir.Value], self._made[key])

    def along(self, source: Source, form: _Axis) -> ir.Value:
        """Columns along an axis; [1, rows, columns]."""
        x = self.float32(self._found[source.graph][str(form.value.name)])
        order = [k for k in range(form.rank) if k != form.axis]
        if form.axis != form.rank - 1:
            x = self.node("Transpose", [x], perm=[*order, form.axis])
        width = self.node("Gather", [self.node("Shape", [x]), self.constant([form.rank - 1])])
        x = self.node("Reshape", [x, self.node("Concat", [self.constant([1, -1]), width], axis=0)])
        return x if form.scale == 1.0 else self.node("Mul", [x, self.constant(form.scale, np.float32)])

    def patches(self, source: Source, form: _Patches) -> ir.Value:
        """Patches of a convolution; a convolution of each channel by one-hot kernels cuts them out."""
        x = self.float32(self._found[source.graph][str(cast(ir.Value, form.node.inputs[0]).name)])
        count, rank = prod(form.kernel), len(form.kernel)
        settings = {
            key: form.node.attributes[key].value
            for key in ("strides", "pads", "dilations", "auto_pad")
            if key in form.node.attributes
        }
        still = {"strides": [1] * rank, "pads": [0] * 2 * rank}
        moves = any(list(settings.get(key, at_rest)) != at_rest for key, at_rest in still.items())
        if moves or count > 1 or str(settings.get("auto_pad", "NOTSET")).startswith("SAME"):
            rest = [0] * rank  # these axes as they are
            x = self.node("Reshape", [x, self.constant([-1, 1, *rest])])
            kernels = self.constant(np.eye(count).reshape(count, 1, *form.kernel), np.float32)
            x = self.node("Conv", [x, kernels], **settings, kernel_shape=list(form.kernel))
            x = self.node("Reshape", [x, self.constant([-1, form.channels * count, *rest])])
        width = form.channels * count // form.groups
        x = self.node("Reshape", [x, self.constant([0, form.groups, width, -1])])
        x = self.node("Transpose", [x], perm=[1, 0, 3, 2])
        return self.node("Reshape", [x, self.constant([form.groups, -1, width])])

    def unpadded(self, x: ir.Value) -> ir.Value:
        """Only the rows of tokens that are none of the padding; each may be several rows in a row."""
        mask = self._found[0][str(self.sizes.padding)]
        flag = self.node("Reshape", [self.cast(mask, BOOL), self.constant([-1, 1])])
        tokens = self.node("Gather", [self.node("Shape", [flag]), self.constant([0])])
        each = self.node("Div", [self.count(x), tokens])
        flag = self.node("Expand", [flag, self.node("Concat", [tokens, each], axis=0)])
        return self.node("Compress", [x, self.node("Reshape", [flag, self.constant([-1])])], axis=1)

    def picked(self, x: ir.Value, rows: int, padded: bool) -> ir.Value:
        """The rows that `_Samples.picks` asks for: one of [j n / t, (j + 1) n / t) for each j < t = min(quota, n).

        n is how many rows the sample has: `tokens` of its own, times rows for each token. Where the quota is larger,
        all of them are taken.
        """
        name = self.pickers.get((rows, padded))
        if name is None:
            name = self.pickers[rows, padded] = free_name(self.graph, "pick")
            for part, dtype in PICK.items():
                self._made[name, part] = _input(self.graph, f"{name}_{part}", dtype, 1 if part == "total" else 2)
        place, quota, step, tokens, before, total = (self._made[name, part] for part in PICK)
        one = self.constant(1.0, np.float64)
        whole = self.count(x)
        each = self.cast(self.node("Max", [self.cast(self.node("Div", [whole, total]), DOUBLE), one]), INT64)
        mine = self.node("Mul", [tokens, each])
        share = self.node("Min", [quota, self.cast(mine, DOUBLE)])
        strata = self.cast(self.node("Max", [share, one]), INT64)
        low, high = (
            self.node("Div", [self.node("Mul", [end, mine]), strata])
            for end in (step, self.node("Add", [step, self.constant(1)]))
        )
        inside = self.node("Mul", [place, self.cast(self.node("Sub", [high, low]), DOUBLE)])
        row = self.node("Add", [low, self.cast(inside, INT64)])
        row = self.node("Add", [row, self.node("Mul", [before, each])])
        there = self.node("And", [self.node("Less", [step, self.cast(share, INT64)]), self.node("Less", [row, whole])])
        chosen = [self.node("Reshape", [value, self.constant([-1])]) for value in (row, there)]
        return self.node("Gather", [x, self.node("Compress", chosen, axis=0)], axis=1)

    # Nodes

    def node(self, op: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        """Append a node; its output."""
        out = ir.Value(name=free_name(self.graph, f"calibrate_{op.lower()}"))
        self.graph.append(ir.node(op, inputs, attributes, outputs=[out], name=out.name))
        return out

    def constant(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """An initializer."""
        return register(self.graph, "calibrate", np.asarray(value, dtype))

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value as another type; to whole numbers, towards zero."""
        return self.node("Cast", [value], to=int(dtype))

    def float32(self, value: ir.Value) -> ir.Value:
        """The value in float32."""
        return value if value.dtype == FLOAT else self.cast(value, FLOAT)

    def count(self, x: ir.Value) -> ir.Value:
        """int64[1]: rows of a matrix."""
        return self.node("Gather", [self.node("Shape", [x]), self.constant([1])])

    def reduce(self, op: str, x: ir.Value) -> ir.Value:
        """Reduce over rows; [groups, 1, columns]."""
        if self.opset >= AXES_AS_INPUT[op]:
            return self.node(op, [x, self.constant([1])], keepdims=1)
        return self.node(op, [x], axes=[1], keepdims=1)

    def total(self, x: ir.Value) -> ir.Value:
        """Sum over rows in double: float32 would lose a digit over a hundred thousand rows."""
        return self.reduce("ReduceSum", self.cast(x, DOUBLE))

    def output(self, value: ir.Value, key: Any, how: str, x: int, y: int) -> None:
        """Make a value an output, once for each key."""
        if key not in self._made:
            self._made[key] = value
            self._outputs.append(value)
            self.parts[str(value.name)] = _Part(how, x, y)


def _input(graph: ir.Graph, wish: str, dtype: ir.DataType, rank: int) -> ir.Value:
    """A new graph input under a free name, all its dimensions dynamic."""
    value = ir.Value(name=free_name(graph, wish), shape=ir.Shape([None] * rank), type=ir.TensorType(dtype))
    graph.inputs.append(value)
    return value


def _merged(models: Sequence[Model]) -> tuple[Model, list[dict[str, ir.Value]]]:
    """One copy of all graphs side by side on the same inputs, and for each graph its values by their own names.

    Tensors are shared with the models, and an initializer that two graphs have in common is kept once. Raises
    ImpossibleError where the graphs cannot live in one model.
    """
    first, *rest = (model.clone() for model in models)
    graph = first.graph
    found = [_values(graph)]
    graph.meta.pop("names", None)
    first.ir_version = max(first.ir_version, 4)  # since which initializers need not be inputs
    for value in [value for value in graph.inputs if value.name in graph.initializers]:
        graph.inputs.remove(value)
    for k, other in enumerate(rest, 1):
        found.append(values := _values(other.graph))
        inputs = {str(value.name): value for value in true_inputs(graph)}
        for domain, version in other.opset_imports.items():
            if first.opset_imports.setdefault(domain, version) != version:
                raise ImpossibleError(f"the graphs differ in the version of operator set '{domain}'")
        for key, function in other.functions.items():
            first.functions.setdefault(key, function)
        for value in true_inputs(other.graph):
            if (same := inputs.get(str(value.name))) is None:
                raise InputError("only one of the graphs has this input", object=str(value.name))
            value.replace_all_uses_with(same)
            values[str(value.name)] = same
        other.graph.inputs.clear()
        other.graph.outputs.clear()
        for name, value in list(other.graph.initializers.items()):
            del other.graph.initializers[name]
            same = graph.initializers.get(name)
            if same is not None and same.const_value is value.const_value:
                value.replace_all_uses_with(same)
                values[name] = same
            else:
                value.name = f"graph{k}/{name}"
                graph.register_initializer(value)
        nodes = list(other.graph)
        for node in other.graph.all_nodes():
            _prefix(node, f"graph{k}/")
        other.graph.remove(nodes)
        graph.extend(nodes)
    return first, found


def _prefix(node: ir.Node, prefix: str) -> None:
    """Put a prefix before the names of a node, of its outputs and of what its subgraphs take in or store."""
    node.name = f"{prefix}{node.name}" if node.name else node.name
    graphs = [graph for attribute in node.attributes.values() for graph in _subgraphs(attribute)]
    taken = [value for graph in graphs for value in (*graph.inputs, *graph.initializers.values())]
    for value in {*node.outputs, *taken}:
        if value.name:
            value.name = f"{prefix}{value.name}"


# Adding up -----------------------------------------------------------------------------------------------------------


@dataclass
class _Centre:
    """Rows so far and their mean; the newest batch's rows, rest, and distance from the mean before it."""

    rows: int = 0
    mean: Any = 0.0
    new: int = 0
    rest: Any = 0.0
    distance: Any = 0.0


@dataclass
class _Totals:
    """Sums over the batches of one pass, in float64.

    Second moments of two parts with na and nb rows: M = Ma + Mb + d d' na nb / (na + nb), d the difference of means.
    """

    copy: _Copy
    sums: dict[str, Any] = field(default_factory=dict)
    centres: list[_Centre] = field(default_factory=list)

    def add(self, found: Mapping[str, Array]) -> None:
        """One more batch."""
        if not self.centres:
            self.centres = [_Centre() for _ in self.copy.centres]
        for centre, (shape, mean, rest) in zip(self.centres, self.copy.centres, strict=True):
            centre.new = int(found[shape][1])
            if centre.new:
                centre.rest = found[rest][:, 0]
                exact = found[mean][:, 0].astype(np.float64) + centre.rest / centre.new
                centre.distance = exact - centre.mean
        for name, part in self.copy.parts.items():
            self._add(name, part, found[name])
        for centre in self.centres:
            if centre.new:
                centre.mean = centre.mean + centre.distance * (centre.new / (centre.rows + centre.new))
                centre.rows += centre.new

    def _add(self, name: str, part: _Part, value: Array) -> None:
        if part.how == "rows":
            self.sums.setdefault(name, []).append(value)
            return
        x, y = self.centres[part.x], self.centres[part.y]
        if not x.new:
            return
        if name not in self.sums:
            self.sums[name] = np.zeros(value.shape)
        total = self.sums[name]
        if part.how == "largest":
            np.maximum(total, value, out=total)
            return
        total += value
        if part.how == "sum":
            return
        between = x.rows * x.new / (x.rows + x.new)
        for left, right, factor in ((x.rest, y.rest, -1 / x.new), (x.distance, y.distance, between)):
            if part.how == "square":
                total += factor * (left * right)[:, None]
            elif factor:
                add_outer(total, factor * left, _dealt(right, len(left)))

    def answer(self, request: Request[Any]) -> Any:
        """What the sums say."""
        if isinstance(request, RowsOf):
            key = ("rows", self.copy.sizes.form(request.x), request.rows)
            return np.concatenate(self.sums[self.copy.name_of(key)], axis=1)
        if isinstance(request, ProfileOf):
            k, _ = self.copy.centred(request.x, None)
            return self._profile(k)
        assert isinstance(request, MomentsOf)
        k, _ = self.copy.centred(request.x, request.rows)
        x = self.centres[k]
        if not x.rows:
            raise InputError("the samples gave no rows", object=str(request.x))
        xx = self.sums[self.copy.name_of(("product", k, k))]
        if request.y is None:
            none = np.zeros((len(x.mean), 0))
            return Moments(x.rows, x.mean, xx, none, np.zeros((*x.mean.shape, 0)), none)
        other, _ = self.copy.centred(request.y, request.rows)
        xy = self.sums[self.copy.name_of(("product", k, other))]
        yy = self.sums[self.copy.name_of(("square", other))]
        y_mean = self.centres[other].mean
        return Moments(x.rows, x.mean, xx, _dealt(y_mean, len(x.mean)), xy, _dealt(yy[:, 0], len(x.mean)))

    def _profile(self, k: int) -> Profile:
        centre = self.centres[k]
        if not centre.rows:
            raise InputError("the samples gave no rows")
        squares, largest, l1 = (
            self.sums[self.copy.name_of((how, k))].reshape(-1) for how in ("square", "largest", "sum")
        )
        mean = centre.mean.reshape(-1)
        variance = np.maximum(squares, 0) / max(centre.rows - 1, 1)
        return Profile(
            centre.rows, mean, variance, largest, l1, np.sqrt(np.maximum(squares, 0) + centre.rows * mean**2)
        )


def add_outer(total: Array, x: Array, y: Array) -> None:
    """Add to float64[groups, columns, outputs] x of each group times y, some rows at a time."""
    step = max(1, BLOCK // max(1, len(total) * total.shape[2]))
    for start in range(0, total.shape[1], step):
        rows = slice(start, start + step)
        total[:, rows] += _outer(x[:, rows], y)


def _outer(x: Array, y: Array) -> Array:
    """float64[groups, columns, outputs]: x of each group times y."""
    return np.asarray(x[:, :, None] * y[:, None, :])


def _dealt(y: Array, groups: int) -> Array:
    """float64[groups, outputs]: the columns of one group dealt out to several, in order."""
    return y if len(y) == groups else y.reshape(groups, -1)
