"""Calibration: every statistic against NumPy, for any split into batches and passes; masks as inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper, parser

from onnxprune import calibrate
from onnxprune.calibrate import Columns, Gate, Moments, MomentsOf, ProfileOf, Reads, RowsOf, Source, collect, masked
from onnxprune.errors import ImpossibleError, InputError
from onnxprune.worker import Worker

RNG = np.random.default_rng(20)
ROUNDING = 3e-6  # wide products are summed in float32: NumPy's float32 is as far off


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same data for a test, whichever run before it."""
    global RNG
    RNG = np.random.default_rng(20)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(seconds=60) as made:
        yield made


def normal(*shape: int, shift: float = 0.0) -> np.ndarray:
    return (RNG.standard_normal(shape) + shift).astype(np.float32)


def build(
    inputs: str, outputs: str, body: str, weights: Mapping[str, np.ndarray], opset: int = 18, version: int = 8
) -> ir.Model:
    model = parser.parse_model(
        f'<ir_version: {version}, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
        if version < 4:
            info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, array.shape)
            model.graph.input.append(info)
    return ir.serde.deserialize_model(model)


def cut(feed: Mapping[str, np.ndarray], sizes: list[int]) -> list[dict[str, np.ndarray]]:
    ends = np.cumsum(sizes)
    return [{name: array[b - a : b] for name, array in feed.items()} for a, b in zip(sizes, ends, strict=True)]


def close(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-6) -> None:
    """Equal relative to the largest element."""
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max(initial=0) <= tolerance * max(np.abs(wanted).max(initial=0), 1e-30)


def check_moments(found: Moments, x: np.ndarray, y: np.ndarray | None = None, tolerance: float = 2e-6) -> None:
    """x is [groups, rows, columns], y [groups, rows, outputs]."""
    x = x.astype(np.float64)
    y = np.zeros((*x.shape[:2], 0)) if y is None else y.astype(np.float64)
    assert found.count == x.shape[1]
    assert {a.dtype for a in (found.mean, found.xx, found.y_mean, found.xy, found.yy)} == {np.dtype(np.float64)}
    close(found.mean, x.mean(1), tolerance)
    close(found.y_mean, y.mean(1), tolerance)
    mx, my = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    close(found.xx, np.einsum("gri,grj->gij", mx, mx), tolerance)
    close(found.xy, np.einsum("gri,grj->gij", mx, my), tolerance)
    close(found.yy, (my**2).sum(1), tolerance)
    ones = np.concatenate([x, np.ones((*x.shape[:2], 1))], axis=2)
    left, right = found.augmented()
    close(left, np.einsum("gri,grj->gij", ones, ones), tolerance)
    close(right, np.einsum("gri,grj->gij", ones, y), tolerance)


def one(worker: Worker, model: Any, feed: Any, request: Any, **options: Any) -> Any:
    return collect(worker, model, feed if isinstance(feed, list) else [feed], [request], **options)[request]


# Profiles ------------------------------------------------------------------------------------------------------------


def check_profile(found: calibrate.Profile, x: np.ndarray) -> None:
    """x is [rows, columns]."""
    x = x.astype(np.float64)
    assert found.count == len(x)
    close(found.mean, x.mean(0))
    close(found.variance, x.var(0, ddof=1))
    close(found.largest, np.abs(x).max(0))
    close(found.l1, np.abs(x).sum(0))
    close(found.l2, np.sqrt((x**2).sum(0)))


@pytest.mark.parametrize("opset", [9, 12, 13, 17, 18, 21])
def test_profiles_along_any_axis(worker: Worker, opset: int) -> None:
    model = build("float[n,3,5,7] x", "float[n,3,5,7] y", "h = Tanh(x) y = Neg(h)", {}, opset)
    x = normal(11, 3, 5, 7, shift=0.5)
    axes = [-1, 1, 2, -2]
    requests = [ProfileOf(Columns(name, axis)) for name in ("x", "h") for axis in axes]
    found = collect(worker, model, cut({"x": x}, [4, 7]), requests)
    for request in requests:
        assert isinstance(request.x, Columns)
        value = x if request.x.value == "x" else np.tanh(x)
        check_profile(found[request], np.moveaxis(value, request.x.axis, -1).reshape(-1, value.shape[request.x.axis]))


def test_profile_of_patches_is_one_row_of_columns_for_all_groups(worker: Worker) -> None:
    w = normal(4, 3, 2)
    model = build("float[n,6,11] x", "float[n,4,10] y", "y = Conv<group=2>(x, w)", {"w": w})
    x = normal(5, 6, 11)
    found = one(worker, model, {"x": x}, ProfileOf(Reads("y")))
    patches = im2col(x, w, group=2)
    check_profile(found, np.concatenate(list(patches), axis=1))


def test_small_deviations_from_a_large_mean(worker: Worker) -> None:
    model = build("float[n,5] x", "float[n,2] y", "y = MatMul(x, w)", {"w": normal(5, 2)})
    x = (1000 + 0.01 * RNG.standard_normal((997, 5))).astype(np.float32)
    found = collect(worker, model, cut({"x": x}, [1, 400, 596]), [ProfileOf(Columns("x")), MomentsOf(Reads("y"))])
    exact = x.astype(np.float64)
    np.testing.assert_allclose(found[ProfileOf(Columns("x"))].variance, exact.var(0, ddof=1), rtol=1e-6)
    centred = exact - exact.mean(0)
    close(found[MomentsOf(Reads("y"))].xx[0], centred.T @ centred)


def test_many_rows_in_one_batch(worker: Worker) -> None:
    model = build("float[n,3,512,512] x", "float[n,3,512,512] y", "y = Abs(x)", {})
    x = RNG.uniform(0, 1, (1, 3, 512, 512)).astype(np.float32)
    check_profile(one(worker, model, {"x": x}, ProfileOf(Columns("y", 1))), np.moveaxis(x, 1, -1).reshape(-1, 3))


def test_one_row(worker: Worker) -> None:
    model = build("float[n,5] x", "float[n,5] y", "y = Neg(x)", {})
    x = normal(1, 5)
    found = one(worker, model, {"x": x}, ProfileOf(Columns("x")))
    assert found.count == 1
    np.testing.assert_array_equal(found.variance, 0)
    close(found.mean, x[0].astype(np.float64))


@pytest.mark.parametrize("kind", ["float16", "double", "bfloat16"])
def test_other_precisions_are_reduced_in_float32(worker: Worker, kind: str) -> None:
    # float16 squares of 300 would overflow.
    inputs = f"{kind}[n,7] x" if kind != "bfloat16" else "float[n,7] x"
    body = "y = Identity(x)" if kind != "bfloat16" else "y = Cast<to=16>(x)"
    model = build(inputs, f"{kind}[n,7] y", body, {})
    x = (300 * normal(53, 7)).astype({"float16": np.float16, "double": np.float64}.get(kind, np.float32))
    if kind == "bfloat16":
        x = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)  # what bfloat16 holds exactly
    check_profile(one(worker, model, {"x": x}, ProfileOf(Columns("y"))), x)


def test_float16_products(worker: Worker) -> None:
    w = normal(7, 3).astype(np.float16)
    model = build("float16[n,7] x", "float16[n,3] y", "y = MatMul(x, w)", {"w": w})
    x = (300 * normal(53, 7)).astype(np.float16)
    check_moments(one(worker, model, {"x": x}, MomentsOf(Reads("y"))), x[None])


# What products read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(13, 7), (2, 13, 7), (2, 3, 13, 7)])
@pytest.mark.parametrize("weight_first", [False, True])
def test_matmul(worker: Worker, shape: tuple[int, ...], weight_first: bool) -> None:
    w = normal(13, 5) if weight_first else normal(7, 5)
    dims = ",".join(map(str, ("n", *shape[1:])) if len(shape) > 2 or not weight_first else map(str, shape))
    body, axis = ("t = Transpose<perm=[1,0]>(w) y = MatMul(t, x)", -2) if weight_first else ("y = MatMul(x, w)", -1)
    model = build(f"float[{dims}] x", "float y", body, {"w": w})
    x = normal(*shape)
    y = w.T @ x if weight_first else x @ w
    rows = [np.moveaxis(value, axis, -1).reshape(1, -1, value.shape[axis]) for value in (x, y)]
    check_moments(one(worker, model, {"x": x}, MomentsOf(Reads("y"), Columns("y", axis))), *rows)


def test_wide_products_in_float32(worker: Worker) -> None:
    w = normal(101, 3)
    model = build("float[n,101] x", "float[n,3] y", "y = MatMul(x, w)", {"w": w})
    x = normal(1009, 101, shift=2.0)
    for sizes in ([1009], [9, 1000], [100] * 10 + [9]):
        found = one(worker, model, cut({"x": x}, sizes), MomentsOf(Reads("y"), Columns("y")))
        check_moments(found, x[None], (x @ w)[None], ROUNDING)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("turn", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_gemm_gives_what_multiplies_the_stored_weight(worker: Worker, first: bool, turn: tuple[int, int]) -> None:
    a, b, c = (
        normal(*((11, 7) if not turn[0] else (7, 11))),
        normal(*((7, 5) if not turn[1] else (5, 7))),
        normal(11, 5),
    )
    x, w = (a, b) if first else (b, a)
    order = "x, w, c" if first else "w, x, c"
    body = f"y = Gemm<transA={turn[0]}, transB={turn[1]}, alpha=0.5, beta=2.0>({order})"
    dims = ",".join(map(str, x.shape))
    model = build(f"float[{dims}] x", "float[11,5] y", body, {"w": w, "c": c})
    left, right = (a.T if turn[0] else a), (b.T if turn[1] else b)
    y = 0.5 * left @ right + 2 * c
    rows, out = (left, y) if first else (right.T, y.T)
    found = one(worker, model, {"x": x}, MomentsOf(Reads("y"), Columns("y", 1 if first else 0)))
    check_moments(found, 0.5 * rows[None], out[None])


def test_gemm_moments_solve_for_the_stored_weight(worker: Worker) -> None:
    w, c = normal(5, 7), normal(5)
    model = build("float[n,7] x", "float[n,5] y", "y = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, c)", {"w": w, "c": c})
    left, right = one(worker, model, {"x": normal(97, 7)}, MomentsOf(Reads("y"), Columns("y"))).augmented()
    solved = np.linalg.solve(left[0], right[0])
    np.testing.assert_allclose(solved[:-1], w.T, atol=1e-5)
    np.testing.assert_allclose(solved[-1], 2 * c, atol=1e-5)


def test_weight_through_other_nodes(worker: Worker) -> None:
    body = "h = DequantizeLinear<axis=1>(q, s) t = Transpose<perm=[1,0]>(h) y = MatMul(x, t)"
    weights = {"q": RNG.integers(-9, 9, (5, 7)).astype(np.int8), "s": np.full(7, 0.1, np.float32)}
    model = build("float[n,7] x", "float[n,5] y", body, weights)
    x = normal(13, 7)
    check_moments(one(worker, model, {"x": x}, MomentsOf(Reads("y"))), x[None])


@pytest.mark.parametrize(
    ("body", "weights", "node"),
    [
        ("t = Transpose<perm=[0,2,1]>(x) y = MatMul(x, t)", {}, "y"),
        ("y = MatMul(x, w)", {"w": (3, 7, 5)}, "y"),
        ("y = Neg(x)", {}, "y"),
    ],
)
def test_no_matrix(worker: Worker, body: str, weights: dict[str, tuple[int, ...]], node: str) -> None:
    model = build("float[3,11,7] x", "float y", body, {name: normal(*shape) for name, shape in weights.items()})
    with pytest.raises(ImpossibleError) as raised:
        one(worker, model, {"x": normal(3, 11, 7)}, MomentsOf(Reads(node)))
    assert raised.value.object == node


# Convolutions --------------------------------------------------------------------------------------------------------


def im2col(
    x: np.ndarray,
    w: np.ndarray,
    group: int = 1,
    strides: list[int] | None = None,
    pads: list[int] | None = None,
    dilations: list[int] | None = None,
    auto_pad: str = "NOTSET",
) -> np.ndarray:
    """[groups, rows, columns] by hand; rows (n, *out), columns (channel in the group, *kernel)."""
    kernel, rank = w.shape[2:], w.ndim - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    begin, end = (pads or [0] * 2 * rank)[:rank], (pads or [0] * 2 * rank)[rank:]
    spans = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    if auto_pad.startswith("SAME"):
        needed = [
            max(0, (-(-size // s) - 1) * s + span - size)
            for size, s, span in zip(x.shape[2:], strides, spans, strict=True)
        ]
        small, large = [n // 2 for n in needed], [n - n // 2 for n in needed]
        begin, end = (small, large) if auto_pad == "SAME_UPPER" else (large, small)
    x = np.pad(x, [(0, 0), (0, 0), *zip(begin, end, strict=True)])
    out = [(size - span) // s + 1 for size, span, s in zip(x.shape[2:], spans, strides, strict=True)]
    inside = w.shape[1]
    found = np.zeros((group, x.shape[0], *out, inside, *kernel), np.float32)
    for g in range(group):
        for n in range(x.shape[0]):
            for place in np.ndindex(*out):
                for tap in np.ndindex(*kernel):
                    at = tuple(p * s + t * d for p, s, t, d in zip(place, strides, tap, dilations, strict=True))
                    channels = x[(n, slice(g * inside, (g + 1) * inside), *at)]
                    found[(g, n, *place, slice(None), *tap)] = channels
    return found.reshape(group, -1, inside * int(np.prod(kernel)))


CONVS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1-D": ((3, 5, 17), (7, 5, 3), {"strides": [2], "pads": [1, 2], "dilations": [3]}),
    "2-D": ((3, 5, 11, 7), (2, 5, 3, 2), {}),
    "strides, pads, dilations": (
        (2, 3, 13, 11), (5, 3, 3, 2), {"strides": [2, 1], "pads": [1, 0, 2, 1], "dilations": [2, 3]},
    ),
    "groups": ((2, 6, 7, 5), (4, 3, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    "depthwise": ((2, 5, 7, 7), (10, 1, 3, 3), {"group": 5, "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "wide": ((2, 11, 7, 5), (3, 11, 3, 3), {"pads": [0, 1, 1, 2], "strides": [2, 1]}),
    "1x1": ((3, 7, 5, 3), (2, 7, 1, 1), {}),
    "1x1 in groups": ((3, 6, 5, 3), (9, 2, 1, 1), {"group": 3}),
    "1x1 with strides": ((3, 7, 5, 3), (2, 7, 1, 1), {"strides": [2, 2]}),
    "1x1 with pads": ((3, 7, 5, 3), (2, 7, 1, 1), {"pads": [0, 1, 1, 0]}),
    "same upper": ((2, 3, 11, 8), (5, 3, 4, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
    "same lower": ((2, 3, 11, 8), (5, 3, 4, 2), {"auto_pad": "SAME_LOWER", "strides": [3, 1]}),
    "valid": ((2, 3, 11, 8), (5, 3, 4, 3), {"auto_pad": "VALID"}),
    "3-D": ((2, 4, 5, 7, 3), (2, 2, 3, 2, 3), {"group": 2, "strides": [1, 2, 1], "pads": [1, 0, 1, 0, 1, 1]}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVS)
def test_conv(worker: Worker, name: str) -> None:
    shape, weight, settings = CONVS[name]
    x, w, b = normal(*shape, shift=0.3), normal(*weight), normal(weight[0])
    texts = [f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in settings.items()]
    attributes = f"<{', '.join(texts)}>" if texts else ""
    dims = ",".join(["n", str(shape[1]), *(f"s{k}" for k in range(len(shape) - 2))])
    model = build(f"float[{dims}] x", "float y", f"y = Conv{attributes}(x, w, b)", {"w": w, "b": b})
    request = MomentsOf(Reads("y"), Columns("y", 1))
    patches = im2col(x, w, **settings)
    groups = len(patches)
    y = np.einsum("grc,goc->gro", patches, w.reshape(groups, -1, patches.shape[2]), dtype=np.float64)
    y += b.reshape(groups, 1, -1)
    found = one(worker, model, cut({"x": x}, [1, len(x) - 1]), request)
    check_moments(found, patches, y)
    left, right = found.augmented()
    close(left[:, -1, :-1], patches.sum(1, dtype=np.float64), 1e-5)
    rows = one(worker, model, {"x": x}, RowsOf(Reads("y"), 10**4))
    np.testing.assert_array_equal(rows, patches)  # to the last bit
    assert right.shape == (groups, patches.shape[2] + 1, weight[0] // groups)


# Splits, passes, padding, samples -----------------------------------------------------------------------------------

TEXT = """
h0 = MatMul(x, w1) h1 = Add(h0, b1) h = Relu(h1) y0 = MatMul(h, w2) y = Add(y0, x)
t = Reshape(h, heads) u = Transpose<perm=[0,2,1,3]>(t) flat = Reshape(h, flatten) z = MatMul(flat, w2)
p = ReduceMean<axes=[1], keepdims=0>(y) m = Cast<to=1>(mask)
"""


def text(seed: int = 0) -> ir.Model:
    rng = np.random.default_rng(seed)
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in
               {"w1": (5, 6), "b1": (6,), "w2": (6, 5)}.items()}  # fmt: skip
    weights |= {"heads": np.array([0, 0, 2, 3]), "flatten": np.array([-1, 6])}
    outputs = "float[n,s,5] y, float z, float p, float u, float m"
    return build("float[n,s,5] x, int64[n,s] mask", outputs, TEXT, weights, opset=17)


def tokens(count: int = 13, length: int = 11) -> dict[str, np.ndarray]:
    lengths = RNG.integers(1, length + 1, count)
    return {"x": normal(count, length, 5, shift=1.0), "mask": (np.arange(length) < lengths[:, None]).astype(np.int64)}


def inside(feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The values of `text` by hand."""
    weights = {
        name: value.const_value.numpy() for name, value in text().graph.initializers.items() if value.const_value
    }
    h = np.maximum(feed["x"] @ weights["w1"] + weights["b1"], 0)
    y0 = h @ weights["w2"]
    return {"x": feed["x"], "h": h, "y0": y0, "t": h.reshape(*h.shape[:2], 2, 3), "p": (y0 + feed["x"]).mean(1)}


MANY: list[Any] = [
    MomentsOf(Reads("h0")),
    MomentsOf(Reads("y0"), Columns("x")),
    MomentsOf(Reads("z"), Columns("z")),
    ProfileOf(Columns("h")),
    ProfileOf(Columns("u", 1)),
    MomentsOf(Reads("y0"), Columns("y"), rows=50),
    RowsOf(Reads("y0"), 50),
    RowsOf(Columns("p"), 7),
]


def same(a: Any, b: Any) -> None:
    for x, y in zip(vars(a).values(), vars(b).values(), strict=True) if not isinstance(a, np.ndarray) else [(a, b)]:
        close(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("padding", [None, "mask"])
def test_any_split_gives_the_same(worker: Worker, padding: str | None) -> None:
    feed, model = tokens(), text()
    whole = collect(worker, model, [feed], MANY, padding=padding)
    for sizes in ([1] * 13, [2, 11], [5, 5, 3]):
        parts = collect(worker, model, cut(feed, sizes), MANY, padding=padding)
        for request in MANY:
            same(parts[request], whole[request])


def test_budget_splits_passes_and_batches(worker: Worker) -> None:
    feed, model = tokens(), text()
    seen: list[list[tuple[int, int]]] = []
    found = []
    for budget in (1 << 30, 4000, 1):
        seen.append([])
        found.append(collect(worker, model, [feed], MANY, budget=budget, progress=lambda k, n: seen[-1].append((k, n))))
        assert seen[-1] == [(k + 1, len(seen[-1])) for k in range(len(seen[-1]))]
    assert len(seen[0]) == 1
    assert len(seen[0]) < len(seen[1]) < len(seen[2])
    # Every request with second moments or rows alone, every sample alone.
    assert len(seen[2]) == 13 * sum(not isinstance(request, ProfileOf) for request in MANY)
    for request in MANY:
        same(found[1][request], found[0][request])
        same(found[2][request], found[0][request])


def test_padded_tokens_are_left_out(worker: Worker) -> None:
    feed = tokens()
    feed["x"][feed["mask"] == 0] = np.nan  # whatever stands there
    feed["mask"][4] = 0  # nothing but padding
    requests: list[Any] = [
        ProfileOf(Columns("h")),
        MomentsOf(Reads("y0"), Columns("x")),
        MomentsOf(Reads("z")),
        ProfileOf(Columns("t", 3)),
        ProfileOf(Columns("m", -1)),
    ]
    found = collect(worker, text(), cut(feed, [3, 2, 8]), requests, padding="mask")
    values, real = inside(feed), feed["mask"] != 0
    check_profile(found[requests[0]], values["h"][real])
    check_moments(found[requests[1]], values["h"][real][None], values["x"][real][None])
    check_moments(found[requests[2]], values["h"][real][None])  # batch and length in one axis
    check_profile(found[requests[3]], values["t"][real].reshape(-1, 3))  # two rows for each token
    assert found[requests[4]].count == 12  # columns are the tokens: no row is one of them, but one sample is gone


def test_values_without_tokens_keep_all_rows(worker: Worker) -> None:
    feed = tokens()
    found = collect(worker, text(), [feed], [ProfileOf(Columns("p")), ProfileOf(Columns("u", 3))], padding="mask")
    check_profile(found[ProfileOf(Columns("p"))], inside(feed)["p"])
    assert found[ProfileOf(Columns("u", 3))].count == 13 * 2 * 11  # heads stand between batch and length


@pytest.mark.parametrize("padding", [None, "mask"])
def test_rows_are_distinct_spread_over_samples_and_the_same_for_all_sources(
    worker: Worker, padding: str | None
) -> None:
    feed = tokens(7)
    values = inside(feed)
    requests = [RowsOf(Columns("x"), 24), RowsOf(Reads("y0"), 24), MomentsOf(Columns("x"), Columns("y0"), rows=24)]
    found = collect(worker, text(), [feed], requests, padding=padding)
    rows, hidden = found[requests[0]][0], found[requests[1]][0]
    assert rows.dtype == np.float32
    order = {tuple(row): k for k, row in enumerate(values["x"].reshape(-1, 5))}
    places = np.array([order[tuple(row)] for row in rows])
    real = feed["mask"] if padding else np.ones_like(feed["mask"])
    assert (np.diff(places) > 0).all()
    assert real.reshape(-1)[places].all()
    counts = np.bincount(places // 11, minlength=7)
    assert ((counts >= np.minimum(real.sum(1), 3)) & (counts <= np.minimum(real.sum(1), 4))).all()
    if not padding:
        assert len(rows) == 24
    close(hidden.astype(np.float64), values["h"].reshape(-1, 6)[places].astype(np.float64))
    check_moments(found[requests[2]], rows[None], values["y0"].reshape(-1, 5)[places][None])
    again = collect(worker, text(), [feed], requests, padding=padding)[requests[0]][0]
    np.testing.assert_array_equal(again, rows)
    other = collect(worker, text(), [feed], requests, padding=padding, seed=1)[requests[0]][0]
    assert not np.array_equal(other, rows)


def test_fewer_rows_than_samples(worker: Worker) -> None:
    feed = tokens()
    for sizes in ([13], [1] * 13):
        found = collect(worker, text(), cut(feed, sizes), [RowsOf(Columns("p"), 3), MomentsOf(Columns("p"), rows=3)])
        assert found[RowsOf(Columns("p"), 3)].shape == (1, 3, 5)
        check_moments(found[MomentsOf(Columns("p"), rows=3)], found[RowsOf(Columns("p"), 3)], tolerance=1e-5)


def test_more_rows_than_there_are(worker: Worker) -> None:
    feed = tokens()
    found = one(worker, text(), cut(feed, [6, 7]), RowsOf(Columns("x"), 10**4))
    np.testing.assert_array_equal(found, feed["x"].reshape(1, -1, 5))


def test_feeds_of_different_lengths_and_fixed_batches(worker: Worker) -> None:
    feeds = [tokens(3, 11), tokens(5, 7)]
    x = np.concatenate([feed["x"].reshape(-1, 5) for feed in feeds])
    check_profile(one(worker, text(), feeds, ProfileOf(Columns("x"))), x)
    model = build("float[2,5] x", "float[2,5] y", "y = Neg(x)", {})
    x = normal(6, 5)
    found = collect(
        worker, model, cut({"x": x}, [2, 2, 2]), [ProfileOf(Columns("x")), RowsOf(Columns("x"), 3)], budget=1
    )
    check_profile(found[ProfileOf(Columns("x"))], x)
    assert found[RowsOf(Columns("x"), 3)].shape == (1, 3, 5)


# Two graphs ----------------------------------------------------------------------------------------------------------


def pair(version: int = 8) -> tuple[ir.Model, ir.Model, dict[str, np.ndarray]]:
    """A small convolutional network, and the same with three of its seven hidden channels; both share a weight."""
    w = {"w1": normal(7, 3, 3, 3), "b1": normal(7), "w2": normal(4, 7, 3, 3), "b2": normal(4)}
    body = "a = Conv<pads=[1,1,1,1]>(x, w1, b1) h = Relu(a) y = Conv<pads=[1,1,1,1], strides=[2,2]>(h, w2, b2)"
    dense = build("float[n,3,9,7] x", "float y", body, w, version=version)
    pruned = dense.clone()
    for name, array in (("w1", w["w1"][:3]), ("b1", w["b1"][:3]), ("w2", w["w2"][:, :3])):
        pruned.graph.initializers[name].const_value = ir.tensor(np.ascontiguousarray(array), name=name)
        pruned.graph.initializers[name].shape = ir.Shape(array.shape)
    return pruned, dense, w


@pytest.mark.parametrize("version", [3, 8])
def test_pruned_inputs_meet_dense_targets(worker: Worker, version: int) -> None:
    pruned, dense, w = pair(version)
    x = normal(5, 3, 9, 7)
    padded = {"pads": [1, 1, 1, 1]}
    a = (im2col(x, w["w1"], **padded)[0] @ w["w1"].reshape(7, -1).T + w["b1"]).reshape(5, 9, 7, 7)
    h = np.moveaxis(np.maximum(a, 0), 3, 1)
    full = im2col(h, w["w2"], strides=[2, 2], **padded)
    part = im2col(h[:, :3], w["w2"][:, :3], strides=[2, 2], **padded)
    y = full @ w["w2"].reshape(4, -1).T + w["b2"]
    cross = MomentsOf(Reads("y"), Columns("y", 1, graph=1))
    between = MomentsOf(Reads("y", graph=1), Reads("y"))
    sampled = MomentsOf(Reads("y"), Columns("y", 1, graph=1), rows=40)
    drawn = RowsOf(Reads("y"), 40), RowsOf(Columns("y", 1, graph=1), 40)
    found = collect(worker, [pruned, dense], cut({"x": x}, [2, 3]), [cross, between, sampled, *drawn])
    check_moments(found[cross], part, y)
    check_moments(found[between], full, part)
    check_moments(found[sampled], found[drawn[0]], found[drawn[1]])
    assert found[sampled].count == 40


def test_models_are_left_as_they_were(worker: Worker) -> None:
    pruned, dense, _ = pair()
    before = [ir.serde.serialize_model(model).SerializeToString() for model in (pruned, dense)]
    one(worker, [pruned, dense], {"x": normal(2, 3, 9, 7)}, MomentsOf(Reads("y"), Columns("y", 1, graph=1), rows=9))
    with masked(worker, dense, [Gate("h", 1)]) as run:
        run({"x": normal(2, 3, 9, 7)}, [np.ones(7)])
    assert [ir.serde.serialize_model(model).SerializeToString() for model in (pruned, dense)] == before


def test_weights_are_shared_and_what_nobody_needs_is_gone() -> None:
    pruned, dense, _ = pair()
    sizes = calibrate._Sizes([pruned, dense], {"x": normal(2, 3, 9, 7)}, None)
    copy = calibrate._Copy([pruned, dense], sizes)
    copy.add(MomentsOf(Columns("a", 1), Columns("a", 1, graph=1)))
    stored = copy.finished().graph.initializers
    assert {"w1", "graph1/w1"} <= stored.keys()
    assert not {"w2", "graph1/w2", "b2"} & stored.keys()
    assert stored["w1"].const_value is pruned.graph.initializers["w1"].const_value
    assert stored["graph1/w1"].const_value is dense.graph.initializers["w1"].const_value


def test_subgraphs_in_both_graphs(worker: Worker) -> None:
    body = """c = ReduceSum<keepdims=0>(x) zero = Constant<value_float=0.0>() g = Greater(c, zero)
    h = If(g) <then_branch = t () => (float[11,5] a) { k = Neg(x) a = Mul(k, w) },
               else_branch = e () => (float[11,5] b) { b = Mul(x, w) }> y = MatMul(h, v)"""
    weights = {"w": normal(5), "v": normal(5, 3)}
    model = build("float[11,5] x", "float y, float[11,5] h", body, weights, 17)
    other = model.clone()
    other.graph.initializers["w"].const_value = ir.tensor(2 * weights["w"], name="w")
    x = normal(11, 5)
    h = x * weights["w"] * (-1 if x.sum() > 0 else 1)
    check_moments(one(worker, [model, other], {"x": x}, MomentsOf(Reads("y"), Reads("y", 1))), h[None], 2 * h[None])


# Masks as inputs -----------------------------------------------------------------------------------------------------


def test_masks_equal_zeroing_by_hand(worker: Worker) -> None:
    _, dense, _ = pair()
    feed = {"x": normal(3, 3, 9, 7)}
    with masked(worker, dense, [Gate("h", 1), Gate("y", 1)]) as run:
        for kept in (np.ones(7, np.bool_), np.arange(7) % 2 == 0, np.zeros(7, np.bool_)):
            zeroed = dense.clone()
            value = zeroed.graph.initializers["w2"]
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy() * kept[:, None, None].astype(np.float32), name="w2")
            with masked(worker, zeroed, []) as plain:
                wanted = plain(feed, [])["y"]
            for out in (np.ones(4), np.array([1, 0, 0.5, 2])):
                found = run(feed, [kept, out])
                assert list(found) == ["y"]
                np.testing.assert_allclose(found["y"], wanted * out[:, None, None], atol=1e-5)


@pytest.mark.parametrize("kind", ["float", "float16"])
@pytest.mark.parametrize("value", ["x", "h", "y"])
@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1, -2, -3])
def test_gates_anywhere(worker: Worker, kind: str, value: str, axis: int | None) -> None:
    model = build(f"{kind}[2,3,5] x", f"{kind}[2,3,5] y, {kind}[2,3,5] h", "h = Neg(x) y = Abs(h)", {})
    x = normal(2, 3, 5).astype(np.float32 if kind == "float" else np.float16)
    mask = np.float32(0) if axis is None else (np.arange(x.shape[axis]) % 2).astype(np.float32)
    scale = mask if axis is None else mask.reshape([-1 if k == axis % 3 else 1 for k in range(3)])
    with masked(worker, model, [Gate(value, axis)]) as run:
        found = run({"x": x}, [mask])
    assert list(found) == ["y", "h"]
    np.testing.assert_array_equal(found["h"], -x if value == "y" else -x * scale.astype(x.dtype))
    np.testing.assert_array_equal(found["y"], np.abs(x * scale.astype(x.dtype)))


def test_a_residual_branch_and_two_gates_on_one_value(worker: Worker) -> None:
    feed = tokens(3)
    values = inside(feed)
    with masked(worker, text(), [Gate("y0", None), Gate("y0")], outputs=["y"]) as run:
        close(run(feed, [1, np.ones(5)])["y"], values["y0"] + values["x"])
        np.testing.assert_array_equal(run(feed, [0, np.ones(5)])["y"], values["x"])
        close(run(feed, [1, np.arange(5)])["y"], values["y0"] * np.arange(5, dtype=np.float32) + values["x"])


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "named"),
    [(Columns("nothing"), "nothing"), (Reads("nothing"), "nothing"), (Columns("x", 3), "x"), (Columns("x", 0, 1), "")],
)
def test_unknown_names(worker: Worker, source: Source, named: str) -> None:
    with pytest.raises(InputError) as raised:
        one(worker, text(), tokens(), ProfileOf(source))
    assert named in raised.value.object


def test_unfit_samples(worker: Worker) -> None:
    request = ProfileOf(Columns("x"))
    feed = tokens()
    with pytest.raises(InputError):
        one(worker, text(), [], request)
    with pytest.raises(InputError) as raised:
        one(worker, text(), {"x": feed["x"]}, request)
    assert raised.value.object == "mask"
    with pytest.raises(InputError):
        one(worker, text(), feed, request, padding="attention_mask")
    with pytest.raises(InputError):
        one(worker, text(), feed | {"mask": 0 * feed["mask"]}, request, padding="mask")
    with pytest.raises(InputError), masked(worker, text(), [Gate("h", 5)]):
        pass
    with masked(worker, text(), [Gate("h")]) as run, pytest.raises(InputError):
        run(feed, [1.0])  # type: ignore[list-item]


def test_groups_that_cannot_be_paired(worker: Worker) -> None:
    model = build("float[n,6,11] x", "float[n,4,10] y", "y = Conv<group=2>(x, w)", {"w": normal(4, 3, 2)})
    with pytest.raises(ImpossibleError):
        one(worker, model, {"x": normal(5, 6, 11)}, MomentsOf(Columns("y", 1), Reads("y")))


def test_rows_that_cannot_be_paired(worker: Worker) -> None:
    with pytest.raises(InputError) as raised:
        one(worker, text(), tokens(), MomentsOf(Reads("y0"), Columns("p")))
    assert "'p'" in raised.value.object


def test_opsets_that_are_too_old(worker: Worker) -> None:
    model = build("float[n,5] x", "float[n,5] y", "y = Neg(x)", {}, opset=8)
    with pytest.raises(ImpossibleError):
        one(worker, model, {"x": normal(2, 5)}, ProfileOf(Columns("x")))
