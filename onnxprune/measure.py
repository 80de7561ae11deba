"""Latency that can be believed: all models in one process, interleaved, warmed up, medians with their spread."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxprune import runtime
from onnxprune.errors import InputError
from onnxprune.types import Array, Progress, quietly
from onnxprune.worker import Worker, tell

SAMPLE = 2e-3  # seconds that one sample takes at least: clocks and schedulers are coarse
WARM = 5  # runs before the first sample, where there is time
SAYS = 1.0  # seconds between two words on how far it is
ENOUGH = 3  # rounds without which a spread says nothing


@dataclass(frozen=True)
class Latency:
    """Medians of one inference: process CPU time and wall time in ms.

    `spread` is interquartile range over median, of the clock that counts: CPU time on one thread of the CPU, else wall.
    """

    cpu_ms: float
    wall_ms: float
    spread: float
    rounds: int
    backend: str
    threads: int

    @property
    def ms(self) -> float:
        """The median that counts."""
        return self.cpu_ms if _by_cpu(self.backend, self.threads) else self.wall_ms


def _by_cpu(backend: str, threads: int) -> bool:
    return backend == "cpu" and threads == 1


def measure(
    paths: Sequence[str | Path],
    feeds: Mapping[str, Array],
    *,
    backend: str = "cpu",
    threads: int = 1,
    rounds: int = 30,
    seconds: float = 10.0,
    timeout: float = 600.0,
    memory: int | None = None,
    progress: Progress = quietly,
) -> list[Latency]:
    """Latency of each model on the same inputs, A B A B in a child process of its own.

    Sampling ends after `rounds` or `seconds`, whichever is first, but not before one round; loading comes on top,
    `timeout` stops all of it.
    """
    if threads < 1 or rounds < 1 or not 0 < seconds < math.inf:
        raise InputError("threads, rounds and seconds are positive numbers", object="measure")
    files = [str(path) for path in paths]
    with Worker(seconds=timeout + seconds, memory=memory, progress=progress) as worker:
        rows: list[Latency] = worker.call(sample, files, dict(feeds), runtime.known(backend), threads, rounds, seconds)
    return rows


def told(
    paths: Sequence[str | Path], feeds: Mapping[str, Array], *, backend: str, threads: int, progress: Progress
) -> list[Latency]:
    """Latency of a dense and a pruned model: longer where the first rounds cannot tell which of them is faster."""
    rows = measure(paths, feeds, backend=backend, threads=threads, progress=progress)
    if faster(*rows) is None:
        rows = measure(paths, feeds, backend=backend, threads=threads, rounds=100, seconds=30.0, progress=progress)
    return rows


def sample(
    paths: Sequence[str], feeds: Mapping[str, Array], backend: str, threads: int, rounds: int, seconds: float
) -> list[Latency]:
    """The measurement itself; runs in the child."""
    found = runtime.backend(backend)
    steps = [found.session(path, threads=threads).bound(feeds) for path in paths]
    end = time.perf_counter() + seconds
    repeats = [math.ceil(SAMPLE / _warm(step, seconds / 10 / len(steps))) for step in steps]
    samples: list[list[tuple[float, float]]] = [[] for _ in steps]
    gc.disable()
    longest, said = 0.0, time.perf_counter()
    for turn in range(rounds):
        start = time.perf_counter()
        if turn and start + longest > end:
            break
        if start - said > SAYS:  # seldom, and between rounds: who shows it takes time as well
            said = start
            tell("measure", turn, min(rounds, turn + math.ceil((end - start) / longest)))
        for step, count, rows in zip(steps, repeats, samples, strict=True):
            rows.append(_sample(step, count))
        longest = max(longest, time.perf_counter() - start)
    gc.enable()
    return [_latency(rows, backend, threads) for rows in samples]


def quickest(path: str, feeds: Mapping[str, Array], backend: str, threads: int, seconds: float) -> float:
    """ms of the fastest sample of a model, of the clock that counts: other work only ever adds. Runs in the child."""
    step = runtime.backend(backend).session(path, threads=threads).bound(feeds)
    end = time.perf_counter() + seconds
    count = math.ceil(SAMPLE / _warm(step, seconds / 10))
    samples = [_sample(step, count)]
    while len(samples) < ENOUGH or time.perf_counter() < end:
        samples.append(_sample(step, count))
    return min(row[0 if _by_cpu(backend, threads) else 1] for row in samples)


def _warm(step: Callable[[], object], seconds: float) -> float:
    """Fill caches and arenas; seconds of the fastest run."""
    begin, best = time.perf_counter(), math.inf
    for _ in range(WARM):
        start = time.perf_counter()
        step()
        now = time.perf_counter()
        best = min(best, now - start)
        if now - begin > seconds:
            break
    return max(best, 1e-7)


def _sample(step: Callable[[], object], count: int) -> tuple[float, float]:
    """(CPU, wall) ms of one run, over `count` of them."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(count):
        step()
    return (time.process_time() - cpu) * 1e3 / count, (time.perf_counter() - wall) * 1e3 / count


def _latency(samples: Sequence[tuple[float, float]], backend: str, threads: int) -> Latency:
    cpu, wall = np.array(samples).T
    low, median, high = np.percentile(cpu if _by_cpu(backend, threads) else wall, [25, 50, 75])
    spread = float((high - low) / median) if median > 0 else 0.0
    return Latency(float(np.median(cpu)), float(np.median(wall)), spread, len(samples), backend, threads)


def faster(dense: Latency, pruned: Latency) -> bool | None:
    """Whether the pruned model is faster; None where the difference lies within the spread or rounds are too few."""
    noise = max(row.spread * row.ms for row in (dense, pruned))
    if min(dense.rounds, pruned.rounds) < ENOUGH or abs(dense.ms - pruned.ms) <= noise:
        return None
    return pruned.ms < dense.ms
