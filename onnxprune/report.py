"""What a run did, as data with a schema: written as JSON, Markdown or HTML, read back by `verify`."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from onnxprune.errors import InputError, shown, shown_path

SCHEMA = 1


class Strict(BaseModel):
    """Unknown keys are errors: a typo in a plan must not be ignored."""

    model_config = ConfigDict(extra="forbid")


class ModelRow(Strict):
    """A model and what it costs; latency as measured, or None."""

    path: str
    sha256: str
    params: int
    macs: int
    bytes: int
    latency: dict[str, Any] | None = None
    faster: bool | None = None


class MemberRow(Strict):
    """An initializer axis that a group owns positions of."""

    initializer: str
    axis: int
    role: str


class GroupRow(Strict):
    """A group before and after; `mixing` lists the ops and axes where its positions see each other."""

    id: int
    kind: str
    exact: bool
    before: int
    after: int
    members: list[MemberRow]
    mixing: list[str] = []


class FrozenRow(Strict):
    """An axis that stays, and why."""

    axis: str
    reason: str
    parameters: int


class Use(Strict):
    """A reader of a shared initializer: first output of the node, input index."""

    node: str
    input: int


class RemovedRow(Strict):
    """One slice that went, or "all" of an initializer that was part of a dropped branch."""

    initializer: str
    axis: int
    removed: list[int] | Literal["all"]
    role: str
    group: int
    uses: list[Use] | None = None


class InterfaceRow(Strict):
    """Graph inputs and outputs that went with a branch, or lost positions; only with --allow-interface-change.

    `narrowed` has {name: {axis: positions that stay}}.
    """

    inputs: list[str] = []
    outputs: list[str] = []
    narrowed: dict[str, dict[int, list[int]]] = {}


class PrecisionRow(Strict):
    """What the written model computes in, after all else; operators that stay in fp32, by their first output.

    `relative` and `equal` say how far that moved the outputs: error of floats, share of equal integers.
    """

    to: Literal["fp16"]
    kept: list[str]
    relative: float | None = None
    equal: float | None = None


class Verification(Strict):
    """How the proof was made; `proven` is False only with --unproven."""

    method: str
    proven: bool
    inputs: int
    differences: list[dict[str, Any]]
    unproven: list[str] = []


class LayerRow(Strict):
    """A node with multiplications, or a table: whether its weight has the pattern along `axis`, or why not.

    `kernel` says whether a sparse kernel is to be expected, `why` in which precision, or what stands against it. `ms`
    is what it takes by itself, dense, where that was measured, and `time` the share of the model's latency.
    """

    node: str
    op: str
    initializer: str
    axis: int
    inputs: int
    outputs: int
    type: str
    macs: int
    sparse: bool
    density: float
    criterion: str
    reason: str
    kernel: bool
    why: str
    ms: float | None = None
    time: float | None = None


class SparsityRow(Strict):
    """N:M: how it was chosen, the shares of all MACs that have it and that a sparse kernel is to be expected for.

    `sparse_time` and `kernel_time` are these shares of the latency where it was measured, on the backend of the report.

    `protected` are (initializer, input, output) that stay whatever a criterion says, `permuted` the groups whose units
    have another order.
    """

    pattern: str
    criterion: str
    repair: str | None
    sparse_macs: float
    kernel_macs: float
    sparse_time: float | None = None
    kernel_time: float | None = None
    permuted: list[int] = []
    protected: list[tuple[str, int, int]] = []
    layers: list[LayerRow]


class Report(Strict):
    """Everything about one run of `prune`.

    `norms` are nodes of the dense model, by their first output, that take a mean off which the pruned model takes off
    in what writes the stream.
    """

    schema_version: int = SCHEMA
    tool: str
    command: list[str]
    recipe: dict[str, Any]
    dense: ModelRow
    pruned: ModelRow
    groups: list[GroupRow]
    frozen: list[FrozenRow]
    removed: list[RemovedRow]
    bypass: list[str] = []
    interface: InterfaceRow = InterfaceRow()
    repaired: list[str] = []
    rewrites: list[str] = []
    norms: list[str] = []
    sparsity: SparsityRow | None = None
    kept: dict[str, dict[str, list[int]]]
    precision: PrecisionRow | None = None
    verification: Verification
    quality: dict[str, Any]
    timing: dict[str, float]
    warnings: list[str] = []

    def data(self) -> dict[str, Any]:
        """As JSON data; `schema` is spelled so in the file."""
        found = self.model_dump(exclude_none=False)
        for row in found["removed"]:
            if row["uses"] is None:
                del row["uses"]
        plain_data: dict[str, Any] = plain({"schema": found.pop("schema_version"), **found})
        return plain_data


def plain(data: Any) -> Any:
    """Data without the infinities and NaN that JSON does not have; None stands for them."""
    match data:
        case dict():
            return {key: plain(value) for key, value in data.items()}
        case list() | tuple():
            return [plain(value) for value in data]
        case float() if not isfinite(data):
            return None
    return data


def to_json(report: Report) -> str:
    """The JSON report, keys in a fixed order."""
    return json.dumps(report.data(), indent=1) + "\n"


def table(report: Report) -> list[tuple[str, str, str, str]]:
    """(what, dense, pruned, ratio) rows of the before/after table."""
    dense, pruned = report.dense, report.pruned
    rows = [
        (name, f"{a:,}", f"{b:,}", f"{b / a:.3f}" if a else "")
        for name, a, b in (
            ("parameters", dense.params, pruned.params),
            ("MACs", dense.macs, pruned.macs),
            ("bytes", dense.bytes, pruned.bytes),
        )
    ]
    if dense.latency and pruned.latency:
        for key, name in (("cpu_ms", "latency (CPU ms)"), ("wall_ms", "latency (wall ms)")):
            a, b = dense.latency[key], pruned.latency[key]
            rows.append((name, f"{a:.3f}", f"{b:.3f}", f"{b / a:.3f}" if a else ""))
    if report.precision is not None:
        rows.append(("precision", "as read", report.precision.to, ""))
    for name, value in report.quality.items():
        if isinstance(value, dict):
            rows.append((name, f"{value['dense']:.4f}", f"{value['pruned']:.4f}", ""))
        elif isinstance(value, float):
            rows.append((name, "", f"{value:.4g}", ""))
    return rows


Section = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def _sections(report: Report) -> list[Section]:
    """(title, columns, rows) of what a person reads: before and after, the proof, groups, what stays and why."""
    proof = report.verification
    reasons: dict[str, tuple[int, int]] = {}
    for row in report.frozen:
        axes, parameters = reasons.get(row.reason, (0, 0))
        reasons[row.reason] = (axes + 1, parameters + row.parameters)
    ordered = sorted(reasons.items(), key=lambda item: -item[1][1])
    title = f"Proof: {proof.method}, {proof.inputs} inputs" if proof.proven else "UNPROVEN"
    return [
        ("Before and after", ("", "dense", "pruned", "ratio"), [*table(report)]),
        (title, ("output", "difference", "tolerance"),
         [(shown(d["output"]), f"{d['relative']:.1e}", f"{d['tolerance']:.0e}") for d in proof.differences]),
        ("Groups", ("group", "kind", "units", "left"),
         [(str(g.id), g.kind, str(g.before), str(g.after)) for g in report.groups]),
        *_sparsity(report),
        ("What stays", ("reason", "axes", "parameters"),
         [(shown(reason), str(axes), f"{held:,}") for reason, (axes, held) in ordered]),
    ]  # fmt: skip


def layers(sparsity: SparsityRow) -> list[tuple[str, ...]]:
    """Rows of the table of layers: the weight, its MACs and time, what is left of it, what to expect; then the sums."""
    total = sum(row.macs for row in sparsity.layers) or 1
    rows: list[tuple[str, ...]] = [
        (
            shown(row.node),
            row.op,
            f"{row.inputs} x {row.outputs}" if row.inputs else "",
            row.type.lower(),
            f"{row.macs / total:.1%}",
            "" if row.time is None else f"{row.time:.1%}",
            f"{row.density:.2f}" if row.sparse else "dense",
            "yes" if row.kernel else "no",
            shown(row.why or row.reason),
        )
        for row in sparsity.layers
    ]
    sums = (
        (f"all that are {sparsity.pattern}", sparsity.sparse_macs, sparsity.sparse_time),
        ("all with a sparse kernel", sparsity.kernel_macs, sparsity.kernel_time),
    )
    return rows + [
        (name, "", "", "", f"{macs:.1%}", "" if time is None else f"{time:.1%}", "", "", "")
        for name, macs, time in sums
    ]


LAYERS = ("node", "op", "inputs x outputs", "type", "MACs", "time", "density", "kernel", "why")


def _sparsity(report: Report) -> list[Section]:
    if report.sparsity is None:
        return []
    return [(f"{report.sparsity.pattern}, layer by layer", LAYERS, layers(report.sparsity))]


def to_markdown(report: Report) -> str:
    """The report for people, as Markdown."""
    lines = [f"# {_cell(shown_path(Path(report.pruned.path).name))}"]
    lines += ["", *(f"- warning: {text}" for text in report.warnings)] if report.warnings else []
    for title, columns, rows in _sections(report):
        lines += ["", f"## {title}", "", f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
        lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text that cannot end a cell or start markup."""
    return "".join("\\" + c if c in "\\|`*_<>[]" else c for c in text)


STYLE = "body{font:15px sans-serif;max-width:60em;margin:2em auto}td,th{padding:.2em 1em;text-align:right}" \
        "td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f2f2f2}"  # fmt: skip


def to_html(report: Report) -> str:
    """The report for people, as one page that loads nothing."""
    title = escape(shown_path(Path(report.pruned.path).name))
    parts = [f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"]
    parts += [f"<p>warning: {escape(text)}</p>" for text in report.warnings]
    for heading, columns, rows in _sections(report):
        parts.append(f"<h2>{escape(heading)}</h2><table>{_row('th', columns)}")
        parts += [_row("td", row) for row in rows]
        parts.append("</table>")
    return "\n".join(parts) + "\n"


def _row(tag: str, cells: tuple[str, ...]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


WRITERS: dict[str, Callable[[Report], str]] = {".json": to_json, ".md": to_markdown, ".html": to_html}


def check_format(path: str | Path) -> None:
    """Raise InputError for a suffix that names no format."""
    if Path(path).suffix not in WRITERS:
        raise InputError(f"a report ends in {', '.join(WRITERS)}", object=f"--report {path}")


def rendered(report: Report, suffix: str) -> str:
    """The report in the format of a suffix."""
    return WRITERS[suffix](report)


def read(text: bytes, file: str) -> Report:
    """A JSON report. Raises InputError where it is not one."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError("not a JSON report", file=file) from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise InputError(f"not a report of schema {SCHEMA}", file=file)
    data["schema_version"] = data.pop("schema")
    try:
        return Report.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{first['msg']}", file=file, object=".".join(map(str, first["loc"]))) from None
