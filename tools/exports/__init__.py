"""Exports of architectures with random weights, for checks on networks that no rule was written for.

Each module has `MODELS`: {name: a function without arguments}. In tools/, `python -m exports FOLDER [NAME...]` writes
those of `vision` and `text` with both exporters of PyTorch, `python -m exports.MODULE FOLDER [NAME...]` those of
another module, in an environment with its framework.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

try:
    import torch
except ImportError:  # an environment with another framework
    pass
else:
    # The wheel of torchvision is built for CUDA: beside a CPU build of PyTorch its operators are missing, and it is not
    # imported without these two declared. No network here calls them.
    if torch.version.cuda is None:
        OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

Built = TypeVar("Built")


def export_all(
    text: str | None,
    models: Mapping[str, Callable[[], Built]],
    writers: Mapping[str, Callable[[Built, Path], None]],
) -> None:
    """The command line of a module: write FOLDER/NAME_WRITER.onnx; what cannot be written is said on stderr."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for name in given.names or sorted(models):
        for writer, write in writers.items():
            path = given.folder / f"{name}_{writer}.onnx"
            try:
                write(models[name](), path)
                print(path, flush=True)
            except Exception as error:
                said = [*str(error).splitlines(), ""][0][:200]
                print(f"{path.stem}: {type(error).__name__}: {said}", file=sys.stderr, flush=True)
