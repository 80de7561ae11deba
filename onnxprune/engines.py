"""build: a TensorRT or TensorRT-RTX engine, with what it was made of and for beside it."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from onnxprune import export, precision, storage
from onnxprune.analysis import Analysis, data_files, named, samples_of
from onnxprune.errors import InputError, InternalError
from onnxprune.infer import symbol, true_inputs
from onnxprune.model import input_sizes, write_sizes
from onnxprune.runtime import tensorrt
from onnxprune.types import Array, Profile, Progress, Shape, quietly
from onnxprune.worker import Worker

SCHEMA = 1
CACHE_LIMIT = 1 << 30  # bytes of a timing cache


@dataclass(frozen=True)
class Engine:
    """An engine that was written, and the record beside it."""

    files: tuple[Path, ...]
    record: Mapping[str, Any]
    difference: precision.Difference


def build(
    model: str | Path,
    output: str | Path,
    profiles: Mapping[str, Profile],
    *,
    backend: str = "tensorrt-rtx",
    to: str = "fp32",
    sparse: bool = False,
    calibration: str | None = None,
    timing_cache: str | None = None,
    force: bool = False,
    seed: int = 0,
    threads: int = 1,
    timeout: float = 3600.0,
    progress: Progress = quietly,
    command: Sequence[str] = (),
) -> Engine:
    """Write an engine of a model in a precision, and OUTPUT.json: what it was made of, and how far outputs differ.

    That is measured on the GPU with the engine, or without one on the CPU with the graph that the engine was built of.
    Raises InputError for a dynamic input without a profile, MachineError without the library, ImpossibleError where it
    cannot take the model.
    """
    if backend not in tensorrt.NAMES:
        raise InputError(f"engines are for {' and '.join(tensorrt.NAMES)}", object=f"--backend {backend}")
    precision.check(to)
    if timing_cache is not None and backend == "tensorrt-rtx":
        raise InputError("TensorRT-RTX has no timing cache, it chooses kernels where it runs", object="--timing-cache")
    output = Path(output)
    if output.suffix not in storage.ENGINES:
        raise InputError(f"the name of an engine ends in {' or '.join(storage.ENGINES)}", file=output)
    with Worker(seconds=timeout) as worker:
        worker.call(_present, backend)
    analysis = Analysis(model, {name: profile.usual for name, profile in profiles.items()})
    source = analysis.source
    finals = (output.with_name(f"{output.name}.json"), output)
    read = [*source.files, *data_files(calibration)]
    storage.check_outputs(finals, read, force=force, engine=True)
    whole = named(source.path, lambda: complete(analysis, profiles))
    cache = _cache(timing_cache, read)
    samples, _ = samples_of(analysis.dense.graph, calibration)
    usual: dict[str, Shape] = {name: profile.usual for name, profile in whole.items()}
    graph = analysis.dense.clone()
    if all(profile.least == profile.most for profile in whole.values()):
        write_sizes(graph, analysis.given)
    with (
        tempfile.TemporaryDirectory(prefix=".onnxprune-", dir=output.parent) as folder,
        Worker(seconds=timeout) as worker,
    ):
        progress("run the model")
        feeds = export.fitting(analysis, samples, usual, worker, seed, threads)
        dense = str(storage.dump(analysis.dense, folder, "dense", external=source.external))
        wanted = precision.running(worker, threads)(dense, feeds, None)
        progress(f"cast to {to}")
        types = analysis.prepared.facts.types
        made = named(
            source.path,
            lambda: precision.converted(graph, to, types, feeds, worker, threads=threads, strict=False),
        )
        copy = str(storage.dump(made.model, folder, "model", external=source.external))
        ready, engine = f"{folder}/ready.onnx", Path(folder) / f"result{output.suffix}"
        worker.call(tensorrt.ready, copy, ready)
        if to in precision.HALVES:
            found = precision.rounded(made.model, to, feeds, worker, source.external)
        else:
            found = precision.running(worker, threads)(ready, feeds, None)
        named(
            source.path,
            lambda: precision.check_finite(wanted, found, made.model, analysis.dense, types, feeds, worker),
        )
        progress("build the engine")
        built: tensorrt.Built = named(
            source.path,
            lambda: worker.call(tensorrt.build, backend, [ready, copy], str(engine), whole, sparse, cache, True),
        )
        ran, where = _on_gpu(worker, backend, engine, feeds)
        difference = precision.difference(wanted, found if ran is None else ran)
        if to == "fp32" and not difference.holds(export.MOST):
            raise InternalError(f"{difference} once it is an engine", file=source.path)
        data = engine.read_bytes()
        record = {
            "schema": SCHEMA,
            "tool": f"onnxprune {version('onnxprune')}",
            "command": list(command),
            "model": {"path": str(source.path), "sha256": source.sha256},
            "engine": {"path": str(output), "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)},
            "backend": backend,
            "version": built.version,
            "precision": to,
            "kept": list(made.kept),
            "sparse": built.sparse,
            "profiles": {
                name: dict(zip(("min", "opt", "max"), map(list, p), strict=True)) for name, p in whole.items()
            },
            "inputs": built.inputs,
            "outputs": built.outputs,
            "difference": {
                **difference.data(),
                "backend": where,
                "data": "calibration" if samples else "random inputs",
            },
            "layers": built.layers,
        }
        progress("write")
        text = Path(folder) / "record"
        text.write_text(json.dumps(record, indent=1))
        storage.publish({text: finals[0], engine: finals[1]}, force=force)
    if timing_cache is not None and built.cache:
        storage.write_bytes(Path(timing_cache), built.cache)
    return Engine(finals[::-1], record, difference)


def complete(analysis: Analysis, profiles: Mapping[str, Profile]) -> dict[str, Profile]:
    """A profile for every input, as far as they say the sizes of its dynamic dimensions.

    Raises InputError with the input that lacks one, and where sizes contradict the model or each other.
    """
    for name, (least, usual, most) in profiles.items():
        if not len(least) == len(usual) == len(most) or any(
            not a <= b <= c for a, b, c in zip(least, usual, most, strict=True)
        ):
            raise InputError("a profile is min..opt..max, of equal rank and rising", object=f"--input-shape {name}")
    model = analysis.dense
    ends = [input_sizes(model, {name: profile[k] for name, profile in profiles.items()}) for k in range(3)]
    found = {}
    for value in true_inputs(model.graph):
        name = str(value.name)
        keys = [symbol(value, axis) for axis in range(len(value.shape or ()))]
        fixed = [dim if isinstance(dim, int) and dim > 0 else None for dim in value.shape or ()]
        if any(dim is None and key not in ends[0] for dim, key in zip(fixed, keys, strict=True)):
            raise InputError(
                "this input is dynamic; give its sizes with --input-shape NAME:SIZES or NAME:MIN..OPT..MAX", object=name
            )
        sizes = (
            tuple(sizes[key] if dim is None else dim for dim, key in zip(fixed, keys, strict=True)) for sizes in ends
        )
        found[name] = Profile(*sizes)
    return found


def _cache(path: str | None, inputs: Sequence[Path]) -> bytes | None:
    """A timing cache, which is written again, empty where there is no file yet."""
    if path is None:
        return None
    if not storage.check_output(path, inputs, force=True).exists():
        return b""
    return storage.read_bytes(path, CACHE_LIMIT)


def _present(backend: str) -> None:
    """In the child: raise MachineError if the library is not there."""
    tensorrt.library(backend)


def _on_gpu(
    worker: Worker, backend: str, engine: Path, feeds: Sequence[Mapping[str, Array]]
) -> tuple[list[dict[str, Array]] | None, str]:
    """Outputs of the engine that this run has built, and where they come from; None without a GPU."""
    if worker.call(tensorrt.gpu) is not None:
        return None, "cpu"
    return worker.call(_run, backend, str(engine), list(feeds)), backend


def _run(backend: str, path: str, feeds: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
    """In the child: outputs of an engine that this run has built."""
    session = tensorrt.EngineBackend(backend).session(path)
    return [session.run(feed) for feed in feeds]
