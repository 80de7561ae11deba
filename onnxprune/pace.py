"""Latency targets: a table says what to cut, whole models say how far that holds, and the two are brought together."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from onnxprune import measure, storage, timing
from onnxprune.analysis import Analysis, cost_shapes
from onnxprune.cache import Cache, key_of, versions
from onnxprune.errors import ImpossibleError, InputError, InternalError
from onnxprune.measure import Latency, faster
from onnxprune.model import Model
from onnxprune.recipe import Options
from onnxprune.report import Report
from onnxprune.select import parse_target
from onnxprune.types import Array, Group, Progress, quietly
from onnxprune.worker import Worker

MOST = 1.03  # times a target at which it is still met
CLOSE = (0.98, 1.015)  # within which nothing is gained by trying again: what is left up to MOST is for noise
STEP = 1.05  # of a factor that has to move
NEAR = 1.003  # of two factors between which no other is tried
TWICE = 2  # times that a choice may come again
ROUNDS = 8  # plans that are measured for one target
WHOLE = (15.0, 40)  # seconds and rounds for a whole model
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx")

T = TypeVar("T")


@dataclass(frozen=True)
class Verdict:
    """A model by name, what the table says that it takes, what was measured, and what is asked for, in ms."""

    name: str
    predicted: float
    measured: float
    goal: float

    @property
    def over(self) -> float:
        """What was measured over what was asked for."""
        return self.measured / self.goal


def converge(
    choose: Callable[[float], T], judge: Callable[[T], Verdict], factor: float = 1.0, rounds: int = ROUNDS
) -> tuple[T | None, float]:
    """(the choice that meets its goal and stays closest to it, None if none does; the factor that led there).

    `choose` takes the factor between prediction and measurement, which `judge` corrects; once one factor was too low
    and another one more than high enough, what follows lies between them.
    """
    met: list[tuple[float, T]] = []
    seen: list[str] = []
    low, high = 0.0, math.inf
    for _ in range(rounds):
        choice = choose(factor)
        found = judge(choice)
        if found.over <= MOST:
            met.append((found.over, choice))
        seen.append(found.name)
        if CLOSE[0] <= found.over <= CLOSE[1] or seen.count(found.name) > TWICE:
            break
        low, high = (max(low, factor), high) if found.over > 1 else (low, min(high, factor))
        if high <= low * NEAR:
            break
        factor = found.measured / max(found.predicted, 1e-12)
        if not low * NEAR < factor < high:
            factor = math.sqrt(low * high) if low and high < math.inf else low * STEP if low else high / STEP
    safe = [row for row in met if row[0] <= CLOSE[1]]
    best = max(safe, key=lambda row: row[0], default=None) or min(met, key=lambda row: row[0], default=None)
    return (best[1] if best else None), factor


class Stopwatch:
    """Latency of one model on one backend: the table that `analysis.costs` takes, and whole models beside the dense.

    What it measures it keeps in the cache, so that a run that was killed goes on, and the same run chooses the same.
    """

    def __init__(
        self,
        analysis: Analysis,
        groups: Sequence[Group],
        feed: Mapping[str, Array],
        options: Options,
        cache: Cache,
        progress: Progress = quietly,
    ) -> None:
        self.analysis, self.feed, self.options, self.cache = analysis, feed, options, cache
        self.where, self.progress = place(options), progress
        self.factor = 1.0
        self.last = (0.0, 0.0)
        self.rows: dict[str, tuple[float, float]] = {}
        movable = np.zeros(analysis.labels, np.bool_)
        for group in groups:
            if group.kind != "layers":
                movable[group.units] = True
        shapes = dict(cost_shapes(analysis.prepared.model, analysis.given, analysis.view.shapes))
        operators = timing.Operators(analysis, shapes, movable)
        with alone(options, cache) as clock:
            table, self.multiple = timing.tabulate(
                operators, clock, lambda done, total: progress("measure operators", done, total)
            )
        progress("measure the dense model")
        self.dense_ms = self.whole(analysis.dense)[0]
        costs, everything = analysis.costs, np.ones(analysis.labels, np.bool_)
        costs.timed = table
        known = costs.of(everything)["latency"]
        costs.timed = replace(table, rate=1.0)
        rest = costs.of(everything)["latency"] - known
        costs.timed = replace(table, rate=max(self.dense_ms - known, -known / 2) / rest if rest > 0 else 0.0)

    def whole(self, model: Model) -> tuple[float, float]:
        """ms of the dense model and of this one, in one interleaved run."""
        name = outline(model)
        if name not in self.rows:
            key = key_of("model", self.where, outline(self.analysis.dense), name, _sizes(self.feed))
            known = self.cache.get("latency", key)
            pair: tuple[float, float] | None = None
            with suppress(ValueError, TypeError):
                dense, other = json.loads(known or b"")
                pair = float(dense), float(other)
            if pair is None:
                pair = self._measured(model)
                self.cache.put("latency", key, json.dumps(pair).encode())
            self.rows[name] = pair
        return self.rows[name]

    def _measured(self, model: Model) -> tuple[float, float]:
        dense = self.analysis.dense
        with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
            each = (("dense", dense), ("pruned", model)) if model is not dense else (("dense", dense),)
            external = self.analysis.source.external
            files = [storage.dump(one, folder, name, external=external) for name, one in each]
            seconds, rounds = WHOLE
            rows = measure.measure(
                files,
                self.feed,
                backend=self.options.backend,
                threads=self.options.threads,
                rounds=rounds,
                seconds=seconds,
                timeout=self.options.timeout,
                progress=self.progress,
            )
        return rows[0].ms, rows[-1].ms

    def goal(self, options: Options, dense_ms: float) -> float:
        """ms that are asked for."""
        number, share = parse_target("latency", options.target["latency"])
        return number * dense_ms if share else number

    def judge(self, options: Options, model: Model, predicted: float) -> Verdict:
        """What a model takes, and what is asked for; where that is a share, other load of the machine is taken out."""
        dense, pruned = self.whole(model)
        self.last = pruned, pruned / dense
        _, share = parse_target("latency", options.target["latency"])
        load = dense / self.dense_ms if share else 1.0
        return Verdict(outline(model), predicted, pruned / load, self.goal(options, dense) / load)

    def converge(self, choose: Callable[[float], T], judge: Callable[[T], Verdict], rounds: int = ROUNDS) -> T | None:
        """See `converge`; what was learnt serves the next target too."""
        found = converge(choose, judge, self.factor, rounds)
        self.factor = found[1]
        return found[0]

    def holds(self, options: Options, report: Report, selected: Model) -> bool:
        """Whether the model that was made meets its target, and is not slower than the dense one."""
        rows = [Latency(**row) for row in (report.dense.latency, report.pruned.latency) if row is not None]
        if len(rows) < 2:  # a dry run
            return True
        dense, pruned = rows
        self.last = pruned.ms, pruned.ms / dense.ms
        holds = pruned.ms <= MOST * self.goal(options, dense.ms)
        if not holds:  # the next choice is to know
            self.rows[outline(selected)] = dense.ms, pruned.ms
        return holds and faster(dense, pruned) is not False

    def out_of_reach(self, path: Path) -> ImpossibleError:
        """That the target is not met, and what was reached last."""
        ms, share = self.last
        return ImpossibleError(
            f"the target is out of reach; the least that can be reached is latency={share:.3f} ({ms:.4g} ms)", file=path
        )

    def unsettled(self, path: Path) -> ImpossibleError:
        """That no choice met the target when measured."""
        ms, share = self.last
        return ImpossibleError(
            f"no choice met the target when it was measured; the last one reached latency={share:.3f} ({ms:.4g} ms)",
            file=path,
        )


@contextmanager
def alone(options: Options, cache: Cache) -> Iterator[timing.Clock]:
    """A clock for operators by themselves, where the options measure; times are kept in the cache, failures are not."""
    where, failed = place(options), set[str]()
    with Worker(seconds=options.timeout) as worker, tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        path = Path(folder) / "piece.onnx"

        def clock(piece: timing.Piece, seconds: float) -> float | None:
            key = key_of("operator", where, seconds, piece.what)
            if known := cache.number("latency", key):
                return known
            if key in failed:
                return None
            try:
                content, inputs = piece.build()
                path.write_bytes(content)
                found = worker.call(measure.quickest, str(path), inputs, options.backend, options.threads, seconds)
            except (InputError, ImpossibleError, InternalError, ValueError, TypeError, RuntimeError):
                failed.add(key)
                return None
            cache.put_number("latency", key, found)
            return float(found) or None

        yield clock


def place(options: Options) -> list[object]:
    """What latencies depend on beside models, as part of their names in the cache."""
    return [options.backend, options.threads, machine(options.backend)]


def outline(model: Model) -> str:
    """A name for what a model is but for the numbers in its weights."""
    found = hashlib.sha256()
    for node in model.graph:
        proto = ir.serde.serialize_node(node)
        proto.ClearField("metadata_props")
        proto.ClearField("doc_string")
        found.update(proto.SerializeToString(deterministic=True))
    for name, value in sorted(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None:
            found.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            if tensor.size <= timing.KNOWN and tensor.dtype.is_integer():
                found.update(tensor.tobytes())
    return found.hexdigest()


def _sizes(feed: Mapping[str, Array]) -> list[object]:
    return [[name, str(array.dtype), array.shape] for name, array in sorted(feed.items())]


def machine(backend: str) -> list[str]:
    """What latency depends on beside the model: runtimes by version, processor, graphics card."""
    found = versions(*PACKAGES)
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        found += sorted({line for line in lines if line.startswith(("model", "cpu family", "stepping", "flags"))})
    for card in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")) if backend != "cpu" else ():
        with suppress(OSError):
            found += [line for line in card.read_text(errors="replace").splitlines() if line.startswith("Model")]
    return found
