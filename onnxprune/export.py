"""Edge formats: ORT format, OpenVINO IR, ONNX at fixed sizes; each is run against the model it was made from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxprune import quality, storage
from onnxprune.analysis import Analysis
from onnxprune.errors import InputError, InternalError
from onnxprune.model import write_sizes
from onnxprune.prove import Prover
from onnxprune.runtime import backend, openvino, ort
from onnxprune.types import Array, Shape
from onnxprune.worker import Worker

FORMATS: Mapping[str, str] = {"onnx": ".onnx", "ort": ".ort", "openvino": ".xml"}
MOST = 0.05  # relative output difference from which on a conversion is wrong


@dataclass(frozen=True)
class Exported:
    """What was written: files, their bytes, how far outputs differ from the model's, relative, on random inputs."""

    files: tuple[Path, ...]
    bytes: int
    difference: float
    backend: str


def export(
    model: str | Path,
    output: str | Path,
    to: str,
    input_shape: Mapping[str, Shape],
    *,
    force: bool = False,
    seed: int = 0,
    threads: int = 1,
    timeout: float = 600.0,
    progress: Callable[[str], None] = lambda stage: None,
) -> Exported:
    """Write a model in another format, sizes in `input_shape` fixed, once its runtime has run it.

    OpenVINO's .bin lies beside the .xml. Raises InputError, MachineError without the runtime, ImpossibleError
    where OpenVINO cannot take the model, InternalError where the result computes something else.
    """
    if to not in FORMATS:
        raise InputError(f"unknown format; there are {', '.join(FORMATS)}", object=f"--to {to}")
    output = Path(output)
    if output.suffix != FORMATS[to]:
        raise InputError(f"the name of this format ends in {FORMATS[to]}", file=output)
    analysis = Analysis(model, input_shape)
    source = analysis.source
    finals = [output, output.with_suffix(".bin")] if to == "openvino" else [output]
    for path in finals:
        storage.check_output(path, source, force=force)
    fixed = analysis.dense.clone()
    write_sizes(fixed, analysis.given)
    runs_on = "openvino" if to == "openvino" else "cpu"
    with (
        tempfile.TemporaryDirectory(prefix=".onnxprune-", dir=output.parent) as folder,
        Worker(seconds=timeout) as worker,
    ):
        dense, copy = (
            str(storage.dump(each, folder, name, external=source.external))
            for name, each in (("dense", analysis.dense), ("fixed", fixed))
        )
        progress("run the model")
        prover = Prover(analysis, [], seed, threads)
        prover.check_dense(worker)
        feeds = [feed for feed in prover.feeds if all(feed[name].shape == s for name, s in input_shape.items())]
        if not feeds:
            raise InputError("the model runs with other sizes only", file=source.path, object="--input-shape")
        wanted = worker.call(_run, "cpu", dense, feeds, threads)
        progress("convert")
        made = Path(copy) if to == "onnx" else Path(folder) / f"result{output.suffix}"
        if to != "onnx":
            worker.call(openvino.convert if to == "openvino" else ort.convert, copy, str(made))
        progress("compare")
        difference = _difference(wanted, worker.call(_run, runs_on, str(made), feeds, threads))
        if not difference <= MOST:
            raise InternalError(f"its outputs are off by {difference:.2g} once it is in this format", file=source.path)
        progress("write")
        if to == "onnx":
            files = storage.write_model(fixed, output, force=force, external=source.external)
        else:
            parts = {made.with_suffix(path.suffix): path for path in reversed(finals)}
            storage.publish(parts, force=force)
            files = tuple(finals)
    return Exported(files, sum(path.stat().st_size for path in files), difference, runs_on)


def _run(name: str, model: str, feeds: Sequence[Mapping[str, Array]], threads: int) -> list[dict[str, Array]]:
    """In the child: outputs for each feed on a backend."""
    session = backend(name).session(model, threads=threads)
    return [session.run(feed) for feed in feeds]


def _difference(wanted: Sequence[Mapping[str, Array]], found: Sequence[Mapping[str, Array]]) -> float:
    """Relative error over all feeds; infinite where an output is missing."""
    if any(one.keys() != other.keys() for one, other in zip(wanted, found, strict=True)):
        return float("inf")
    return quality.relative_error(found, wanted, None)
