"""Running the proof on a user's model: feeds, the child process, and who is to blame when it fails."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from onnxprune import feeds, verify
from onnxprune.analysis import Analysis
from onnxprune.errors import ImpossibleError, InputError
from onnxprune.runtime import ort
from onnxprune.types import Array
from onnxprune.worker import Worker


class Prover:
    """Runs reference and candidate in one child process, on the same feeds."""

    def __init__(
        self, analysis: Analysis, samples: Sequence[Mapping[str, Array]], seed: int = 0, threads: int = 1
    ) -> None:
        self.analysis, self.threads = analysis, threads
        graph = analysis.dense.graph
        self.feeds: list[Mapping[str, Array]] = list(samples[:2])
        self.problem = ""
        try:
            for k, facts in enumerate((analysis.prepared.facts, analysis.prepared.other)):
                self.feeds.append(feeds.random_feed(graph, facts.shapes, seed + k))
        except ImpossibleError as error:
            self.problem = str(error)
            if not self.feeds:
                raise

    def prove(self, worker: Worker, candidate: ir.Model, gone: Sequence[verify.Removal]) -> list[verify.Difference]:
        """Differences between a candidate and the dense model with these slices at zero."""

        def run(path: str, samples: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
            found: list[dict[str, Array]] = worker.call(ort.run, path, list(samples), threads=self.threads)
            return found

        return verify.compare(verify.reference(self.analysis.dense, gone), candidate, self.feeds, run)

    def check_dense(self, worker: Worker) -> None:
        """Keep the feeds that the dense model accepts. Raises InputError if it accepts none."""
        with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
            path = str(Path(folder) / "dense.onnx")
            ir.save(self.analysis.dense, path, external_data="dense.data")
            accepted = []
            for feed in self.feeds:
                try:
                    worker.call(ort.run, path, [feed], threads=self.threads)
                    accepted.append(feed)
                except InputError as error:
                    self.problem = error.message
        if not accepted:
            raise InputError(self.problem, file=self.analysis.source.path.name)
        self.feeds = accepted
