"""Networks of the quality benchmark: a residual CNN and a vision transformer for 8x8 digits, one of each per seed.

`python tools/digits.py FOLDER --seeds 0-5` writes cnn_0.onnx and the like, the weights beside them as cnn_0.pt,
and the arrays calibration.npz (unlabelled) and evaluation.npz. What is there already is left alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))

from digits_data import CALIBRATION_IMAGES, load_split
from digits_networks import DigitsCNN, DigitsViT
from train_digits import Task, check, export, run, train

KINDS = {
    "cnn": Task(lambda: DigitsCNN(widths=(24, 40, 56)), epochs=60, rate=3e-3, dynamo=False),
    "vit": Task(lambda: DigitsViT(width=96, heads=6, hidden=384, depth=4), epochs=120, rate=1.5e-3, dynamo=True),
}


def seeds_of(text: str) -> list[int]:
    """`0-2,5` is 0, 1, 2, 5."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def build(name: str, seed: int, folder: Path) -> None:
    """Train, export, check and measure one network."""
    path = folder / f"{name}_{seed}.onnx"
    images, heldout, labels, truth = load_split()
    started = time.perf_counter()
    network = train(KINDS[name], torch.from_numpy(images), torch.from_numpy(labels), seed)
    seconds = time.perf_counter() - started
    torch.save(network.state_dict(), path.with_suffix(".pt"))
    export(network, path, dynamo=KINDS[name].dynamo, fold=True)
    check(network, path, heldout)
    accuracy = np.mean(run(path, heldout).argmax(axis=1) == truth)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{path.name}: {accuracy:.2%} of the held-out images, {parameters} parameters, {seconds:.0f} s", flush=True)


def save_arrays(folder: Path) -> None:
    """Unlabelled images of the training half, and the held-out half with its labels."""
    images, heldout, _, truth = load_split()
    np.savez_compressed(folder / "calibration.npz", image=images[:CALIBRATION_IMAGES])
    np.savez_compressed(folder / "evaluation.npz", image=heldout, labels=truth)


def main() -> None:
    """Parse the command line; write what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=seeds_of, default="0-5", help="such as 0-2,5 (0-5)")
    parser.add_argument("--model", choices=[*KINDS, "all"], default="all")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    save_arrays(given.folder)
    for seed in given.seeds:
        for name in KINDS if given.model == "all" else [given.model]:
            if not (given.folder / f"{name}_{seed}.onnx").exists():
                build(name, seed, given.folder)


if __name__ == "__main__":
    main()
