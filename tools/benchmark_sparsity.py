"""N:M on the digits networks: what every way of choosing and repairing weights costs, on images that were held out.

`python tools/benchmark_sparsity.py FOLDER --models cnn_3,vit_3 --pattern 2:4`, FOLDER as tools/digits.py writes it.
Prints a Markdown table: points of accuracy below the dense network, divergence from it, CPU seconds.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune import quality
from onnxprune.runtime import ort
from onnxprune.sparsify import sparsify

ARMS: dict[str, dict[str, Any]] = {
    "nm-mag, no data": {"criterion": "nm-mag"},
    "nm-mag, no data, nm-perm": {"criterion": "nm-mag", "permute": True},
    **{
        f"{criterion}{', nm-perm' if permute else ''}, {repair}": {
            "criterion": criterion,
            "permute": permute,
            "reconstruct": repair,
            "calibration": "calibration.npz",
        }
        for repair in ("none", "admm")
        for criterion in ("nm-mag", "nm-wanda", "nm-sparsegpt")
        for permute in (False, True)
        if (criterion, repair) != ("nm-mag", "none")
    },
}


def outputs(path: Path, images: np.ndarray) -> list[dict[str, np.ndarray]]:
    """What a network says of the images."""
    name = next(iter(ort.interface(str(path)).inputs)).name
    return ort.run(str(path), [{name: images}])


def main() -> None:
    """Parse the command line; print one row for each arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", default="cnn_3,vit_3")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--arms", default="*", metavar="GLOB", help="such as '*admm'")
    given = parser.parse_args()
    data = np.load(given.folder / "evaluation.npz")
    models = given.models.split(",")
    print(f"| {given.pattern} | " + " | ".join(models) + " |\n|" + " --- |" + " ---: |" * len(models))
    for arm in fnmatch.filter(ARMS, given.arms):
        options = ARMS[arm]
        cells = []
        for model in models:
            dense, labels = given.folder / f"{model}.onnx", data["labels"]
            known = {k: str(given.folder / v) if k == "calibration" else v for k, v in options.items()}
            start = sum(os.times()[:4])
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "sparse.onnx"
                sparsify(dense, out, pattern=given.pattern, measure=False, **known)
                seconds = sum(os.times()[:4]) - start
                found, wanted = outputs(out, data["image"]), outputs(dense, data["image"])
            lost = quality.accuracy(wanted, wanted, labels) - quality.accuracy(found, wanted, labels)
            cells.append(f"{100 * lost:.2f} ({quality.divergence(found, wanted):.4f}), {seconds:.0f} s")
        print(f"| {arm} | " + " | ".join(cells) + " |", flush=True)
    print(f"{time.strftime('%Y-%m-%d')}, load {os.getloadavg()[0]:.0f}")


if __name__ == "__main__":
    main()
