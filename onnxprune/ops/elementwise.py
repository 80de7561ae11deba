"""Unary and broadcasting operators: every axis passes through, aligned from the right."""

from __future__ import annotations

from collections.abc import Iterable

from onnxprune.ops import rule, shape
from onnxprune.types import OpNode, Pattern, Relation, Shape

UNARY = """Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Clip Cos Cosh Dropout Elu Erf Exp Floor Gelu
HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign
Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu com.microsoft::Gelu
com.microsoft::QuickGelu""".split()
BROADCAST = """And BitwiseAnd BitwiseOr BitwiseXor Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Or
PRelu Sum Where Xor""".split()


@rule("Cast", "Identity", carries=(0,))
def same_elements(node: OpNode) -> Iterable[Relation]:
    """X -> Y with the same elements."""
    return unary(node)


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
