"""Quantised forms: scales and zero points lie along the channels they scale."""

from __future__ import annotations

from collections.abc import Iterable

from onnxprune.ops import Edit, Resizing, resize, rule, shape, stand_in
from onnxprune.types import OpNode, Pattern, Relation, Shape

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


@rule("QLinearConv", roles=dict.fromkeys((1, 2, 4, 5, 6, 7), "quant") | {8: "bias"}, integers={3: (5, 0), 8: None})
def qlinear_conv(node: OpNode) -> Iterable[Relation]:
    """As Conv, with scales and zero points for X, W (one for all, or one for each filter) and Y."""
    groups = node.attr("group", 1)
    out, inside = node.shape(3)[:2]
    sizes = {"g": groups, "i": inside, "o": out // groups}
    x, w, m = ("n (g i) *", "(g o) i *", "(g o)") if groups > 1 else ("n i *", "o i *", "o")
    vectors = [_vector(node, k, m) if node.shape(k) == (out,) else "" for k in (4, 5)]
    avoid = ("g",) if inside > 1 and out > groups else ()
    yield Pattern(f"{x}, , , {w}, {', '.join(vectors)}, , , {m} -> n {m} *", sizes, avoid=avoid)


@resize("QLinearConv")
def qlinear_conv_group(this: Resizing) -> Edit | None:
    """`group` follows from the channels that X keeps and those that one filter reads."""
    groups = this.dense.attr("group", 1)
    now = this.wanted[this.node.inputs[0]][1] // this.wanted[this.node.inputs[3]][1]
    return None if groups in (1, now) else Edit(attrs={"group": now})


@rule("ConvInteger", roles={2: "quant", 3: "quant"}, integers={1: (3, 0)})
def conv_integer(node: OpNode) -> Iterable[Relation]:
    """X (n, i, *s), W (o, i, *k) -> Y (n, o, *s) int32, each less its zero point; groups freeze."""
    if node.attr("group", 1) == 1:
        yield Pattern(f"n i *, o i *, , {_vector(node, 3, 'o')} -> n o *")


def _product(a: int, b: int) -> tuple[str, str, str]:
    left = "k" if a == 1 else "... n k"
    right = "k" if b == 1 else "... k m"
    return left, right, " ".join(part for part in ("...", "n" if a > 1 else "", "m" if b > 1 else "") if part)


@rule("QLinearMatMul", roles=dict.fromkeys((1, 2, 4, 5, 6, 7), "quant"), integers={0: (2, -2), 3: (5, -1)})
def qlinear_matmul(node: OpNode) -> Iterable[Relation]:
    """As MatMul, with scales and zero points for A, B (one for all, or one for each column) and Y."""
    left, right, out = _product(len(node.shape(0)), len(node.shape(3)))
    columns = node.shape(3)[-1:]
    vectors = ["m" if node.shape(k) == columns else "" for k in (4, 5)]
    if all(len(node.shape(k)) == 0 or node.shape(k) == (1,) for k in (1, 2)):
        yield Pattern(f"{left}, , , {right}, {', '.join(vectors)}, , -> {out}")


@rule("MatMulInteger", roles={2: "quant", 3: "quant"}, integers={0: (2, -2), 1: (3, -1)})
def matmul_integer(node: OpNode) -> Iterable[Relation]:
    """As MatMul, in integers, each side less its zero point."""
    left, right, out = _product(len(node.shape(0)), len(node.shape(1)))
    yield Pattern(f"{left}, {right}, , {_vector(node, 3, 'm')} -> {out}")


@rule(MS + "MatMulIntegerToFloat", roles=dict.fromkeys((2, 3, 4, 5), "quant") | {6: "bias"}, integers={1: (5, -1)})
def matmul_integer_to_float(node: OpNode) -> Iterable[Relation]:
    """As MatMul; B's scale and zero point are one for all or one for each column, bias (m)."""
    left, right, out = _product(len(node.shape(0)), len(node.shape(1)))
    yield Pattern(f"{left}, {right}, , {_vector(node, 3, 'm')}, , {_vector(node, 5, 'm')}, m -> {out}")


@rule(MS + "DynamicQuantizeMatMul", roles={2: "quant", 3: "quant", 4: "bias"}, integers={1: (3, -1)})
def dynamic_quantize_matmul(node: OpNode) -> Iterable[Relation]:
    """As MatMul of a float A that is quantised on the way; bias (m)."""
    left, right, out = _product(len(node.shape(0)), len(node.shape(1)))
    yield Pattern(f"{left}, {right}, {_vector(node, 2, 'm')}, {_vector(node, 3, 'm')}, m -> {out}")


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


stand_in(MS + "QGemm", "Gemm", (0, 3))
stand_in(MS + "QLinearAdd", "Add", (0, 3))
stand_in(MS + "QLinearMul", "Mul", (0, 3))
stand_in(MS + "QLinearAveragePool", "AveragePool", (0,))
stand_in(MS + "QLinearGlobalAveragePool", "GlobalAveragePool", (0,))


@rule(MS + "MatMulNBits", roles={2: "quant", 3: "quant", 4: "index", 5: "bias"}, integers={1: (3, 0)})
def matmul_nbits(node: OpNode) -> Iterable[Relation]:
    """A (..., j q), B (m, j, bytes), scales (m j), zero points -> Y (..., m): m is free, j in whole blocks."""
    blocks, size = node.shape(1)[1], node.attrs["block_size"]
    a = "... (j q)" if node.shape(0)[-1] == blocks * size else "... !"
    sizes = {"j": blocks, "q": size, "m": node.attrs["N"]}
    scales = "(m j)" if len(node.shape(2)) == 1 else "m j"
    zero, fixed = "", ["q"]
    if node.has(3):
        zero, whole = _zero_points(node, blocks)
        fixed += ["j"] if not whole else []
    group = "!" if node.has(4) else ""
    yield Pattern(f"{a}, m j !, {scales}, {zero}, {group}, m -> ... m", sizes, fixed=tuple(fixed))


def _zero_points(node: OpNode, blocks: int) -> tuple[str, bool]:
    """The part of the zero points, and whether one block of them can be taken out: not where two share a byte."""
    given = node.shape(3)
    if len(given) == 2:
        return ("m j", True) if given[1] == blocks else ("m _", False)
    return ("(m j)", True) if given[0] == node.attrs["N"] * blocks else ("!", False)


@resize(MS + "MatMulNBits")
def matmul_nbits_sizes(this: Resizing) -> Edit | None:
    """`N` and `K` follow the rows and blocks that are left."""
    rows, blocks = this.wanted[this.node.inputs[1]][:2]
    before = this.dense.shape(1)
    if (rows, blocks) == before[:2]:
        return None
    size = this.dense.attrs["block_size"]
    columns = this.dense.attrs["K"] if blocks == before[1] else blocks * size
    return Edit(attrs={"N": rows, "K": columns})


@shape(MS + "MatMulNBits")
def matmul_nbits_shape(node: OpNode) -> tuple[Shape, ...]:
    """Y (..., N)."""
    return ((*node.shape(0)[:-1], node.attrs["N"]),)
