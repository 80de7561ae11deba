"""Operators that hold a whole block: attention in its many packings, rotary positions, skip connections with a norm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from onnxprune.ops import ANY, Edit, Resizing, resize, rule, shape, wants
from onnxprune.types import Axis, OpNode, Pattern, Relation, Shape, Take, Virtual

MS = "com.microsoft::"
SCORES = ("b", "(k r)", "s", "u")


def _lined_up(given: Shape, tokens: tuple[str, ...], sizes: Shape) -> str:
    """A mask's axes under these tokens, aligned from the right; axes of size one stretch and tie nothing."""
    count = len(given)
    pairs = zip(tokens[len(tokens) - count :], sizes[len(sizes) - count :], given, strict=True)
    return " ".join(token if size == mine else "_" for token, size, mine in pairs)


def _pattern(node: OpNode, inputs: list[str], outputs: list[str], sizes: dict[str, int], fixed: str) -> Pattern:
    text = ", ".join(inputs[: len(node.inputs)]) + " -> " + ", ".join(outputs[: len(node.outputs)])
    return Pattern(text, sizes, batch=("k", "r"), fixed=tuple(fixed.split()))


def _pieces(node: OpNode, whole: str, axis: int, widths: dict[str, int]) -> Iterable[Relation]:
    """Virtual one-axis values for consecutive runs of an axis, named `whole#piece`."""
    start = 0
    for name, width in widths.items():
        piece = f"{node.outputs[0]}#{whole}#{name}"
        yield Virtual(piece, (width,))
        yield Take(piece, 0, whole, axis, np.arange(start, start + width))
        start += width


def _blocks_left(this: Resizing, value: str, axis: int, blocks: int, start: int = 0, end: int | None = None) -> int:
    """How many of the equal blocks in a run of positions still have survivors."""
    keep = this.keep(Axis(value, axis))[start:end]
    return int(keep.reshape(blocks, -1).any(axis=1).sum())


def _scale(this: Resizing, before: int, after: int) -> dict[str, float]:
    """The scale that follows from the head size keeps its dense value, written down."""
    return {"scale": float(before**-0.5)} if before != after and not this.dense.attr("scale", 0.0) else {}


# ONNX ---------------------------------------------------------------------------------------------------------------


@rule("Attention", roles={3: "bias"})
def attention(node: OpNode) -> Iterable[Relation]:
    """Q (b, k r, s, d), K (b, k, t, d), V (b, k, t, e) -> Y (b, k r, s, e); in 3-D heads are packed into the last."""
    q, k, v = (node.shape(i) for i in range(3))
    flat = len(q) == 3
    heads, groups = (node.attrs["q_num_heads"], node.attrs["kv_num_heads"]) if flat else (q[1], k[1])
    d, e = (q[2] // heads, v[2] // groups) if flat else (q[3], v[3])
    past = node.shape(4)[2] if node.has(4) else 0
    mask = _lined_up(node.shape(3), SCORES, (q[0], heads, q[-2], k[-2] + past)) if node.has(3) else ""
    inputs = ["b s (k r d)", "b t (k d)", "b t (k e)"] if flat else ["b (k r) s d", "b k t d", "b k t e"]
    outputs = ["b s (k r e)" if flat else "b (k r) s e", "b k u d", "b k u e", " ".join(SCORES)]
    sizes = {"k": groups, "r": heads // groups, "d": d, "e": e}
    yield _pattern(node, [*inputs, mask, "b k p d", "b k p e"], outputs, sizes, "s t u p")


@wants("Attention")
def attention_wants(node: OpNode) -> Mapping[int, Sequence[int]]:
    """Caches (b, k, p, d) and (b, k, p, e); a mask over past and present keys."""
    q, k, v = (node.shape(i) for i in range(3))
    groups = node.attrs["kv_num_heads"] if len(q) == 3 else k[1]
    d, e = (k[2] // groups, v[2] // groups) if len(q) == 3 else (k[3], v[3])
    return _cached(node, 4, (q[0], groups, d, e), k[-2], 3)


def _cached(
    node: OpNode, at: int, sizes: tuple[int, int, int, int], fresh: int, mask: int, past: int | None = None
) -> dict[int, Sequence[int]]:
    """Shapes of a cache of keys at input `at` and one of values behind it, and of a mask over all keys."""
    b, k, d, e = sizes
    if not node.has(at):
        return {}
    given = node.shape(at)
    past = given[2] if past is None else past
    found: dict[int, Sequence[int]] = {at: (b, k, past, d)}
    if node.has(at + 1):
        found[at + 1] = (b, k, past, e)
    if node.has(mask) and node.inputs[mask] in node.shapes:
        found[mask] = (*[ANY] * (len(node.shape(mask)) - 1), past + fresh)
    return found


@resize("Attention")
def attention_heads(this: Resizing) -> Edit | None:
    """Head counts where they are attributes; the scale keeps the dense head size."""
    dense, wanted = this.dense, this.wanted
    before, after = dense.shape(0), wanted[dense.inputs[0]]
    if len(before) == 4:
        attrs = _scale(this, before[3], after[3])
        return Edit(attrs=attrs) if attrs else None
    heads, groups = dense.attrs["q_num_heads"], dense.attrs["kv_num_heads"]
    left = _blocks_left(this, dense.inputs[0], 2, heads), _blocks_left(this, dense.inputs[1], 2, groups)
    scale = _scale(this, before[2] // heads, after[2] // left[0])
    if left == (heads, groups) and not scale:
        return None
    return Edit(attrs={"q_num_heads": left[0], "kv_num_heads": left[1], **scale})


@rule("RotaryEmbedding", roles={1: "index", 2: "index"})
def rotary(node: OpNode) -> Iterable[Relation]:
    """X (b, h, s, d) or (b, s, h d), cosine and sine tables -> Y: positions of a head are turned in pairs, and stay."""
    yield _rotary(node, node.attr("num_heads", 0), ["! !", "! !", "! !"])


def _rotary(node: OpNode, heads: int, others: list[str]) -> Pattern:
    x = node.shape(0)
    part = "b h s d" if len(x) == 4 else "b s (h d)"
    sizes = {"h": heads, "d": x[2] // heads} if len(x) == 3 else {}
    rest = [" ".join("!" for _ in node.shape(k)) if node.has(k) else "" for k in range(1, len(node.inputs))]
    return Pattern(f"{', '.join([part, *rest])} -> {part}", sizes, batch=("h",), fixed=("d", "s"))


@resize("RotaryEmbedding", MS + "RotaryEmbedding")
def rotary_heads(this: Resizing) -> Edit | None:
    """`num_heads` follows where it is written down."""
    heads = this.dense.attr("num_heads", 0)
    if not heads or len(this.dense.shape(0)) == 4:
        return None
    left = _blocks_left(this, this.dense.inputs[0], 2, heads)
    return None if left == heads else Edit(attrs={"num_heads": left})


@shape("RotaryEmbedding", MS + "RotaryEmbedding", MS + "BiasGelu", MS + "FastGelu")
def same(node: OpNode) -> tuple[Shape, ...]:
    """Y has the shape of X."""
    return (node.shape(0),)


# ONNX Runtime -------------------------------------------------------------------------------------------------------


@rule(MS + "RotaryEmbedding", roles={2: "index", 3: "index"})
def ms_rotary(node: OpNode) -> Iterable[Relation]:
    """X (b, h, s, d) or (b, s, h d), positions, tables -> Y: positions of a head are turned in pairs, and stay."""
    heads = node.attr("num_heads", 0) or node.shape(0)[-1] // (2 * node.shape(2)[-1])
    yield _rotary(node, heads, [])


@rule(MS + "Attention", roles={2: "bias", 5: "bias"})
def packed_attention(node: OpNode) -> Iterable[Relation]:
    """X (b, s, i), W (i, q k v), bias (q k v) -> Y (b, s, h e): q, k and v side by side, heads first in each."""
    heads = node.attrs["num_heads"]
    widths = _packed_widths(node)
    sizes = {"k": heads, "r": 1, "d": widths["q"] // heads, "e": widths["v"] // heads}
    packed = ((node.inputs[1], 1), *(((node.inputs[2], 0),) if node.has(2) else ()))
    for whole, axis in packed:
        yield from _pieces(node, whole, axis, widths)
    operands = (*(f"{node.outputs[0]}#{whole}#{name}" for whole, _ in packed for name in widths), node.outputs[0])
    pieces = ", ".join(["(k d), (k d), (k e)"] * len(packed))
    yield Pattern(f"{pieces} -> _ _ (k e)", sizes, batch=("k", "r"), operands=operands)
    bias = ""
    if node.has(5):
        x = node.shape(0)
        bias = _lined_up(node.shape(5), ("_", "k", "_", "_"), (x[0], heads, x[1], node.shape(5)[-1]))
    inputs = ["b s i", "i _", "_", "!", "! b k p d", bias, "!"]
    yield _pattern(node, inputs, ["b s (k e)", "! b k u d"], sizes, "s p u")


def _packed_widths(node: OpNode) -> dict[str, int]:
    total = node.shape(1)[1]
    given = node.attr("qkv_hidden_sizes") or (total // 3,) * 3
    return dict(zip("qkv", given, strict=True))


@resize(MS + "Attention")
def packed_attention_heads(this: Resizing) -> Edit | None:
    """`num_heads` and, where they are given, the three widths; the scale keeps the dense head size."""
    dense = this.dense
    heads, widths = dense.attrs["num_heads"], _packed_widths(dense)
    keep = this.keep(Axis(dense.inputs[1], 1))
    if keep.all():
        return None
    left = _blocks_left(this, dense.inputs[1], 1, heads, 0, widths["q"])
    now, start = [], 0
    for width in widths.values():
        now.append(int(keep[start : start + width].sum()))
        start += width
    attrs: dict[str, object] = {"num_heads": left, **_scale(this, widths["q"] // heads, now[0] // left)}
    if dense.attr("qkv_hidden_sizes") or len(set(now)) > 1:
        attrs["qkv_hidden_sizes"] = tuple(now)
    return Edit(attrs=attrs)


@shape(MS + "Attention")
def packed_attention_shape(node: OpNode) -> tuple[Shape, ...]:
    """Y (b, s, v)."""
    return ((*node.shape(0)[:2], _packed_widths(node)["v"]),)


@rule(MS + "MultiHeadAttention", roles={3: "bias", 5: "bias"})
def multi_head_attention(node: OpNode) -> Iterable[Relation]:
    """Q (b, s, h d), K (b, t, h d), V (b, t, h e), bias over all three -> Y (b, s, h e)."""
    heads, q = node.attrs["num_heads"], node.shape(0)
    if len(q) != 3 or not node.has(2) or len(node.shape(1)) != 3 or len(node.shape(2)) != 3:
        return  # packed into five axes, or keys from a cache: heads stay
    widths = {"q": q[2], "k": node.shape(1)[2], "v": node.shape(2)[2]}
    sizes = {"k": heads, "r": 1, "d": q[2] // heads, "e": widths["v"] // heads}
    if node.has(3):
        whole = node.inputs[3]
        yield from _pieces(node, whole, 0, widths)
        operands = (*(f"{node.outputs[0]}#{whole}#{name}" for name in widths), *node.inputs[:3])
        yield Pattern(
            "(k d), (k d), (k e) -> _ _ (k d), _ _ (k d), _ _ (k e)", sizes, batch=("k", "r"), operands=operands
        )
    bias = _lined_up(node.shape(5), SCORES, (q[0], heads, q[1], node.shape(5)[-1])) if node.has(5) else ""
    mask = " ".join("!" for _ in node.shape(4)) if node.has(4) else ""
    inputs = ["b s (k d)", "b t (k d)", "b t (k e)", "_", mask, bias, "b k p d", "b k p e"]
    yield _pattern(node, inputs, ["b s (k e)", "b k u d", "b k u e"], sizes, "s t u p")


@resize(MS + "MultiHeadAttention")
def multi_head_attention_heads(this: Resizing) -> Edit | None:
    """`num_heads` follows; the scale keeps the dense head size."""
    dense = this.dense
    heads, width, now = dense.attrs["num_heads"], dense.shape(0)[-1], this.wanted[dense.inputs[0]][-1]
    if len(dense.shape(0)) != 3 or width == now:
        return None
    left = _blocks_left(this, dense.inputs[0], 2, heads)
    return Edit(attrs={"num_heads": left, **_scale(this, width // heads, now // left)})


@wants(MS + "MultiHeadAttention")
def multi_head_attention_wants(node: OpNode) -> Mapping[int, Sequence[int]]:
    """Caches (b, h, p, d) and (b, h, p, e); a bias over past and present keys."""
    q, heads = node.shape(0), node.attrs["num_heads"]
    if len(q) != 3 or not node.has(2) or len(node.shape(1)) != 3 or len(node.shape(2)) != 3:
        return {}
    widths = node.shape(1)[2] // heads, node.shape(2)[2] // heads
    return _cached(node, 6, (q[0], heads, *widths), node.shape(1)[1], 5)


@shape(MS + "MultiHeadAttention")
def multi_head_attention_shape(node: OpNode) -> tuple[Shape, ...]:
    """Y (b, s, v); caches grow by the new keys."""
    q, k, v = node.shape(0), node.shape(1), node.shape(2)
    heads = node.attrs["num_heads"]
    past = node.shape(6)[2] if node.has(6) else 0
    cache = [(q[0], heads, past + k[1], width // heads) for width in (k[2], v[2])]
    return ((*q[:2], v[2]), *cache)


@rule(MS + "GroupQueryAttention", roles={7: "index", 8: "index", 10: "bias", 11: "bias"})
def group_query_attention(node: OpNode) -> Iterable[Relation]:
    """Q (b, s, k r d), K and V (b, t, k d), or all three side by side in Q; caches (b, k, p, d) -> Y (b, s, k r d)."""
    heads, groups, d = _group_query_sizes(node)
    sizes = {"k": groups, "r": heads // groups, "d": d}
    fixed = "s t u p d" if node.attr("do_rotary", 0) or node.has(3) else "s t u p"
    packed = not node.has(1)
    if packed:
        whole = node.inputs[0]
        yield from _pieces(node, whole, 2, {"q": heads * d, "k": groups * d, "v": groups * d})
        operands = (*(f"{node.outputs[0]}#{whole}#{name}" for name in "qkv"), node.outputs[0])
        yield Pattern("(k r d), (k d), (k d) -> _ _ (k r d)", sizes, batch=("k", "r"), operands=operands)
    others = [" ".join("!" for _ in node.shape(k)) if node.has(k) else "" for k in range(5, len(node.inputs))]
    if node.has(10):
        others[5] = _lined_up(node.shape(10), SCORES, (*node.shape(0)[:1], heads, *node.shape(10)[-2:]))
    if node.has(11):
        others[6] = "(k r)"
    inputs = ["b s _" if packed else "b s (k r d)", "b t (k d)", "b t (k d)", "b k p d", "b k p d", *others]
    yield _pattern(node, inputs, ["b s (k r d)", "b k u d", "b k u d"], sizes, fixed)


def _group_query_sizes(node: OpNode) -> tuple[int, int, int]:
    heads, groups = node.attrs["num_heads"], node.attrs["kv_num_heads"]
    return heads, groups, node.shape(0)[-1] // (heads if node.has(1) else heads + 2 * groups)


@resize(MS + "GroupQueryAttention")
def group_query_attention_heads(this: Resizing) -> Edit | None:
    """`num_heads` and `kv_num_heads` follow; the scale keeps the dense head size."""
    dense = this.dense
    heads, groups, d = _group_query_sizes(dense)
    keep = this.keep(Axis(dense.outputs[0], 2))
    if keep.all():
        return None
    blocks = keep.reshape(groups, heads // groups, d)
    left = int(blocks.any(axis=(1, 2)).sum())
    ratio = int(blocks.any(axis=2).sum()) // left
    scale = _scale(this, d, int(keep.sum()) // (left * ratio))
    return Edit(attrs={"num_heads": left * ratio, "kv_num_heads": left, **scale})


@shape(MS + "GroupQueryAttention")
def group_query_attention_shape(node: OpNode) -> tuple[Shape, ...]:
    """Y (b, s, heads x head size); caches grow by the new keys."""
    heads, groups, d = _group_query_sizes(node)
    x = node.shape(0)
    cache = (x[0], groups, (node.shape(3)[2] if node.has(3) else 0) + x[1], d)
    return ((*x[:2], heads * d), cache, cache)


@wants(MS + "GroupQueryAttention")
def group_query_attention_wants(node: OpNode) -> Mapping[int, Sequence[int]]:
    """Caches (b, k, p, d) of which p and the new keys are all keys; several new ones after others in batches of one."""
    _, groups, d = _group_query_sizes(node)
    b, s, _ = node.shape(0)
    total = node.const(6)
    past = int(total.reshape(-1)[0]) - s if total is not None else None
    if s > 1 and past != 0:
        b = 1
    if node.attr("sliding_window_cache", 0):  # a ring as long as the window; beyond that nothing is written
        past = node.attrs["local_window_size"]
    return {0: (b, ANY, ANY)} | _cached(node, 3, (b, groups, d, d), s, 10, past)


@rule(MS + "SkipLayerNormalization", roles={2: "norm", 3: "norm", 4: "bias"})
def skip_layer_norm(node: OpNode) -> Iterable[Relation]:
    """X, skip (b, s, c), gain, shift, bias (c) -> Y, mean, deviation, X + skip: averaged over c, which mixes."""
    yield _skip_norm(node, ["c", "c", "c"])


@rule(MS + "SkipSimplifiedLayerNormalization", roles={2: "norm", 3: "bias"})
def skip_rms_norm(node: OpNode) -> Iterable[Relation]:
    """X, skip (b, s, c), gain, bias (c) -> Y, mean, deviation, X + skip: averaged over c, which mixes."""
    yield _skip_norm(node, ["c", "c"])


def _skip_norm(node: OpNode, vectors: list[str]) -> Pattern:
    rank = len(node.shape(0))
    x = " ".join([*(f"a{k}" for k in range(rank - 1)), "c"])
    same = x if node.shape(1) == node.shape(0) else " ".join(["_"] * (len(node.shape(1)) - 1) + ["c"])
    inputs = [x, same, *vectors][: len(node.inputs)]
    outputs = [x, "...", "...", x][: len(node.outputs)]
    return Pattern(", ".join(inputs) + " -> " + ", ".join(outputs), mixes=("c",))


@shape(MS + "SkipLayerNormalization", MS + "SkipSimplifiedLayerNormalization")
def skip_norm_shape(node: OpNode) -> tuple[Shape, ...]:
    """Y and the sum have the shape of X."""
    x = node.shape(0)
    mean = (*x[:-1], 1)
    return (x, mean, mean, x)


@rule(MS + "EmbedLayerNormalization", roles={5: "norm", 6: "norm", 7: "index"})
def embed_layer_norm(node: OpNode) -> Iterable[Relation]:
    """Ids (b, s), segments, three tables (n, c), gain, shift (c) -> Y (b, s, c): averaged over c, which mixes."""
    inputs = ["b s", "b s", "! c", "! c", "! c", "c", "c", "! !", "! !"]
    text = ", ".join(inputs[: len(node.inputs)]) + " -> " + ", ".join(["b s c", "!", "b s c"][: len(node.outputs)])
    yield Pattern(text, mixes=("c",))


@shape(MS + "EmbedLayerNormalization", like=2)
def embed_layer_norm_shape(node: OpNode) -> tuple[Shape, ...]:
    """Y (b, s, c)."""
    return ((*node.shape(0), node.shape(2)[1]), node.shape(0)[:1], (*node.shape(0), node.shape(2)[1]))


@rule(MS + "BiasGelu", MS + "FastGelu", roles={1: "bias"})
def bias_gelu(node: OpNode) -> Iterable[Relation]:
    """X (..., c), bias (c) -> gelu(X + bias)."""
    yield Pattern(("..., ..." if node.has(1) else "...") + " -> ...")
