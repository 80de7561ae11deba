"""The smaller verbs: explain, compare, measure, list."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune import bfloat, feeds, interface, ops, plugin, quality, runtime, storage
from onnxprune import measure as latency
from onnxprune.analysis import Analysis, cost_shapes, named, samples_of
from onnxprune.errors import ImpossibleError, InputError, LateError
from onnxprune.model import Model, input_sizes
from onnxprune.prove import Prover, allowance
from onnxprune.recipe import KINDS
from onnxprune.runtime import ort, tensorrt
from onnxprune.types import Array, Axis, Progress, Shape, quietly
from onnxprune.worker import Worker


def rows(what: str) -> list[tuple[str, str]]:
    """(name, one line of help) of everything of a kind, for `onnxprune list`."""
    if what in plugin.KINDS:
        none = [("none", "What stays keeps its values.")] if what == "reconstructors" else []
        return none + [(name, plugin.help_of(cls)) for name, cls in plugin.available(what).items()]
    if what == "backends":
        with Worker() as worker:
            missing = worker.call(runtime.missing)
        return [(name, f"{text}: {missing[name] or 'ready'}") for name, text in sorted(runtime.KNOWN.items())]
    if what == "ops":
        return ops.known()
    return [*KINDS.items(), *rows("sparsifiers")]


def explain(analysis: Analysis, a: str, b: str) -> tuple[list[tuple[Any, str, Any]] | None, dict[str, str]]:
    """The shortest chain between two axes given as VALUE:AXIS, and why each of them stays if it does."""
    ends = [_axes(analysis, text) for text in (a, b)]
    reasons = {}
    for text, axes in zip((a, b), ends, strict=True):
        labels = analysis.dims.labels_of(axes[0])
        if labels is None:
            reasons[text] = "an axis of size one carries nothing"
        elif found := [r for label in np.unique(labels)[:64] if (r := analysis.dims.reason(int(label)))]:
            reasons[text] = found[0]
    chains = [chain for x in ends[0] for y in ends[1] if (chain := analysis.dims.explain(x, y)) is not None]
    return (min(chains, key=len) if chains else None), reasons


def _axes(analysis: Analysis, text: str) -> list[Any]:
    """The axes that VALUE:AXIS means: one, or one for each reader of a shared initializer."""
    name, colon, number = text.rpartition(":")
    if not colon or not number.lstrip("-").isdigit():
        raise InputError("expected VALUE:AXIS", object=text)
    values = [v for v in analysis.view.shapes if v == name or v.split("\0")[0] == name]
    if not values:
        raise InputError("no such value in the model", file=analysis.source.path.name, object=name)
    rank = len(analysis.view.shapes[values[0]])
    if not -rank <= int(number) < rank:
        raise InputError(f"it has {rank} axes", file=analysis.source.path.name, object=text)
    return [Axis(value, int(number) % rank) for value in values]


def compare_models(
    dense: str,
    pruned: str,
    evaluation: str | None,
    metric: str | None,
    input_shape: Mapping[str, Shape],
    seed: int,
    timeout: float = 600.0,
    progress: Progress = quietly,
) -> dict[str, Any]:
    """Relative error over all outputs, cosine of the first, and the metric where there is data for it."""
    compute = quality.metric(metric) if metric else None
    progress("read and analyse")
    analysis = Analysis(dense, input_shape)
    other, _ = storage.read_model(pruned)
    if [v.name for v in other.graph.outputs] != [v.name for v in analysis.dense.graph.outputs]:
        raise InputError("the two models have different outputs", file=Path(pruned).name)
    samples, labels = samples_of(analysis.dense.graph, evaluation)
    with Worker(seconds=timeout) as worker:
        prover = Prover(analysis, samples, seed)
        if not samples:
            prover.check_dense(worker)
        inputs = samples or prover.feeds
        results = []
        for name, model in (("dense", analysis.dense), ("pruned", other)):
            progress(f"run the {name} model")
            results.append(prover.runner(worker)(model, list(inputs)))
    narrowed = interface.noted(other.metadata_props)
    results[0] = [interface.narrow(outputs, narrowed) for outputs in results[0]]
    found: dict[str, Any] = {
        "relative-error": quality.relative_error(results[1], results[0], None),
        "cosine": quality.cosine(results[1], results[0], None),
        "inputs": len(inputs),
        "data": "evaluation" if samples else "random inputs",
    }
    if compute is None and labels is not None:
        metric, compute = "accuracy", quality.accuracy
    if compute is not None and metric not in found:
        found[str(metric)] = {
            "dense": compute(results[0], results[0], labels),
            "pruned": compute(results[1], results[0], labels),
        }
    return found


def measure_models(
    models: Sequence[str],
    input_shape: Mapping[str, Shape],
    backend: str,
    threads: int,
    rounds: int,
    seconds: float,
    trust_engine: bool = False,
    timeout: float = 600.0,
    progress: Progress = quietly,
) -> list[latency.Latency]:
    """Interleaved latency of models with one interface, at the given sizes (else batch 1 and stated defaults).

    Engines are native code: only with `trust_engine`, and behind a model that says what goes in.
    """
    for path in models:
        if Path(path).suffix.lower() in storage.ENGINES:
            if not trust_engine:
                what = "an engine is native code of whoever built it; --trust-engine runs it all the same"
            elif backend not in tensorrt.NAMES:
                what = f"an engine needs --backend {' or '.join(tensorrt.NAMES)}"
            elif path == models[0]:
                what = "name the ONNX model that it was built of before it"
            else:
                continue
            raise InputError(what, file=path)
    if threads < 1 or rounds < 1 or not seconds > 0:
        raise InputError("--threads, --rounds and --seconds are positive", object="measure")
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        copies, first = [], None
        for k, path in enumerate(models):  # a runtime that is given the file itself opens what it refers to by name
            if Path(path).suffix.lower() in storage.ENGINES:
                copies.append(Path(path))
                continue
            model, source = storage.read_model(path)
            first = first or model
            if backend == "cpu" and bfloat.computes(model):
                raise ImpossibleError(f"{bfloat.MISSING}; name another --backend", file=path)
            copies.append(storage.dump(model, folder, f"{k}", external=source.external))
        assert first is not None
        progress("find inputs that it runs on")
        with Worker(seconds=timeout) as worker:
            feed = _accepted(models[0], str(copies[0]), first, input_shape, threads, worker)
        progress("measure")
        return latency.measure(
            copies,
            feed,
            backend=backend,
            threads=threads,
            rounds=rounds,
            seconds=seconds,
            timeout=timeout,
            progress=progress,
        )


def _accepted(
    path: str, copy: str, model: Model, input_shape: Mapping[str, Shape], threads: int, worker: Worker
) -> Mapping[str, Array]:
    """Random inputs that a model runs on: of the usual sizes, else of those that are found to be accepted."""
    given = named(path, lambda: input_sizes(model, input_shape))
    first = allowance(worker.seconds)
    late: LateError | None = None
    try:
        feed = feeds.random_feed(model.graph, cost_shapes(model, given), 0)
        with worker.within(first):
            worker.call(ort.run, copy, [feed], threads=threads)
        return feed
    except LateError as error:
        late = error
    except (InputError, ImpossibleError):
        pass
    prover = Prover(Analysis(path, input_shape), [], 0, threads)
    if late is not None and prover.due(worker.seconds) < first:  # there is no reason why it should take longer
        raise late
    prover.check_dense(worker)
    return prover.feeds[0]
