"""Changes of basis: exact where the data has no more directions than stay, refused where something sees positions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper, parser

import onnxprune
from onnxprune import feeds, quality, reconstruct
from onnxprune.allocate import rotated, started
from onnxprune.analysis import Analysis
from onnxprune.audit import verify
from onnxprune.bases import Bases
from onnxprune.errors import ImpossibleError
from onnxprune.layerwise import Repair
from onnxprune.recipe import Options
from onnxprune.recovery import Recovery
from onnxprune.rows import ROWS
from onnxprune.types import Plan
from onnxprune.worker import Worker

ort.set_default_logger_severity(4)
RNG = np.random.default_rng(5)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(seconds=60) as made:
        yield made


def low(rows: int, heads: int, size: int, rank: int, spread: float = 0.5) -> np.ndarray:
    """float32[rows, heads * size]: of every head only `rank` directions."""
    parts = [RNG.standard_normal((rows, rank)) @ RNG.standard_normal((rank, size)) for _ in range(heads)]
    return (np.concatenate(parts, axis=1) * spread / np.sqrt(rows * rank / 4)).astype(np.float32)


def full(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def analysis(
    folder: Path, inputs: str, outputs: str, body: str, remove: tuple[str, ...], opset: int = 18, **weights: object
) -> Analysis:
    text = f'<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    model = parser.parse_model(text)
    for name, array in weights.items():
        if name in body:
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    path = folder / "m.onnx"
    onnx.save(model, path)
    return Analysis(path, remove=remove)


def cut(
    of: Analysis, kind: str, left: int, worker: Worker, fit: bool = False, means: bool = False
) -> tuple[Bases, ir.Model, float]:
    """Leave as many units of every group of a kind: (bases, the repaired model, relative error on other samples).

    Without `fit` the weights are only those that the basis gives; with `means` norms need not take the mean off.
    """
    groups = [group for group in of.groups if group.kind == kind]
    assert groups, [group.kind for group in of.groups]
    plan = Plan({g.id: np.isin(np.arange(len(g.units)), RNG.permutation(len(g.units))[:left]) for g in groups})
    pruned = of.rewrite(plan)
    shapes = of.prepared.facts.shapes
    fed = [feeds.random_feed(of.dense.graph, shapes, seed) for seed in range(60)]
    recovery = Recovery(of, fed[:48], Options(ratio=0.5, calibration="given"), worker)
    assert recovery.bases is not None
    recovery.bases.means = recovery.bases.removable() if means else frozenset()
    start = started(of, plan, pruned, recovery.bases)
    recovery._begin(recovery.samples.feeds, (), ROWS)
    how = recovery.reconstructor if fit else None
    found: Repair = reconstruct.repair(worker, start.model, start.sites, how, start=start.arrays)
    model = start.model.clone()
    reconstruct.apply(model, found.changes)
    return recovery.bases, model, apart(of.dense, model, fed[48:])


def apart(dense: ir.Model, model: ir.Model, fed: list[dict[str, np.ndarray]]) -> float:
    """The relative error of a model's outputs on these feeds."""
    sessions = (ort.InferenceSession(ir.serde.serialize_model(m).SerializeToString()) for m in (dense, model))
    wanted, found = (
        [dict(zip((o.name for o in s.get_outputs()), s.run(None, feed), strict=True)) for feed in fed] for s in sessions
    )
    return quality.relative_error(found, wanted, None)


# Heads ---------------------------------------------------------------------------------------------------------------

ATTENTION = (
    "q1 = Reshape(q0, split) k1 = Reshape(k0, split) v1 = Reshape(v0, split) "
    "q = Transpose<perm = [0,2,1,3]>(q1) k = Transpose<perm = [0,2,3,1]>(k1) v = Transpose<perm = [0,2,1,3]>(v1) "
    "s0 = MatMul(q, k) s = Mul(s0, scale) p = Softmax(s) c0 = MatMul(p, v) c1 = Transpose<perm = [0,2,1,3]>(c0) "
    "c = Reshape(c1, join) "
)
PLAIN = "q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv) "
BIASED = "q2 = MatMul(x, wq) q0 = Add(q2, bq) k2 = MatMul(x, wk) k0 = Add(bk, k2) v2 = MatMul(x, wv) v0 = Add(v2, bv) "
SIZES = {"split": i64(0, 0, 3, 7), "join": i64(0, 0, -1), "scale": np.float32(0.6)}


def heads(rank: int, **more: object) -> dict[str, object]:
    """Weights of attention over 3 heads of 7 of which queries are whole, keys and values of low rank."""
    return {"wq": full(11, 21), "bq": full(21), "wk": low(11, 3, 7, rank), "bk": full(21), "wv": low(11, 3, 7, rank),
            "bv": full(21), "wo": full(21, 5), "bo": full(5), **SIZES, **more}  # fmt: skip


@pytest.mark.parametrize(
    ("body", "fit"),
    [
        (PLAIN + ATTENTION + "y = MatMul(c, wo)", False),
        (PLAIN + ATTENTION + "y0 = MatMul(c, wo) y = Add(y0, bo)", False),
        (BIASED + ATTENTION + "y0 = MatMul(c, wo) y = Add(y0, bo)", False),
        (BIASED + ATTENTION + "y0 = MatMul(c, wo) y = Add(y0, bo)", True),
        (BIASED + ATTENTION + "y = MatMul(c, wo)", False),
        (PLAIN + ATTENTION + "d = Reshape(c, flat) e = Gemm(d, wo, bo) y = Reshape(e, back)", False),
    ],
)
def test_a_head_gives_up_what_it_does_not_use(body: str, fit: bool, worker: Worker, tmp_path: Path) -> None:
    given = heads(3, flat=i64(-1, 21), back=i64(-1, 6, 5))
    model = analysis(tmp_path, "float[n,6,11] x", "float[n,6,5] y", body, ("head-dim",), **given)
    bases, _, error = cut(model, "head-dim", 4, worker, fit)
    assert len(bases.heads) == 2
    assert error < (0.02 if fit else 1e-3)


@pytest.mark.parametrize("count", [1, 3])
def test_heads_that_share_keys_and_values(count: int, worker: Worker, tmp_path: Path) -> None:
    """Grouped queries (3 of 6), and one for all."""
    body = (
        "q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv) q1 = Reshape(q0, six) k1 = Reshape(k0, few) "
        "v1 = Reshape(v0, few) q = Transpose<perm = [0,2,1,3]>(q1) k2 = Transpose<perm = [0,2,1,3]>(k1) "
        "v2 = Transpose<perm = [0,2,1,3]>(v1) k3 = Unsqueeze(k2, two) v3 = Unsqueeze(v2, two) k4 = Expand(k3, many) "
        "v4 = Expand(v3, many) k5 = Reshape(k4, all) v = Reshape(v4, all) k = Transpose<perm = [0,1,3,2]>(k5) "
        "s = MatMul(q, k) p = Softmax(s) c0 = MatMul(p, v) c1 = Transpose<perm = [0,2,1,3]>(c0) c = Reshape(c1, join) "
        "y = MatMul(c, wo)"
    )
    model = analysis(
        tmp_path, "float[n,5,11] x", "float[n,5,4] y", body, ("head-dim",),
        wq=full(11, 42), wk=low(11, count, 7, 3), wv=low(11, count, 7, 3), wo=full(42, 4), six=i64(0, 0, 6, 7),
        few=i64(0, 0, count, 7), two=i64(2), many=i64(1, count, 6 // count, 5, 7), all=i64(-1, 6, 5, 7),
        join=i64(0, 0, 42),
    )  # fmt: skip
    bases, _, error = cut(model, "head-dim", 3, worker)
    assert len(bases.heads) == 2
    assert error < 1e-3


@pytest.mark.parametrize("order", ["3hd", "h3d"])
def test_one_projection_for_all_three(order: str, worker: Worker, tmp_path: Path) -> None:
    weight = np.concatenate([full(11, 21), low(11, 3, 7, 3), low(11, 3, 7, 3)], axis=1).reshape(11, 3, 3, 7)
    perm, split, axes = (
        ("[2,0,3,1,4]", (0, 0, 3, 3, 7), "3hd") if order == "3hd" else ("[3,0,2,1,4]", (0, 0, 3, 3, 7), "h3d")
    )
    weight = weight if axes == "3hd" else weight.transpose(0, 2, 1, 3)
    body = (
        f"a0 = MatMul(x, w) a = Add(a0, b) d = Reshape(a, split) e = Transpose<perm = {perm}>(d) "
        "q = Gather<axis = 0>(e, i0) k1 = Gather<axis = 0>(e, i1) v = Gather<axis = 0>(e, i2) "
        "k = Transpose<perm = [0,1,3,2]>(k1) s = MatMul(q, k) p = Softmax(s) c0 = MatMul(p, v) "
        "c1 = Transpose<perm = [0,2,1,3]>(c0) c = Reshape(c1, join) y0 = MatMul(c, wo) y = Add(y0, bo)"
    )
    numbers = {f"i{k}": np.array(k, np.int64) for k in range(3)}
    model = analysis(
        tmp_path, "float[n,6,11] x", "float[n,6,5] y", body, ("head-dim",), w=weight.reshape(11, 63),
        b=np.zeros(63, np.float32), wo=full(21, 5), bo=full(5), split=i64(*split), join=i64(0, 0, 21), **numbers,
    )  # fmt: skip
    bases, _, error = cut(model, "head-dim", 3, worker)
    assert len(bases.heads) == 2
    assert error < 1e-3


def test_heads_folded_into_the_batch_with_a_scale_on_the_queries(worker: Worker, tmp_path: Path) -> None:
    move = "{0}1 = Reshape({0}0, split) {0}2 = Transpose<perm = [0,2,1,3]>({0}1) {0}3 = Reshape({0}2, fold) "
    body = (
        PLAIN.replace("q0 =", "q9 =") + "q0 = Mul(q9, scale) " + "".join(move.format(name) for name in "qkv")
        + "k = Transpose<perm = [0,2,1]>(k3) s = MatMul(q3, k) p = Softmax(s) c0 = MatMul(p, v3) "
        "c1 = Reshape(c0, unfold) c2 = Transpose<perm = [0,2,1,3]>(c1) c = Reshape(c2, join) y = MatMul(c, wo)"
    )  # fmt: skip
    given = heads(3, fold=i64(-1, 6, 7), unfold=i64(-1, 3, 6, 7))
    model = analysis(tmp_path, "float[n,6,11] x", "float[n,6,5] y", body, ("head-dim",), **given)
    bases, _, error = cut(model, "head-dim", 3, worker)
    assert len(bases.heads) == 2
    assert error < 1e-3


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("n = LayerNormalization(q, g) s9 = MatMul(n, k)", 1),  # a norm on the queries
        ("n = Mul(q, g) s9 = MatMul(n, k)", 1),  # a gain for each position
        ("n = Mul(q, cos) r = Neg(q) m = Mul(r, sin) z = Add(n, m) s9 = MatMul(z, k)", 1),
    ],
)
def test_queries_that_are_more_than_moved_lose_positions(text: str, left: int, worker: Worker, tmp_path: Path) -> None:
    body = (
        BIASED + ATTENTION.replace("s0 = MatMul(q, k)", text.replace("s9", "s0")) + "y0 = MatMul(c, wo) y = Add(y0, bo)"
    )
    given = heads(3, g=full(7), cos=full(6, 7), sin=full(6, 7))
    model = analysis(tmp_path, "float[n,6,11] x", "float[n,6,5] y", body, ("head-dim",), **given)
    bases = Bases(model)
    assert len(bases.heads) == left  # values, and nothing else
    assert all(h.reader for h in bases.heads)
    if any(group.kind == "head-dim" for group in model.groups):
        _, _, error = cut(model, "head-dim", 5, worker, fit=True)
        assert error < 0.8


# Width ---------------------------------------------------------------------------------------------------------------


def stream(rank: int = 4, size: int = 13, **more: object) -> dict[str, object]:
    """Weights of a block of this width, of which tokens use only `rank` directions."""
    basis = RNG.standard_normal((rank, size))
    basis -= basis.mean(axis=1, keepdims=True)

    def inside(rows: int) -> np.ndarray:
        return (RNG.standard_normal((rows, rank)) @ basis / np.sqrt(rows)).astype(np.float32)

    return {"w0": inside(7), "b0": inside(1)[0], "g1": full(size) + 2, "s1": full(size), "w1": full(size, 17),
            "b1": full(17), "w2": inside(17), "b2": inside(1)[0], "g2": full(size) + 2, "s2": full(size),
            "w3": full(size, 3), "b3": full(3), "e": inside(5).reshape(1, 5, size), "g9": full(size) + 2,
            "g8": full(5, size), **more}  # fmt: skip


BLOCK = (
    "a0 = MatMul(x, w0) a1 = Add(a0, b0) a = Add(a1, e) c = LayerNormalization(a, g1, s1) d0 = MatMul(c, w1) "
    "d1 = Add(d0, b1) d = Relu(d1) h0 = MatMul(d, w2) h1 = Add(h0, b2) h = Add(a, h1) "
)
END = "f = LayerNormalization(h, g2, s2) y0 = MatMul(f, w3) y = Add(y0, b3)"


@pytest.mark.parametrize("shifts", [True, False])
def test_a_width_gives_up_what_its_tokens_do_not_use(shifts: bool, worker: Worker, tmp_path: Path) -> None:
    body = BLOCK + END if shifts else (BLOCK + END).replace(", s1)", ")").replace(", s2)", ")")
    model = analysis(tmp_path, "float[n,5,7] x", "float[n,5,3] y", body, ("width",), **stream())
    bases, _, error = cut(model, "width", 5, worker)
    assert len(bases.widths) == 1
    assert error < 1e-3
    _, _, error = cut(model, "width", 4, worker, fit=True)
    assert error < 0.8


SCALED = BLOCK.replace("h = Add(a, h1)", "{} h = Add(a, h9)")


@pytest.mark.parametrize(
    ("steps", "end"),
    [
        ("h9 = Mul(h1, g9)", END),
        ("h7 = Mul(g9, h1) h8 = Add(h7, b8) h9 = Mul(h8, g8)", END),
        ("h9 = Mul(h1, g9)", END.replace("y = Add(y0, b3)", "y1 = Mul(y0, c3) y = Add(y1, b3)")),
        ("h9 = Mul(h1, g9)", END.replace("y = Add(y0, b3)", "y1 = Add(b3, y0) y = Mul(y1, c3)")),
        ("h9 = Mul(h1, g9)", END.replace("y = Add(y0, b3)", "y = Mul(y0, c3)")),
    ],
)
def test_a_gain_behind_an_operator_folds_into_it(steps: str, end: str, worker: Worker, tmp_path: Path) -> None:
    """A layer's scale, say; what is written lies in few directions after it."""
    given = stream(g8=full(13) + 2, b8=full(13), c3=full(3) + 1)
    given["w0"], given["e"] = 0.01 * np.asarray(given["w0"]), 0.01 * np.asarray(given["e"])
    model = analysis(tmp_path, "float[n,5,7] x", "float[n,5,3] y", SCALED.format(steps) + end, ("width",), **given)
    bases, _, error = cut(model, "width", 12, worker)
    assert len(bases.widths) == 1
    assert error < 1e-3


PLAIN_BLOCK = BLOCK.replace("d1 = Add(d0, b1) d = Relu(d1)", "d = Relu(d0)")  # a reader without a bias
FINAL = "f = LayerNormalization(h, g2, s2) "
BARE = FINAL + "y = MatMul(f, w3)"


@pytest.mark.parametrize(
    ("block", "end"),
    [
        (PLAIN_BLOCK, END),
        (BLOCK, BARE),
        (PLAIN_BLOCK, BARE),
        (BLOCK, FINAL + "t = Reshape(f, flat) y0 = Gemm<transB = 1>(t, w9) y = Reshape(y0, back)"),
        (BLOCK, FINAL + "t = MatMul(f, w3) u = Add(t, b3) v = MatMul(f, w4) y = Mul(u, v)"),  # one with, one without
        (
            BLOCK,
            FINAL
            + "t = Mul(f, two) y0 = MatMul(t, w3) v = Div(f, two) y1 = MatMul(v, w4) y2 = Add(y1, b3) y = Mul(y0, y2)",
        ),
        (BLOCK, FINAL + "t = Mul(two, f) y0 = MatMul(t, w3) y = Add(y0, b3)"),
        (
            BLOCK,
            FINAL
            + "t = Transpose<perm = [0,2,1]>(f) v = Conv<pads = [1,1]>(t, k3, b3) y = Transpose<perm = [0,2,1]>(v)",
        ),
        (PLAIN_BLOCK, FINAL + "p = ReduceMean<keepdims = 1>(f, one) y0 = MatMul(p, w3) y = Add(y0, z)"),
        (
            BLOCK,
            "p = ReduceMean<keepdims = 1>(h, one) f = LayerNormalization(p, g2, s2) y0 = MatMul(f, w3) y = Add(y0, z)",
        ),
    ],
)
def test_a_shift_may_be_read_without_a_bias(block: str, end: str, worker: Worker, tmp_path: Path) -> None:
    given = stream(
        k3=full(3, 13, 3),
        one=i64(1),
        two=np.float32(2),
        w4=full(13, 3),
        w9=full(3, 13),
        flat=i64(-1, 13),
        back=i64(-1, 5, 3),
        z=full(1, 5, 1),
    )
    model = analysis(tmp_path, "float[n,5,7] x", "float[n,5,3] y", block + end, ("width",), **given)
    bases, _, error = cut(model, "width", 5, worker)
    assert len(bases.widths) == 1
    assert error < 1e-3


@pytest.mark.parametrize(
    ("block", "end", "outputs"),
    [
        (BLOCK + "h9 = Mul(h, g9) ", END.replace("(h,", "(h9,"), ""),  # a gain on the stream
        (BLOCK.replace("h = Add(a, h1)", "h = Add(c, h1)"), END, ""),  # post-norm
        (BLOCK + "j = Add(h, c) ", END.replace("(h,", "(j,"), ""),  # a norm's output in a sum
        (BLOCK, END.replace("f = LayerNormalization(h, g2, s2)", "f = Tanh(h)"), ""),
        (BLOCK, END.replace("y = Add(y0, b3)", "y = Add(y0, b3) t = Softmax(h)"), ", float[n,5,13] t"),
        (BLOCK.replace("LayerNormalization(a, g1, s1)", "LayerNormalization<axis = 1>(a, g8)"), END, ""),
    ],
)
def test_a_width_that_others_see_loses_positions(
    block: str, end: str, outputs: str, worker: Worker, tmp_path: Path
) -> None:
    model = analysis(tmp_path, "float[n,5,7] x", f"float[n,5,3] y{outputs}", block + end, ("width",), **stream(7))
    assert Bases(model).widths == []
    if any(group.kind == "width" for group in model.groups):
        _, _, error = cut(model, "width", 11, worker, fit=True)
        assert error < 0.9


CENTRED = "{f}m = ReduceMean<keepdims = 1>({h}, last) {f}o = Sub({h}, {f}m) "
SPELT = CENTRED + (
    "{f}sq = Pow({f}o, two) {f}v = ReduceMean<keepdims = 1>({f}sq, last) {f}e = Add({f}v, tiny) {f}r = Sqrt({f}e) "
    "{f}u = Div({f}o, {f}r) {f}g = Mul({f}u, {g}) {f} = Add({f}g, {s}) "
)
LAYER = "{f} = LayerNormalization({h}, {g}, {s}) "
MEAN = "{f}sq = Mul({h}, {h}) {f}v = ReduceMean<keepdims = 1>({f}sq, last) {f}e = Add(tiny, {f}v) "
RMS = MEAN + "{f}r = Sqrt({f}e) {f}u = Div({h}, {f}r) {f} = Mul({f}u, {g}) "
RECIPROCAL = MEAN + "{f}r = Sqrt({f}e) {f}i = Reciprocal({f}r) {f}u = Mul({f}i, {h}) {f} = Mul({g}, {f}u) "
DIVIDED = MEAN + "{f}r = Sqrt({f}e) {f}i = Div(one, {f}r) {f} = Mul({h}, {f}i) "
POWER = MEAN + "{f}i = Pow({f}e, half) {f}u = Mul({h}, {f}i) {f} = Mul({f}u, {g}) "
SHIFTED = RMS.replace("{f} = Mul({f}u, {g})", "{f}g = Mul({f}u, {g}) {f} = Add({s}, {f}g)")
FUSED = "{f} = SimplifiedLayerNormalization<axis = -1>({h}, {g}) "
NUMBERS = {"last": i64(-1), "two": np.float32(2), "tiny": np.float32(1e-6), "one": np.float32(1),
           "half": np.float32(-0.5)}  # fmt: skip


def spelled(first: str, second: str) -> str:
    """The block with these as its norms."""
    return (
        BLOCK.replace("c = LayerNormalization(a, g1, s1) ", first.format(f="c", h="a", g="g1", s="s1"))
        + second.format(f="f", h="h", g="g2", s="s2")
        + "y0 = MatMul(f, w3) y = Add(y0, b3)"
    )


@pytest.mark.parametrize(
    ("norm", "left"), [(SPELT, 5), (RMS, 4), (RECIPROCAL, 4), (DIVIDED, 4), (POWER, 4), (FUSED, 4), (SHIFTED, 4)]
)
def test_norms_may_be_spelled_out(norm: str, left: int, worker: Worker, tmp_path: Path) -> None:
    body = spelled(norm, norm)
    model = analysis(tmp_path, "float[n,5,7] x", "float[n,5,3] y", body, ("width",), **stream(), **NUMBERS)
    bases, _, error = cut(model, "width", left, worker)
    assert len(bases.widths) == 1
    assert error < 1e-3
    _, _, error = cut(model, "width", left - 1, worker, fit=True)
    assert error < 0.8


def test_a_shift_without_a_mean_may_be_read_without_a_bias(worker: Worker, tmp_path: Path) -> None:
    body = spelled(SHIFTED, SHIFTED).replace("y0 = MatMul(f, w3) y = Add(y0, b3)", "y = MatMul(f, w3)")
    model = analysis(tmp_path, "float[n,5,7] x", "float[n,5,3] y", body, ("width",), **stream(), **NUMBERS)
    _, _, error = cut(model, "width", 5, worker)
    assert error < 1e-3


@pytest.mark.parametrize("means", [False, True])
def test_a_width_turns_where_a_branch_goes_as_well(means: bool, worker: Worker, tmp_path: Path) -> None:
    """Without the branch, what the width loses is nothing."""
    more = "k = LayerNormalization(h, g3, s3) l0 = MatMul(k, w5) l = Relu(l0) m = MatMul(l, w6) i = Add(h, m) "
    body = BLOCK + more + END.replace("(h,", "(i,")
    given = stream()
    given |= {"g3": full(13) + 2, "s3": full(13), "w5": full(13, 17), "w6": full(17, 7) @ np.asarray(given["w0"])}
    of = analysis(tmp_path, "float[n,5,7] x", "float[n,5,3] y", body, ("width", "layers"), **given)
    layers, width = (next(group for group in of.groups if group.kind == kind) for kind in ("layers", "width"))
    gone = {layers.id: np.arange(len(layers.units)) > 0}
    less = of.settled(Plan(gone | {width.id: np.arange(13) < 5}))
    fed = [feeds.random_feed(of.dense.graph, of.prepared.facts.shapes, seed) for seed in range(60)]
    recovery = Recovery(of, fed[:48], Options(ratio=0.5, calibration="given"), worker)
    assert recovery.bases is not None
    recovery.bases.means = recovery.bases.removable() if means else frozenset()
    start = started(of, less, of.rewrite(less), recovery.bases)
    assert any("5 of 13 directions" in text for text in start.rewrites)
    model = start.model.clone()
    reconstruct.apply(model, start.arrays)
    assert apart(of.rewrite(Plan(gone)), model, fed[48:]) < 1e-3


def test_a_bias_that_is_to_stay_does_not_take_a_shift(tmp_path: Path) -> None:
    of = analysis(tmp_path, "float[n,5,7] x", "float[n,5,3] y", BLOCK + END, ("width",), **stream())
    np.savez(tmp_path / "c.npz", x=RNG.standard_normal((64, 5, 7)).astype(np.float32))
    found = onnxprune.prune(
        of.source.path,
        target={"macs": 0.6},
        remove=("width",),
        approximate=True,
        measure=False,
        round_to="1",
        reconstruct="slicegpt",
        ignore=("b1",),
        calibration=str(tmp_path / "c.npz"),
    )
    assert any("turned the width" in text for text in found.report.rewrites)
    assert "b1" not in found.report.repaired
    assert found.report.quality["relative-error"] < 1e-3


EMBEDDED = BLOCK[BLOCK.index("c =") :]
TIED = "a0 = Gather(tokens, x) a = Add(a0, e) " + EMBEDDED + FINAL


@pytest.mark.parametrize(
    "end",
    [
        "t = Transpose<perm = [1,0]>(tokens) y = MatMul(f, t)",
        "t = Transpose(tokens) y0 = MatMul(f, t) y = Add(y0, b9)",
        "t = Reshape(f, flat) y0 = Gemm<transB = 1>(t, tokens) y = Reshape(y0, back)",
    ],
)
@pytest.mark.parametrize("rows", [11, 101])
def test_a_head_that_is_tied_gets_a_weight_of_its_own(rows: int, end: str, worker: Worker, tmp_path: Path) -> None:
    given = tied(rows)
    model = analysis(tmp_path, "int64[n,5] x", f"float[n,5,{rows}] y", TIED + end, ("width",), **given)
    bases, pruned, error = cut(model, "width", 5, worker)
    assert len(bases.widths) == 1
    assert error < 1e-3
    sizes = sorted(
        v.shape.numpy() for v in pruned.graph.initializers.values() if v.shape is not None and rows in v.shape
    )
    assert [size for size in sizes if len(size) == 2] == [(rows, 5), (rows, 5)]


def test_what_is_looked_up_twice_is_stored_once(worker: Worker, tmp_path: Path) -> None:
    """An embedding for encoder and decoder, and the head: two tables, not three."""
    body = "u0 = Gather(tokens, x) u1 = Gather(tokens, z) a0 = Add(u0, u1) a = Add(a0, e) " + EMBEDDED + FINAL
    end = "t = Transpose(tokens) y = MatMul(f, t)"
    model = analysis(tmp_path, "int64[n,5] x, int64[n,5] z", "float[n,5,101] y", body + end, ("width",), **tied(101))
    _, pruned, error = cut(model, "width", 5, worker)
    assert error < 1e-3
    sizes = [tuple(value.shape.numpy()) for value in pruned.graph.initializers.values() if value.shape is not None]
    assert sizes.count((101, 5)) == 2


def tied(rows: int) -> dict[str, object]:
    """Weights of a block between an embedding of so many tokens and the same as a head."""
    given = stream()
    e = np.asarray(given["e"]).reshape(5, 13)
    tokens = (RNG.standard_normal((rows, 5)) @ e).astype(np.float32)
    return given | {"tokens": tokens, "b9": full(rows), "flat": i64(-1, 13), "back": i64(-1, 5, rows)}


def whole(body: str, means: bool, folder: Path, opset: int = 18) -> tuple[list[str], float]:
    """(operators, relative error) of a model of which the width is turned as a whole, random weights and biases."""
    given = stream(13) | {"g8": full(13) + 2, "b8": full(13), "c3": full(3) + 1, "k3": full(3, 13, 3)} | NUMBERS
    given |= {"w4": full(13, 3), "t9": full(1, 10, 13), "t8": full(9, 13), "rows": i64(7, 0, 3, 3, 8).reshape(5, 1)}
    given |= {"roi": np.zeros(0, np.float32), "half9": np.array([1, 1, 0.5], np.float32)}
    given["b2"], given["e"] = full(13), full(1, 5, 13)  # with a mean
    given["w0"], given["w2"] = full(7, 13) + 0.1, full(17, 13) + 0.1
    of = analysis(folder, "float[n,5,7] x", "float[n,5,3] y", body, ("width",), opset, **given)
    bases = Bases(of)
    assert len(bases.widths) == 1
    bases.means = bases.removable() if means else frozenset()
    model, _ = rotated(of, bases)
    fed = [feeds.random_feed(of.dense.graph, of.prepared.facts.shapes, seed) for seed in range(4)]
    return [node.op_type for node in model.graph], apart(of.dense, model, fed)


RESIZED = (
    'p = Transpose<perm = [0,2,1]>(t9) r = Resize<mode = "linear">(p, roi, half9) q = Transpose<perm = [0,2,1]>(r) '
)
EVERY = [
    BLOCK + END,
    RESIZED + BLOCK.replace("Add(a1, e)", "Add(a1, q)") + END,
    "q = GatherND(t8, rows) " + BLOCK.replace("Add(a1, e)", "Add(a1, q)") + END,
    PLAIN_BLOCK + END,
    BLOCK + BARE,
    PLAIN_BLOCK + BARE,
    SCALED.format("h7 = Mul(g9, h1) h8 = Add(h7, b8) h9 = Mul(h8, g8)") + END,
    BLOCK + FINAL + "t = Mul(two, f) y0 = MatMul(t, w3) y = Add(y0, b3)",
    BLOCK
    + FINAL
    + "t = Transpose<perm = [0,2,1]>(f) v = Conv<pads = [1,1]>(t, k3, b3) y = Transpose<perm = [0,2,1]>(v)",
    *(spelled(norm, norm) for norm in (SPELT, RMS, RECIPROCAL, DIVIDED, POWER, SHIFTED, FUSED)),
    spelled(SPELT, "{f} = LayerNormalization<epsilon = 0.01>({h}, {g}, {s}) "),
]


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("body", EVERY)
def test_a_whole_width_turns_without_a_trace(body: str, means: bool, tmp_path: Path) -> None:
    left, error = whole(body, means, tmp_path)
    assert error < 1e-5
    bare = body.endswith(BARE) or body.startswith(PLAIN_BLOCK) or "Conv" in body
    assert ("LayerNormalization" in left or "Sub" in left) == (
        ("= Layer" in body or "Sub" in body) and (not means or bare)
    )


@pytest.mark.parametrize("opset", [17, 18, 23])
def test_a_norm_by_root_mean_square_at_every_operator_set(opset: int, tmp_path: Path) -> None:
    left, error = whole(BLOCK + END, True, tmp_path, opset)
    assert error < 1e-5
    assert ("RMSNormalization" in left) == (opset == 23)


@pytest.mark.parametrize("norm", [LAYER, SPELT])
def test_a_norm_that_leaves_the_mean_has_room_for_a_direction_more(norm: str, worker: Worker, tmp_path: Path) -> None:
    body = spelled(norm, norm)
    model = analysis(tmp_path, "float[n,5,7] x", "float[n,5,3] y", body, ("width",), **stream(), **NUMBERS)
    errors = [cut(model, "width", 4, worker, means=means)[2] for means in (True, False)]
    assert errors[0] < 1e-3 < errors[1]


def test_slicing_alone_is_named_and_told(worker: Worker, tmp_path: Path) -> None:
    body = spelled(RMS, RMS)
    model = analysis(tmp_path, "float[n,5,7] x", "float[n,5,3] y", body, ("width",), **stream(7), **NUMBERS)
    samples = {"x": RNG.standard_normal((64, 5, 7)).astype(np.float32)}
    np.savez(tmp_path / "c.npz", **samples)
    shared = {"target": {"params": 0.8}, "remove": ("width",), "approximate": True, "measure": False, "round_to": 1}
    found = {
        how: onnxprune.prune(
            model.source.path,
            tmp_path / f"{how}.onnx",
            reconstruct=how,
            calibration=str(tmp_path / "c.npz"),
            evaluation=str(tmp_path / "c.npz"),
            allocate="uniform",
            **shared,  # type: ignore[arg-type]
        ).report
        for how in ("none", "slicegpt")
    }
    assert any("turned the width" in text for text in found["slicegpt"].rewrites)
    assert not any("turned" in text for text in found["none"].rewrites)
    errors = {how: report.quality["relative-error"] for how, report in found.items()}
    assert errors["slicegpt"] < 0.8 * errors["none"]


@pytest.mark.parametrize(
    ("how", "norm", "goes"),
    [
        ("slicegpt", LAYER, 2),
        ("slicegpt", SPELT, 2),
        ("slicegpt,ln2rms=0", LAYER, 0),
        ("sequential", SPELT, 0),
        ("sequential,ln2rms=1", LAYER, 2),
    ],
)
def test_what_norms_leave_to_others_is_reported_and_verified(how: str, norm: str, goes: int, tmp_path: Path) -> None:
    of = analysis(tmp_path, "float[n,5,7] x", "float[n,5,3] y", spelled(norm, norm), ("width",), **stream(7), **NUMBERS)
    dense, small, report = of.source.path, tmp_path / "s.onnx", tmp_path / "s.json"
    np.savez(tmp_path / "c.npz", x=RNG.standard_normal((64, 5, 7)).astype(np.float32))
    given = {"calibration": str(tmp_path / "c.npz"), "ratio": 0.3, "remove": ("width",), "approximate": True}
    found = onnxprune.prune(dense, small, report=report, reconstruct=how, measure=False, round_to="1", **given)  # type: ignore[arg-type]
    assert len(found.report.norms) == goes
    assert any("took the mean off what writes" in text for text in found.report.rewrites) == bool(goes)
    left = {node.op_type for node in found.model.graph}
    assert all(value.uses() for value in found.model.graph.initializers.values())
    assert bool(left & {"LayerNormalization", "Sub"}) == (not goes)
    assert verify(str(dense), str(small), str(report), {}, 0)["proven"]
    told = json.loads(report.read_text())
    for wrong in ([*told["norms"], "h"], ["y"], told["norms"][1:] if goes else ["h1"]):
        report.write_text(json.dumps(told | {"norms": wrong}))
        with pytest.raises(ImpossibleError):
            verify(str(dense), str(small), str(report), {}, 0)


@pytest.mark.parametrize("how", ["sequential", "slicegpt"])
@pytest.mark.parametrize(
    ("target", "copied"), [({"macs": 0.4}, True), ({"macs": 0.8}, False), ({"params": 0.6}, False)]
)
def test_a_tied_head_is_copied_where_that_may_cost_parameters(
    target: dict[str, float], copied: bool, how: str, tmp_path: Path
) -> None:
    """The file is what the report says; a tie stays where parameters have a limit or would be more than before."""
    body = TIED + "t = Transpose<perm = [1,0]>(tokens) y = MatMul(f, t)"
    model = analysis(tmp_path, "int64[n,5] x", "float[n,5,101] y", body, ("width",), **tied(101))
    dense, small, report = model.source.path, tmp_path / "s.onnx", tmp_path / "s.json"
    np.savez(tmp_path / "c.npz", x=RNG.integers(0, 101, (64, 5)))
    found = onnxprune.prune(
        dense,
        small,
        report=report,
        target=target,
        remove=("width",),
        approximate=True,
        measure=False,
        round_to="1",
        reconstruct=how,
        calibration=str(tmp_path / "c.npz"),
        allocate="uniform",
    ).report
    assert any("no longer shares its weight with tokens" in text for text in found.rewrites) == copied
    assert any("turned the width" in text for text in found.rewrites) == copied
    assert found.pruned.params <= target.get("params", 1) * found.dense.params
    assert {row.initializer: len(row.removed) for row in found.removed}["tokens"] == 13 - len(found.kept["tokens"]["1"])
    assert verify(str(dense), str(small), str(report), {}, 0)["proven"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (RMS, "{f} = LayerNormalization({h}, {g}, {s}) "),  # only one of two takes the mean off
        (RMS, RMS.replace("Div({h}", "Div(a")),  # over another value's size
        (RMS, RMS.replace("Mul({h}, {h})", "Mul(a, a)")),
        (SPELT, SPELT.replace("Sub({h}, {f}m)", "Sub({h}, cm)")),  # another value's mean
        (RMS, RMS.replace("Mul({f}u, {g})", "Mul({f}t, {g})").replace(" {f} =", " {f}t = Tanh({f}u) {f} =")),
    ],
)
def test_what_only_looks_like_a_norm_loses_positions(first: str, second: str, worker: Worker, tmp_path: Path) -> None:
    body = spelled(first, second)
    model = analysis(tmp_path, "float[n,5,7] x", "float[n,5,3] y", body, ("width",), **stream(7), **NUMBERS)
    assert Bases(model).widths == []
    _, _, error = cut(model, "width", 11, worker, fit=True)
    assert error < 0.9
