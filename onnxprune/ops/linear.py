"""Operators that contract: a letter that is missing on the right is summed over, so removal there is exact."""

from __future__ import annotations

from collections.abc import Iterable

from onnxprune.ops import Edit, Resizing, resize, rule
from onnxprune.types import OpNode, Pattern, Relation


def _avoid(node: OpNode, inside: int, outside: int) -> tuple[str, ...]:
    """Whole conv groups go only where a group has a single channel on one side: else positions inside go."""
    return ("g",) if inside > 1 and outside > 1 else ()


@rule("Conv", roles={1: "weight", 2: "bias"})
def conv(node: OpNode) -> Iterable[Relation]:
    """X (n, c, *s), W (m, c/g, *k), B (m) -> Y (n, m, *s).

    Depthwise is not a special case: with one channel a group, g is the only atom left to cut.
    """
    groups = node.attr("group", 1)
    if groups == 1:
        yield Pattern("n i *, o i *, o -> n o *")
        return
    out, inside = node.shape(1)[:2]
    sizes = {"g": groups, "i": inside, "o": out // groups}
    yield Pattern("n (g i) *, (g o) i *, (g o) -> n (g o) *", sizes, avoid=_avoid(node, inside, out // groups))


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


@resize("Conv")
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


@rule("Gemm", roles={1: "weight", 2: "bias"})
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
