"""What criteria look at: the weights, what the operators that read a group are fed, and what its removal does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from onnxprune import interface, plugin, quality
from onnxprune.analysis import Analysis
from onnxprune.branches import PLAIN, SKIP_NORMS
from onnxprune.calibrate import (
    Columns,
    Gate,
    Gather,
    Moments,
    MomentsOf,
    Profile,
    ProfileOf,
    Reads,
    RowsOf,
    Source,
    add_outer,
    masked,
)
from onnxprune.errors import ImpossibleError, InputError, InternalError
from onnxprune.layouts import Gates
from onnxprune.operators import Operator, Slot, State
from onnxprune.plugin import COPIES, Levels
from onnxprune.running import MEMORY, Runner
from onnxprune.sites import find_sites
from onnxprune.types import Array, Axis, Group, Mask, OpNode, Plan, Progress, quietly
from onnxprune.worker import Worker

Feeds = Sequence[Mapping[str, Array]]
TOKENS = 2048  # rows of a stream or a router that are enough
SAMPLES = 128  # of the calibration set on which losses are measured
PLAIN_READERS = frozenset(
    "Add Sub Mul Div PRelu BatchNormalization InstanceNormalization Identity Sum Max Min Where Expand".split()
)

LEAST = 1 << 28  # bytes that scoring one group may take in any case
SHARE = 3  # of the memory, one part for statistics that are gathered at once
ROWS = 20_000  # of an operator's input, from which its second moments are known well enough


def evidence(
    analysis: Analysis,
    groups: Sequence[Group],
    seed: int,
    gather: Gather | None,
    memory: int,
    runs: Runs | None = None,
    progress: Progress = quietly,
) -> plugin.Evidence:
    """Evidence about these groups, in so many bytes; statistics that are as large are gathered for many at once.

    Losses are measured on `runs`, and unknown without them.
    """
    if gather is None:
        return plugin.Evidence(analysis.weights, seed)
    found = _Statistics(analysis, groups, gather, memory // SHARE, max(memory // 2, LEAST))
    loss = _Losses(analysis, groups, found.operators, runs, progress).of if runs is not None else None
    return plugin.Evidence(analysis.weights, seed, found.readers, found.junctions, found.router, loss, found.most)


@dataclass(frozen=True)
class Runs:
    """Where and on what losses are measured: all of the first feeds that hold so many samples."""

    worker: Worker
    feeds: Feeds
    threads: int = 1
    memory: int = MEMORY

    @cached_property
    def taken(self) -> Feeds:
        """The feeds that are used."""
        found: list[Mapping[str, Array]] = []
        for feed in self.feeds:
            if sum(map(_count, found)) < SAMPLES:
                found.append(feed)
        return found


@dataclass
class _Statistics:
    """Statistics of the dense model, each gathered when it is first asked for."""

    analysis: Analysis
    groups: Sequence[Group]
    gather: Gather
    budget: int
    most: int  # bytes that scoring one group may take
    moments: dict[Slot, Moments] = field(default_factory=dict)
    samples: dict[tuple[Slot, int], Array] = field(default_factory=dict)
    streams: dict[int, list[plugin.Junction]] = field(default_factory=dict)

    # Readers

    @cached_property
    def operators(self) -> Operators:
        """Linear operators that read groups."""
        return Operators(self.analysis)

    @cached_property
    def reading(self) -> dict[Slot, Operator]:
        """The operators that read these groups by weight, in the order of the groups."""
        return {operator.weight: operator for group in self.groups for operator, _ in self.operators.of(group)}

    @cached_property
    def profiles(self) -> dict[Slot, Profile]:
        """Statistics of the columns of all of them, in one pass."""
        requests = {slot: ProfileOf(self.operators.source(one)) for slot, one in self.reading.items()}
        found = self.gather(list(requests.values()))
        return {slot: found[request] for slot, request in requests.items()}

    def second(self, slot: Slot) -> tuple[Array, Array]:
        """Means, and means of products, of what a weight is multiplied by; those of the next ones come with it.

        Raises ImpossibleError where they take more than they may.
        """
        if slot not in self.moments:
            sizes = {name: 8 * self.operators.columns(one) ** 2 for name, one in self.reading.items()}
            if (need := COPIES * sizes[slot]) > self.most:
                text = f"second moments of what it reads take {need / 1e9:.1f} GB, more than half of --memory"
                raise ImpossibleError(f"{text}; fluct and obs-struct can do without", object=slot[0])
            wanted = self._next(slot, {name: size for name, size in sizes.items() if COPIES * size <= self.most})
            requests = {name: MomentsOf(self.operators.source(self.reading[name]), rows=ROWS) for name in wanted}
            self.moments.clear()  # before others take as much
            found = self.gather(list(requests.values()))
            self.moments = {name: found[request] for name, request in requests.items()}
        moments = self.moments[slot]
        second = moments.xx / max(moments.count, 1)
        add_outer(second, moments.mean, moments.mean)
        return moments.mean[0], np.asarray(second[0])

    def sample(self, slot: Slot, rows: int) -> Array:
        """So many rows of what a weight is multiplied by; those of the next ones come with them."""
        if (slot, rows) not in self.samples:
            columns = {name: self.operators.columns(one) for name, one in self.reading.items()}
            wide = {name: n for name, n in columns.items() if name == slot or COPIES * 8 * n**2 > self.most}
            names = self._next(slot, {name: 4 * rows * n for name, n in wide.items()})
            requests = {name: RowsOf(self.operators.source(self.reading[name]), rows) for name in names}
            self.samples.clear()
            found = self.gather(list(requests.values()))
            self.samples = {(name, rows): found[request][0] for name, request in requests.items()}
        return self.samples[slot, rows]

    def _next(self, slot: Slot, sizes: Mapping[Slot, int]) -> list[Slot]:
        """A weight and as many behind it as there is room for, of these."""
        order = list(sizes)
        behind = order[order.index(slot) :]
        fits = np.cumsum([sizes[name] for name in behind]) <= self.budget
        return behind[: max(1, int(fits.sum()))]

    def readers(self, group: Group) -> list[plugin.Reader]:
        """See Evidence.readers."""
        found = []
        for operator, columns in self.operators.of(group):
            slot = operator.weight
            found.append(
                plugin.Reader(
                    node=operator.node,
                    read=partial(self.operators.matrix, operator),
                    shape=self.operators.shape(operator),
                    columns=columns,
                    intercept=slot in self.operators.free,
                    profile=lambda slot=slot: self.profiles[slot],  # type: ignore[misc]
                    second=partial(self.second, slot),
                    sample=partial(self.sample, slot),
                )
            )
        return found

    # Streams and routers

    def junctions(self, group: Group) -> list[plugin.Junction]:
        """See Evidence.junctions; none where one of the sums is quantised."""
        if group.id not in self.streams:
            self.streams = {group.id: self._junctions(group) if group.kind == "layers" else []}
        return self.streams[group.id]

    def _junctions(self, group: Group) -> list[plugin.Junction]:
        branches, first = self.analysis.branches, len(self.analysis.dims.frozen)
        places: list[tuple[str, str, bool]] = []  # (what the branch adds, the other value, whether that is the sum)
        for unit in group.units.tolist():
            branch = branches.found[unit - first]
            node = branches.view.nodes[branch.sum]
            if (node.domain, node.op_type) in PLAIN:
                places.append((branch.value, node.outputs[0], True))
            elif node.op_type in SKIP_NORMS:
                places.append((branch.value, node.inputs[1 - branch.operand], False))
            else:
                return []
        requests = {
            value: RowsOf(Columns(value, self.channels(value)), TOKENS)
            for added, other, _ in places
            for value in (added, other)
        }
        found = self.gather(list(requests.values()))
        rows = {value: found[request][0] for value, request in requests.items()}
        return [
            plugin.Junction(rows[other] - rows[added], rows[other])
            if total
            else plugin.Junction(rows[other], rows[other] + rows[added])
            for added, other, total in places
        ]

    @cached_property
    def uses(self) -> Counter[int]:
        """{class of axes: how many axes of initializers are in it}."""
        dims = self.analysis.dims
        axes = (Axis(name, k) for name, item in self.analysis.view.stored.items() for k in range(len(item.shape)))
        numbers = dims.relations.number
        return Counter(int(dims.classes[numbers[axis]]) for axis in axes if axis in numbers)

    def channels(self, value: str) -> int:
        """The axis of a value that most initializers share; the last of equals."""
        dims, rank = self.analysis.dims, len(self.analysis.view.shapes[value])
        numbers = dims.relations.number
        counts = [
            self.uses[int(dims.classes[numbers[axis]])] if (axis := Axis(value, k)) in numbers else 0
            for k in range(rank)
        ]
        return rank - 1 - int(np.argmax(counts[::-1]))

    def router(self, group: Group) -> plugin.Router | None:
        """See Evidence.router: what a TopK chooses from, else what a softmax or a fused operator reads."""
        found = [place for node in self.analysis.view.nodes if (place := self._chooses(node, group)) is not None]
        if group.kind != "experts" or not found:
            return None
        value, axis, top, places = min(found, key=lambda place: place[2])
        rows = self.gather([request := RowsOf(Columns(value, axis), TOKENS)])[request][0]
        return plugin.Router(rows, top, places)

    def _chooses(self, node: OpNode, group: Group) -> tuple[str, int, int, Array] | None:
        """(value, axis, how many are chosen, position of each unit) if a node chooses among the units of a group."""
        if node.within or node.op_type not in ("TopK", "Softmax", "MoE", "QMoE"):
            return None
        value = node.inputs[1] if node.op_type in ("MoE", "QMoE") else node.inputs[0]
        shape = self.analysis.view.shapes.get(value, ())
        axis = int(node.attr("axis", -1)) % max(len(shape), 1)
        labels = self.analysis.dims.labels_of(Axis(value, axis)) if shape else None
        if labels is None or not np.isin(group.units, labels).all():
            return None
        top = node.attr("k") if node.op_type != "Softmax" else len(labels)
        top = top if top is not None else node.const(1)
        order = np.argsort(labels, kind="stable")
        places = order[np.searchsorted(labels, group.units, sorter=order)]
        return None if top is None else (value, axis, int(np.max(top)), places)


class Operators:
    """Linear operators of the dense model by the slot of their weight."""

    def __init__(self, analysis: Analysis) -> None:
        self.weights, self.shapes = analysis.weights, analysis.view.shapes

        def whole(axis: Axis) -> Mask:
            return np.ones(self.shapes[axis.value][axis.index], np.bool_)

        model = analysis.prepared.model
        sites = find_sites(model, model, self.shapes, whole, joint=True)
        every = [operator for site in sites for operator in site.operators]
        self.found = {o.weight: _whole(o) for o in every if len(o.layout.inner) == 1 and not o.scaled}
        self.names = {slot: s.initializer for s in analysis.view.stored.values() for slot in s.uses}
        self.sizes = {slot: s.shape for s in analysis.view.stored.values() for slot in s.uses}
        self.free = {o.weight for s in sites if any(each.homes() for each in s.operators) for o in s.operators}

    def of(self, group: Group) -> list[tuple[Operator, Array]]:
        """Operators that sum over units of a group, with the columns int64[units, ...] of each."""
        found = []
        for member in group.members if group.kind != "layers" else ():
            for slot in member.readers:
                operator = self.found.get(slot)
                if operator is None or member.role != "weight" or (member.axis,) != operator.layout.inner:
                    continue
                taps = self.taps(operator)
                count = len(group.units)
                if (
                    len(member.positions) % count
                    or (np.bincount(member.units, minlength=count) != len(member.positions) // count).any()
                ):
                    continue
                positions = member.positions[np.argsort(member.units, kind="stable")].reshape(count, -1)
                columns = (positions[:, :, None] * taps + np.arange(taps)).reshape(count, -1)
                found.append((operator, columns))
        return found

    def taps(self, operator: Operator) -> int:
        """Columns of one channel. Each tap of a transposed convolution writes elsewhere, and counts as an output."""
        return operator.layout.patch if operator.convolves else 1

    def source(self, operator: Operator) -> Source:
        """What an operator multiplies by its weight, rows of all groups as one."""
        if isinstance(operator.source, State):
            return Columns(operator.source.y, -1)
        return Reads(operator.node) if operator.convolves else Columns(operator.x, operator.layout.summed[0])

    def matrix(self, operator: Operator) -> Array:
        """float64[columns, outputs], those of all groups side by side."""
        matrix = operator.layout.matrix(self.weights.array(self.names[operator.weight])).swapaxes(0, 1)
        return np.asarray(matrix.reshape(len(matrix) * self.taps(operator) // operator.layout.patch, -1))

    def shape(self, operator: Operator) -> tuple[int, int]:
        """(columns, outputs) of `matrix`."""
        columns, size = self.columns(operator), math.prod(operator.layout.sizes(self.sizes[operator.weight]))
        return columns, size // columns

    def columns(self, operator: Operator) -> int:
        """Columns of `matrix`."""
        return operator.layout.sizes(self.sizes[operator.weight])[1] * self.taps(operator) // operator.layout.patch


def _whole(operator: Operator) -> Operator:
    """All gates of a recurrent operator at once."""
    layout = operator.layout
    every = replace(layout, chosen=tuple(range(layout.count))) if isinstance(layout, Gates) else layout
    return replace(operator, layout=every)


class _Losses:
    """How far the outputs move if units go, or go in part; nothing is repaired.

    Units of a group go where the operators that read it see no more of them: their weights are multiplied by masks in
    one copy of the model that serves every mask. Where something else reads a group as well, whole units are cut out
    by the rewriter instead.
    """

    def __init__(
        self,
        analysis: Analysis,
        groups: Sequence[Group],
        operators: Operators,
        runs: Runs,
        progress: Progress = quietly,
    ) -> None:
        self.analysis, self.operators, self.runs, self.progress = analysis, operators, runs, progress
        self.by_id = {group.id: group for group in (*analysis.groups, *groups)}

    @cached_property
    def dense(self) -> list[dict[str, Array]]:
        """The dense outputs."""
        return self._outputs(self.analysis.prepared.model)

    def of(self, levels: Sequence[Levels], measure: str) -> Array:
        """See Evidence.loss."""
        score = quality.MEASURES[measure]
        known = dict.fromkeys(k for each in levels for k in each)
        gates = {k: found for k in known if (found := self._gates(self.by_id[k])) is not None}
        if gates.keys() == known.keys():
            return np.array([score(outputs, self.dense) for outputs in self._gated(levels, gates)])
        return np.array([self._cut(each, score) for each in self._counted(levels)])

    def _counted(self, levels: Sequence[Levels]) -> Iterator[Levels]:
        for k, each in enumerate(levels):
            self.progress("measure losses", k, len(levels))
            yield each

    def _outputs(self, model: Any) -> list[dict[str, Array]]:
        return Runner(self.runs.worker, self.runs.threads, self.runs.memory)(model, self.runs.taken)

    def _gated(self, levels: Sequence[Levels], gates: Mapping[int, list[tuple[Gate, Array]]]) -> Any:
        """The outputs at each of the levels."""
        places = {gate: None for each in gates.values() for gate, _ in each}
        shapes = self.analysis.prepared.facts.shapes
        order = list(places)
        model = self.analysis.prepared.model
        with masked(self.runs.worker, model, order, threads=self.runs.threads, memory=self.runs.memory) as call:
            for each in self._counted(levels):
                masks = {g: np.ones(() if g.axis is None else shapes[g.value][g.axis], np.float32) for g in order}
                for k, level in each.items():
                    for gate, units in gates[k]:
                        if gate.axis is None:
                            masks[gate] = np.float32(level[int(units[0])])  # type: ignore[assignment]
                        else:
                            masks[gate][units[0]] = np.asarray(level, np.float32)[units[1]]
                yield [call(feed, [masks[gate] for gate in order]) for feed in self.runs.taken]

    def _cut(self, levels: Levels, score: Any) -> float:
        """The loss of a model from which whole units are cut."""
        if any(not np.isin(level, (0, 1)).all() for level in levels.values()):
            return float("nan")
        keep = {}
        for k, level in levels.items():
            whole = next(group for group in self.analysis.groups if group.id == k)
            gone = self.by_id[k].units[np.asarray(level) == 0]
            keep[k] = ~np.isin(whole.units, gone)
            if not keep[k].any():
                return float("inf")
        try:
            smaller = self.analysis.rewrite(self.analysis.settled(Plan(keep)))
            outputs = self._outputs(smaller)
        except (InternalError, InputError, ImpossibleError):
            return float("inf")
        narrowed = interface.noted(smaller.metadata_props)
        return float(score(outputs, [interface.narrow(wanted, narrowed) for wanted in self.dense]))

    def _gates(self, group: Group) -> list[tuple[Gate, Array]] | None:
        """Where units can be switched off, with what says which; None where masks would not be the removal.

        For a branch the second is its number in the group, else int64[2, n]: positions and their units.
        """
        if group.kind == "layers":
            return self._branch_gates(group)
        if not group.exact or np.isin(group.units, self.otherwise).any():
            return None
        found = []
        for member in group.members:
            if member.role not in ("weight", "bias", "norm", "divisor"):
                return None
            for slot in member.readers:
                operator = self.operators.found.get(slot)
                # A mask would be seen by readers of other units too, and integers cannot be multiplied by one.
                fixed = operator is not None and (operator.tie or operator.coded)
                if fixed or (operator is None and not self._writes(slot, member.axis)):
                    return None
                if operator is not None and (member.axis,) == operator.layout.inner:
                    found.append((Gate(member.initializer, member.axis), np.stack([member.positions, member.units])))
        return found or None

    def _branch_gates(self, group: Group) -> list[tuple[Gate, Array]] | None:
        branches, first = self.analysis.branches, len(self.analysis.dims.frozen)
        found = []
        for k, unit in enumerate(group.units.tolist()):
            branch = branches.found[unit - first]
            node = branches.view.nodes[branch.sum]
            bias = SKIP_NORMS.get(node.op_type)
            alone = bias is not None and not node.has(bias)  # else the bias goes as well
            if (node.domain, node.op_type) not in PLAIN and not alone:
                return None
            found.append((Gate(branch.value, None), np.array([k])))
        return found

    @cached_property
    def nodes(self) -> dict[str, OpNode]:
        """The nodes by their first output."""
        return {node.outputs[0]: node for node in self.analysis.view.nodes}

    def _writes(self, slot: Slot, axis: int) -> bool:
        """Whether what is stored in a slot only makes positions of an axis, or scales and shifts them."""
        node = self.nodes.get(slot[0])
        if node is None or node.within:
            return False
        rank = len(node.shapes.get(node.inputs[slot[1]], ()))
        if node.op_type == "Conv" and not node.domain:
            return slot[1] == 2 or axis == 0
        if node.op_type == "ConvTranspose":
            return slot[1] == 2 or axis == 1
        if node.op_type in ("LSTM", "GRU", "RNN"):
            return slot[1] > 2 or axis == 1
        if node.op_type == "Attention" and node.domain:
            return slot[1] in (1, 2) and axis == 2 - slot[1]
        if node.op_type in ("Gemm", "MatMul") and not node.domain:
            outputs = rank - 1 if not node.attr("transB", 0) else 0
            return slot[1] == 2 or (slot[1] == 1 and axis == outputs)
        return node.op_type in PLAIN_READERS or (node.op_type == "Gather" and slot[1] == 0 and axis > 0)

    @cached_property
    def otherwise(self) -> Array:
        """Labels that are summed over by something else than a linear operator with a weight of its own."""
        linear = {operator.node for operator in self.operators.found.values()}
        found: list[Array] = []
        for node in self.analysis.view.nodes:
            if node.outputs[0] in linear or node.op_type in ("Shape", "Size"):
                continue
            read, made = ([self._labels(name, node) for name in names if name] for names in (node.inputs, node.outputs))
            found.append(np.setdiff1d(_union(read), _union(made)))
        return np.unique(_union(found))

    def _labels(self, name: str, node: OpNode) -> Array:
        rank = len(node.shapes.get(name, ()))
        labels = (self.analysis.dims.labels_of(Axis(name, k)) for k in range(rank))
        return _union([each for each in labels if each is not None])


def _union(parts: Sequence[Array]) -> Array:
    return np.unique(np.concatenate([np.zeros(0, np.int64), *parts]))


def _count(feed: Mapping[str, Array]) -> int:
    return max((len(array) for array in feed.values() if np.ndim(array)), default=1)
