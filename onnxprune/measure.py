"""Latency that can be believed: all models in one process, interleaved, warmed up, medians with their spread."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxprune.runtime import ort
from onnxprune.types import Array
from onnxprune.worker import call

SAMPLE = 2e-3  # seconds that one timing should at least take


@dataclass(frozen=True)
class Latency:
    """Medians of one inference: process CPU time and wall time in ms; spread is interquartile range over median."""

    cpu_ms: float
    wall_ms: float
    spread: float
    rounds: int
    backend: str
    threads: int


def measure(
    paths: Sequence[str | Path],
    feed: Mapping[str, Array],
    *,
    backend: str = "cpu",
    threads: int = 1,
    rounds: int = 30,
    seconds: float = 10.0,
) -> list[Latency]:
    """Latency of each model on the same feed, measured A B A B in a child process of its own."""
    rows: list[Latency] = call(
        time_all,
        [str(path) for path in paths],
        dict(feed),
        backend,
        threads,
        rounds,
        seconds,
        seconds=60 + 20 * seconds,
    )
    return rows


def time_all(
    paths: list[str], feed: dict[str, Array], backend: str, threads: int, rounds: int, seconds: float
) -> list[Latency]:
    """The measurement itself; runs in the child."""
    sessions = [ort.session(path, threads=threads, backend=backend) for path in paths]
    repeats = []
    for session in sessions:
        ort.infer_once(session, feed)
        start = time.perf_counter()
        ort.infer_once(session, feed)
        repeats.append(max(1, int(SAMPLE / max(time.perf_counter() - start, 1e-7))))
    for session in sessions:
        for _ in range(2):
            ort.infer_once(session, feed)
    cpu: list[list[float]] = [[] for _ in sessions]
    wall: list[list[float]] = [[] for _ in sessions]
    end = time.perf_counter() + seconds
    for turn in range(rounds):
        if turn >= 5 and time.perf_counter() > end:
            break
        for k, session in enumerate(sessions):
            cpu_start, wall_start = time.process_time(), time.perf_counter()
            for _ in range(repeats[k]):
                session.run(None, feed)
            wall[k].append((time.perf_counter() - wall_start) * 1e3 / repeats[k])
            cpu[k].append((time.process_time() - cpu_start) * 1e3 / repeats[k])
    rows = []
    for c, w in zip(cpu, wall, strict=True):
        judged = np.array(c if threads == 1 and backend == "cpu" else w)
        low, median, high = np.percentile(judged, [25, 50, 75])
        spread = float((high - low) / median) if median else 0.0
        rows.append(Latency(float(np.median(c)), float(np.median(w)), spread, len(c), backend, threads))
    return rows


def faster(dense: Latency, pruned: Latency) -> bool | None:
    """Whether the pruned model is faster; None where the difference drowns in the spread."""
    single = dense.threads == 1 and dense.backend == "cpu"
    a, b = (row.cpu_ms if single else row.wall_ms for row in (dense, pruned))
    if abs(a - b) <= max(dense.spread, pruned.spread) * a / 2:
        return None
    return b < a
