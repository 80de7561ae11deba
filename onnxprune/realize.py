"""realize(): what some training left at zero, or without effect, becomes a smaller network with the same outputs.

No data is needed: bounds say which positions are constants, coupling says which of them may go together, and what a
unit that goes still gives to its readers moves into their biases. The proof is against the dense model itself.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune import account, fold, ops, pipeline, verify
from onnxprune.account import Proven
from onnxprune.analysis import Analysis
from onnxprune.bounds import Bounds, pads
from onnxprune.errors import ImpossibleError, InputError, InternalError
from onnxprune.infer import initializers
from onnxprune.model import Model
from onnxprune.prove import Prover
from onnxprune.recipe import Options, check, recorded
from onnxprune.recovery import Repaired
from onnxprune.relate import parse
from onnxprune.types import Array, Axis, Group, Mask, OpNode, Pattern, Plan, Positions, Progress, quietly
from onnxprune.worker import Worker

RECORDED = frozenset("approximate no-new-bias ignore input-shape backend measure strict unproven seed threads".split())
TOLERANCE = 1e-6  # of the median slice: what is smaller counts as zero
FLOATS = frozenset({1, 10, 11, 16})  # ONNX element types
ADDS = frozenset("ReduceSum ReduceL1 ReduceL2 ReduceSumSquare".split())  # over zeros, less of them is the same
STRETCHES = frozenset("Add Sum Sub Mul Div Max Min Pow PRelu".split())  # operands broadcast from the right


@dataclass(frozen=True)
class Weight:
    """What reads positions of a term: nonzero bool[out, n], and the labels of `out` (None: all of them stay)."""

    nonzero: Mask
    labels: Positions | None

    def used(self, dead: Mask) -> Mask:
        """bool[n]: has an effect on some output that stays."""
        rows = self.nonzero if self.labels is None else self.nonzero[~dead[self.labels]]
        return np.asarray(rows.any(axis=0))


@dataclass(frozen=True)
class Term:
    """An axis that a node sums over: its labels int64[n], where its values are zero, its constants, and its weights.

    `offset` makes a float64[out] of the constants of positions that go, to be added behind the node; without it, `why`.
    """

    node: OpNode
    labels: Positions
    zero: Mask
    constant: Array
    weights: tuple[Weight, ...]
    matrix: Array | None = None
    axis: int = 0
    why: str = ""


# Which units have no effect, or a constant one -----------------------------------------------------------------------


def cleaned(analysis: Analysis, tolerance: float) -> tuple[dict[str, Array], bool]:
    """(weights with negligible slices at zero by their name for coupling, whether any of those was not zero before).

    A slice of a unit is negligible if its norm is at most `tolerance` times the median of the others.
    """
    found: dict[str, Array] = {}
    changed = False
    for group in analysis.groups:
        for member in group.members if group.kind != "layers" else ():
            if member.role not in ("weight", "norm", "bias") or member.shared:
                continue
            array = found.get(member.value)
            array = analysis.weights.array(member.initializer) if array is None else array
            others = tuple(k for k in range(array.ndim) if k != member.axis)
            norms = np.sqrt(np.square(array).sum(axis=others))[member.positions]
            large = norms[norms > tolerance * norms.max(initial=0.0)]
            small = (norms > 0) & (norms <= tolerance * np.median(large)) if len(large) else np.zeros(0, np.bool_)
            if small.any():
                array = array.copy()
                array[(slice(None),) * member.axis + (member.positions[small],)] = 0
                found[member.value], changed = array, True
    return found, changed


def bounds_of(analysis: Analysis, clean: Mapping[str, Array]) -> Bounds:
    """Bounds of every value, with negligible weights at zero."""
    stored = initializers(analysis.prepared.model.graph)

    def read(name: str) -> Array | None:
        if name in clean:
            return clean[name]
        tensor = stored[analysis.view.stored[name].initializer].const_value
        if tensor is None or tensor.dtype.name in ("STRING", "COMPLEX64", "COMPLEX128"):
            return None
        array: Array = tensor.numpy()
        return array.astype(np.float32) if tensor.dtype.is_floating_point() and array.dtype.itemsize < 4 else array

    return Bounds(analysis.view, read)


class Dead:
    """Units that can go without a trace but for constants; `plan` answers for any set of groups."""

    def __init__(self, analysis: Analysis, clean: Mapping[str, Array], approximate: bool, new_bias: bool) -> None:
        self.analysis, self.bounds = analysis, bounds_of(analysis, clean)
        self.nodes = fold.by_output(analysis.prepared.model)
        self.new_bias = new_bias
        self.approximate = approximate
        self.terms: list[Term] = []
        self.barred: dict[int, str] = {}  # labels
        for node in analysis.view.nodes:
            for pattern in _patterns(node):
                self._read(node, pattern)
        self._mixing()
        branches = analysis.branches
        for branch, label in zip(branches.found[branches.free :], branches.tied.tolist(), strict=True):
            if np.any(self.bounds.of(branch.value)):  # it goes with the position, and says something
                self.barred.setdefault(label, f"'{branch.value}' goes with it, which is not zero")

    def labels_of(self, name: str, axis: int) -> Positions | None:
        """Labels of an axis; None where it carries nothing."""
        return self.analysis.dims.labels_of(Axis(name, axis))

    def _read(self, node: OpNode, pattern: Pattern) -> None:
        """Terms of a node: letters that are missing on the right, and those that one operand has twice."""
        left, right = parse(pattern.text)
        names = pattern.operands[: len(left)] if pattern.operands else node.inputs
        outputs = pattern.operands[len(left) :] if pattern.operands else node.outputs
        kept = {a for tokens in right for token in tokens for a in (token if isinstance(token, tuple) else (token,))}
        summed: dict[Any, list[tuple[str, int]]] = defaultdict(list)
        for name, tokens in zip(names, left, strict=False):
            rank = len(self.analysis.dims.relations.shapes.get(name, ()))
            flat = [a for token in tokens for a in (token if isinstance(token, tuple) else (token,))]
            for index, token in _places(tokens, rank):
                letters = token if isinstance(token, tuple) else (token,)
                twice = not isinstance(token, tuple) and flat.count(token) > 1
                if token in ("*", "_", "!") or str(token).startswith("...") or set(letters) & set(pattern.mixes):
                    continue
                if twice or not set(letters) <= kept:
                    summed[("twice", name) if twice else token].append((name, index))
        if (linear := self._linear(node)) is not None:
            self.terms.append(linear)
            return
        for token, operands in summed.items():
            passing = [self._labels_with(set(token), outputs, right)] if isinstance(token, tuple) else []
            others = {place for key, places in summed.items() if key != token for place in places}
            self._term(node, operands, np.concatenate([*passing, np.zeros(0, np.int64)]), others)

    def _labels_with(self, letters: set[str], names: Sequence[str], parts: Sequence[Sequence[Any]]) -> Positions:
        """Labels of the axes of some outputs in which one of these letters takes part."""
        found = [np.zeros(0, np.int64)]
        for name, tokens in zip(names, parts, strict=False):
            rank = len(self.analysis.dims.relations.shapes.get(name, ()))
            for index, token in _places(tokens, rank) if name else ():
                labels = self.labels_of(name, index)
                if labels is not None and letters & set(token if isinstance(token, tuple) else (token,)):
                    found.append(labels)
        return np.concatenate(found)

    def _linear(self, node: OpNode) -> Term | None:
        """The term of an operator that multiplies by a known matrix; what it sums over takes constants."""
        kind, y = node.op_type, node.outputs[0]
        if kind not in ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul") or not node.has(1):
            return None
        left, right = (self.bounds.array(name) for name in node.inputs[:2])
        rank = len(node.out_shape(0))
        x, weight, axis, out = node.inputs[0], right, 1, 1
        groups = node.attr("group", 1)
        if kind == "MatMul" and right is not None and right.ndim == 2 and len(node.shape(0)) > 1:
            axis, out, weight = len(node.shape(0)) - 1, rank - 1, right.T
        elif kind == "MatMul" and left is not None and left.ndim == 2 and len(node.shape(1)) > 1:
            x, axis, out, weight = node.inputs[1], len(node.shape(1)) - 2, rank - 2, left
        elif kind == "MatMul" or weight is None:
            return None
        elif kind.endswith("Gemm"):
            axis = 0 if node.attr("transA", 0) else 1
            weight = weight if node.attr("transB", 0) else weight.T
            weight = weight if node.attr("alpha", 1.0) == 1 else weight * node.attr("alpha", 1.0)
        else:
            taps = weight.reshape(*weight.shape[:2], -1)
            spread = np.zeros((2, len(taps), taps.shape[1] * groups))
            for g in range(groups):
                rows = slice(g * len(taps) // groups, (g + 1) * len(taps) // groups)
                columns = slice(g * taps.shape[1], (g + 1) * taps.shape[1])
                spread[:, rows, columns] = np.abs(taps[rows]).sum(axis=2), taps[rows].sum(axis=2)
            weight, nonzero = spread[1], spread[0] != 0
        labels = self.labels_of(x, axis)
        if labels is None:
            return None
        used: Any = slice(None)
        if groups > 1:  # whole groups pass through, positions inside them are summed over
            inside = self.labels_of(node.inputs[1], 1)
            used = labels == np.tile(inside, groups) if inside is not None else slice(0)
        conv = kind.endswith("Conv")
        nonzero = nonzero if conv else weight != 0
        constant, why = self.bounds.constant(x, axis), ""
        if conv and pads(node):
            why = "a constant does not reach the border that it pads with zeros"
        elif fold.place_of(self.nodes[y], out, self.new_bias) is None:
            why = "it has no bias that can take a constant"
        return Term(node, labels[used], (constant == 0)[used], constant[used],
                    (Weight(nonzero[:, used], self.labels_of(y, out)),), weight[:, used], out, why)  # fmt: skip

    def _term(
        self,
        node: OpNode,
        operands: Sequence[tuple[str, int]],
        passing: Positions,
        others: Collection[tuple[str, int]],
    ) -> None:
        """A term of which only zeros are known to have no effect: of a value, or of all that weights give to it.

        Labels that are `passing` go on behind the node instead. Along the `others` the node sums as well: two of them
        cannot excuse each other.
        """
        name, axis = operands[0]
        labels = self.labels_of(name, axis)
        if labels is None:
            return
        zero = np.zeros(len(labels), np.bool_)
        weights = []
        for name, axis in operands:
            if name not in self.bounds.view.shapes:
                continue
            if self.bounds.shape(name)[axis] != len(labels):
                continue
            array = self.bounds.array(name)
            if self.analysis.prepared.facts.types.get(name.split("\0")[0]) in FLOATS:  # of integers, zero may be any
                zero |= self.bounds.constant(name, axis) == 0
            if array is not None:
                moved = np.moveaxis(array != self._nothing(node, name, array), axis, -1)
                for k in range(moved.ndim - 1):
                    place = (name, k if k < axis else k + 1)
                    own = self.labels_of(*place) if place not in others else None
                    if own is not None:
                        rows = np.moveaxis(moved, k, 0).reshape(len(own), -1, len(labels)).any(axis=1)
                        weights.append(Weight(rows, own))
                weights.append(Weight(moved.reshape(-1, len(labels)).any(axis=0, keepdims=True), None))
        used = ~np.isin(labels, passing)
        weights = [replace(weight, nonzero=weight.nonzero[:, used]) for weight in weights]
        self.terms.append(Term(node, labels[used], zero[used], np.full(used.sum(), np.nan), tuple(weights)))

    def _nothing(self, node: OpNode, name: str, array: Array) -> Array:
        """What zero is in a weight: its zero point where it is quantised."""
        if array.dtype.kind == "f" or name not in self.analysis.view.stored:
            return np.zeros((), array.dtype)
        stored = initializers(self.analysis.prepared.model.graph)
        return verify.zero_of(stored[self.analysis.view.stored[name].initializer], array)

    def _mixing(self) -> None:
        """Bar what mixes with others, unless a sum cannot tell that zeros are missing, or the user agrees to it."""
        dims, nodes = self.analysis.dims, {node.outputs[0]: node for node in self.analysis.view.nodes}
        for mark in dims.relations.mixing:
            axis, node = dims.relations.axes[mark.axis], nodes[mark.node]
            labels = dims.labels_of(axis)
            if labels is None:
                continue
            known = axis.value in self.bounds.view.shapes
            zero = self.bounds.constant(axis.value, axis.index) == 0 if known else np.zeros(len(labels), np.bool_)
            if self.approximate:  # its place after the operator must hold nothing either
                same = [k for k in range(len(node.out_shape(0))) if self._same(node.outputs[0], k, labels)]
                for k in same:
                    zero = zero & (self.bounds.constant(node.outputs[0], k) == 0)
            fine = zero if node.op_type in ADDS or self.approximate else np.zeros(len(labels), np.bool_)
            for label in np.unique(labels[~fine]).tolist():
                self.barred.setdefault(label, f"{mark.text} sees it")

    def _same(self, name: str, axis: int, labels: Positions) -> bool:
        own = self.labels_of(name, axis)
        return own is not None and np.array_equal(own, labels)

    def labels(self, groups: Iterable[Group], stay: Collection[int] = ()) -> Mask:
        """bool[labels]: the most units of these groups that can go together, but for `stay`."""
        dead = np.zeros(self.analysis.labels, np.bool_)
        for group in groups:
            dead[group.units] = True
        dead[[*self.barred, *stay]] = False
        changed = True
        while changed:
            changed = False
            for term in reversed(self.terms):
                going = dead[term.labels]
                if not going.any():
                    continue
                known = np.zeros(len(going), np.bool_) if term.why or term.matrix is None else ~np.isnan(term.constant)
                harmless = term.zero | known
                for weight in term.weights:
                    harmless = harmless | ~weight.used(dead)
                if (left := term.labels[going & ~harmless]).size:
                    dead[left] = False
                    changed = True
        return dead

    def plan(self, groups: Sequence[Group]) -> Plan:
        """What stays of these groups: as few units as have an effect, and at least as many as must."""
        stay: list[int] = []
        while True:
            dead = self.labels(groups, stay)
            short = [g for g in groups if (~dead[g.units]).sum() < g.least]
            if not short:
                return Plan({group.id: ~dead[group.units] for group in groups if dead[group.units].any()})
            for group in short:
                going = group.units[dead[group.units]]
                stay += going[: group.least - int((~dead[group.units]).sum())].tolist()

    def offsets(self, dead: Mask) -> list[fold.Offset]:
        """What the nodes that stay lose with these units, as constants behind them."""
        found = []
        for term in self.terms:
            if term.matrix is None:
                continue
            going = dead[term.labels] & ~term.zero & ~np.isnan(term.constant)
            out = self.labels_of(term.node.outputs[0], term.axis)
            keep = np.ones(len(term.matrix), np.bool_) if out is None else ~dead[out]
            values = term.matrix[np.ix_(keep, going)].astype(np.float64) @ term.constant[going]
            if values.any():
                found.append(fold.Offset(term.node.outputs[0], term.axis, len(term.node.out_shape(0)), values))
        return found

    def refused(self, groups: Sequence[Group], plan: Plan) -> list[str]:
        """Units that emit nothing but a constant, and stay since some reader cannot take it."""
        found: dict[tuple[str, str], set[int]] = defaultdict(set)
        dead = self.analysis.alive(plan)
        free = np.zeros(len(dead), np.bool_)
        for group in groups:
            free[group.units] = True
        for term in self.terms:
            stuck = free[term.labels] & dead[term.labels] & ~np.isnan(term.constant) & ~term.zero
            for weight in term.weights:
                stuck &= weight.used(~dead)
            if term.why and stuck.any():
                found[term.node.name or term.node.outputs[0], term.why].update(term.labels[stuck].tolist())
        return [f"{len(units)} units that emit a constant stay before node '{name}': {why}"
                for (name, why), units in found.items()]  # fmt: skip


def _patterns(node: OpNode) -> list[Pattern]:
    """What a node's rule says in axis notation; nothing where all its axes are frozen for lack of an answer."""
    if not node.bodies and any(name and name not in node.shapes for name in (*node.inputs, *node.outputs)):
        return []
    try:
        answer = ops.relations(node)
    except (ArithmeticError, LookupError, TypeError, ValueError):  # attributes that contradict the shapes
        return []
    return [] if isinstance(answer, str) else [part for part in answer if isinstance(part, Pattern)]


def _places(tokens: Sequence[Any], rank: int) -> list[tuple[int, Any]]:
    """(axis, token) of the tokens that stand for one axis each, counted from the side where they are."""
    rest = next((k for k, token in enumerate(tokens) if token in ("*", "...")), None)
    if rest is None:
        return list(enumerate(tokens[:rank]))
    behind = len(tokens) - rest - 1
    return [*enumerate(tokens[:rest]), *((rank - behind + k, token) for k, token in enumerate(tokens[rest + 1 :]))]


# Constants that are computed, and products of low rank ---------------------------------------------------------------


def constant_operands(analysis: Analysis, bounds: Bounds) -> dict[tuple[str, int], tuple[Array, int]]:
    """{(first output, input): (array, element type)} of operands that follow from inputs, but are always the same.

    Only where another operand has the output's shape, so that it does not matter how far the constant stretches.
    """
    prepared, found = analysis.prepared, {}
    probes = (prepared.facts.shapes, prepared.other.shapes)
    for node in analysis.view.nodes:
        y = node.outputs[0]
        if node.within or node.domain or node.op_type not in STRETCHES or bounds.whole(y) is not None:
            continue
        for k, name in enumerate(node.inputs):
            if name not in bounds.makers or bounds.array(name) is not None or bounds.makers[name].within:
                continue
            others = [other for j, other in enumerate(node.inputs) if j != k]
            full = any(all(shapes.get(other) == shapes.get(y) for shapes in probes) for other in others)
            if full and (whole := bounds.whole(name)) is not None:
                first = next((j for j, size in enumerate(whole.shape) if size > 1), whole.ndim - 1)
                found[y, k] = (whole.reshape(whole.shape[first:]), prepared.facts.types[name])
    return found


def ones_left(analysis: Analysis, dead: Mask) -> dict[tuple[str, int], tuple[Array, int]]:
    """Masks of zeros and ones of which only ones are left, as operands: {(first output, input): (array, type)}."""
    found = {}
    for node in analysis.view.nodes:
        for k, name in enumerate(node.inputs) if node.op_type == "Mul" and not node.within else ():
            stored, other = analysis.view.stored.get(name), node.inputs[1 - k]
            if stored is None or analysis.view.shapes.get(other) != analysis.view.shapes.get(node.outputs[0]):
                continue
            array, axes = analysis.weights.array(stored.initializer), range(len(stored.shape))
            keep = [np.ones(n, np.bool_) for n in stored.shape]
            for axis in axes:
                if (labels := analysis.dims.labels_of(Axis(name, axis))) is not None:
                    keep[axis] = ~dead[labels]
            left = array[np.ix_(*keep)] if keep else array
            if left.size < array.size and (left == 1).all():
                found[node.outputs[0], k] = (np.ones(1), analysis.prepared.facts.types[stored.initializer])
    return found


def simplified(analysis: Analysis, clean: Mapping[str, Array], tolerance: float, ignore: Sequence[str]) -> Simple:
    """The model without computed constants, products in a basis where what they do not need is zero."""
    model = analysis.prepared.model.clone()
    model.graph.meta.pop("names", None)
    operands = constant_operands(analysis, bounds_of(analysis, clean))
    told = fold.write_operands(model, operands) if operands else []
    names = {node.name or node.outputs[0] for node in analysis.view.nodes} | set(analysis.view.stored)
    left = {str(node.name) or str(node.outputs[0].name) for node in fold.by_output(model).values()}
    gone = names - left - set(initializers(model.graph))
    if told and any(fnmatch.filter(gone, pattern) for pattern in ignore):
        model, told = analysis.prepared.model.clone(), []
        model.graph.meta.pop("names", None)
    changed, more = fold.compress(model, tolerance, ignore)
    return Simple(model, told + more, changed)


@dataclass(frozen=True)
class Simple:
    """A model with the same outputs, what was done, and the initializers that have other values."""

    model: Model
    told: list[str]
    changed: list[str]


# The verb ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Realized:
    """A plan and its model, with the initializers that changed, those that are new, and other steps."""

    plan: Plan
    model: Model
    repaired: list[str]
    rewrites: list[str]
    differences: list[verify.Difference] | None


def realize(
    model: str | Path,
    output: str | Path | None = None,
    *,
    tolerance: float = TOLERANCE,
    report: str | Path | Sequence[str | Path] = (),
    progress: Progress = quietly,
    command: Sequence[str] = (),
    **options: Any,
) -> pipeline.Result:
    """Take out what is at zero or without effect; the outputs stay what they are.

    Slices up to `tolerance` times the median of their group count as zero. With `no_new_bias`, units whose constant no
    bias can take stay. `options` are those of `prune` that speak of no budget. Without `output` nothing is written.
    Raises InputError, ImpossibleError (nothing to take out), MachineError, InternalError.
    """
    beside = [report] if isinstance(report, str | Path) else list(report)
    chosen = Options(ratio=0.0, remove=("all",), **options)
    check(chosen)
    if not 0 <= tolerance < 1:
        raise InputError("a tolerance lies in [0, 1)", object=f"--tolerance {tolerance:g}")
    clock = pipeline.Clock(progress)
    with clock.stage("read and analyse"):
        opened = pipeline.opened(model, [output], [beside], chosen)
    analysis = opened.analysis
    with Worker(seconds=chosen.timeout, progress=progress) as worker:
        prover = Prover(analysis, opened.calibration, chosen.seed, chosen.threads)
        with clock.stage("run the dense model"):
            pipeline.check_dense(prover, worker, chosen)
        with clock.stage("find what has no effect, take it out and prove"):
            run = _Run(analysis, chosen, tolerance, prover, worker)
            found = run.result()
        gone = [*_lost(analysis, run.simple), *run.analysis.removals(found.plan)]
        nothing = Proven(Plan({}), found.model, [], found.differences, run.unproven)
        repaired = Repaired(found.model, found.repaired, run.warnings(found))
        shown = pipeline.measured(
            analysis, chosen, opened.paths[0], nothing, prover, worker, opened.evaluation, clock, command, (), repaired
        )
    proven = Proven(found.plan, found.model, gone, found.differences, run.unproven)
    changes = account.changes(run.analysis, chosen, run.groups, proven)
    changes["rewrites"] = [f"folded {name}" for name in analysis.prepared.folded] + found.rewrites
    proof = shown.report.verification.model_copy(update={"method": run.method})
    told = {key: value for key, value in recorded(chosen).items() if key in RECORDED}
    result = replace(
        shown,
        plan=found.plan,
        report=shown.report.model_copy(
            update=changes
            | {
                "recipe": {"remove": ["all"], **told, "tolerance": tolerance},
                "verification": proof,
            }
        ),
    )
    if chosen.dry_run:
        return result
    with clock.stage("write"):
        return pipeline.write([result], opened.paths, [beside], analysis, chosen, prover.feeds, progress)[0]


def _lost(analysis: Analysis, simple: Simple) -> list[verify.Removal]:
    """Initializers that nothing reads since constants that were computed from them are written down."""
    left = set(initializers(simple.model.graph))
    owner = {m.initializer: group.id for group in reversed(analysis.groups) for m in group.members}
    roles = {stored.initializer: stored.role for stored in analysis.view.stored.values()}
    gone = [name for name in initializers(analysis.prepared.model.graph) if name not in left]
    return [verify.Removal(name, 0, "all", roles.get(name, "weight"), owner.get(name, -1)) for name in gone]


class _Run:
    """One model: simplified, analysed again, and taken apart until the proof holds."""

    def __init__(self, dense: Analysis, options: Options, tolerance: float, prover: Prover, worker: Worker) -> None:
        self.dense, self.options, self.tolerance, self.prover, self.worker = dense, options, tolerance, prover, worker
        self.unproven: list[int] = []
        clean, dropped = cleaned(dense, tolerance)
        self.reference = dense.dense
        self.method = "same outputs"
        if dropped and tolerance > TOLERANCE:
            self.reference = fold.with_values(dense.prepared.model, clean)
            self.method = f"same outputs, slices below {tolerance:g} of the median at zero"
        self.simple = simplified(dense, clean, tolerance, options.ignore)
        self.analysis, self.broken = dense, False
        if self.simple.told and not self._holds(self.simple.model):
            self.simple, self.broken = Simple(dense.dense, [], []), True
        if self.simple.told:
            self.analysis = Analysis(
                dense.source.path, options.input_shape, remove=("all",), read=(self.simple.model, dense.source)
            )
            clean, _ = cleaned(self.analysis, tolerance)
        self.dead = Dead(self.analysis, clean, options.approximate, not options.no_new_bias)
        self.groups = [group for group in self.analysis.groups if self._free(group)]

    def _free(self, group: Group) -> bool:
        touched = {*group.nodes, *(m.initializer for m in group.members)}
        ignored = any(fnmatch.filter(touched, pattern) for pattern in self.options.ignore)
        return group.kind != "layers" and len(group.units) > group.least and not ignored

    def _differences(self, candidate: Model, reference: Model | None = None) -> list[verify.Difference] | None:
        """How far a candidate is from the reference; None where nothing can be run."""
        if not self.prover.feeds:
            return None
        return self.prover.compare(self.worker, reference or self.reference, candidate)

    def _holds(self, candidate: Model) -> bool:
        try:
            return all(d.holds for d in self._differences(candidate) or ())
        except (InternalError, InputError):
            return False

    def result(self) -> Realized:
        """The largest plan that is proven.

        Raises ImpossibleError where nothing goes, InternalError where nothing is proven.
        """
        while True:
            left = [group for group in self.groups if group.id not in self.unproven]
            plan = self.dead.plan(left)
            if not plan.keep and not self.simple.told:
                if self.unproven or self.broken:
                    raise InternalError("nothing that could be proven can be taken out", file=self.dense.source.path)
                why = self.dead.refused(self.groups, plan)
                text = f"; {why[0]}" if why else ""
                raise ImpossibleError(f"no unit is at zero or without effect{text}", file=self.dense.source.path)
            if (found := self._attempt(left)) is not None:
                return found
            self.unproven += sorted(verify.blame(sorted(plan.keep), self._proves))

    def _proves(self, ids: Collection[int]) -> bool:
        """Whether what goes of these groups alone is proven."""
        return self._attempt([group for group in self.groups if group.id in ids]) is not None

    def _attempt(self, groups: Sequence[Group]) -> Realized | None:
        """Take out what can go of these groups; None if it is not proven."""
        plan = self.dead.plan(groups)
        dead = ~self.analysis.alive(plan)
        try:
            model = self.analysis.rewrite(plan) if plan.keep else self.analysis.dense.clone()
            changed, fresh = fold.shift(model, self.dead.offsets(dead))
            told = fold.write_operands(model, ones_left(self.analysis, dead))
            reference = self.analysis.reference([], ~dead) if self.options.approximate and plan.keep else None
            differences = self._differences(model, reference)
        except (InternalError, InputError):
            return None
        if not all(row.holds for row in differences or ()):
            return None
        rewrites = self.simple.told + [f"constants of removed units in the new bias {name}" for name in fresh] + told
        return Realized(plan, model, sorted({*self.simple.changed, *changed}), rewrites, differences)

    def warnings(self, found: Realized) -> list[str]:
        """What stays although it is dead, and what failed."""
        told = self.dead.refused(self.groups, found.plan)
        if self.broken:
            told.append("writing down constants failed its proof and was left out; this is our bug, please report it")
        return told
