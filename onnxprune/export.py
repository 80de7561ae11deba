"""Edge formats: ORT format, OpenVINO IR, ONNX at fixed sizes; each is run against the model it was made from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from onnxprune import feeds, quality, storage
from onnxprune.analysis import cost_shapes, named
from onnxprune.errors import InputError, InternalError
from onnxprune.model import input_sizes, write_sizes
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

    OpenVINO's .bin lies beside the .xml. Raises InputError, MachineError without the runtime, InternalError where the
    result computes something else.
    """
    if to not in FORMATS:
        raise InputError(f"unknown format; there are {', '.join(FORMATS)}", object=f"--to {to}")
    output = Path(output)
    if output.suffix != FORMATS[to]:
        raise InputError(f"the name of this format ends in {FORMATS[to]}", file=output)
    dense, source = storage.read_model(model)
    sizes = named(source.path, lambda: input_sizes(dense, input_shape))
    finals = [output, output.with_suffix(".bin")] if to == "openvino" else [output]
    for path in finals:
        storage.check_output(path, source, force=force)
    write_sizes(dense, sizes)
    runs_on = "openvino" if to == "openvino" else "cpu"
    with (
        tempfile.TemporaryDirectory(prefix=".onnxprune-", dir=output.parent) as folder,
        Worker(seconds=timeout) as worker,
    ):
        progress("convert")
        copy = storage.dump(dense, folder, "model", external=source.external)
        made = Path(folder) / f"result{output.suffix}"
        if to == "onnx":
            made = copy
        else:
            worker.call(openvino.convert if to == "openvino" else ort.convert, str(copy), str(made))
        progress("compare")
        feed = feeds.random_feed(dense.graph, cost_shapes(dense, sizes), seed)
        wanted = worker.call(_run, "cpu", str(copy), feed, threads)
        found = worker.call(_run, runs_on, str(made), feed, threads)
        difference = _difference(wanted, found)
        if not difference <= MOST:
            raise InternalError(f"its outputs are off by {difference:.2g} once it is in this format", file=source.path)
        progress("write")
        if to == "onnx":
            files = storage.write_model(dense, output, force=force, external=source.external)
        else:
            parts = {made.with_suffix(path.suffix): path for path in reversed(finals)}
            storage.publish(parts, force=force)
            files = tuple(finals)
    return Exported(files, sum(path.stat().st_size for path in files), difference, runs_on)


def _run(name: str, model: str, feed: Mapping[str, Array], threads: int) -> dict[str, Array]:
    """In the child: one run on a backend."""
    return backend(name).session(model, threads=threads).run(feed)


def _difference(wanted: Mapping[str, Array], found: Mapping[str, Array]) -> float:
    """Relative error; infinite where an output is missing or not whole."""
    if wanted.keys() != found.keys() or any(found[name].shape != a.shape for name, a in wanted.items()):
        return float("inf")
    return quality.relative_error([dict(found)], [dict(wanted)], None)
