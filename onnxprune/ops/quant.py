"""Quantised forms: scales and zero points lie along the channels they scale."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import numpy as np

from onnxprune.ops import Edit, Resizing, resize, rule, shape, stand_in
from onnxprune.types import OpNode, Pattern, Relation, Shape, Take, Virtual

MS = "com.microsoft::"


def _vector(node: OpNode, k: int, letter: str) -> str:
    """The part of a scale or zero point: one for all, or one for each position of `letter`."""
    return letter if node.has(k) and len(node.shape(k)) == 1 else ""


@rule("QuantizeLinear", "DequantizeLinear", roles={1: "quant", 2: "quant"}, integers={0: (2, 1)})
def quantize(node: OpNode) -> Iterable[Relation]:
    """X, scale, zero point -> Y: one scale for all, or one for each position of `axis`."""
    rank = len(node.shape(0))
    names = [f"a{k}" for k in range(rank)]
    text = " ".join(names)
    scale = node.shape(1)
    if len(scale) > 1:  # blocks of positions share a scale
        return
    along = names[node.attr("axis", 1) % rank] if len(scale) == 1 and rank else ""
    zero = f", {along}" if node.has(2) else ""
    yield Pattern(f"{text}, {along}{zero} -> {text}")


@rule("DynamicQuantizeLinear")
def dynamic_quantize(node: OpNode) -> Iterable[Relation]:
    """X -> Y, and one scale and zero point for the whole of it."""
    yield Pattern("... -> ..., ,")


def _grouped(node: OpNode, k: int) -> tuple[str, str, str, dict[str, int], tuple[str, ...]]:
    """Parts of X, of the weight at input `k` and of one number a filter; sizes; what is cut last, as in Conv."""
    groups = node.attr("group", 1)
    out, inside = node.shape(k)[:2]
    sizes = {"g": groups, "i": inside, "o": out // groups}
    x, w, m = ("n (g i) *", "(g o) i *", "(g o)") if groups > 1 else ("n i *", "o i *", "o")
    return x, w, m, sizes, ("g",) if inside > 1 and out > groups else ()


@rule("QLinearConv", roles=dict.fromkeys((1, 2, 4, 5, 6, 7), "quant") | {8: "bias"}, integers={3: (5, 0), 8: None})
def qlinear_conv(node: OpNode) -> Iterable[Relation]:
    """As Conv, with scales and zero points for X, W (one for all, or one for each filter) and Y."""
    x, w, m, sizes, avoid = _grouped(node, 3)
    vectors = [_vector(node, k, m) if node.shape(k) == node.shape(3)[:1] else "" for k in (4, 5)]
    yield Pattern(f"{x}, , , {w}, {', '.join(vectors)}, , , {m} -> n {m} *", sizes, avoid=avoid)


@resize("QLinearConv", "ConvInteger")
def qlinear_conv_group(this: Resizing) -> Edit | None:
    """`group` follows from the channels that X keeps and those that one filter reads."""
    groups = this.dense.attr("group", 1)
    weight = 1 if this.dense.op_type == "ConvInteger" else 3
    now = this.wanted[this.node.inputs[0]][1] // this.wanted[this.node.inputs[weight]][1]
    return None if groups in (1, now) else Edit(attrs={"group": now})


@rule("ConvInteger", roles={2: "quant", 3: "quant"}, integers={1: (3, 0)})
def conv_integer(node: OpNode) -> Iterable[Relation]:
    """X (n, c, *s), W (m, c/g, *k) -> Y (n, m, *s) int32, each less its zero point (W's: one, or one a filter)."""
    x, w, m, sizes, avoid = _grouped(node, 1)
    yield Pattern(f"{x}, {w}, , {_vector(node, 3, m)} -> n {m} *", sizes, avoid=avoid)


def _product(a: int, b: int) -> tuple[str, str, str, tuple[str, ...]]:
    left = "k" if a == 1 else "... n k"
    right = "k" if b == 1 else "... k m"
    out = " ".join(part for part in ("...", "n" if a > 1 else "", "m" if b > 1 else "") if part)
    return left, right, out, ("...",) if a > 2 and b > 2 else ()


@rule("QLinearMatMul", roles=dict.fromkeys((1, 2, 4, 5, 6, 7), "quant"), integers={0: (2, -2), 3: (5, -1)})
def qlinear_matmul(node: OpNode) -> Iterable[Relation]:
    """As MatMul, with scales and zero points for A, B (one for all, or one for each column) and Y."""
    left, right, out, batch = _product(len(node.shape(0)), len(node.shape(3)))
    columns = node.shape(3)[-1:]
    vectors = ["m" if node.shape(k) == columns else "" for k in (4, 5)]
    if all(len(node.shape(k)) == 0 or node.shape(k) == (1,) for k in (1, 2)):
        yield Pattern(f"{left}, , , {right}, {', '.join(vectors)}, , -> {out}", batch=batch)


@rule("MatMulInteger", roles={2: "quant", 3: "quant"}, integers={0: (2, -2), 1: (3, -1)})
def matmul_integer(node: OpNode) -> Iterable[Relation]:
    """As MatMul, in integers, each side less its zero point."""
    left, right, out, batch = _product(len(node.shape(0)), len(node.shape(1)))
    yield Pattern(f"{left}, {right}, , {_vector(node, 3, 'm')} -> {out}", batch=batch)


@rule(MS + "MatMulIntegerToFloat", roles=dict.fromkeys((2, 3, 4, 5), "quant") | {6: "bias"}, integers={1: (5, -1)})
def matmul_integer_to_float(node: OpNode) -> Iterable[Relation]:
    """As MatMul; B's scale and zero point are one for all or one for each column, bias (m)."""
    left, right, out, batch = _product(len(node.shape(0)), len(node.shape(1)))
    yield Pattern(f"{left}, {right}, , {_vector(node, 3, 'm')}, , {_vector(node, 5, 'm')}, m -> {out}", batch=batch)


@rule(MS + "DynamicQuantizeMatMul", roles={2: "quant", 3: "quant", 4: "bias"}, integers={1: (3, -1)})
def dynamic_quantize_matmul(node: OpNode) -> Iterable[Relation]:
    """As MatMul of a float A that is quantised on the way; bias (m)."""
    left, right, out, batch = _product(len(node.shape(0)), len(node.shape(1)))
    yield Pattern(f"{left}, {right}, {_vector(node, 2, 'm')}, {_vector(node, 3, 'm')}, m -> {out}", batch=batch)


@shape(MS + "MatMulIntegerToFloat", like=2)
@shape(MS + "DynamicQuantizeMatMul")
def product_shape(node: OpNode) -> tuple[Shape, ...]:
    """Y (..., n, m)."""
    return ((*node.shape(0)[:-1], node.shape(1)[-1]),)


@rule(
    MS + "QGemm",
    roles=dict.fromkeys((1, 2, 4, 5, 7, 8), "quant") | {6: "bias"},
    integers={3: (5, -1), 6: None},
)
def qgemm(node: OpNode) -> Iterable[Relation]:
    """As Gemm, with scales and zero points for A, B (one for all, or one for each column) and Y."""
    a = "k n" if node.attr("transA", 0) else "n k"
    b = "m k" if node.attr("transB", 0) else "k m"
    columns = node.out_shape(0)[1]
    vectors = ["m" if node.shape(k) == (columns,) else "" for k in (4, 5)]
    yield Pattern(f"{a}, , , {b}, {', '.join(vectors)}, m, , -> n m")


@rule(
    MS + "QLinearAdd",
    MS + "QLinearMul",
    roles=dict.fromkeys((1, 2, 4, 5, 6, 7), "quant") | {0: "bias", 3: "bias"},
    integers={0: (2, -1), 3: (5, -1)},
)
def qlinear_binary(node: OpNode) -> Iterable[Relation]:
    """A, B -> Y, aligned from the right; scales and zero points are one for all."""
    yield Pattern("..., , , ..., , , , -> ...")


@rule(MS + "QLinearSigmoid", MS + "QLinearLeakyRelu", roles=dict.fromkeys(range(1, 5), "quant"))
def qlinear_unary(node: OpNode) -> Iterable[Relation]:
    """X -> Y; scales and zero points are one for all."""
    yield Pattern("..., , , , -> ...")


@shape(MS + "QLinearSigmoid", MS + "QLinearLeakyRelu")
def qlinear_unary_shape(node: OpNode) -> tuple[Shape, ...]:
    """Y has the shape of X."""
    return (node.shape(0),)


@rule(MS + "QLinearGlobalAveragePool", MS + "QLinearAveragePool", roles=dict.fromkeys(range(1, 5), "quant"))
def qlinear_pool(node: OpNode) -> Iterable[Relation]:
    """X (n, c, *s) -> Y (n, c, *s): each channel by itself; the channels-last form freezes."""
    if not node.attr("channels_last", 0):
        yield Pattern("n c *, , , , -> n c *")


@rule(MS + "QLinearSoftmax", roles=dict.fromkeys(range(1, 5), "quant"))
def qlinear_softmax(node: OpNode) -> Iterable[Relation]:
    """X -> Y: the axis (under `opset` 13: all axes from it on) is normalised, and mixes; one scale for all."""
    names = [f"a{k}" for k in range(len(node.shape(0)))]
    axis = node.attr("axis", -1) % len(names)
    mixes = names[axis:] if node.attr("opset", 13) < 13 else names[axis : axis + 1]
    yield Pattern(f"{' '.join(names)}, , , , -> {' '.join(names)}", mixes=tuple(mixes))


@rule(MS + "QLinearConcat", roles={0: "quant", 1: "quant"} | {k: "quant" for k in range(3, 600) if k % 3 != 2})
def qlinear_concat(node: OpNode) -> Iterable[Relation]:
    """Scale and zero point of Y, then those of each input behind it: each input is a run of positions of Y."""
    pieces = node.inputs[2::3]
    rank = len(node.out_shape(0))
    axis = node.attr("axis", 1) % rank
    part = " ".join("_" if k == axis else f"a{k}" for k in range(rank))
    yield Pattern(", ".join([part] * len(pieces)) + f" -> {part}", operands=(*pieces, node.outputs[0]))
    start = 0
    for name in pieces:
        size = node.shapes[name][axis]
        yield Take(name, axis, node.outputs[0], axis, np.arange(start, start + size))
        start += size


@shape(MS + "QLinearConcat", like=2)
def qlinear_concat_shape(node: OpNode) -> tuple[Shape, ...]:
    """The sum of sizes along `axis`."""
    shapes = [list(node.shapes[name]) for name in node.inputs[2::3]]
    axis = node.attr("axis", 1) % len(shapes[0])
    shapes[0][axis] = sum(one[axis] for one in shapes)
    return (tuple(shapes[0]),)


@rule(MS + "QLinearWhere", roles=dict.fromkeys((2, 3, 5, 6, 7, 8), "quant") | {0: "index"})
def qlinear_where(node: OpNode) -> Iterable[Relation]:
    """Condition, X, Y -> Z, aligned from the right; scales and zero points are one for all."""
    yield Pattern("..., ..., , , ..., , , , -> ...")


@shape(MS + "QLinearWhere", like=1)
def qlinear_where_shape(node: OpNode) -> tuple[Shape, ...]:
    """All three broadcast."""
    return (np.broadcast_shapes(node.shape(0), node.shape(1), node.shape(4)),)


@shape(MS + "QLinearSoftmax")
def qlinear_softmax_shape(node: OpNode) -> tuple[Shape, ...]:
    """Y has the shape of X."""
    return (node.shape(0),)


stand_in(MS + "QGemm", "Gemm", (0, 3))
stand_in(MS + "QLinearAdd", "Add", (0, 3))
stand_in(MS + "QLinearMul", "Mul", (0, 3))
stand_in(MS + "QLinearAveragePool", "AveragePool", (0,))
stand_in(MS + "QLinearGlobalAveragePool", "GlobalAveragePool", (0,))


@rule(MS + "MatMulNBits", roles={2: "quant", 3: "quant", 4: "index", 5: "bias"}, integers={1: (3, 0)})
def matmul_nbits(node: OpNode) -> Iterable[Relation]:
    """A (..., j p q), B (m, j p, bytes), scales (m j p), zero points (m j) -> Y (..., m): q a block, p share a byte."""
    blocks, size, rows = node.shape(1)[1], node.attrs["block_size"], node.attrs["N"]
    points = prod(node.shape(3)) // rows if node.has(3) else blocks
    shared = 1 if points == blocks else 8 // node.attr("bits", 4)
    sizes = {"m": rows, "c": blocks, "j": points, "p": shared, "q": size}
    whole, runs = (f"{node.outputs[0]}#{name}" for name in ("columns", "blocks"))  # the last ones need not be full
    yield Virtual(whole, (points * shared * size,))
    yield Virtual(runs, (points * shared,))
    yield Take(node.inputs[0], len(node.shape(0)) - 1, whole, 0, np.arange(node.shape(0)[-1]))
    yield Take(node.inputs[1], 1, runs, 0, np.arange(blocks))
    scales = "(m c)" if len(node.shape(2)) == 1 else "m c"
    group = "!" if node.has(4) else ""
    yield Pattern(f"... _, m c !, {scales}, , {group}, m -> ... m", sizes)
    zero = (("(m j)" if len(node.shape(3)) == 1 else "m j"), node.inputs[3]) if node.has(3) else ("", "")
    operands = (whole, runs, zero[1], node.inputs[1])
    yield Pattern(f"(j p q), (j p), {zero[0]} -> m _ _", sizes, fixed=("p", "q"), operands=operands)


@resize(MS + "MatMulNBits")
def matmul_nbits_sizes(this: Resizing) -> Edit | None:
    """`N` and `K` follow the rows and blocks that are left."""
    rows, columns = this.wanted[this.node.inputs[1]][0], this.wanted[this.node.inputs[0]][-1]
    before = this.dense.attrs["N"], this.dense.attrs["K"]
    return None if (rows, columns) == before else Edit(attrs={"N": rows, "K": columns})


@shape(MS + "MatMulNBits")
def matmul_nbits_shape(node: OpNode) -> tuple[Shape, ...]:
    """Y (..., N)."""
    return ((*node.shape(0)[:-1], node.attrs["N"]),)
