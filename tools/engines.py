"""Engines of dense and pruned models: python tools/engines.py FILE-OR-FOLDER... [--ratio R] [--backend NAME].

Every model that the parser takes dense has to build pruned too. Sizes are those of the inputs that the proof runs on,
dynamic where these differ. Prints Markdown; exit code 1 where a pruned model fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import onnxprune
from onnxprune import engines
from onnxprune.analysis import Analysis
from onnxprune.prove import Prover
from onnxprune.types import Profile
from onnxprune.worker import Worker


def profiles(path: Path) -> dict[str, Profile]:
    """From the smallest to the largest shapes that the model is proven with."""
    prover = Prover(Analysis(path), [])
    with Worker() as worker:
        prover.check_dense(worker)
    found = {}
    for name, array in prover.feeds[0].items():
        shapes = [feed[name].shape for feed in prover.feeds]
        least, most = (tuple(map(choose, zip(*shapes, strict=True))) for choose in (min, max))
        found[name] = Profile(least, array.shape, most)
    return found


def attempt(path: Path, folder: str, name: str, sizes: dict[str, Profile], backend: str) -> str:
    """Bytes of the engine, or why there is none."""
    try:
        made = engines.build(path, f"{folder}/{name}.engine", sizes, backend=backend)
    except onnxprune.PruneError as error:
        return f"exit {error.code}: {error.line()}"
    return f"{made.record['engine']['bytes']:,}"


def row(path: Path, ratio: float, backend: str) -> tuple[str, str, str]:
    """Sizes, and what came of the dense and of the pruned model."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            sizes = profiles(path)
            small = f"{folder}/small.onnx"
            kinds = ("channels", "heads")
            onnxprune.prune(path, small, ratio=ratio, round_to=1, measure=False, remove=kinds, approximate=False)
        except onnxprune.PruneError as error:
            return "", "", f"not pruned: {error.message}"
        dense = attempt(path, folder, "dense", sizes, backend)
        shown = "dynamic" if any(p.least != p.most for p in sizes.values()) else "fixed"
        pruned = "" if dense.startswith("exit") else attempt(Path(small), folder, "pruned", sizes, backend)
    return shown, dense, pruned


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--backend", default="tensorrt-rtx")
    given = parser.parse_args()
    files = [f for path in given.models for f in (sorted(path.rglob("*.onnx")) if path.is_dir() else [path])]
    print("| model | sizes | dense, bytes | pruned, bytes |\n| --- | --- | ---: | ---: |")
    failed = 0
    for path in files:
        shown, dense, pruned = row(path, given.ratio, given.backend)
        failed += pruned.startswith("exit")
        print(f"| {path.parent.name}/{path.stem} | {shown} | {dense} | {pruned} |", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
