"""python -m exports FOLDER [NAME...], in tools/: export the named architectures, or all, with both exporters."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

import torch

from exports import write

FAMILIES = ("vision", "text")


def main() -> None:
    """Write FOLDER/NAME_EXPORTER.onnx; what an exporter cannot write is said on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    models = {n: build for family in FAMILIES for n, build in import_module(f"exports.{family}").MODELS.items()}
    for name in given.names or sorted(models):
        for exporter in ("dynamo", "torchscript"):
            torch.manual_seed(0)
            try:
                print(write(name, models[name](), given.folder, exporter))
            except Exception as error:
                print(f"{name}_{exporter}: {type(error).__name__}: {str(error).splitlines()[:1]}", file=sys.stderr)


if __name__ == "__main__":
    main()
