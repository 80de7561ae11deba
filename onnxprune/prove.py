"""Running the proof on a user's model: feeds, the child process, and who is to blame when it fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from math import prod

import numpy as np

from onnxprune import feeds, interface, verify
from onnxprune.analysis import Analysis, cost_shapes
from onnxprune.errors import ImpossibleError, InputError, LateError, MachineError, PruneError, UnloadableError
from onnxprune.infer import control, true_inputs, walk
from onnxprune.infer import seed as seed_facts
from onnxprune.model import Model, normalise
from onnxprune.probes import alternatives, single_lengths, small_sizes
from onnxprune.running import MEMORY, Runner, memory_of
from onnxprune.types import Array, Mask, Shape
from onnxprune.worker import Worker

RANDOM = 2  # random feeds that a proof runs on, of those that the dense model accepts
Run = Callable[[Sequence[Mapping[str, Array]]], list[dict[str, Array]]]
BULK = 1 << 28  # bytes of a feed from which on small ones come first, and each is sent by itself
SAMPLES = 2  # feeds of the user's own data that it runs on as well
FIRST = 30.0, 0.075  # seconds, and share of the time limit, for a model that nobody has seen running yet
SLOWEST = 1e7, 2e8, 3e4  # bytes of weights, MACs, and nodes in loops, that even a busy machine gets done in a second
TIMES = 8  # what random inputs may take of what those take that MACs are counted for
FASTEST = 1e13  # MACs that no machine gets done in a second
FASTEST_RUNS = 3e6  # nodes in loops likewise


def allowance(seconds: float) -> float:
    """Seconds of a time limit after which a model that weighs nothing is taken to have no end."""
    return max(FIRST[0], FIRST[1] * seconds)


class Prover:
    """Runs reference and candidate in a child process, on the same feeds."""

    def __init__(
        self,
        analysis: Analysis,
        samples: Sequence[Mapping[str, Array]],
        seed: int = 0,
        threads: int = 1,
        memory: int = MEMORY,
    ) -> None:
        self.analysis, self.threads, self.memory = analysis, threads, memory
        self._outputs: list[tuple[Model, list[dict[str, Array]]]] = []
        graph = analysis.dense.graph
        self.samples = list(samples[:SAMPLES])
        self.feeds: list[Mapping[str, Array]] = []
        self.seed = seed
        self.sizes: list[Mapping[str, Shape]] = []
        self.usual: Mapping[str, Shape] = {}
        self.unseen: list[dict[str, int]] = []
        self.problem: PruneError | None = None
        try:
            self.usual = cost_shapes(analysis.prepared.model, analysis.given, analysis.view.shapes)
            prepared = analysis.prepared
            sizes: list[Mapping[str, Shape]] = [prepared.facts.shapes, prepared.other.shapes, self.usual]
            if max(feeds.bytes_of(graph, shapes) for shapes in sizes) > BULK:
                sizes.sort(key=lambda shapes: feeds.bytes_of(graph, shapes))
            if any(control(node) == "If" for node in walk(graph)):
                sizes += [seed_facts(graph, s).shapes for s in single_lengths(analysis.dense, analysis.given)]
            if memory_of(analysis.dense) > memory:
                few = small_sizes(analysis.dense, (prepared.sizes, prepared.other_sizes), analysis.given)
                sizes = [*(seed_facts(graph, one).shapes for one in few), *sizes]
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
        known = self._known(candidate)
        if known is None:
            made, known = self.runner(worker).together([reference, candidate], self.feeds)
            self._keep(candidate, known)
        else:
            made = self.runner(worker)(reference, self.feeds)
        narrowed = interface.noted(candidate.metadata_props)
        wanted = [interface.narrow(outputs, narrowed) for outputs in made]
        return verify.compare(wanted, known, verify.tolerance_of(reference))

    def runner(self, worker: Worker) -> Runner:
        """What runs models in this child."""
        return Runner(worker, self.threads, self.memory, memory_of(self.analysis.dense) > self.memory)

    def outputs(self, worker: Worker, model: Model) -> list[dict[str, Array]]:
        """What the dense model or the latest candidate computes from each feed."""
        if (found := self._known(model)) is None:
            found = self.runner(worker)(model, self.feeds)
            self._keep(model, found)
        return found

    def _known(self, model: Model) -> list[dict[str, Array]] | None:
        return next((found for known, found in self._outputs if known is model), None)

    def _keep(self, model: Model, found: list[dict[str, Array]]) -> None:
        self._outputs = [*(row for row in self._outputs if row[0] is self.analysis.dense), (model, found)]

    def typical(self, worker: Worker, usual: Mapping[str, Array]) -> Mapping[str, Array]:
        """A feed of the usual sizes if the dense model accepts it, else one of those that the proof runs on."""
        try:
            self.runner(worker)(self.analysis.dense, [usual])
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
        dense = self.analysis.dense
        with self._at_first(worker), self.runner(worker).ready(dense) as run:
            found = [*zip(self.samples, run(self.samples) if self.samples else [], strict=True), *self._random(run)]
            if not found and self.sizes:
                plain = dense.clone()
                normalise(plain)
                sizes = alternatives(plain, self.analysis.given)
                self.sizes = [seed_facts(dense.graph, chosen).shapes for chosen in sizes]
                found = self._accepted(run, 0, RANDOM)
        self.feeds = [feed for feed, _ in found]
        self._outputs = [(dense, [outputs for _, outputs in found])]
        if not self.feeds:
            problem = self.problem or InputError("it accepts no input")
            raise type(problem)(problem.message, file=self.analysis.source.path, object=problem.object)

    def _at_first(self, worker: Worker) -> AbstractContextManager[None]:
        """Limits until it is known that the model comes to an end. Raises LateError if it cannot within the time limit.

        Loops may be endless, and functions explode when they are inlined: what weighs little is not waited for.
        """
        macs = self.work["macs"]
        if macs / FASTEST > worker.seconds:
            raise LateError(f"{macs:.1e} MACs take longer than {worker.seconds:g} s; raise --timeout",
                            file=self.analysis.source.path)  # fmt: skip
        return worker.within(allowance(worker.seconds) + self.due(worker.seconds), 2 * max(self.memory, MEMORY))

    @cached_property
    def work(self) -> Mapping[str, float]:
        """What the dense model costs."""
        return self.analysis.costs.of(np.ones(self.analysis.labels, np.bool_))

    def due(self, limit: float) -> float:
        """Seconds that one execution of the dense model may well take, going by what it weighs, computes and repeats.

        A loop with more rounds than fit into `limit` seconds has another end, if it has one.
        """
        usual = sum(prod(self.usual.get(str(value.name), ())) for value in true_inputs(self.analysis.dense.graph))
        given = sum(array.size for feed in self.samples for array in feed.values())
        times, runs = max(TIMES, given / max(usual, 1)), self.analysis.costs.runs
        looped = runs / SLOWEST[2] if runs / FASTEST_RUNS < limit else 0.0
        return self.work["size"] / SLOWEST[0] + times * self.work["macs"] / SLOWEST[1] + looped

    def _random(self, run: Run) -> list[Ran]:
        """Random feeds that the dense model accepts, for every combination of choices."""
        graph = self.analysis.dense.graph
        found: list[Ran] = []
        combinations = feeds.combinations(graph) if self.sizes else 0
        for choice in range(combinations):  # each at sizes that suit it
            fresh = self._accepted(run, choice, max(1, RANDOM // combinations))
            row = feeds.combination(graph, choice)
            if row and not fresh and not any(_takes(sample, row) for sample in self.samples):
                self.unseen.append(row)
            found += fresh
        return found

    def _accepted(self, run: Run, choice: int, most: int) -> list[Ran]:
        """Up to `most` random feeds that the dense model runs with, and what it makes of them.

        As many as are wanted are run at once, unless they are large: loading takes longer than running. Where an output
        is empty, which proves nothing about it, other sizes come first.
        """
        found: list[Ran] = []
        empty: list[Ran] = []
        sizes = list(enumerate(self.sizes))
        while sizes and len(found) < most:
            bulky = feeds.bytes_of(self.analysis.dense.graph, sizes[0][1]) > BULK
            count = 1 if bulky else most - len(found)
            some, sizes = sizes[:count], sizes[count:]
            made = [feed for k, shapes in some if (feed := self._drawn(shapes, k, choice)) is not None]
            for part in (made, *([feed] for feed in made)) if len(made) > 1 else (made,) if made else ():
                try:
                    ran = run(part)
                except (LateError, UnloadableError):
                    raise
                except (InputError, MachineError) as error:  # what is too large at one size may fit at another
                    self.problem = error
                    continue
                said = [_says_something(outputs) for outputs in ran]
                for row in (pair for pair, says in zip(zip(part, ran, strict=True), said, strict=True) if says):
                    (found if all(array.size for array in row[1].values()) else empty).append(row)
                if not all(said):
                    self.problem = InputError("no output is finite on random inputs; pass --calibration")
                if part is made:
                    break
        return (found + empty)[:most]

    def _drawn(self, shapes: Mapping[str, Shape], k: int, choice: int) -> Mapping[str, Array] | None:
        try:
            return feeds.random_feed(self.analysis.dense.graph, shapes, self.seed + k, choice)
        except MachineError as error:
            self.problem = error
            return None


Ran = tuple[Mapping[str, Array], dict[str, Array]]  # a feed and what came of it


def _takes(sample: Mapping[str, Array], row: Mapping[str, int]) -> bool:
    return all(name in sample and bool((sample[name] == value).all()) for name, value in row.items())


def _says_something(outputs: Mapping[str, Array]) -> bool:
    """Whether any number among the outputs is finite; a model of NaN equals every other."""
    floats = [a for a in outputs.values() if a.size and (a.dtype.kind == "f" or a.dtype.name == "bfloat16")]
    return not floats or any(np.isfinite(array.astype(np.float64)).any() for array in floats)
