"""One table row for each model of a folder, pruned at one ratio: python tools/benchmark_zoo.py [--ratio 0.25].

The folder is the one that ONNXPRUNE_ZOO names, with one subfolder for each model. Prints Markdown, progress on stderr.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path

import onnxprune

HEAD = (
    "| model | groups | units | params | after | MACs | after | params ratio | MACs ratio | CPU latency ratio | spread "
    "| output difference | proof |"
)


def row(path: Path, ratio: float) -> str:
    """The model pruned, proven and measured; or the reason why it is not."""
    name = f"{path.parent.name}/{path.stem}"
    try:
        report = onnxprune.prune(path, ratio=ratio).report
    except onnxprune.PruneError as error:
        return f"| {name} | exit {error.code}: {error.message} |" + " |" * 11
    dense, pruned = report.dense, report.pruned
    units = f"{sum(g.before for g in report.groups if g.after < g.before)}"
    proof = max(d["relative"] for d in report.verification.differences)
    cells = [
        name,
        str(sum(g.after < g.before for g in report.groups)),
        units,
        f"{dense.params:,}",
        f"{pruned.params:,}",
        f"{dense.macs:,}",
        f"{pruned.macs:,}",
        f"{pruned.params / dense.params:.3f}",
        f"{pruned.macs / dense.macs:.3f}",
    ]
    assert dense.latency is not None
    assert pruned.latency is not None
    cells += [
        f"{pruned.latency['cpu_ms'] / dense.latency['cpu_ms']:.3f}",
        f"{max(dense.latency['spread'], pruned.latency['spread']):.1%}",
        f"{report.quality['relative-error']:.3f}",
        f"{proof:.0e}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratio", type=float, default=0.25)
    given = parser.parse_args()
    folder = os.environ.get("ONNXPRUNE_ZOO")
    if not folder:
        sys.exit("set ONNXPRUNE_ZOO to a folder of models")
    print(f"`tools/benchmark_zoo.py --ratio {given.ratio}` on {platform.processor() or platform.machine()},", end=" ")
    print(f"{os.cpu_count()} cores, {platform.python_implementation()} {platform.python_version()}.\n")
    print(HEAD)
    print("| --- |" + " ---: |" * 12)
    for path in sorted(Path(folder).glob("*/*.onnx")):
        print(path, file=sys.stderr)
        print(row(path, given.ratio), flush=True)


if __name__ == "__main__":
    main()
