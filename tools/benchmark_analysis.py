"""How long analysis takes, and that it grows with the model: python tools/benchmark_analysis.py [MODEL...].

Without models, chains of 1,000, 10,000 and 100,000 nodes, and one group of a million channels. CPU seconds of one
thread, medians of `--repeat` runs, each in a process of its own; imports and the start of processes are not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

LENGTHS = (1_000, 10_000, 100_000)
CHANNELS = (10_000, 100_000, 1_000_000)

MEASURE = """
import json, sys, time
import networkx, onnx.reference  # otherwise imported when they are first needed
from onnxprune.analysis import Analysis
start = time.process_time()
analysis = Analysis(sys.argv[1])
seconds = time.process_time() - start
units = sum(len(group.units) for group in analysis.groups)
status = open("/proc/self/status").read()  # what getrusage() says was the parent's before
print(json.dumps([seconds, len(analysis.view.nodes), len(analysis.groups), units,
                  int(status.partition("VmHWM:")[2].split()[0]) / 1024]))
"""


class Builder:
    """A graph of float32 nodes that grows at its end."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[ir.Node] = []
        self.stored: list[ir.Value] = []

    def weight(self, *shape: int) -> ir.Value:
        """A new random initializer."""
        return self.constant(self.random.standard_normal(shape, np.float32) / np.float32(shape[0]) ** 0.5)

    def constant(self, array: np.ndarray) -> ir.Value:
        """A new initializer."""
        name = f"w{len(self.stored)}"
        self.stored.append(ir.val(name, const_value=ir.tensor(array, name=name)))
        return self.stored[-1]

    def add(self, op_type: str, *inputs: ir.Value, **attrs: object) -> ir.Value:
        """The output of a new node."""
        node = ir.node(op_type, list(inputs), attrs, name=f"n{len(self.nodes)}")  # type: ignore[arg-type]
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def save(self, x: ir.Value, y: ir.Value, path: Path) -> Path:
        """Write the model."""
        y.shape, y.type = x.shape, x.type
        graph = ir.Graph([x], [y], nodes=self.nodes, initializers=self.stored, opset_imports={"": 21}, name="g")
        ir.save(ir.Model(graph, ir_version=10), path)
        return path


def given(width: int) -> ir.Value:
    """float32[batch, length, width]."""
    return ir.val("x", ir.DataType.FLOAT, ir.Shape(["batch", "length", width]))


def chain(nodes: int, path: Path) -> Path:
    """Residual blocks of 14 nodes each: heads that are split and merged, then an FFN."""
    heads, size, width, inner = 2, 3, 8, 5
    build, x = Builder(), given(width)
    stream = x
    while len(build.nodes) < nodes:
        apart, whole = (build.constant(np.array([0, 0, *sizes])) for sizes in ((heads, size), (heads * size,)))
        value = build.add("MatMul", stream, build.weight(width, heads * size))
        value = build.add("Reshape", value, apart)
        value = build.add("Transpose", value, perm=[0, 2, 1, 3])
        value = build.add("Tanh", value)
        value = build.add("Transpose", value, perm=[0, 2, 1, 3])
        value = build.add("Reshape", value, whole)
        value = build.add("MatMul", value, build.weight(heads * size, width))
        stream = build.add("Add", stream, value)
        value = build.add("MatMul", stream, build.weight(width, inner))
        value = build.add("Add", value, build.weight(inner))
        value = build.add("Relu", value)
        value = build.add("MatMul", value, build.weight(inner, width))
        value = build.add("Add", value, build.weight(width))
        stream = build.add("Add", stream, value)
    return build.save(x, stream, path)


def wide(channels: int, path: Path) -> Path:
    """An FFN of so many neurons, with a vector for each and a sum over itself, between four channels."""
    build, x = Builder(), given(4)
    value = build.add("Add", build.add("MatMul", x, build.weight(4, channels)), build.weight(channels))
    value = build.add("Mul", value, build.add("Sigmoid", value))
    return build.save(x, build.add("MatMul", value, build.weight(channels, 4)), path)


def main() -> None:
    """Build what is to be built, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = given.models or [
            *(chain(n, Path(folder) / f"chain_{n}.onnx") for n in LENGTHS),
            *(wide(n, Path(folder) / f"wide_{n}.onnx") for n in CHANNELS),
        ]
        found: dict[Path, list[list[float]]] = {model: [] for model in models}
        for _ in range(given.repeat):
            for model in models:
                out = subprocess.run([sys.executable, "-c", MEASURE, model], check=True, capture_output=True, text=True)
                found[model].append(json.loads(out.stdout))
    print("| model | nodes | groups | units | CPU s | ms per 1,000 nodes | peak MB |")
    print("| --- " * 7 + "|")
    for model, runs in found.items():
        seconds, memory = (statistics.median(run[k] for run in runs) for k in (0, 4))
        _, nodes, groups, units, _ = runs[0]
        cells = (model.stem, f"{nodes:,}", f"{groups:,}", f"{units:,}", f"{seconds:.2f}",
                 f"{1e6 * seconds / nodes:.0f}", f"{memory:.0f}")  # fmt: skip
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
