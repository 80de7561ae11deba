"""Running the proof on a user's model: feeds, the child process, and who is to blame when it fails."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence

import numpy as np

from onnxprune import feeds, storage, verify
from onnxprune.analysis import Analysis, cost_shapes
from onnxprune.errors import ImpossibleError, InputError, MachineError, PruneError
from onnxprune.model import Model
from onnxprune.runtime import ort
from onnxprune.types import Array, Mask
from onnxprune.worker import Worker

RANDOM = 2  # random feeds that a proof runs on, of those that the dense model accepts
SAMPLES = 2  # feeds of the user's own data that it runs on as well


class Prover:
    """Runs reference and candidate in one child process, on the same feeds."""

    def __init__(
        self, analysis: Analysis, samples: Sequence[Mapping[str, Array]], seed: int = 0, threads: int = 1
    ) -> None:
        self.analysis, self.threads = analysis, threads
        graph = analysis.dense.graph
        self.samples = list(samples[:SAMPLES])
        self.feeds: list[Mapping[str, Array]] = []
        self.problem: PruneError | None = None
        try:
            usual = cost_shapes(analysis.dense, analysis.given)
            for k, shapes in enumerate((analysis.prepared.facts.shapes, analysis.prepared.other.shapes, usual)):
                self.feeds.append(feeds.random_feed(graph, shapes, seed + k))
        except ImpossibleError as error:
            self.problem = error

    def prove(
        self, worker: Worker, candidate: Model, gone: Sequence[verify.Removal], alive: Mask
    ) -> list[verify.Difference]:
        """Differences between a candidate and the dense model without the units that are not alive."""

        def run(path: str, samples: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
            found: list[dict[str, Array]] = worker.call(ort.run, path, list(samples), threads=self.threads)
            return found

        return verify.compare(self.analysis.reference(gone, alive), candidate, self.feeds, run)

    def check_dense(self, worker: Worker) -> None:
        """Keep the feeds that the dense model accepts. Raises InputError or ImpossibleError if there are none."""
        with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
            path = str(storage.dump(self.analysis.dense, folder, "dense"))
            for sample in self.samples:
                worker.call(ort.run, path, [sample], threads=self.threads)
            accepted: list[Mapping[str, Array]] = []
            for feed in self.feeds:
                if len(accepted) == RANDOM:
                    break
                try:
                    outputs = worker.call(ort.run, path, [feed], threads=self.threads)
                    if _says_something(outputs[0]):
                        accepted.append(feed)
                    else:
                        self.problem = InputError("no output is finite on random inputs; pass --calibration")
                except (InputError, MachineError) as error:  # what is too large at one size may fit at another
                    self.problem = error
        self.feeds = [*self.samples, *accepted]
        self.samples = []  # they are among the feeds now, also when this is asked again
        if not self.feeds:
            problem = self.problem or InputError("it accepts no input")
            raise type(problem)(problem.message, file=self.analysis.source.path, object=problem.object)


def _says_something(outputs: Mapping[str, Array]) -> bool:
    """Whether any number among the outputs is finite; a model of NaN equals every other."""
    floats = [a for a in outputs.values() if a.size and (a.dtype.kind == "f" or a.dtype.name == "bfloat16")]
    return not floats or any(np.isfinite(array.astype(np.float64)).any() for array in floats)
