"""How much of what coupling allows is removed: python tools/deep_removal.py FOLDER [NAME...].

Exports the architectures of exports/standard.py, prunes each at --ratio 0.5, and compares the parameters that are
left with the same network built at exactly half of every free width and exported alike. Prints Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnx
from exports.standard import ARCHITECTURES, export, halved
from onnx import numpy_helper

import onnxprune


def stored(path: Path) -> int:
    """Elements of all float initializers and constants of a file."""
    graph = onnx.load(path).graph
    tensors = list(graph.initializer)
    tensors += [a.t for node in graph.node if node.op_type == "Constant" for a in node.attribute if a.HasField("t")]
    return sum(numpy_helper.to_array(t).size for t in tensors if t.data_type == onnx.TensorProto.FLOAT)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=sorted(ARCHITECTURES))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    print("| network | exporter | parameters | exact halves | `--round-to 1` | off by | `--round-to auto` | off by |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in given.names:
        for dynamo in (False, True):
            dense = export(name, given.folder, dynamo)
            before = stored(dense)
            if ARCHITECTURES[name].scales:
                wanted = stored(export(name, given.folder, dynamo, half=True))
            else:
                wanted = before - halved(name)
            cells = []
            for rounding in ("1", "auto"):
                small = given.folder / f"{dense.stem}_small.onnx"
                onnxprune.prune(dense, small, ratio=0.5, round_to=rounding, measure=False, force=True)
                left = stored(small)
                cells += [f"{left:,}", f"{left / wanted - 1:+.2%}"]
            exporter = "dynamo" if dynamo else "TorchScript"
            print(f"| {name} | {exporter} | {before:,} | {wanted:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
