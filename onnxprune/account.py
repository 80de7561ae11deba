"""What was done to a model, and what it costs now, as the report tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune import interface, verify
from onnxprune import measure as latency
from onnxprune import report as reports
from onnxprune.analysis import Analysis, cost_of
from onnxprune.cost import Cost
from onnxprune.model import Model
from onnxprune.recipe import Options
from onnxprune.types import Axis, Frozen, Group, Mask, Plan


@dataclass(frozen=True)
class Proven:
    """A plan with its model, what went, and the proof; `differences` is None where nothing could be run."""

    plan: Plan
    model: Model
    gone: list[verify.Removal]
    differences: list[verify.Difference] | None
    unproven: list[int]
    precision: reports.PrecisionRow | None = None


def changes(
    analysis: Analysis, options: Options, groups: Sequence[Group], proven: Proven, rewrites: Sequence[str] = ()
) -> dict[str, Any]:
    """What went, what stayed and why, as the report lists it."""
    dropped = analysis.dropped(analysis.alive(proven.plan))
    return {
        "groups": [_group_row(group, proven.plan, analysis.inside(group, dropped.dead)) for group in analysis.groups],
        "frozen": [
            reports.FrozenRow(axis=str(f.axis), reason=f.reason, parameters=f.parameters)
            for f in (*analysis.frozen(groups), *_unproven(analysis, proven))
        ],
        "removed": [reports.RemovedRow.model_validate(removal.entry()) for removal in proven.gone],
        "rewrites": [
            *(f"folded {name}" for name in analysis.prepared.folded if proven.gone),
            *rewrites,
            *([f"cast to {options.precision}"] if proven.precision else []),
        ],
        "precision": proven.precision,
        "kept": _kept(analysis, proven.gone),
        "bypass": list(dropped.bypass),
        "interface": reports.InterfaceRow(
            inputs=list(dropped.inputs),
            outputs=list(dropped.outputs),
            narrowed={
                name: {axis: at.tolist() for axis, at in axes.items()}
                for name, axes in interface.noted(proven.model.metadata_props).items()
            },
        ),
    }


def _group_row(group: Group, plan: Plan, gone: bool) -> reports.GroupRow:
    """A group before and after; nothing is left of one inside branches that are `gone`."""
    keep: Mask | None = plan.keep.get(group.id)
    members = {(m.initializer, m.axis, m.role) for m in group.members}
    return reports.GroupRow(
        id=group.id,
        kind=group.kind,
        exact=group.exact,
        before=len(group.units),
        after=0 if gone else len(group.units) if keep is None else int(keep.sum()),
        members=[reports.MemberRow(initializer=i, axis=a, role=r) for i, a, r in sorted(members)],
        mixing=list(group.mixing),
    )


def _unproven(analysis: Analysis, proven: Proven) -> list[Frozen]:
    """What stays because its proof failed."""
    members = {
        (Axis(m.initializer, m.axis), int(np.prod(analysis.prepared.facts.shapes[m.initializer], dtype=np.int64)))
        for group in analysis.groups
        if group.id in proven.unproven
        for m in group.members
    }
    return [Frozen(axis, "unproven: its proof failed, which is our bug", size) for axis, size in sorted(members)]


def _kept(analysis: Analysis, gone: Sequence[verify.Removal]) -> dict[str, dict[str, list[int]]]:
    """Old positions that survive, for each initializer axis that every reader lost alike."""
    found: dict[str, dict[str, set[int]]] = {}
    for removal in gone:
        if removal.uses is None and removal.removed != "all":
            size = analysis.prepared.facts.shapes[removal.initializer][removal.axis]
            axes = found.setdefault(removal.initializer, {})
            axes.setdefault(str(removal.axis), set(range(size))).difference_update(removal.removed)
    return {name: {axis: sorted(kept) for axis, kept in axes.items()} for name, axes in sorted(found.items())}


def models(
    analysis: Analysis, path: Path | None, proven: Proven, size: int, rows: Sequence[latency.Latency]
) -> tuple[reports.ModelRow, reports.ModelRow]:
    """Dense and pruned in the report, with what they cost."""
    whole = analysis.costs.of(np.ones(analysis.labels, np.bool_))
    dense = Cost(round(whole["params"]), analysis.source.bytes, round(whole["macs"]))
    pruned = cost_of(proven.model, analysis.given, size)
    times: list[dict[str, Any] | None] = [*map(asdict, rows)] or [None, None]
    faster = latency.faster(*rows) if rows else None
    source = analysis.source
    return (
        reports.ModelRow(path=str(source.path), sha256=source.sha256, latency=times[0], **asdict(dense)),
        reports.ModelRow(path=str(path or ""), sha256="", latency=times[1], faster=faster, **asdict(pruned)),
    )


def warnings(analysis: Analysis, proven: Proven, options: Options, rows: Sequence[latency.Latency]) -> list[str]:
    """What the user should know about the result."""
    found = [f"group {k} failed its proof and was left alone; this is our bug, please report it"
             for k in proven.unproven]  # fmt: skip
    if all(keep.all() for keep in proven.plan.keep.values()) and options.ratio != 0:
        found.append("the dense model meets the target already; nothing was removed")
    if rows and latency.faster(*rows) is False:
        found.append("the pruned model is slower than the dense one")
    dropped = analysis.dropped(analysis.alive(proven.plan))
    if dropped.zeroed and analysis.generates():
        found.append("layers were cut from a model that generates; judge it by what it generates, not by one step")
    if lost := (*dropped.inputs, *dropped.outputs):
        found.append(f"the interface changed: {', '.join(lost)} went with the layers that they serve")
    if narrower := interface.noted(proven.model.metadata_props):
        found.append(
            f"the interface changed: {', '.join(narrower)} lost positions; the model's metadata say which stay"
        )
    return found
