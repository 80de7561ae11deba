"""Unary and broadcasting operators: every axis passes through, aligned from the right."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from onnxprune.ops import Edit, Resizing, resize, rule, shape
from onnxprune.types import Axis, Named, OpNode, Pattern, Positions, Relation, Shape

UNARY = """Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Clip Cos Cosh Dropout Elu Erf Exp Floor Gelu
HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign
Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu ai.onnx.ml::Binarizer
com.microsoft::Gelu com.microsoft::QuickGelu""".split()
BROADCAST = """And BitwiseAnd BitwiseOr BitwiseXor Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Or
PRelu Sum Where Xor""".split()


@rule("Cast", "Identity", carries=(0,))
def same_elements(node: OpNode) -> Iterable[Relation]:
    """X -> Y with the same elements."""
    return unary(node)


@rule("CastLike", carries=(0,))
def cast_like(node: OpNode) -> Iterable[Relation]:
    """X, a value of the wanted type, of which nothing else is read -> Y with the same elements."""
    yield Pattern(f"..., {' '.join('_' for _ in node.shape(1))} -> ...")


@rule(*(name for name in UNARY if name not in ("Cast", "Identity", "Reciprocal", "Log", "Sqrt")))
def unary(node: OpNode) -> Iterable[Relation]:
    """X -> Y, and Dropout's mask; further inputs are scalars."""
    yield Pattern("... -> " + ", ".join("..." for _ in node.outputs))


@shape(*(name for name in UNARY if "::" in name))
def same(node: OpNode) -> tuple[Shape, ...]:
    """Y has the shape of X."""
    return (node.shape(0),)


@rule("Reciprocal", "Log", "Sqrt", roles={0: "divisor"})
def unary_of_positive(node: OpNode) -> Iterable[Relation]:
    """X -> Y, where zero is a pole: an initializer there keeps its value in the oracle."""
    yield Pattern("... -> ...")


@rule(*BROADCAST)
def broadcast(node: OpNode) -> Iterable[Relation]:
    """A, B, ... -> Y, aligned from the right; axes of size one stretch and tie nothing."""
    if node.opset < 7 and node.attr("broadcast", 0):  # aligned by an attribute, not from the right
        return
    yield Pattern(", ".join("..." for _ in node.inputs) + " -> ...")


@rule("Equal", roles={0: "index", 1: "index"})
def equal(node: OpNode) -> Iterable[Relation]:
    """A, B -> Y, aligned from the right; constant integers name positions, if those on the other side count some."""
    yield from broadcast(node)
    if (named := _constant(node)) is not None:
        k, positions, axis = named
        yield Named(node.outputs[0], axis, node.inputs[1 - k], positions)


def _constant(node: OpNode) -> tuple[int, Positions, int | None] | None:
    """(input that is a constant, its integers, the axis of Y that they lie along) where these are a row or a scalar."""
    for k in (0, 1):
        value, rank = node.const(k), len(node.out_shape(0))
        if value is None or value.dtype.kind not in "iu" or node.const(1 - k) is not None:
            continue
        long = [axis - value.ndim for axis, size in enumerate(value.shape) if size > 1]
        other = node.shape(1 - k)
        if not long or (len(long) == 1 and (-long[0] > len(other) or other[long[0]] == 1)):
            return k, value.reshape(-1).astype(np.int64), rank + long[0] if long else None
    return None


@resize("Equal")
def equal_numbers(this: Resizing) -> Edit | None:
    """Names of positions are counted anew over the survivors."""
    if (named := _constant(this.dense)) is None:
        return None
    k, positions, axis = named
    counted = this.counted(this.dense.inputs[1 - k])
    constant = this.dense.const(k)
    if counted is None or constant is None or (keep := this.keep(counted)).all():
        return None
    kept = positions if axis is None else positions[this.keep(Axis(this.dense.outputs[0], axis))]
    shape = [len(kept) if size > 1 else 1 for size in constant.shape]
    return Edit(inputs={k: (np.cumsum(keep) - 1)[kept].reshape(shape).astype(constant.dtype)})


@rule("Add", "Sub", roles={0: "bias", 1: "bias"})
def add(node: OpNode) -> Iterable[Relation]:
    """A, B -> Y, aligned from the right."""
    return broadcast(node)


@rule("Mul", roles={0: "norm", 1: "norm"})
def mul(node: OpNode) -> Iterable[Relation]:
    """A, B -> Y, aligned from the right."""
    return broadcast(node)


@rule("Div", "Pow", roles={0: "norm", 1: "divisor"})
def div(node: OpNode) -> Iterable[Relation]:
    """A, B -> Y, aligned from the right; B keeps its value in the oracle."""
    return broadcast(node)
