"""How much of many exports can be pruned, and whether it is right: python tools/coverage.py FOLDER... [--ratio 0.3].

Prunes every model of a folder with all exact kinds, as a user would, and checks each result with an oracle of its own:
the removed slices of the report are zeroed in the dense file with nothing but `onnx`, and both are run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from onnxprune.analysis import Analysis
from onnxprune.prove import Prover
from onnxprune.worker import Worker

ZEROED = ("weight", "bias", "norm")
TOLERANCE = 1e-3

ort.set_default_logger_severity(4)


def zeroed(model: onnx.ModelProto, removed: list[dict]) -> onnx.ModelProto:
    """The dense model with the removed slices of weights, biases and norms at zero; float tensors of the main graph."""
    graph = model.graph
    tensors = {t.name: t for t in graph.initializer}
    tensors |= {n.output[0]: a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.HasField("t")}
    nodes = {node.output[0]: node for node in graph.node}
    for entry in removed:
        if entry["role"] not in ZEROED or entry["removed"] == "all":
            continue
        tensor = tensors[entry["initializer"]]
        targets = [tensor]
        if "uses" in entry:
            targets = []
            for use in entry["uses"]:
                own = f"{entry['initializer']}/{use['node']}/{use['input']}"
                node = nodes[use["node"]]
                if node.input[use["input"]] != own:
                    fresh = graph.initializer.add()
                    fresh.CopyFrom(tensors.get(node.input[use["input"]], tensor))
                    fresh.name = own
                    node.input[use["input"]] = own
                    tensors[own] = fresh
                targets.append(tensors[own])
        for target in targets:
            array = numpy_helper.to_array(target).copy()
            at = (slice(None),) * entry["axis"] + (entry["removed"],)
            array[at] = zero_of(graph, target.name, array, tensors)[at] if array.dtype.kind in "iu" else 0
            name = target.name
            target.CopyFrom(numpy_helper.from_array(array, name))
    return model


# {operator: {integer weight's input: (zero point's input, axis of the weight along which this lies)}}
POINTS = {
    "DequantizeLinear": {0: (2, 1)},
    "QLinearConv": {3: (5, 0)},
    "QLinearMatMul": {0: (2, -2), 3: (5, -1)},
    "QGemm": {3: (5, -1)},
    "ConvInteger": {1: (3, 0)},
    "MatMulInteger": {0: (2, -2), 1: (3, -1)},
    "MatMulIntegerToFloat": {1: (5, -1)},
    "DynamicQuantizeMatMul": {1: (3, -1)},
    "QLinearAdd": {0: (2, -1), 3: (5, -1)},
    "QLinearMul": {0: (2, -1), 3: (5, -1)},
}


def zero_of(graph: onnx.GraphProto, name: str, array: np.ndarray, tensors: dict[str, onnx.TensorProto]) -> np.ndarray:
    """What stands for zero in each place of an integer weight."""
    for node in graph.node:
        for k in [k for k, given in enumerate(node.input) if given == name]:
            attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "MatMulNBits":
                return packed_zero(node, attrs, array, tensors)
            point, axis = POINTS.get(node.op_type, {}).get(k, (len(node.input), 0))
            if point >= len(node.input) or node.input[point] not in tensors:
                continue
            zero = numpy_helper.to_array(tensors[node.input[point]])
            axis = attrs.get("axis", axis) if node.op_type == "DequantizeLinear" else axis
            axis = 0 if attrs.get("transB") else axis
            shape = [1] * array.ndim
            if zero.size > 1:
                shape[axis] = zero.size
            return np.broadcast_to(zero.reshape(shape), array.shape)
    return np.zeros_like(array)


def packed_zero(
    node: onnx.NodeProto, attrs: dict, array: np.ndarray, tensors: dict[str, onnx.TensorProto]
) -> np.ndarray:
    """The bytes of a block in which every number is at its zero point, by default the middle of the range."""
    bits = attrs["bits"]
    if len(node.input) < 4 or not node.input[3]:
        codes = np.full(array.shape[:2], 2 ** (bits - 1))
    else:
        points = numpy_helper.to_array(tensors[node.input[3]]).reshape(len(array), -1)
        shifts = range(0, 8, bits)
        codes = np.stack([points >> s & (2**bits - 1) for s in shifts], -1).reshape(len(array), -1)
        codes = codes[:, : array.shape[1]]
    filled = sum(codes.astype(np.int64) << s for s in range(0, 8, bits))
    return np.broadcast_to(filled.astype(np.uint8)[..., None], array.shape)


def frozen(model: onnx.ModelProto, rewrites: list[str], sample: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The model with the float values that the report calls folded computed once, by running it as it was read."""
    producers = {name: node for node in model.graph.node for name in node.output}
    folded = [text.removeprefix("folded ") for text in rewrites if text.startswith("folded ")]
    folded = [name for name in folded if name in producers and name not in {o.name for o in model.graph.output}]
    asking = onnx.ModelProto()
    asking.CopyFrom(model)
    asking.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in folded)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    values = ort.InferenceSession(asking.SerializeToString(), options).run(folded, sample) if folded else []
    for name, value in zip(folded, values, strict=True):
        if value.dtype.kind == "f":
            producers[name].output[list(producers[name].output).index(name)] = f"{name}/computed"
            model.graph.initializer.append(numpy_helper.from_array(value, name))
    return model


def run(model: onnx.ModelProto, samples: list[dict[str, np.ndarray]]) -> list[list[np.ndarray]]:
    """Outputs for each feed; sums of eight-bit products do not saturate where ONNX Runtime can help it."""
    exact, data = ort.SessionOptions(), model.SerializeToString()
    exact.add_session_config_entry("session.x64quantprecision", "1")
    try:
        session = ort.InferenceSession(data, exact)
    except Exception:  # not every quantised operator exists in that form
        session = ort.InferenceSession(data)
    return [[flat(value) for value in session.run(None, feed)] for feed in samples]


def flat(value: object) -> np.ndarray:
    """One output as one array; rows of numbers by name as a matrix."""
    return np.array([[*row.values()] for row in value]) if isinstance(value, list) else np.asarray(value)


def difference(analysis: Analysis, dense: Path, pruned: Path, report: dict) -> float:
    """Largest difference over all outputs, relative to each output's largest value."""
    prover = Prover(analysis, [], seed=7)
    with Worker() as worker:
        prover.check_dense(worker)  # only for inputs that the dense model accepts
    samples = [dict(prover.feeds[0])]
    reference = zeroed(frozen(onnx.load(dense), report["rewrites"], samples[0]), report["removed"])
    wanted, found = (run(model, samples) for model in (reference, onnx.load(pruned)))
    worst = 0.0
    for a, b in zip(wanted[0], found[0], strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.dtype.kind != "f" or not a.size:
            continue
        finite = np.isfinite(a)
        if not finite.any():
            return float("inf")  # nothing was compared
        gap, scale = np.abs(a - b)[finite].max(initial=0), np.abs(a[finite]).max(initial=0)
        worst = max(worst, float(gap / max(scale, 1e-6)))
    return worst


def reach(analysis: Analysis) -> tuple[float, str]:
    """(share of the weights' parameters that some exact group can shrink, what holds back most of the rest)."""
    made = set(analysis.prepared.folded.values()) - analysis.prepared.statistics
    total = {
        s.initializer: np.prod(s.shape)
        for s in analysis.view.stored.values()
        if s.role != "index" and len(s.shape) > 1 and s.initializer not in made
    }
    within = {m.initializer for g in analysis.groups if g.exact and len(g.units) > 1 for m in g.members}
    lost: dict[str, float] = {}
    for row in analysis.frozen([g for g in analysis.groups if g.exact]):
        if row.axis.value in total and row.axis.value not in within:
            lost[row.reason] = lost.get(row.reason, 0.0) + row.parameters
    share = sum(v for k, v in total.items() if k in within) / max(sum(total.values()), 1)
    return float(share), max(lost, key=lambda reason: lost[reason]) if lost else ""


def row(path: Path, ratio: float, kinds: str) -> str:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        small, report = Path(folder) / "small.onnx", Path(folder) / "report.json"
        command = f"--ratio {ratio} --remove {kinds} --round-to 1 --no-measure --quiet".split()
        command += ["-o", str(small), "--report", str(report)]
        done = subprocess.run(
            [sys.executable, "-m", "onnxprune", "prune", str(path), *command],
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
        if done.returncode:
            return f"| {path.stem} | exit {done.returncode}: {done.stderr.strip().splitlines()[-1][:160]} | | | | | |"
        data = json.loads(report.read_text())
        analysis = Analysis(path)
        gap = difference(analysis, path, small, data)
        share, reason = reach(analysis)
        unproven = data["verification"]["unproven"]
        cells = [
            path.stem,
            "proven" if not unproven else f"{len(unproven)} unproven",
            f"{gap:.0e}" if gap <= TOLERANCE else f"**{gap:.0e}**",
            f"{data['pruned']['params'] / data['dense']['params']:.3f}",
            f"{data['pruned']['macs'] / max(data['dense']['macs'], 1):.3f}",
            f"{share:.1%}",
            reason[:80],
        ]
        return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="models, or folders of them")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--remove", default="channels,heads")
    given = parser.parse_args()
    print("| model | proof | oracle | params | MACs | reach | largest reason for the rest |")
    print("| --- | --- | ---: | ---: | ---: | ---: | --- |")
    for path in sorted(file for place in given.files for file in [*place.glob("*.onnx")] or [place]):
        print(path, file=sys.stderr)
        try:
            print(row(path, given.ratio, given.remove), flush=True)
        except Exception as error:
            print(f"| {path.stem} | {type(error).__name__}: {str(error)[:160]} | | | | | |", flush=True)


if __name__ == "__main__":
    main()
