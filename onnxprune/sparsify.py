"""sparsify(): N:M weights in a model that keeps all of its structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxprune import pipeline, plugin
from onnxprune.account import Proven
from onnxprune.errors import InputError, InternalError
from onnxprune.prove import Prover
from onnxprune.recipe import Options, check, recorded
from onnxprune.recovery import Recovery, Repaired
from onnxprune.select import parse_size
from onnxprune.types import Plan, Progress, quietly
from onnxprune.worker import Worker

RECORDED = frozenset(
    """pattern sparsifier permute reconstruct calibration evaluation metric memory ignore input-shape backend measure
    strict unproven seed threads""".split()
)


def sparsify(
    model: str | Path,
    output: str | Path | None = None,
    *,
    pattern: str = "2:4",
    criterion: str | None = None,
    permute: bool = False,
    reconstruct: str | None = None,
    report: str | Path | Sequence[str | Path] = (),
    progress: Progress = quietly,
    command: Sequence[str] = (),
    **options: Any,
) -> pipeline.Result:
    """Leave N of every M weights along the axis that is summed over, wherever that can hold.

    `criterion` is a sparsifier that chooses weights, by default the best that the data allows; `reconstruct` repairs
    what is kept: `admm` where there is calibration data, or `none`. With `permute`, channels are brought into a better
    order first. Without `output` nothing is written. Raises InputError, ImpossibleError (no weight can have the
    pattern), MachineError, InternalError.
    """
    beside = [report] if isinstance(report, str | Path) else list(report)
    repair = reconstruct or ("admm" if options.get("calibration") is not None else None)
    chosen = Options(
        ratio=0.0, pattern=pattern, sparsifier=criterion, permute=permute, reconstruct=repair, **options
    )  # fmt: skip
    check(chosen)
    if repair not in (None, "none") and not plugin.trait(plugin.build("reconstructors", repair), "masked"):
        raise InputError("it would fill zeros again; admm does not", object=f"--reconstruct {repair}")
    clock = pipeline.Clock(progress)
    with clock.stage("read and analyse"):
        opened = pipeline.opened(model, [output], [beside], chosen)
    analysis, whole = opened.analysis, Plan({})
    with Worker(seconds=chosen.timeout, progress=progress) as worker:
        prover = Prover(analysis, opened.calibration, chosen.seed, chosen.threads, parse_size(chosen.memory))
        with clock.stage("run the dense model"):
            pipeline.check_dense(prover, worker, chosen)
        normal = analysis.rewrite(whole)
        rows = prover.compare(worker, analysis.dense, normal) if prover.feeds else None
        if not all(row.holds for row in rows or ()):
            raise InternalError("the model as it is cannot be written down with the same outputs",
                                file=analysis.source.path)  # fmt: skip
        recovery = Recovery(analysis, opened.calibration, chosen, worker, progress)
        start = Repaired(normal, [], [])
        repaired, sparse = pipeline.thinned(analysis, whole, start, chosen, recovery, prover, worker, clock)
        proven = Proven(whole, repaired.model, [], rows, [])
        found = pipeline.measured(
            analysis, chosen, opened.paths[0], proven, prover, worker, opened.evaluation, clock, command, (), repaired
        )
    found = pipeline.with_pattern(found, sparse)
    told = {key: value for key, value in recorded(chosen).items() if key in RECORDED}
    proof = found.report.verification.model_copy(update={"method": "same outputs but for N:M and its repair"})
    found = replace(found, report=found.report.model_copy(update={"recipe": told, "verification": proof}))
    if chosen.dry_run:
        return found
    with clock.stage("write"):
        return pipeline.write([found], opened.paths, [beside], analysis, chosen, prover.feeds, progress)[0]
