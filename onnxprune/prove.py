"""Running the proof on a user's model: feeds, the child process, and who is to blame when it fails."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence

import numpy as np

from onnxprune import feeds, storage, verify
from onnxprune.analysis import Analysis, cost_shapes
from onnxprune.errors import ImpossibleError, InputError, MachineError, PruneError
from onnxprune.infer import control, walk
from onnxprune.infer import seed as seed_facts
from onnxprune.model import Model, normalise
from onnxprune.probes import alternatives, single_lengths
from onnxprune.runtime import ort
from onnxprune.types import Array, Mask, Shape
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
        self.seed = seed
        self.sizes: list[Mapping[str, Shape]] = []
        self.unseen: list[dict[str, int]] = []
        self.problem: PruneError | None = None
        try:
            usual = cost_shapes(analysis.prepared.model, analysis.given, analysis.view.shapes)
            sizes: list[Mapping[str, Shape]] = [analysis.prepared.facts.shapes, analysis.prepared.other.shapes, usual]
            for k, shapes in enumerate(sizes):
                feeds.random_feed(graph, shapes, seed + k)
            if any(control(node) == "If" for node in walk(graph)):
                sizes += [seed_facts(graph, s).shapes for s in single_lengths(analysis.dense, analysis.given)]
            self.sizes = sizes
        except ImpossibleError as error:
            self.problem = error

    def prove(
        self, worker: Worker, candidate: Model, gone: Sequence[verify.Removal], alive: Mask
    ) -> list[verify.Difference]:
        """Differences between a candidate and the dense model without the units that are not alive."""
        return self.compare(worker, self.analysis.reference(gone, alive), candidate)

    def compare(self, worker: Worker, reference: Model, candidate: Model) -> list[verify.Difference]:
        """Differences between two models on the feeds that the dense one accepts."""

        def run(path: str, samples: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
            found: list[dict[str, Array]] = worker.call(ort.run, path, list(samples), threads=self.threads)
            return found

        return verify.compare(reference, candidate, self.feeds, run)

    def typical(self, worker: Worker, usual: Mapping[str, Array]) -> Mapping[str, Array]:
        """A feed of the usual sizes if the dense model accepts it, else one of those that the proof runs on."""
        with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
            path = str(storage.dump(self.analysis.dense, folder, "dense"))
            try:
                worker.call(ort.run, path, [usual], threads=self.threads)
            except InputError:
                return self.feeds[0]
        return usual

    def warnings(self) -> list[str]:
        """What no feed could reach."""
        return [
            f"no random input ran with {', '.join(f'{name} = {value}' for name, value in row.items())}: "
            "what only this reaches is not proven; pass --calibration"
            for row in self.unseen
        ]

    def check_dense(self, worker: Worker) -> None:
        """Keep the feeds that the dense model accepts. Raises InputError or ImpossibleError if there are none."""
        if self.feeds:
            return  # asked before, for another target
        with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
            path = str(storage.dump(self.analysis.dense, folder, "dense"))
            for sample in self.samples:
                worker.call(ort.run, path, [sample], threads=self.threads)
            accepted: list[Mapping[str, Array]] = []
            graph = self.analysis.dense.graph
            combinations = feeds.combinations(graph) if self.sizes else 0
            for choice in range(combinations):  # each at sizes that suit it
                found = self._accepted(worker, path, choice, max(1, RANDOM // combinations))
                row = feeds.combination(graph, choice)
                if row and not found and not any(_takes(sample, row) for sample in self.samples):
                    self.unseen.append(row)
                accepted += found
            if not accepted and not self.samples and self.sizes:
                plain = self.analysis.dense.clone()
                normalise(plain)
                sizes = alternatives(plain, self.analysis.given)
                self.sizes = [seed_facts(graph, chosen).shapes for chosen in sizes]
                accepted = self._accepted(worker, path, 0, RANDOM)
        self.feeds = [*self.samples, *accepted]
        if not self.feeds:
            problem = self.problem or InputError("it accepts no input")
            raise type(problem)(problem.message, file=self.analysis.source.path, object=problem.object)

    def _accepted(self, worker: Worker, path: str, choice: int, most: int) -> list[Mapping[str, Array]]:
        """Up to `most` random feeds that the dense model runs with."""
        found: list[Mapping[str, Array]] = []
        for k, shapes in enumerate(self.sizes):
            if len(found) == most:
                break
            try:
                feed = feeds.random_feed(self.analysis.dense.graph, shapes, self.seed + k, choice)
                outputs = worker.call(ort.run, path, [feed], threads=self.threads)
            except (InputError, MachineError) as error:  # what is too large at one size may fit at another
                self.problem = error
                continue
            if _says_something(outputs[0]):
                found.append(feed)
            else:
                self.problem = InputError("no output is finite on random inputs; pass --calibration")
        return found


def _takes(sample: Mapping[str, Array], row: Mapping[str, int]) -> bool:
    return all(name in sample and bool((sample[name] == value).all()) for name, value in row.items())


def _says_something(outputs: Mapping[str, Array]) -> bool:
    """Whether any number among the outputs is finite; a model of NaN equals every other."""
    floats = [a for a in outputs.values() if a.size and (a.dtype.kind == "f" or a.dtype.name == "bfloat16")]
    return not floats or any(np.isfinite(array.astype(np.float64)).any() for array in floats)
