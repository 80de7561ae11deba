"""verify: the proof repeated from a report and two files, trusting neither the run nor the tool's own state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxprune import precision, storage
from onnxprune import report as reports
from onnxprune import verify as proof
from onnxprune.allocate import rotated
from onnxprune.analysis import Analysis
from onnxprune.bases import Bases
from onnxprune.branches import Dropped
from onnxprune.errors import ImpossibleError, InputError
from onnxprune.infer import attributes as attributes_of
from onnxprune.infer import bodies, initializers, names, walk
from onnxprune.model import add_initializer
from onnxprune.nm import NM, broken
from onnxprune.operators import stored as stored_in
from onnxprune.prove import Prover
from onnxprune.realize import realize
from onnxprune.rewrite import apply
from onnxprune.rms import by_root_mean_square
from onnxprune.runtime import ort
from onnxprune.types import Axis, Mask, Plan, Progress, Shape, quietly
from onnxprune.worker import Worker


def verify(
    dense: str,
    pruned: str,
    plan: str,
    input_shape: Mapping[str, Shape],
    seed: int,
    timeout: float = 600.0,
    progress: Progress = quietly,
) -> dict[str, Any]:
    """Apply the plan to DENSE, prove that, and check that PRUNED is the same up to the repaired values.

    Raises ImpossibleError (a gate that fails) with the object at fault.
    """
    report = reports.read(storage.read_bytes(plan), Path(plan).name)
    remove = report.recipe.get("remove", ())
    if not isinstance(remove, list | tuple) or not all(isinstance(kind, str) for kind in remove):
        raise InputError("not a list of kinds", file=Path(plan).name, object="recipe.remove")
    consent = report.recipe.get("allow-interface-change") is True
    progress("read and analyse")
    analysis = Analysis(dense, input_shape, remove=remove, interface=consent)
    small, _ = storage.read_model(pruned)
    if analysis.source.sha256 != report.dense.sha256:
        raise ImpossibleError("is not the model that the report speaks of (sha256)", file=dense)
    if "tolerance" in report.recipe:
        return _realized(report, dense, small, Path(pruned).name, seed, timeout, progress)
    removals = [
        proof.Removal(
            row.initializer,
            row.axis,
            "all" if row.removed == "all" else tuple(row.removed),
            row.role,
            row.group,
            tuple((use.node, use.input) for use in row.uses) if row.uses else None,
        )
        for row in report.removed
    ]
    gone, dropped = _branches(analysis, removals, report.bypass, Path(plan).name)
    slices = [removal for removal in removals if removal.removed != "all"]
    own = ~gone[: analysis.branches.free]
    alive = np.concatenate([_alive(analysis, slices, dropped.dead, Path(plan).name), own])
    whole = Plan({group.id: alive[group.units] for group in analysis.groups})
    if odd := set(analysis.removals(whole)) ^ set(removals):
        text = "its role, group, positions or readers are not those of the units that go"
        raise ImpossibleError(text, file=Path(plan).name, object=min(row.initializer for row in odd))
    rebuilt = apply(analysis.prepared, analysis.dims, analysis.view, alive, analysis.branches)
    with Worker(seconds=timeout, progress=progress) as worker:
        prover = Prover(analysis, [], seed)
        progress("run the dense model")
        prover.check_dense(worker)
        progress("prove")
        differences = prover.prove(worker, rebuilt, removals, alive)
        _check(differences, "differs from the dense model without the removed units", Path(pruned).name)
        if report.norms:
            rows = _means(analysis, report.norms, prover, worker, Path(plan).name)
            _check(rows, "differs from the dense model where norms do not take the mean off", Path(pruned).name)
            rebuilt = by_root_mean_square(rebuilt, report.norms)
    repaired = frozenset(report.repaired)
    _part(rebuilt.graph, small.graph, repaired)
    if report.precision is not None:
        types = analysis.prepared.facts.types
        with Worker(seconds=timeout, progress=progress) as worker:
            signatures = worker.call(ort.signatures, precision.foreign(rebuilt))
        again = precision.cast(rebuilt, report.precision.to, types, signatures, kept=report.precision.kept)
        rebuilt = again.model
        repaired |= {copy for copy, original in again.copies.items() if original in repaired}
    _same(rebuilt, small, repaired, Path(pruned).name)
    if (row := report.sparsity) is not None:
        places = [(layer.initializer, layer.axis) for layer in row.layers if layer.sparse]
        if lacking := broken(small, NM.parse(row.pattern), places):
            raise ImpossibleError(f"is not {row.pattern}", file=Path(pruned).name, object=lacking[0])
    return {"proven": True, "inputs": len(prover.feeds), "differences": [asdict(d) for d in differences]}


def _realized(
    report: reports.Report, dense: str, small: ir.Model, file: str, seed: int, timeout: float, progress: Progress
) -> dict[str, Any]:
    """Take out once more what has no effect, and prove it; the model in the file must be that, up to noise."""
    recipe = report.recipe
    shape = {name: tuple(sizes) for name, sizes in recipe.get("input-shape", {}).items()}
    try:
        again = realize(
            dense,
            tolerance=recipe["tolerance"],
            no_new_bias=recipe["no-new-bias"],
            approximate=recipe["approximate"],
            ignore=tuple(recipe.get("ignore", ())),
            input_shape=shape,
            seed=seed,
            timeout=timeout,
            progress=progress,
            measure=False,
        )
    except (KeyError, TypeError, AttributeError):
        raise InputError("not the options of a run of 'realize'", file=file, object="recipe") from None
    _same(again.model, small, frozenset(initializers(again.model.graph)), file)
    with Worker(seconds=timeout, progress=progress) as worker:
        prover = Prover(Analysis(dense, shape), [], seed)
        prover.check_dense(worker)
        differences = prover.compare(worker, again.model, small)
    _check(differences, "differs from what taking out gives", file)
    proof = again.report.verification
    return {"proven": True, "inputs": proof.inputs, "differences": proof.differences}


def _means(
    analysis: Analysis, norms: Sequence[str], prover: Prover, worker: Worker, file: str
) -> list[proof.Difference]:
    """What it does to the dense model that these nodes leave the mean to what writes their width: noise.

    Raises ImpossibleError for a node that cannot.
    """
    bases = Bases(analysis)
    bases.means = frozenset(norms) & bases.removable()
    model, found = rotated(analysis, bases)
    if odd := sorted(set(norms) - set(found)):
        raise ImpossibleError("is listed among the norms, and is none that can do without", file=file, object=odd[0])
    return prover.compare(worker, analysis.dense, model)


def _check(differences: Iterable[proof.Difference], text: str, file: str) -> None:
    """Raise ImpossibleError for the first difference that is more than noise."""
    for row in differences:
        if not row.holds:
            raise ImpossibleError(f"{text} by {row.relative:.2e}", file=file, object=f"output '{row.output}'")


def _branches(
    analysis: Analysis, removals: Iterable[proof.Removal], bypass: Iterable[str], file: str
) -> tuple[Mask, Dropped]:
    """bool[branches] that go, and what goes with them. Raises ImpossibleError where one is listed in part."""
    whole = {removal.initializer for removal in removals if removal.removed == "all"}
    goes = np.zeros(len(analysis.branches.found), np.bool_)
    for k in range(len(goes)) if whole or bypass else ():
        alone = analysis.without(np.arange(len(goes)) == k)
        goes[k] = alone.initializers.keys() <= whole if alone.initializers else set(alone.bypass) <= set(bypass)
    dropped = analysis.without(goes)
    if odd := sorted(whole ^ dropped.initializers.keys()):
        raise ImpossibleError(
            "not every tensor of a removed branch is listed, or one that stays", file=file, object=odd[0]
        )
    if odd := sorted(set(bypass) ^ set(dropped.bypass)):
        raise ImpossibleError("'bypass' does not name the sums of the removed branches", file=file, object=odd[0])
    return goes, dropped


def _alive(analysis: Analysis, removals: Iterable[proof.Removal], dead: frozenset[str], file: str) -> Mask:
    """bool[labels] from the listed slices. Raises ImpossibleError where a unit is listed in part.

    What is `dead` goes with a branch, whatever its positions.
    """
    alive = np.ones(len(analysis.dims.frozen), np.bool_)
    listed: dict[tuple[str, int], set[int]] = {}
    readers = {
        name: [value for value, stored in analysis.view.stored.items() if stored.initializer == name]
        for name in {r.initializer for r in removals}
    }
    for removal in removals:
        values = [
            value
            for value in readers[removal.initializer]
            if removal.uses is None or set(analysis.view.stored[value].uses) & set(removal.uses)
        ]
        if not values:
            raise InputError("no such initializer in the dense model", file=file, object=removal.initializer)
        for value in values:
            labels = analysis.dims.labels_of(Axis(value, removal.axis))
            positions = [int(position) for position in removal.removed]
            if labels is None or not all(0 <= position < len(labels) for position in positions):
                raise InputError(f"axis {removal.axis} has no such positions", file=file, object=removal.initializer)
            listed.setdefault((value, removal.axis), set()).update(positions)
            alive[labels[positions]] = False
    frozen = np.flatnonzero(~alive & (analysis.dims.frozen >= 0))
    if len(frozen):
        raise ImpossibleError(f"removes positions that stay: {analysis.dims.reason(int(frozen[0]))}", file=file)
    for value, stored in analysis.view.stored.items():
        for axis in range(len(stored.shape) if value not in dead else 0):
            labels = analysis.dims.labels_of(Axis(value, axis))
            gone = set() if labels is None else set(np.flatnonzero(~alive[labels]).tolist())
            if gone != listed.get((value, axis), set()):
                raise ImpossibleError(
                    "not every slice of a removed unit is listed", file=file, object=stored.initializer
                )
    return alive


def _same(rebuilt: ir.Model, pruned: ir.Model, repaired: frozenset[str], file: str) -> None:
    """Raise ImpossibleError unless nodes, names, shapes and all values but the repaired ones agree."""
    a, b = rebuilt.graph, pruned.graph
    if rebuilt.ir_version != pruned.ir_version or dict(rebuilt.opset_imports) != dict(pruned.opset_imports):
        raise ImpossibleError("its IR version or operator sets are not those of the dense model", file=file)
    if unknown := repaired - set(initializers(b)):
        raise ImpossibleError("is listed as repaired, and is not there", file=file, object=min(unknown))
    pairs = list(zip_longest(walk(a), walk(b)))
    if any(m is None or t is None or _node(m) != _node(t) for m, t in pairs):
        raise ImpossibleError("its nodes are not those that the plan gives", file=file)
    for mine, theirs in ((a.inputs, b.inputs), (a.outputs, b.outputs)):
        if [(v.name, str(v.shape), v.dtype) for v in mine] != [(v.name, str(v.shape), v.dtype) for v in theirs]:
            raise ImpossibleError("its inputs and outputs are not those of the dense model", file=file)
    stored, found = initializers(a), initializers(b)
    if odd := sorted(set(stored) ^ set(found)):
        raise ImpossibleError("an initializer that the plan does not give, or lacks", file=file, object=odd[0])
    for name, value in stored.items():
        x, y = value.const_value, found[name].const_value
        if x is None or y is None or tuple(x.shape) != tuple(y.shape) or x.dtype != y.dtype:
            raise ImpossibleError("its shape or type is not what the plan gives", file=file, object=name)
        if name not in repaired and x.tobytes() != y.tobytes():
            raise ImpossibleError("its values changed, and it is not listed as repaired", file=file, object=name)


def _part(rebuilt: ir.Graph, pruned: ir.Graph, repaired: frozenset[str]) -> None:
    """Give every reader of a shared initializer for which the file has a repaired copy one of that name, unrepaired."""
    copies = repaired - set(initializers(rebuilt))
    slots = {
        (str(node.outputs[0].name), k): str(value.name)
        for node in walk(pruned)
        for k, value in enumerate(node.inputs)
        if value is not None and value.name in copies
    }
    made: dict[str, ir.Value] = {}
    for node in list(walk(rebuilt)) if slots else ():
        for k, value in enumerate(node.inputs):
            name = slots.get((str(node.outputs[0].name), k))
            if name is None or value is None or (source := stored_in(value)) is None or source.const_value is None:
                continue
            if name not in made:
                made[name] = ir.Value(name=name, shape=source.shape, type=source.type, const_value=source.const_value)
                add_initializer(rebuilt, made[name])
            node.replace_input_with(k, made[name])


def _node(node: ir.Node) -> tuple[object, ...]:
    inner = [(key, names(body.inputs), names(body.outputs)) for key, body in bodies(node).items()]
    attributes = sorted((k, str(value)) for k, value in attributes_of(node).items())
    return (node.domain, node.op_type, list(names(node.inputs)), list(names(node.outputs)), attributes, inner)
