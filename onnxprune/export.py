"""Edge formats: ORT format, OpenVINO IR, ONNX at fixed sizes; each is run against the model it was made from."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from onnxprune import precision as precisions
from onnxprune import storage
from onnxprune.analysis import Analysis, data_files, named, samples_of
from onnxprune.errors import InputError, InternalError
from onnxprune.model import write_sizes
from onnxprune.precision import Difference
from onnxprune.prove import Prover
from onnxprune.runtime import backend, openvino, ort
from onnxprune.types import Array, Progress, Shape, quietly
from onnxprune.worker import Worker

FORMATS: Mapping[str, str] = {"onnx": ".onnx", "ort": ".ort", "openvino": ".xml"}
MOST = 0.05  # relative output difference from which on a conversion is wrong


@dataclass(frozen=True)
class Exported:
    """What was written: files, their bytes, how far outputs differ from the model's on `data`, on which backend.

    `kept` are operators that stay in fp32 because the precision does not suit them.
    """

    files: tuple[Path, ...]
    bytes: int
    difference: Difference
    backend: str
    data: str
    kept: tuple[str, ...]


def export(
    model: str | Path,
    output: str | Path,
    to: str,
    input_shape: Mapping[str, Shape],
    *,
    precision: str = "fp32",
    calibration: str | None = None,
    force: bool = False,
    seed: int = 0,
    threads: int = 1,
    timeout: float = 600.0,
    progress: Progress = quietly,
) -> Exported:
    """Write a model in another format or precision, sizes in `input_shape` fixed, once its runtime has run it.

    OpenVINO's .bin lies beside the .xml. Raises InputError, MachineError without the runtime, ImpossibleError
    where OpenVINO cannot take the model or numbers leave the range of the precision, InternalError where the result
    computes something else.
    """
    if to not in FORMATS:
        raise InputError(f"unknown format; there are {', '.join(FORMATS)}", object=f"--to {to}")
    precisions.check(precision)
    if precision == "bf16" and to != "onnx":
        raise InputError("only --to onnx can be bf16: the runtime of this format computes in fp16", object=f"--to {to}")
    output = Path(output)
    if output.suffix != FORMATS[to]:
        raise InputError(f"the name of this format ends in {FORMATS[to]}", file=output)
    analysis = Analysis(model, input_shape)
    source = analysis.source
    finals = [output, output.with_suffix(".bin")] if to == "openvino" else [output]
    storage.check_outputs(finals, [*source.files, *data_files(calibration)], force=force)
    samples, _ = samples_of(analysis.dense.graph, calibration)
    fixed = analysis.dense.clone()
    write_sizes(fixed, analysis.given)
    runs_on = "openvino" if to == "openvino" else "cpu"
    with (
        tempfile.TemporaryDirectory(prefix=".onnxprune-", dir=output.parent) as folder,
        Worker(seconds=timeout) as worker,
    ):
        progress("run the model")
        feeds = fitting(analysis, samples, input_shape, worker, seed, threads)
        dense = str(storage.dump(analysis.dense, folder, "dense", external=source.external))
        wanted = worker.call(_run, "cpu", dense, feeds, threads)
        progress("convert")
        types = analysis.prepared.facts.types
        made = named(source.path, lambda: precisions.converted(fixed, precision, types, feeds, worker, threads=threads))
        copy = str(storage.dump(made.model, folder, "fixed", external=source.external))
        result = Path(copy) if to == "onnx" else Path(folder) / f"result{output.suffix}"
        if to != "onnx":
            worker.call(openvino.convert if to == "openvino" else ort.convert, copy, str(result))
        progress("compare")
        near = wanted
        if precision in precisions.HALVES:
            near = precisions.rounded(made.model, precision, feeds, worker, source.external)
        found = near if precision == "bf16" else worker.call(_run, runs_on, str(result), feeds, threads)
        for outputs in (near, found):
            check = partial(precisions.check_finite, wanted, outputs, made.model, analysis.dense, types, feeds, worker)
            named(source.path, check)
        difference = precisions.difference(wanted, found)
        if precision == "fp32" and not difference.holds(MOST):
            raise InternalError(f"{difference} once it is in this format", file=source.path)
        progress("write")
        if to == "onnx":
            files: tuple[Path, ...] = storage.write_model(made.model, output, force=force, external=source.external)
        else:
            parts = {result.with_suffix(path.suffix): path for path in reversed(finals)}
            storage.publish(parts, force=force)
            files = tuple(finals)
    data = "calibration" if samples else "random inputs"
    return Exported(files, sum(path.stat().st_size for path in files), difference, runs_on, data, made.kept)


def fitting(
    analysis: Analysis,
    samples: Sequence[Mapping[str, Array]],
    input_shape: Mapping[str, Shape],
    worker: Worker,
    seed: int,
    threads: int,
) -> list[Mapping[str, Array]]:
    """Feeds of the given sizes that the model accepts: all calibration samples, or random ones without any."""
    prover = Prover(analysis, samples, seed, threads)
    prover.check_dense(worker)
    found = list(samples) or list(prover.feeds)
    fit = [feed for feed in found if all(feed[name].shape == shape for name, shape in input_shape.items())]
    if samples and len(fit) < len(samples):
        raise InputError("the calibration data has other sizes", object="--input-shape")
    if not fit:
        raise InputError("the model runs with other sizes only", file=analysis.source.path, object="--input-shape")
    return fit


def _run(name: str, model: str, feeds: Sequence[Mapping[str, Array]], threads: int) -> list[dict[str, Array]]:
    """In the child: outputs for each feed on a backend."""
    session = backend(name).session(model, threads=threads)
    return [session.run(feed) for feed in feeds]
