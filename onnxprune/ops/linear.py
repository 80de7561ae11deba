"""Operators that contract: a letter that is missing on the right is summed over, so removal there is exact."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from onnxprune.ops import Edit, Resizing, resize, rule, shape, stand_in
from onnxprune.types import OpNode, Pattern, Relation, Shape


def _avoid(node: OpNode, inside: int, outside: int) -> tuple[str, ...]:
    """Whole conv groups go only where a group has a single channel on one side: else positions inside go."""
    return ("g",) if inside > 1 and outside > 1 else ()


@rule("Conv", "com.microsoft::FusedConv", roles={1: "weight", 2: "bias"})
def conv(node: OpNode) -> Iterable[Relation]:
    """X (n, c, *s), W (m, c/g, *k), B (m) -> Y (n, m, *s); a fused one may add Z (n, m, *s).

    Depthwise is not a special case: with one channel a group, g is the only atom left to cut.
    """
    groups = node.attr("group", 1)
    out, inside = node.shape(1)[:2]
    sizes = {"g": groups, "i": inside, "o": out // groups}
    text = "n i *, o i *, o, n o * -> n o *" if groups == 1 else "n (g i) *, (g o) i *, (g o), n (g o) * -> n (g o) *"
    yield Pattern(text, sizes, avoid=_avoid(node, inside, out // groups))


@rule("ConvTranspose", roles={1: "weight", 2: "bias"})
def conv_transpose(node: OpNode) -> Iterable[Relation]:
    """X (n, c, *s), W (c, m/g, *k), B (m) -> Y (n, m, *s)."""
    groups = node.attr("group", 1)
    if groups == 1:
        yield Pattern("n i *, i o *, o -> n o *")
        return
    channels, outside = node.shape(1)[:2]
    sizes = {"g": groups, "i": channels // groups, "o": outside}
    yield Pattern("n (g i) *, (g i) o *, (g o) -> n (g o) *", sizes, avoid=_avoid(node, channels // groups, outside))


@resize("Conv", "com.microsoft::FusedConv")
def conv_group(this: Resizing) -> Edit | None:
    """`group` follows from the channels that X keeps and those that one filter reads."""
    groups = this.dense.attr("group", 1)
    if groups == 1:
        return None
    now = this.wanted[this.node.inputs[0]][1] // this.wanted[this.node.inputs[1]][1]
    return None if now == groups else Edit(attrs={"group": now})


@resize("ConvTranspose")
def conv_transpose_group(this: Resizing) -> Edit | None:
    """`group` follows from the channels of Y and those that one group writes."""
    groups = this.dense.attr("group", 1)
    if groups == 1:
        return None
    now = this.wanted[this.node.outputs[0]][1] // this.wanted[this.node.inputs[1]][1]
    return None if now == groups else Edit(attrs={"group": now})


@rule("Gemm", "com.microsoft::FusedGemm", roles={1: "weight", 2: "bias"})
def gemm(node: OpNode) -> Iterable[Relation]:
    """A (n, k), B (k, m), C broadcast to (n, m) -> Y (n, m); each of A and B may be stored transposed."""
    a = "k n" if node.attr("transA", 0) else "n k"
    b = "m k" if node.attr("transB", 0) else "k m"
    c = {0: "", 1: "m", 2: "n m"}[len(node.shape(2))] if node.has(2) else ""
    yield Pattern(f"{a}, {b}, {c} -> n m")


@rule("MatMul")
def matmul(node: OpNode) -> Iterable[Relation]:
    """A (..., n, k), B (..., k, m) -> Y (..., n, m), as numpy.matmul."""
    a, b = len(node.shape(0)), len(node.shape(1))
    left = "k" if a == 1 else "... n k"
    right = "k" if b == 1 else "... k m"
    out = " ".join(part for part in ("...", "n" if a > 1 else "", "m" if b > 1 else "") if part)
    yield Pattern(f"{left}, {right} -> {out}", batch=("...",) if a > 2 and b > 2 else ())


@rule("com.microsoft::FusedMatMul")
def fused_matmul(node: OpNode) -> Iterable[Relation]:
    """MatMul with a factor, either side stored transposed; transposed batches freeze."""
    if node.attr("transBatchA", 0) or node.attr("transBatchB", 0):
        return
    left = "... k n" if node.attr("transA", 0) else "... n k"
    right = "... m k" if node.attr("transB", 0) else "... k m"
    batch = ("...",) if len(node.shape(0)) > 2 and len(node.shape(1)) > 2 else ()
    if min(len(node.shape(0)), len(node.shape(1))) > 1:
        yield Pattern(f"{left}, {right} -> ... n m", batch=batch)


@shape("com.microsoft::FusedMatMul")
def fused_matmul_shape(node: OpNode) -> tuple[Shape, ...]:
    """Y (..., n, m)."""
    a, b = node.shape(0), node.shape(1)
    rows = a[-1] if node.attr("transA", 0) else a[-2]
    columns = b[-2] if node.attr("transB", 0) else b[-1]
    return ((*np.broadcast_shapes(a[:-2], b[:-2]), rows, columns),)


stand_in("com.microsoft::FusedGemm", "Gemm", (0, 1))
stand_in("com.microsoft::FusedConv", "Conv", (0, 1))


@rule("Einsum")
def einsum(node: OpNode) -> Iterable[Relation]:
    """The equation is the pattern: letters that are missing on the right are summed over."""
    left, _, right = str(node.attrs["equation"]).replace(" ", "").partition("->")
    terms = left.split(",")
    if not right or any(len(set(term.replace(".", ""))) < len(term.replace(".", "")) for term in terms):
        return  # an implicit output or a diagonal
    letters = [set(term) for term in terms]
    batch = tuple(sorted(set.intersection(*letters) & set(right) - {"."})) if len(terms) > 1 else ()
    yield Pattern(", ".join(map(_spaced, terms)) + " -> " + _spaced(right), batch=batch)


def _spaced(term: str) -> str:
    return " ".join(term.replace("...", "@")).replace("@", "...")
