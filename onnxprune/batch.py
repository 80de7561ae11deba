"""Many models by one recipe: each is pruned for itself, and what fails does not stop the others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxprune import pipeline, storage
from onnxprune.errors import InputError, PruneError, ours
from onnxprune.recipe import Options, check
from onnxprune.report import Report
from onnxprune.types import Progress, quietly

LIST_LIMIT = 1 << 24  # bytes of a list of models


@dataclass(frozen=True)
class Row:
    """What became of one model: where it was written and its report, or the error."""

    model: Path
    output: Path
    report: Report | None = None
    error: PruneError | None = None

    def data(self) -> dict[str, Any]:
        """For `--json`."""
        found: dict[str, Any] = {"model": str(self.model), "output": str(self.output)}
        if self.error is not None:
            return found | {"error": self.error.fields()}
        assert self.report is not None
        return found | {"dense": self.report.dense.model_dump(), "pruned": self.report.pruned.model_dump()}

    def cells(self) -> tuple[object, ...]:
        """(model, ratios of parameters, MACs and latency, result)."""
        if self.report is None:
            return (self.model.name, "", "", "", f"exit {self.error.code if self.error else 5}")
        dense, pruned = self.report.dense, self.report.pruned
        ratios = [
            f"{after / before:.3f}" if before else ""
            for before, after in ((dense.params, pruned.params), (dense.macs, pruned.macs))
        ]
        if dense.latency and pruned.latency and dense.latency["cpu_ms"]:
            ratios.append(f"{pruned.latency['cpu_ms'] / dense.latency['cpu_ms']:.3f}")
        return (self.model.name, *[*ratios, ""][:3], "done")


def models_of(place: str | Path, folder: str | Path) -> list[tuple[Path, Path]]:
    """(model, its path in the output folder) of every .onnx file under a place, or of each line of a text file.

    What lies in the output folder is left out, and so are empty lines of a list and those that start with #; relative
    paths start at the list's folder. Raises InputError where there is none, or where two would be written to one place.
    """
    place = Path(place)
    if place.is_dir():
        written = Path(folder).resolve()
        files = [path for path in sorted(place.rglob("*.onnx")) if not path.resolve().is_relative_to(written)]
        found = [(path, path.relative_to(place)) for path in files]
    else:
        try:
            text = storage.read_bytes(place, LIST_LIMIT).decode()
        except UnicodeDecodeError:
            raise InputError("a folder of models, or a text file with a path in each line", file=place) from None
        lines = [line.strip() for line in text.splitlines()]
        paths = [place.parent / line for line in lines if line and not line.startswith("#")]
        found = [(path, Path(path.name)) for path in paths]
    if not found:
        raise InputError("there are no models in it", file=place)
    names: set[Path] = set()
    for _, name in found:
        if name in names:
            raise InputError("two models have this name, and would be written to one place", file=place,
                             object=str(name))  # fmt: skip
        names.add(name)
    return found


def batch(
    place: str | Path,
    folder: str | Path,
    options: Options,
    inputs: Sequence[str | Path] = (),
    progress: Progress = quietly,
    command: Sequence[str] = (),
) -> list[Row]:
    """Prune every model of a folder or list into `folder`, each with its JSON report beside it.

    `inputs` are files that no output may be, as the models and their list. Raises InputError for options that
    contradict each other, or where there is no model.
    """
    check(options)
    found = models_of(place, folder)
    inputs = [file for file in (*inputs, place, *(model for model, _ in found)) if Path(file).is_file()]
    rows, start = [], time.monotonic()
    for k, (model, name) in enumerate(found):
        output = Path(folder) / name

        left = f" ({(time.monotonic() - start) / k * (len(found) - k) / 60:.0f} min left)" if k else ""

        def said(stage: str, done: int = 0, total: int = 0, at: str = f"{k + 1} of {len(found)}{left}: {name}") -> None:
            progress(f"{at}: {stage}", done, total)

        fresh = [] if options.dry_run else [f for f in (output.parent, *output.parent.parents) if not f.exists()]
        try:
            for missing in reversed(fresh):
                missing.mkdir(exist_ok=True)
            told: dict[str, Any] = {"inputs": inputs, "progress": said, "command": command}
            result = pipeline.family(model, [output], [options], [[output.with_suffix(".json")]], **told)[0]
            rows.append(Row(model, output, result.report))
        except BaseException as error:
            for empty in fresh:
                with suppress(OSError):
                    empty.rmdir()
            if not isinstance(error, Exception):
                raise
            rows.append(Row(model, output, error=ours(error)))
    return rows
