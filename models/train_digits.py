"""Train the digit classifiers, export them to ONNX, and measure the files on the held-out half of the images.

Run as `python models/train_digits.py`, or with `--model cnn` or `--model vit` for one of the two. The same machine and
the same versions give the same files.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from digits_data import distort, load_split, save_arrays
from digits_networks import DigitsCNN, DigitsViT
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

FOLDER = Path(__file__).parent
SEED = 0
BATCH = 64
AVERAGING = 0.995


@dataclass(frozen=True)
class Task:
    """One network and how it is trained and exported."""

    network: Callable[[], nn.Module]
    epochs: int
    rate: float
    dynamo: bool


TASKS = {
    "cnn": Task(DigitsCNN, epochs=150, rate=3e-3, dynamo=False),
    "vit": Task(DigitsViT, epochs=400, rate=1.5e-3, dynamo=True),
}


def train(task: Task, images: Tensor, labels: Tensor, seed: int = SEED) -> nn.Module:
    """The moving average of the network's weights, after AdamW along a cosine with a warm-up of one twentieth."""
    torch.manual_seed(seed)
    network = task.network().train()
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(AVERAGING), use_buffers=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=task.rate, weight_decay=0.05)
    steps = task.epochs * (len(images) // BATCH)

    def rate(step: int) -> float:
        return min(1.0, step / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for _ in range(task.epochs):
        order = torch.randperm(len(images))
        for batch in order[: len(images) // BATCH * BATCH].split(BATCH):
            logits = network(distort(images[batch]))
            loss = functional.cross_entropy(logits, labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(network)
    return average.module.eval()


def export(network: nn.Module, path: Path, *, dynamo: bool, fold: bool = False) -> None:
    """Write one self-contained file with input `image`, output `logits` and a free dimension `batch`.

    The TorchScript exporter folds BatchNormalization into the convolutions; without `fold`, PRESERVE keeps the nodes.
    """
    names = {"input_names": ["image"], "output_names": ["logits"]}
    example = torch.rand(2, 1, 8, 8)
    if dynamo:
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.onnx.export(network, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
        model = program.model_proto
    else:
        axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
        mode = torch.onnx.TrainingMode.EVAL if fold else torch.onnx.TrainingMode.PRESERVE
        torch.onnx.export(network, (example,), path, dynamo=False, dynamic_axes=axes, training=mode, **names)
        model = onnx.load(path)
    strip(model.graph)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def strip(graph: onnx.GraphProto) -> None:
    """Remove the exporter's notes (stack traces, with paths of the exporting machine) from the graph and its parts."""
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def run(path: Path, images: NDArray) -> NDArray:
    """Logits float32[n, 10] of the saved model, from onnxruntime on the CPU."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"image": images})[0]


def check(network: nn.Module, path: Path, images: NDArray) -> None:
    """Raise AssertionError if the file and the network disagree, with one image or with seven."""
    for n in (1, 7):
        with torch.no_grad():
            expected = network(torch.from_numpy(images[:n])).numpy()
        np.testing.assert_allclose(run(path, images[:n]), expected, rtol=1e-4, atol=1e-4)


def build(name: str, folder: Path) -> None:
    """Train, export, check and measure one of the TASKS."""
    task = TASKS[name]
    train_images, heldout_images, train_labels, heldout_labels = load_split()
    started = time.perf_counter()
    network = train(task, torch.from_numpy(train_images), torch.from_numpy(train_labels))
    seconds = time.perf_counter() - started
    path = folder / f"digits_{name}.onnx"
    export(network, path, dynamo=task.dynamo)
    check(network, path, heldout_images)
    right = int((run(path, heldout_images).argmax(axis=1) == heldout_labels).sum())
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(
        f"{path.name}: {right} of {len(heldout_labels)} held-out images right ({right / len(heldout_labels):.2%}), "
        f"{parameters} parameters, {path.stat().st_size} bytes, trained in {seconds:.0f} s"
    )


def main() -> None:
    """Parse the command line; write the arrays and the chosen models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*TASKS, "all"], default="all", help="which network to train (all)")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder to write to (the folder of this script)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    save_arrays(arguments.output)
    for name in TASKS if arguments.model == "all" else [arguments.model]:
        build(name, arguments.output)


if __name__ == "__main__":
    main()
