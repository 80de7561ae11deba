"""sensitivity(): what removing part of each group by itself costs at the outputs, and what it gains."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune import choose, interface, pipeline, quality, reconstruct, runtime, storage
from onnxprune import select as selection
from onnxprune.allocate import TRIAL_ROWS, started
from onnxprune.analysis import Analysis, data_files
from onnxprune.errors import InputError, InternalError, MachineError, printable, shown, shown_path
from onnxprune.model import Model
from onnxprune.prove import Prover
from onnxprune.recipe import Options, check
from onnxprune.recovery import Recovery
from onnxprune.types import Array, Group, Plan, Progress, quietly
from onnxprune.worker import Worker

LEVELS = (0.25, 0.5, 0.75)  # shares of a group's units
PLOTS = (".png", ".svg", ".html")
NAMED = 40  # groups up to which the plot names each

Feeds = Sequence[Mapping[str, Array]]
Outputs = list[dict[str, Array]]


@dataclass(frozen=True)
class Row:
    """One group at one level: `removed` of its units are gone, and nothing else.

    `error` is the relative error of the outputs, `repaired` that after repair (None where none was asked for), both
    NaN where the model could not be made or run. Gains are shares of the dense model's cost that go.
    """

    group: int
    kind: str
    exact: bool
    units: int
    level: float
    removed: int
    error: float
    repaired: float | None
    macs: float
    params: float
    latency: float | None
    nodes: tuple[str, ...]

    def cells(self) -> list[object]:
        """The row as the columns of a table have it."""
        return [getattr(self, name) for name in COLUMNS[:-1]] + [" ".join(map(printable, self.nodes))]


COLUMNS = tuple(field.name for field in fields(Row))


@dataclass(frozen=True)
class Sensitivity:
    """The rows, group by group in the order of the model; what the dense model costs, and what errors were seen on.

    `data` is `calibration` or `random inputs`, `inputs` how many feeds of them; `held_out` whether repair was fitted
    to others. `latency` of the dense model is in ms.
    """

    source: storage.Source
    rows: tuple[Row, ...]
    dense: Mapping[str, float]
    data: str
    inputs: int
    held_out: bool
    backend: str | None
    warnings: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that hold something."""
        absent = {name for name in ("repaired", "latency") if all(getattr(row, name) is None for row in self.rows)}
        return tuple(name for name in COLUMNS if name not in absent)

    def table(self) -> tuple[list[str], list[tuple[object, ...]]]:
        """(columns, rows) for people."""
        columns = self.columns
        forms = dict.fromkeys(("error", "repaired"), "{:.3g}") | dict.fromkeys(("macs", "params", "latency"), "{:.1%}")
        rows: list[tuple[object, ...]] = []
        for row in self.rows:
            cells = asdict(row) | {"exact": "exact" if row.exact else "mixing", "nodes": shown(", ".join(row.nodes))}
            found = {name: math.nan if cells[name] is None else cells[name] for name in columns}
            rows.append(tuple(forms.get(name, "{}").format(cell) for name, cell in found.items()))
        return [*columns], rows

    def data_of(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "model": {"path": str(self.source.path), "sha256": self.source.sha256},
            "data": self.data,
            "inputs": self.inputs,
            "held_out": self.held_out,
            "backend": self.backend,
            "dense": dict(self.dense),
            "rows": [asdict(row) for row in self.rows],
            "warnings": list(self.warnings),
        }


def sensitivity(
    model: str | Path,
    *,
    levels: Sequence[float] = LEVELS,
    backend: str | None = None,
    reconstruct: str | None = None,
    csv: str | Path | None = None,
    plot: str | Path | None = None,
    progress: Progress = quietly,
    **options: Any,
) -> Sensitivity:
    """Take a share of the least important units out of one group at a time, and compare outputs with the dense model.

    Without calibration data errors are those on random inputs. With `reconstruct` what stays is repaired with one half
    of the data, and errors are seen on the other. With `backend` there are gains in latency, from measured operators.
    Files are written once everything is known. Raises InputError, ImpossibleError (nothing can be removed),
    MachineError, InternalError.
    """
    wrong = [level for level in levels if not 0 <= level < 1]
    if wrong or not levels:
        raise InputError("shares of a group's units, 0 <= share < 1", object=f"--levels {wrong[0] if wrong else ''}")
    levels = sorted(set(levels))
    chosen = Options(
        ratio=levels[-1], round_to=1, reconstruct=reconstruct or "none", backend=backend or "cpu", **options
    )
    check(chosen)
    if plot is not None:
        check_plot(plot)
    opened = pipeline.opened(model, [None], [], chosen)
    analysis = opened.analysis
    files = [Path(path) for path in (csv, plot) if path is not None]
    storage.check_outputs(files, [*analysis.source.files, *data_files(chosen.calibration)], force=chosen.force)
    with Worker(seconds=chosen.timeout, progress=progress) as worker:
        if backend is not None:
            worker.call(runtime.backend, backend)
        found = _found(opened, replace(chosen, remove=opened.remove), worker, levels, backend, progress)
    content = {}
    if csv is not None:
        content[Path(csv)] = to_csv(found).encode()
    if plot is not None:
        content[Path(plot)] = drawn(found, Path(plot).suffix)
    storage.write_files(content, force=chosen.force)
    return found


def _found(
    opened: pipeline.Opened,
    options: Options,
    worker: Worker,
    levels: Sequence[float],
    backend: str | None,
    progress: Progress,
) -> Sensitivity:
    """Every group at every level."""
    analysis = opened.analysis
    prover = Prover(analysis, opened.calibration, options.seed, options.threads, selection.parse_size(options.memory))
    progress("run the dense model")
    pipeline.check_dense(prover, worker, options)
    if backend is not None:
        pipeline.stopwatch(analysis, prover, worker, opened.evaluation, options, progress)
    recovery = Recovery(analysis, opened.calibration, options, worker, progress)
    progress("score")
    groups = choose.groups_of(analysis, options)
    groups, importance = choose.score(analysis, groups, options, recovery.evidence(groups))
    bench = _Bench(analysis, prover, worker, recovery)
    rounding = selection.Rounding(1, options.min_keep)
    rows: list[Row] = []
    told: list[str] = []
    for k, (group, scores) in enumerate(zip(groups, importance, strict=True)):
        known: dict[int, tuple[float, float | None]] = {0: (0.0, None if bench.fitted is None else 0.0)}
        for level in levels:
            progress("remove part of one group after the other", k, len(groups))
            plan = selection.by_ratio([group], [scores], level, rounding)
            removed = int((~plan.keep[group.id]).sum())
            plan = choose.over_all_units(analysis, [group], plan)
            if removed not in known:
                try:
                    known[removed] = bench.errors(plan)
                except (InputError, InternalError) as error:
                    known[removed] = math.nan, None
                    told.append(f"group {group.id} without {removed} units: {error.message}; this is our bug")
            rows.append(_row(analysis, group, level, removed, plan, known[removed]))
    return Sensitivity(
        analysis.source,
        tuple(rows),
        analysis.costs.of(np.ones(analysis.labels, np.bool_)),
        "calibration" if options.calibration is not None else "random inputs",
        len(bench.feeds),
        bench.fitted is not None and len(bench.fitted) < len(recovery.samples.feeds),
        backend,
        tuple(told),
    )


def _row(
    analysis: Analysis, group: Group, level: float, removed: int, plan: Plan, errors: tuple[float, float | None]
) -> Row:
    """A row with its gains."""
    dense = analysis.costs.of(np.ones(analysis.labels, np.bool_))
    left = analysis.costs.of(analysis.alive(plan))
    gains = {name: 1 - left[name] / whole if whole else 0.0 for name, whole in dense.items()}
    return Row(
        group.id,
        group.kind,
        group.exact,
        len(group.units),
        level,
        removed,
        *errors,
        gains["macs"],
        gains["params"],
        gains.get("latency"),
        group.nodes,
    )


class _Bench:
    """The samples that errors are seen on, what the dense model makes of them, and those that repair is fitted to."""

    def __init__(self, analysis: Analysis, prover: Prover, worker: Worker, recovery: Recovery) -> None:
        self.analysis, self.worker, self.recovery = analysis, worker, recovery
        self.run = prover.runner(worker)
        samples = recovery.samples
        self.feeds: Feeds = samples.feeds or prover.feeds
        self.fitted: Feeds | None = None
        if recovery.reconstructor is not None:
            self.fitted, self.feeds = samples.fitted, samples.feeds[1::2] or samples.feeds
            dense = analysis.prepared.model
            sampling = samples.sampling(TRIAL_ROWS)
            told: dict[str, Any] = {"threads": recovery.options.threads, "memory": recovery.memory}
            reconstruct.begin(worker, dense, self.fitted, sampling, **told)
        self.dense: Outputs = self.run(analysis.dense, self.feeds)

    def errors(self, plan: Plan) -> tuple[float, float | None]:
        """Relative error of a plan's model as it is, and after repair."""
        pruned = self.analysis.rewrite(plan)
        return self._error(pruned), None if self.fitted is None else self._error(self._repaired(plan, pruned))

    def _error(self, model: Model) -> float:
        narrowed = interface.noted(model.metadata_props)
        dense = [interface.narrow(outputs, narrowed) for outputs in self.dense]
        return quality.relative_error(self.run(model, self.feeds), dense, None)

    def _repaired(self, plan: Plan, pruned: Model) -> Model:
        recovery = self.recovery
        start = started(self.analysis, plan, pruned, recovery.bases, recovery.stays)
        found = reconstruct.repair(
            self.worker, start.model, start.sites, recovery.reconstructor, start=start.arrays, keep=True
        )
        model = start.model.clone()
        reconstruct.apply(model, found.changes)
        return model


# What is written ------------------------------------------------------------------------------------------------------


def to_csv(found: Sensitivity) -> str:
    """All columns, numbers in full; what is absent is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(row.cells() for row in found.rows)
    return text.getvalue()


def check_plot(path: str | Path) -> None:
    """Refuse a plot of no known format, or without what draws it. Raises InputError, MachineError."""
    if Path(path).suffix not in PLOTS:
        raise InputError(f"a plot ends in {', '.join(PLOTS)}", object=f"--plot {path}")
    _matplotlib()


def _matplotlib() -> Any:
    """What draws; it takes a while to load."""
    try:
        import matplotlib.figure
    except ImportError:
        message = "plots need matplotlib; install it with: pip install 'onnxprune[plot]'"
        raise MachineError(message, object="--plot") from None
    return matplotlib


def drawn(found: Sensitivity, suffix: str) -> bytes:
    """Error of each group at each level, and error against what is gained, as a picture or a page."""
    if suffix == ".html":
        picture = drawn(found, ".svg").decode()
        title = escape(shown_path(found.source.path.name))
        svg = picture[picture.index("<svg") :]
        return f"<!doctype html><meta charset=utf-8><title>{title}</title>\n{svg}".encode()
    matplotlib = _matplotlib()
    settings: Any = {"svg.hashsalt": "onnxprune", "svg.fonttype": "none", "text.parse_math": False}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name in a script that the font lacks
        figure = matplotlib.figure.Figure(figsize=(13, 5.5), layout="constrained")
        _draw(figure, found)
        out = io.BytesIO()
        metadata = {"Date": None} if suffix == ".svg" else {"Software": None}
        figure.savefig(out, format=suffix[1:], metadata=metadata)
    return out.getvalue()


def _draw(figure: Any, found: Sensitivity) -> None:
    """Two panels, a colour for each level; after repair hollow."""
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    gain = "macs" if found.backend is None else "latency"
    groups = list(dict.fromkeys(row.group for row in found.rows))
    place = {group: k for k, group in enumerate(groups)}
    kinds: list[tuple[str, str, Callable[[Row], float | None]]] = [("", "full", lambda row: row.error)]
    if "repaired" in found.columns:
        kinds.append((", repaired", "none", lambda row: row.repaired))
    for k, level in enumerate(dict.fromkeys(row.level for row in found.rows)):
        for text, fill, of in kinds:
            rows = [row for row in found.rows if row.level == level]
            errors = [math.nan if (error := of(row)) is None else error for row in rows]
            style = {"marker": "o", "markersize": 5, "fillstyle": fill, "color": f"C{k}", "label": f"{level:g}{text}"}
            left.plot([place[row.group] for row in rows], errors, linewidth=0.7, **style)
            right.plot([getattr(row, gain) for row in rows], errors, linestyle="none", **style)
    first = {row.group: row for row in reversed(found.rows)}
    if len(groups) <= NAMED:
        names = [f"{shown(first[g].nodes[0])[:30] if first[g].nodes else ''} ({g})" for g in groups]
        left.set_xticks(range(len(groups)), names, rotation=90, fontsize=7)
    left.set(xlabel="group", ylabel=f"relative error of the outputs ({found.data})", ylim=(0, None))
    title = {"macs": "MACs saved", "latency": f"latency saved on {found.backend}"}[gain]
    right.set(xlabel=f"{title} (share of the dense model)", ylim=(0, None))
    if found.rows:
        left.legend(title="share of the units removed", fontsize=8)
    figure.suptitle(shown_path(found.source.path.name))
