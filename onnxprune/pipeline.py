"""prune(): load -> fold -> relate -> couple -> group -> score -> select -> rewrite -> verify -> measure -> save."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from onnxprune import account, bfloat, cache, choose, feeds, interface, pace, plugin, quality, runtime, storage, verify
from onnxprune import measure as latency
from onnxprune import report as reports
from onnxprune import select as selection
from onnxprune.account import Proven
from onnxprune.ahead import ahead
from onnxprune.analysis import Analysis, cost_shapes, data_files, named, samples_of
from onnxprune.bases import Bases
from onnxprune.errors import ImpossibleError, InputError, InternalError
from onnxprune.model import Model
from onnxprune.nm import NM, broken
from onnxprune.precision import judged
from onnxprune.prove import Prover
from onnxprune.recipe import KINDS, Methods, Options, check, recorded
from onnxprune.recovery import Recovery, Repaired
from onnxprune.running import Runner, memory_of
from onnxprune.runtime import ort
from onnxprune.sparse import Sparse, sparsified, timed
from onnxprune.types import Array, Group, Plan, Progress, quietly
from onnxprune.worker import Worker


@dataclass(frozen=True)
class Result:
    """A pruned model: where it was written (None after a dry run), the model itself, the plan and the report."""

    path: Path | None
    model: Model
    plan: Plan
    report: reports.Report


@dataclass
class Clock:
    """Seconds spent in each stage."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and say that it began."""
        self.progress(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def prune(
    model: str | Path,
    output: str | Path | None = None,
    *,
    report: str | Path | Sequence[str | Path] = (),
    progress: Progress = quietly,
    command: Sequence[str] = (),
    **options: Any,
) -> Result:
    """Prune one model for one target; see `Options` for the keywords.

    Without `output` no model is written. Raises InputError, ImpossibleError, MachineError, InternalError.
    """
    beside = [report] if isinstance(report, str | Path) else report
    return family(model, [output], [Options(**options)], [beside], progress=progress, command=command)[0]


def family(
    model: str | Path,
    outputs: Sequence[str | Path | None],
    variants: Sequence[Options],
    beside: Sequence[Sequence[str | Path]] = (),
    *,
    texts: Mapping[str | Path, str] = MappingProxyType({}),
    inputs: Sequence[str | Path] = (),
    progress: Progress = quietly,
    command: Sequence[str] = (),
) -> list[Result]:
    """Several targets from one analysis; nothing gets its name before all of them are reached and proven.

    `beside` has the reports of each target, in the format that their suffix names, `texts` other files to be written
    with them. `inputs` are files that were read for this besides those that the options name: no output may be one.
    """
    for options in variants:
        check(options)
    beside = beside or [()] * len(variants)
    clock = Clock(progress)
    first = variants[0]
    with clock.stage("read and analyse"):
        this = opened(model, outputs, beside, first, texts, inputs)
    analysis, results = this.analysis, []
    analysis.source.hash_ahead()
    variants = [replace(options, remove=this.remove) for options in variants]
    first = variants[0]
    with storage.Drafts() as drafts:
        with Worker(seconds=first.timeout, progress=progress) as worker:
            if first.measure and not first.dry_run:
                worker.call(runtime.backend, first.backend)  # before hours of work for a latency that cannot be had
            prover = Prover(analysis, this.calibration, first.seed, first.threads, selection.parse_size(first.memory))
            early = None
            if not this.calibration and not prover.runner(worker).fits(analysis.dense):
                early = ahead(
                    partial(
                        choose.scored, analysis, first, lambda groups: plugin.Evidence(analysis.weights, first.seed)
                    )
                )
            with clock.stage("run the dense model"):
                check_dense(prover, worker, first)
            watch = None
            if any("latency" in options.target for options in variants):
                with clock.stage("measure operators"):
                    watch = stopwatch(analysis, prover, worker, this.evaluation, first, clock.progress)
            for options, path in zip(variants, this.paths, strict=True):
                results.append(
                    _one(
                        analysis,
                        options,
                        path,
                        prover,
                        worker,
                        this.calibration,
                        this.evaluation,
                        clock,
                        command,
                        drafts,
                        watch,
                        early if options is first else None,
                    )
                )
        if not first.dry_run:
            with clock.stage("write"):
                results = write(results, this.paths, beside, analysis, first, prover.feeds, progress, texts, drafts)
    return results


def stopwatch(
    analysis: Analysis, prover: Prover, worker: Worker, evaluation: Samples, options: Options, progress: Progress
) -> pace.Stopwatch:
    """What latency targets are judged by; from here on the analysis counts latency among its costs."""
    if not prover.feeds:
        raise ImpossibleError("a model that does not run has no latency", file=analysis.source.path)
    if (unmeasured := _unmeasured(analysis, prover, worker, options)) is not None:
        raise ImpossibleError(unmeasured, file=analysis.source.path, object="--target latency")
    feed = prover.typical(worker, _usual_feed(analysis, evaluation[0], prover, options))
    kept = cache.opened(options.cache, options.no_cache)
    return pace.Stopwatch(analysis, choose.groups_of(analysis, options), feed, options, kept, progress)


Samples = tuple[list[dict[str, Array]], Array | None]


@dataclass(frozen=True)
class Opened:
    """A model that was read, for these kinds; outputs that may be written, calibration feeds, data to evaluate on."""

    analysis: Analysis
    remove: tuple[str, ...]
    paths: list[Path | None]
    calibration: list[dict[str, Array]]
    evaluation: Samples


def opened(
    model: str | Path,
    outputs: Sequence[str | Path | None],
    beside: Sequence[Sequence[str | Path]],
    options: Options,
    texts: Iterable[str | Path] = (),
    inputs: Sequence[str | Path] = (),
) -> Opened:
    """Read and analyse; refuse outputs that may not be written, and with --strict operators without a rule."""
    for report in chain(*beside):
        reports.check_format(report)
    analysis, remove = _analysed(model, options)
    read = [*analysis.source.files, *data_files(options.calibration, options.evaluation), *map(Path, inputs)]
    written = [path for path in (*outputs, *chain(*beside), *texts) if path is not None]
    storage.check_outputs(written, read, force=options.force)
    paths = [None if path is None else Path(path) for path in outputs]
    calibration, _ = samples_of(analysis.dense.graph, options.calibration)
    evaluation = samples_of(analysis.dense.graph, options.evaluation)
    if options.strict and analysis.dims.relations.unknown:
        node, reason = next(iter(analysis.dims.relations.unknown.items()))
        raise ImpossibleError(f"{reason} (--strict)", file=analysis.source.path.name, object=node)
    return Opened(analysis, remove, paths, calibration, evaluation)


HEAD = 16  # positions of a head from which on a subspace of it is worth more than whole heads


def _analysed(model: str | Path, options: Options) -> tuple[Analysis, tuple[str, ...]]:
    """The analysis, and the kinds that it is for: where heads and head-dim may both go, the one that costs less.

    Repair can take a subspace out of every head, where queries, keys and values are not rotated by position; that
    keeps more than whole heads do, unless heads are small.
    """

    def analysed(remove: tuple[str, ...]) -> Analysis:
        return Analysis(model, options.input_shape, remove=remove, interface=options.allow_interface_change)

    kinds = tuple(KINDS) if "all" in options.remove else options.remove
    repaired = options.calibration is not None and Methods.of(options).reconstruct is not None
    if repaired and options.target and {"heads", "head-dim"} <= set(kinds):
        inside = tuple(kind for kind in kinds if kind != "heads")
        analysis = analysed(inside)
        if min((len(heads.first[0]) for heads in Bases(analysis).heads), default=0) >= HEAD:
            return analysis, inside
    return analysed(options.remove), options.remove


def check_dense(prover: Prover, worker: Worker, options: Options) -> None:
    """Find inputs that the dense model accepts: what does not run is not analysed further, and cannot be proven."""
    try:
        named(prover.analysis.source.path, lambda: prover.check_dense(worker))
    except (InputError, ImpossibleError) as error:
        if not options.unproven:
            message = f"{error.message}; --unproven writes without proof"
            raise type(error)(message, file=prover.analysis.source.path, object=error.object) from None


def _one(
    analysis: Analysis,
    options: Options,
    path: Path | None,
    prover: Prover,
    worker: Worker,
    samples: Sequence[Mapping[str, Array]],
    evaluation: tuple[list[dict[str, Array]], Array | None],
    clock: Clock,
    command: Sequence[str],
    drafts: storage.Drafts,
    watch: pace.Stopwatch | None = None,
    early: Future[choose.Scored] | None = None,
) -> Result:
    """Score, select, rewrite, prove, repair, measure one target; `early` has the scores if they were begun before."""
    watch = watch if "latency" in options.target else None
    recovery = Recovery(analysis, samples, options, worker, clock.progress)
    with clock.stage("score"):
        groups, importance = (
            early.result() if early is not None else choose.scored(analysis, options, recovery.evidence)
        )
    if prover.feeds and any(group.kind == "width" for group in groups):
        recovery.leave_means(lambda model: all(r.holds for r in prover.compare(worker, analysis.dense, model)))
    large = not prover.runner(worker).fits(analysis.dense)
    final = recovery.reconstructor is None and options.pattern is None and options.precision == "fp32"

    def begin(model: Model) -> None:
        """Write what takes long and will most likely stay as it is, while it is proven."""
        if large and final and watch is None and path is not None and not options.dry_run:
            drafts.begin(model, path, analysis.source.external)

    for _ in range(AGAIN):
        with clock.stage("select, rewrite and prove"):
            proven = _proven(analysis, groups, importance, options, prover, worker, recovery, watch, begin)
        selected = proven.model
        with clock.stage("repair"):
            repaired = recovery.repair(proven.plan, proven.model)
        repaired, sparse = thinned(analysis, proven.plan, repaired, options, recovery, prover, worker, clock)
        proven = replace(proven, model=repaired.model)
        if options.precision != "fp32":
            with clock.stage("cast"):
                proven = _cast(analysis, proven, options, prover, worker)
        found = measured(analysis, options, path, proven, prover, worker, evaluation, clock, command, groups, repaired)
        if watch is None or watch.holds(options, found.report, selected):
            return with_pattern(found, sparse)
    assert watch is not None
    raise watch.unsettled(analysis.source.path)


AGAIN = 3  # times that a latency target may be missed in the end


def thinned(
    analysis: Analysis,
    plan: Plan,
    repaired: Repaired,
    options: Options,
    recovery: Recovery,
    prover: Prover,
    worker: Worker,
    clock: Clock,
) -> tuple[Repaired, Sparse | None]:
    """A model with the pattern that the options name, if they do, and what was done for it."""
    if options.pattern is None:
        return repaired, None
    with clock.stage(f"make it {options.pattern}"):
        copied = all(
            keep.all() for keep in plan.keep.values()
        )  # as it was read, with constants where coupling saw none
        model = analysis.rewrite(plan) if copied else repaired.model
        sparse = sparsified(analysis, plan, model, options, recovery, prover, worker)
    names = sorted({*repaired.names, *sparse.names})
    warnings = repaired.warnings + sparse.warnings
    return replace(repaired, model=sparse.model, names=names, warnings=warnings), sparse


def with_pattern(result: Result, sparse: Sparse | None) -> Result:
    """The result with what the report says about N:M."""
    if sparse is None:
        return result
    row, taken = sparse.row, result.report.pruned.latency
    if taken is not None:
        row = timed(row, latency.Latency(**taken).ms)
    more = {"sparsity": row, "rewrites": result.report.rewrites + sparse.rewrites}
    return replace(result, report=result.report.model_copy(update=more))


def _cast(analysis: Analysis, proven: Proven, options: Options, prover: Prover, worker: Worker) -> Proven:
    """In the precision that was asked for: the proof speaks of the model before."""
    types = analysis.prepared.facts.types
    made, off = named(
        analysis.source.path, lambda: judged(proven.model, options.precision, types, prover.feeds, worker)
    )
    row = reports.PrecisionRow(to="fp16", kept=list(made.kept), relative=off.relative, equal=off.equal)
    return replace(proven, model=made.model, precision=row)


def measured(
    analysis: Analysis,
    options: Options,
    path: Path | None,
    proven: Proven,
    prover: Prover,
    worker: Worker,
    evaluation: Samples,
    clock: Clock,
    command: Sequence[str],
    groups: Sequence[Group],
    repaired: Repaired,
) -> Result:
    """Quality and latency of what was proven and perhaps repaired, and the report; `groups` might have shrunk."""
    name = path.name if path is not None else "pruned.onnx"
    size = storage.size_of(proven.model, name, external=analysis.source.external)
    found: dict[str, Any] = {}
    rows: list[latency.Latency] = []
    told: list[str] = []
    if prover.feeds:
        with clock.stage("quality"):
            found = _quality(proven.model, prover, evaluation, options, worker, analysis)
        if options.measure and not options.dry_run:
            with clock.stage("measure"):
                if (unmeasured := _unmeasured(analysis, prover, worker, options)) is None:
                    rows = _measured(analysis, proven.model, prover, worker, evaluation[0], options, clock.progress)
                else:
                    told = [unmeasured]
    dense, pruned = account.models(analysis, path, proven, size, rows)
    touched = [g for g in analysis.groups if not proven.plan.keep.get(g.id, np.ones(1, np.bool_)).all()]
    return Result(
        path,
        proven.model,
        proven.plan,
        reports.Report(
            tool=f"onnxprune {version('onnxprune')}",
            command=list(command),
            recipe=recorded(options),
            quality=found,
            timing={name: round(seconds, 3) for name, seconds in clock.seconds.items()},
            dense=dense,
            pruned=pruned,
            **account.changes(analysis, options, groups, proven, repaired.rewrites),
            verification=reports.Verification(
                method="masked" if any(not g.exact for g in touched) else "zero-all",
                proven=proven.differences is not None,
                inputs=len(prover.feeds),
                differences=[asdict(d) for d in proven.differences or ()],
                unproven=[f"group {k}" for k in proven.unproven],
            ),
            repaired=repaired.names,
            norms=list(repaired.norms),
            warnings=[
                *account.warnings(analysis, proven, options, rows),
                *told,
                *repaired.warnings,
                *prover.warnings(),
            ],
        ),
    )


def _unmeasured(analysis: Analysis, prover: Prover, worker: Worker, options: Options) -> str | None:
    """Why latency cannot be measured; None where it can."""
    if options.backend == "cpu" and bfloat.computes(analysis.dense):
        return f"latency was not measured: {bfloat.MISSING}"
    if prover.runner(worker).fits(analysis.dense):
        return None
    need = memory_of(analysis.dense) / 1e6
    return f"latency was not measured: loading the model takes {need:,.0f} MB; raise --memory"


def _measured(
    analysis: Analysis,
    pruned: Model,
    prover: Prover,
    worker: Worker,
    evaluation: Sequence[Mapping[str, Array]],
    options: Options,
    progress: Progress,
) -> list[latency.Latency]:
    """Latency of dense and pruned."""
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        files = [
            storage.dump(model, folder, name, external=analysis.source.external)
            for name, model in (("dense", analysis.dense), ("pruned", pruned))
        ]
        feed = prover.typical(worker, _usual_feed(analysis, evaluation, prover, options))
        return latency.told(files, feed, backend=options.backend, threads=options.threads, progress=progress)


def _usual_feed(
    analysis: Analysis, evaluation: Sequence[Mapping[str, Array]], prover: Prover, options: Options
) -> Mapping[str, Array]:
    """What latency is measured on: a batch of the user's, else random values at the sizes that cost is counted at."""
    if evaluation and not analysis.given:
        return evaluation[0]
    try:
        shapes = cost_shapes(analysis.prepared.model, analysis.given, analysis.view.shapes)
        return feeds.random_feed(analysis.dense.graph, shapes, options.seed)
    except ImpossibleError:
        return prover.feeds[0]


def _proven(
    analysis: Analysis,
    groups: Sequence[Group],
    importance: Sequence[Array],
    options: Options,
    prover: Prover,
    worker: Worker,
    recovery: Recovery,
    watch: pace.Stopwatch | None,
    begin: Callable[[Model], None],
) -> Proven:
    """A plan that is proven, after leaving alone the groups that are not; `begin` sees each model of a whole plan."""
    unproven: list[int] = []
    while True:
        left = [(g, s) for g, s in zip(groups, importance, strict=True) if g.id not in unproven]
        if groups and not left:
            raise InternalError("no group could be proven", file=analysis.source.path.name)
        try:
            plan = choose.selected(analysis, [g for g, _ in left], [s for _, s in left], options, recovery, watch)
        except ImpossibleError as error:
            if not unproven:
                raise
            reason = f"groups {unproven} could not be proven, and without them {error.message}"
            raise InternalError(reason, file=analysis.source.path) from None
        touched = [k for k, keep in plan.keep.items() if not keep.all()]
        if unproven and not touched:
            raise InternalError("nothing that could be proven can be removed", file=analysis.source.path.name)
        if not prover.feeds:
            return Proven(plan, choose.rewritten(analysis, plan), analysis.removals(plan), None, unproven)

        whole = frozenset(touched)

        def attempt(
            ids: frozenset[int], plan: Plan = plan, others: list[int] = unproven, whole: frozenset[int] = whole
        ) -> Proven | None:
            part = Plan({k: keep for k, keep in plan.keep.items() if k in ids})
            gone = analysis.removals(part)
            try:
                smaller = choose.rewritten(analysis, part)
                if ids == whole:
                    begin(smaller)
                found = prover.prove(worker, smaller, gone, analysis.alive(part))
            except (InternalError, InputError):
                return None
            return Proven(plan, smaller, gone, found, others) if all(d.holds for d in found) else None

        if (proven := attempt(whole)) is not None:
            return proven
        unproven = unproven + sorted(verify.blame(touched, lambda ids: attempt(ids) is not None))


def _quality(
    pruned_model: Model,
    prover: Prover,
    evaluation: tuple[list[dict[str, Array]], Array | None],
    options: Options,
    worker: Worker,
    analysis: Analysis,
) -> dict[str, Any]:
    """Output difference, and the metric where there is data for it."""
    samples, labels = evaluation
    if options.metric and not samples:
        raise InputError("needs --evaluation", object=f"--metric {options.metric}")
    both = analysis.dense, pruned_model
    if samples:
        dense, pruned = (prover.runner(worker)(model, samples) for model in both)
    else:
        dense, pruned = (prover.outputs(worker, model) for model in both)
    narrowed = interface.noted(pruned_model.metadata_props)
    dense = [
        interface.narrow({name: wanted[name] for name in outputs}, narrowed)
        for wanted, outputs in zip(dense, pruned, strict=True)
    ]
    found: dict[str, Any] = {"relative-error": quality.relative_error(pruned, dense, None)}
    found["data"] = "evaluation" if samples else "calibration" if options.calibration else "random inputs"
    name = options.metric or ("accuracy" if labels is not None else None)
    if name and name != "relative-error":
        compute = quality.metric(name)
        found[name] = {"dense": compute(dense, dense, labels), "pruned": compute(pruned, dense, labels)}
    return found


def write(
    results: Sequence[Result],
    paths: Sequence[Path | None],
    beside: Sequence[Sequence[str | Path]],
    analysis: Analysis,
    options: Options,
    inputs: plugin.Feeds,
    progress: Progress,
    texts: Mapping[str | Path, str] = MappingProxyType({}),
    drafts: storage.Drafts | None = None,
) -> list[Result]:
    """Write models, reports and `texts`; where one of them cannot be written, none that is new stays.

    What is too large to be loaded as a whole is run on the first of `inputs`.
    """
    folders = {Path(path).parent for path in (*paths, *chain(*beside), *texts) if path is not None}
    before = {file for folder in folders for file in folder.iterdir()}
    done: list[Path] = []
    found = []
    try:
        for result, path, names in zip(results, paths, beside, strict=True):
            if path is not None:
                result, files = _written(result, path, analysis, options, inputs[:1], progress, drafts)
                done += files
            for name in map(Path, names):
                storage.write_text(name, reports.rendered(result.report, name.suffix), force=options.force)
                done.append(name)
            found.append(result)
        for place, text in texts.items():
            storage.write_text(Path(place), text, force=options.force)
            done.append(Path(place))
    except BaseException:
        for file in done:
            if file not in before:
                file.unlink(missing_ok=True)
        raise
    return found


def _written(
    result: Result,
    path: Path,
    analysis: Analysis,
    options: Options,
    inputs: plugin.Feeds,
    progress: Progress,
    drafts: storage.Drafts | None,
) -> tuple[Result, tuple[Path, ...]]:
    """The result with its model in the file, checked there before it gets its name, and the files."""

    def loads(candidate: Path) -> None:
        with Worker(seconds=options.timeout, progress=progress) as worker:
            run = Runner(worker, options.threads, selection.parse_size(options.memory))
            try:
                if run.fits(result.model) and not bfloat.computes(result.model):
                    found = [port.name for port in worker.call(ort.interface, str(candidate)).outputs]
                else:
                    found = [name for outputs in run(storage.read_model(candidate)[0], inputs) for name in outputs]
            except InputError as error:
                raise InternalError(f"the written model does not load: {error.message}", file=path.name) from None
        lost = result.report.interface.outputs
        names = [str(value.name) for value in analysis.dense.graph.outputs if value.name not in lost]
        if found != names:
            raise InternalError("the written model has other outputs than the dense one", file=path.name)

    def checked(candidate: Path) -> None:
        if result.report.verification.proven or not options.unproven:
            loads(candidate)
        if (row := result.report.sparsity) is not None:
            places = [(layer.initializer, layer.axis) for layer in row.layers if layer.sparse]
            if left := broken(storage.read_model(candidate)[0], NM.parse(row.pattern), places):
                raise InternalError(f"the written weight is not {row.pattern}", file=path.name, object=left[0])

    files = storage.write_model(
        result.model,
        path,
        force=options.force,
        external=analysis.source.external,
        prove=checked,
        drafts=drafts,
        told=partial(progress, "write, in MB"),
    )
    pruned = result.report.pruned.model_copy(
        update={"sha256": files.sha256, "bytes": sum(f.stat().st_size for f in files), "path": str(path)}
    )
    return Result(path, result.model, result.plan, result.report.model_copy(update={"pruned": pruned})), files
