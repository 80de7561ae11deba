"""What stands behind a linear operator and belongs to it: steps that change each channel by itself, and bounds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxprune.infer import attributes, bodies
from onnxprune.operators import Slot, Step, kept_of
from onnxprune.types import Array, Shape


@dataclass
class Chain:
    """Where a chain ends, and what is on the way."""

    value: ir.Value
    steps: list[Step] = field(default_factory=list)
    rest: list[ir.Value] = field(default_factory=list)
    path: list[str] = field(default_factory=list)


def follow(node: ir.Node, axes: tuple[int, ...], shapes: Mapping[str, Shape], stays: Collection[str]) -> Chain:
    """What happens to an operator's output until something else than a gain, a shift or a sum reads it."""
    chain = Chain(node.outputs[0], path=[str(node.outputs[0].name)])
    start = shapes[str(node.outputs[0].name)]
    while len(chain.value.uses()) == 1 and not chain.value.is_graph_output():
        use = next(iter(chain.value.uses()))
        reader, k = use.node, use.idx
        if reader.graph is not node.graph or bodies(reader) or reader.domain not in ("", "ai.onnx"):
            break
        out = reader.outputs[0]
        if shapes.get(str(out.name)) != start:
            break
        slot = str(out.name)
        other = reader.inputs[1 - k] if reader.op_type in ("Add", "Mul") and len(reader.inputs) == 2 else None
        if reader.op_type == "Identity":
            pass
        elif reader.op_type == "Add" and other is not None and _per_channel(other, axes, start):
            chain.steps.append(step_of("add", [(other, (slot, 1 - k))], stays))
        elif (
            reader.op_type == "Add"
            and other is not None
            and shapes.get(str(other.name)) == start
            and other is not chain.value
        ):
            chain.rest.append(other)
        elif chain.rest:
            break
        elif reader.op_type == "Mul" and other is not None and _per_channel(other, axes, start):
            chain.steps.append(step_of("mul", [(other, (slot, 1 - k))], stays))
        elif reader.op_type == "BatchNormalization" and k == 0 and axes == (1,) and len(reader.outputs) == 1:
            epsilon = float(attributes(reader).get("epsilon", 1e-5))  # type: ignore[arg-type]
            read = [(value, (slot, i)) for i, value in enumerate(reader.inputs[1:5], start=1)]
            if any(kept_of(value, place)[0] is None for value, place in read):
                break
            chain.steps.append(step_of("norm", read, stays, epsilon))
        else:
            break
        chain.value = out
        chain.path.append(slot)
    return chain


def step_of(
    kind: str, read: Sequence[tuple[ir.Value | None, Slot]], stays: Collection[str], epsilon: float = 0.0
) -> Step:
    """A step with what is stored for it; the number that is added stays where it has others to serve as well."""
    found = [kept_of(value, slot) for value, slot in read]
    value, _, alone = found[1 if kind == "norm" else 0]
    fixed = not alone or (value is not None and str(value.name) in stays)
    return Step(kind, tuple(slot for _, slot, _ in found), epsilon, fixed)


def _per_channel(value: ir.Value, axes: tuple[int, ...], shape: Shape) -> bool:
    """Whether a stored value has one number for each channel."""
    source, _, _ = kept_of(value, ("", 0))
    if source is None or source.const_value is None:
        return False
    own = tuple(int(d) for d in source.const_value.shape.numpy())
    if len(own) > len(shape):
        return False
    padded = (1,) * (len(shape) - len(own)) + own
    if any(size > 1 for k, size in enumerate(padded) if k not in axes):
        return False
    return any(padded[k] > 1 for k in axes) or all(shape[k] == 1 for k in axes)


def bounds_of(value: ir.Value) -> tuple[float, float]:
    """What readers see of a value: everything, or what ReLU, Clip and quantisation let through."""
    if value.is_graph_output() or not value.uses():
        return -np.inf, np.inf
    found = {_passes(use.node) for use in value.uses()}
    return found.pop() if len(found) == 1 else (-np.inf, np.inf)


def _passes(node: ir.Node) -> tuple[float, float]:
    if node.op_type == "Relu":
        behind = bounds_of(node.outputs[0])
        return max(behind[0], 0.0), max(behind[1], 0.0)
    if node.op_type == "QuantizeLinear":
        return range_of(*node.inputs[1:3]) if "output_dtype" not in node.attributes else (-np.inf, np.inf)
    if node.op_type != "Clip":
        return -np.inf, np.inf
    limits: list[float] = []
    for k, (key, other) in enumerate((("min", -np.inf), ("max", np.inf)), start=1):
        value = node.inputs[k] if k < len(node.inputs) else None
        if value is not None and value.const_value is None:
            return -np.inf, np.inf
        tensor: Array | None = (
            value.const_value.numpy() if value is not None and value.const_value is not None else None
        )
        limits.append(float(tensor.reshape(-1)[0]) if tensor is not None else float(attributes(node).get(key, other)))  # type: ignore[arg-type]
    return limits[0], limits[1]


def range_of(scale: ir.Value | None, zero: ir.Value | None = None) -> tuple[float, float]:
    """What integers of one scale can tell apart."""
    known = [v.const_value.numpy() for v in (scale, zero) if v is not None and v.const_value is not None]
    if scale is None or len(known) < 1 + (zero is not None) or known[0].size != 1:
        return -np.inf, np.inf
    point = known[1].reshape(-1) if len(known) > 1 else np.zeros(1, np.uint8)
    if point.dtype.name not in ("int8", "uint8", "int16", "uint16"):
        return -np.inf, np.inf
    limits, size, middle = np.iinfo(point.dtype), float(known[0].reshape(-1)[0]), int(point[0])
    return (limits.min - middle) * size, (limits.max - middle) * size
