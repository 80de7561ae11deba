"""Repair: every site is what the model computes there, every piece what the whole model does, every repair a gain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper, parser
from test_zoo import CASES, INSIDE, NORMS
from zoo import ZOO

from onnxprune import feeds, reconstruct
from onnxprune.allocate import sites_of
from onnxprune.analysis import Analysis
from onnxprune.flow import Flow, Sessions
from onnxprune.infer import initializers
from onnxprune.lsq import PULL, Regression, fit, goal
from onnxprune.parts import Part
from onnxprune.reading import deserialized, serialized
from onnxprune.recipe import Options
from onnxprune.recovery import Recovery, Repaired
from onnxprune.rows import Rows, Sampling
from onnxprune.sites import Site, find_sites
from onnxprune.types import Group, Plan
from onnxprune.worker import Worker

ort.set_default_logger_severity(4)
SAMPLES = 24
LARGE = ("attention over every position of an image of any size",)  # at its smallest sizes still seconds a sample


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(seconds=60) as made:
        yield made


@cache
def saved(name: str, folder: Path) -> Path:
    """An entry of the zoo as a file."""
    path = folder / f"{abs(hash(name))}.onnx"
    onnx.save(ZOO[name](), path)
    return path


def built(inputs: str, outputs: str, body: str, opset: int = 18, **weights: np.ndarray | tuple[int, ...]) -> ir.Model:
    """A small model; a weight given by its shape is random."""
    rng = np.random.default_rng(3)
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}')
    for name, given in weights.items():
        array = given if isinstance(given, np.ndarray) else rng.standard_normal(given).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return deserialized(model)


def draw(groups: tuple[Group, ...], seed: int) -> Plan:
    """Of every group some units, of which there must be several."""
    rng = np.random.default_rng(seed)
    keep = {}
    for group in groups:
        if group.kind != "layers" and len(group.units) > group.least:
            mask = np.zeros(len(group.units), np.bool_)
            mask[rng.permutation(len(mask))[: rng.integers(group.least, len(mask))]] = True
            keep[group.id] = mask
    return Plan(keep)


def samples(analysis: Analysis, count: int = SAMPLES) -> list[dict[str, np.ndarray]]:
    """Random feeds; both halves of them take every branch."""
    graph, shapes = analysis.dense.graph, analysis.prepared.facts.shapes
    return [feeds.random_feed(graph, shapes, seed, choice=seed // 2) for seed in range(count)]


# Sites ---------------------------------------------------------------------------------------------------------------


def check_sites(model: ir.Model, sites: list[Site], fed: list[dict[str, np.ndarray]]) -> None:
    """What a site is the sum of must be its value."""
    sites = [site for site in sites if site.dense]
    flow, sessions = Flow(model, fed, Sessions(), {site.value for site in sites}), Sessions()
    for site in sites:
        (whole,) = flow.values([site.value])
        names = [operator.x for operator in site.operators]
        apart = Flow(model, fed, sessions, {*names, *site.rest}).values([*names, *site.rest])
        counts = [1] * len(fed)
        first = site.operators[0]
        shapes = [first.layout.shape(x.shape, flow.array(first.weight).shape) for x in apart[0]]
        rows = Rows(shapes, site.axes, counts, [None] * len(fed), Sampling())
        parts = [
            Part(flow, operator, rows.read(x, operator.layout))
            for operator, x in zip(site.operators, apart, strict=False)
        ]
        total = sum(part.output() for part in parts) + sum(rows.of(x, site.axes) for x in apart[len(names) :])
        wanted = rows.of(whole, site.axes)
        assert total.shape == wanted.shape
        assert np.abs(total - wanted).max() <= 2e-3 * max(np.abs(wanted).max(), 1e-6), site


@pytest.mark.parametrize("name", sorted(set(ZOO) - set(LARGE)))
def test_a_site_is_the_sum_of_its_operators_and_the_rest(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    analysis = Analysis(saved(name, tmp_path_factory.getbasetemp()), remove=("all",))
    plan = draw(analysis.groups, len(name))
    pruned = analysis.rewrite(plan)
    check_sites(pruned, sites_of(analysis, plan, pruned), samples(analysis, 3))


def whole(shapes: Mapping[str, tuple[int, ...]]):  # type: ignore[no-untyped-def]
    return lambda axis: np.ones(shapes[axis.value][axis.index], np.bool_)


def found(model: ir.Model, stays: tuple[str, ...] = ()) -> dict[str, Site]:
    """Sites of a model of which nothing goes, as sums of their parts."""
    model = ir.passes.common.ShapeInferencePass()(model).model
    shapes = {
        str(v.name): tuple(d if isinstance(d, int) else 3 for d in v.shape)
        for node in model.graph
        for v in (*node.inputs, *node.outputs)
        if v is not None and v.shape is not None
    }
    sites = find_sites(model, model, shapes, whole(shapes), stays)
    fed = [feeds.random_feed(model.graph, shapes, seed) for seed in range(3)]
    check_sites(model, sites, fed)
    return {site.value: site for site in sites}


def test_a_chain_ends_where_something_else_reads_it() -> None:
    sites = found(
        built(
            "float[n,3,6,5] x",
            "float[n,4,6,5] y",
            "a = Conv(x, w, c) b = BatchNormalization(a, g, s, m, v) d = Mul(b, scale) e = Add(d, shift) f = Relu(e) "
            "y = Conv(f, u)",
            w=(7, 3, 1, 1), c=(7,), g=(7,), s=(7,), m=(7,), v=np.full(7, 0.7, np.float32), scale=(7, 1, 1),
            shift=(1, 7, 1, 1), u=(4, 7, 1, 1),
        )
    )  # fmt: skip
    assert set(sites) == {"e", "y"}
    assert [step.kind for step in sites["e"].operators[0].steps] == ["norm", "mul", "add"]
    assert sites["e"].bounds == (0.0, np.inf)
    assert sites["e"].operators[0].homes() == [("a", 2)]


def test_a_projection_and_its_branch_are_one_site_whose_bias_counts_once() -> None:
    sites = found(
        built(
            "float[n,3] x, float[n,5] z",
            "float[n,5] y",
            "a = MatMul(x, u) a1 = Add(a, p) b = MatMul(x, w) s = Add(a1, b) t = Add(s, c) y = Add(t, z)",
            u=(3, 5), w=(3, 5), c=(5,), p=(5,),
        )
    )  # fmt: skip
    (site,) = sites.values()
    assert [operator.node for operator in site.operators] == ["a", "b"]
    assert site.rest == ("z",)


def test_channels_along_another_axis_are_another_matter() -> None:
    sites = found(
        built(
            "float[n,5,5] x",
            "float[n,5,5] y",
            "a = Conv(x, w) b = MatMul(x, u) y = Add(a, b)",
            w=(5, 5, 1), u=(5, 5),
        )
    )  # fmt: skip
    assert [operator.node for operator in sites["y"].operators] == ["a"]
    assert sites["y"].rest == ("b",)


def test_weights_behind_transposes_and_identities() -> None:
    sites = found(
        built(
            "float[n,3] x",
            "float[n,5] y, float[n,5] z",
            "t = Transpose(w) i = Identity(b) y = Gemm(x, t, i) v = Transpose<perm = [1,0]>(u) "
            "z = Gemm<transB = 1>(x, v, b)",
            w=(5, 3), u=(3, 5), b=(5,),
        )
    )  # fmt: skip
    assert sites["y"].operators[0].weight == ("t", 0)
    assert sites["y"].operators[0].plain.transposed
    assert not sites["z"].operators[0].plain.transposed


def test_no_site_where_two_read_the_weight_or_the_user_keeps_it() -> None:
    text = "a = MatMul(x, w) b = Add(a, c) d = Relu(b) e = MatMul(d, w) f = MatMul(e, u) y = Add(f, k)"
    model = built("float[n,5] x", "float[n,2] y", text, w=(5, 5), c=(5,), u=(5, 2), k=(2,))
    assert set(found(model)) == {"y"}
    assert found(model)["y"].operators[0].homes() == [("y", 1)]
    assert found(model.clone(), ("k",))["y"].operators[0].homes() == []
    assert found(model.clone(), ("u",)) == {}


def test_a_bias_is_one_number_for_each_output() -> None:
    """A column of as many numbers as there are outputs is none."""
    model = built("float[5,3] x", "float[5,5] y", "y = Gemm(x, w, c)", w=(3, 5), c=(5, 1))
    assert found(model) == {}
    model = built("float[n,3] x", "float[n,5] y", "y = Gemm(x, w, c)", w=(3, 5), c=(1,))
    assert found(model)["y"].operators[0].homes() == []
    model = built("float[3,7] x", "float[7,5] y", "y = Gemm<transA = 1>(x, w, c)", w=(3, 5), c=(1, 5))
    assert found(model)["y"].operators[0].bias == ("y", 2)


@pytest.mark.parametrize(
    ("attributes", "weight", "x"),
    [
        ("", (6, 4, 3), "n,4,11"),
        ("<pads = [2,0], strides = [2]>", (6, 4, 3), "n,4,11"),
        ("<group = 2, dilations = [3], pads = [1,4]>", (6, 2, 3), "n,4,11"),
        ("<group = 4, pads = [1,0,2,3], strides = [2,1]>", (8, 1, 3, 2), "n,4,7,6"),
        ("<group = 3, dilations = [1,2], strides = [1,3], auto_pad = \"VALID\">", (6, 2, 2, 2), "n,6,7,6"),
        ("<pads = [0,1,0,1,0,1]>", (5, 3, 2, 1, 2), "n,3,4,3,5"),
    ],
)  # fmt: skip
def test_patches_are_what_a_convolution_multiplies(attributes: str, weight: tuple[int, ...], x: str) -> None:
    model = built(f"float[{x}] x", "float y", f"y = Conv{attributes}(x, w, c)", w=weight, c=(weight[0],))
    model.graph.outputs[0].shape = None
    assert set(found(model)) == {"y"}


@pytest.mark.parametrize(
    ("attributes", "weight", "x"),
    [
        ("", (4, 6, 3), "n,4,5"),
        ("<strides = [3], pads = [2,0], output_padding = [1]>", (4, 6, 4), "n,4,5"),
        ("<pads = [3,2], dilations = [2]>", (4, 6, 2), "n,4,9"),  # more than the kernel reaches
        ("<group = 2, dilations = [3], pads = [1,4], strides = [2]>", (4, 3, 3), "n,4,6"),
        ("<group = 4, pads = [1,0,2,3], strides = [2,1], output_padding = [1,0]>", (8, 1, 3, 4), "n,8,4,6"),
        ("<group = 3, dilations = [1,2], strides = [1,3]>", (6, 2, 2, 2), "n,6,4,3"),
        ("<strides = [2,3], output_shape = [9,11]>", (3, 5, 3, 2), "n,3,4,4"),
        ("<strides = [2,3], auto_pad = \"SAME_UPPER\">", (3, 5, 3, 4), "n,3,4,4"),
        ("<strides = [2,3], auto_pad = \"SAME_LOWER\">", (3, 5, 5, 4), "n,3,4,4"),
        ("<strides = [2,1], auto_pad = \"VALID\">", (3, 5, 3, 2), "n,3,4,4"),
        ("<pads = [0,1,0,1,0,1], strides = [1,2,1], output_padding = [0,1,0]>", (3, 5, 2, 1, 3), "n,3,4,3,5"),
    ],
)  # fmt: skip
def test_patches_are_what_a_transposed_convolution_multiplies(attributes: str, weight: tuple[int, ...], x: str) -> None:
    channels = weight[1] * int(attributes.partition("group = ")[2][:1] or 1)
    text = f"y = ConvTranspose{attributes}(x, w, c)"
    model = built(f"float[{x}] x", "float y", text, w=weight, c=(channels,))
    model.graph.outputs[0].shape = None
    assert set(found(model)) == {"y"}


@pytest.mark.parametrize("where", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 3), (4, 1)])
def test_padding_to_the_same_size(where: str, strides: tuple[int, int]) -> None:
    text = f'y = Conv<auto_pad = "{where}", strides = [{strides[0]},{strides[1]}]>(x, w)'
    model = built("float[n,3,7,8] x", "float y", text, w=(5, 3, 2, 4))
    model.graph.outputs[0].shape = None
    assert set(found(model)) == {"y"}


@pytest.mark.parametrize(
    ("x", "text", "w", "axes", "groups"),
    [
        ("n,2,4,3", "MatMul(x, w)", (2, 3, 5), (1, 3), 2),
        ("n,1,4,3", "MatMul(x, w)", (2, 3, 5), (1, 3), 1),
        ("4,3", "MatMul(x, w)", (2, 3, 5), (0, 2), 1),
        ("n,2,6,4,3", "MatMul(x, w)", (2, 1, 3, 5), (1, 4), 2),
        ("1,6,4,3", "MatMul(x, w)", (2, 1, 3, 5), (0, 3), 1),
        ("n,2,6,4,3", "MatMul(x, w)", (2, 6, 3, 5), (1, 2, 4), 12),
        ("n,4,3", "MatMul(x, w)", (1, 3, 5), (2,), 1),
        ("n,3,4", "MatMul(w, x)", (5, 3), (1,), 1),
        ("n,2,3,4", "MatMul(w, x)", (2, 5, 3), (1, 2), 2),
        ("n,2,4,3", "MatMul(x, t)", (2, 5, 3), (1, 3), 2),
        ("n,4,3", 'Einsum<equation = "btd,dhk->bthk">(x, w)', (3, 2, 5), (2, 3), 1),
        ("n,4,2,3", 'Einsum<equation = "bthd,hdm->bmt">(x, w)', (2, 3, 5), (1,), 1),
        ("2,4,3", 'Einsum<equation = "...td,...df->...ft">(x, w)', (2, 3, 5), (0, 1), 2),
        ("n,4,3", 'Einsum<equation = "...d,edf->f...e">(x, w)', (2, 3, 5), (0, 3), 1),
        ("n,4,2,3", 'Einsum<equation = "hkd,bthd->bkth">(w, x)', (2, 5, 3), (3, 1), 2),
    ],
)  # fmt: skip
def test_weights_with_more_axes_than_two(
    x: str, text: str, w: tuple[int, ...], axes: tuple[int, ...], groups: int
) -> None:
    turned = "t = Transpose<perm = [0,2,1]>(w) " if "(x, t)" in text else ""
    model = built(f"float[{x}] x", "float y", f"{turned}y = {text}", w=w)
    model.graph.outputs[0].shape = None
    (site,) = found(model).values()
    assert site.axes == axes
    layout = site.operators[0].layout
    assert layout.sizes(w)[0] == groups
    array = np.random.default_rng(0).standard_normal(w)
    np.testing.assert_array_equal(layout.stored(layout.matrix(array), array), array)


def test_biases_of_stacked_outputs() -> None:
    """One number for each expert or each output is part of the sum as much as one for each of both."""
    for shape in ((2, 1, 5), (2, 1, 1), (5,)):
        model = built("float[2,n,3] x", "float[2,n,5] y", "a = MatMul(x, w) y = Add(a, c)", w=(2, 3, 5), c=shape)
        (site,) = found(model).values()
        assert site.axes == (0, 2)
        assert len(site.operators[0].steps) == 1
    model = built("float[2,n,3] x", "float[5,n,2] y",
                  'a = Einsum<equation = "end,edf->fne">(x, w) y = Add(a, c)', w=(2, 3, 5), c=(5, 1, 2))  # fmt: skip
    assert found(model)["y"].axes == (2, 0)


# Least squares -------------------------------------------------------------------------------------------------------

X = np.array([[1, 0], [0, 1], [1, 1]], np.float32)  # and one output that is their sum


def test_least_squares_on_one_of_two_columns() -> None:
    wanted = X.sum(axis=1, keepdims=True)
    change = Regression(X[:, :1], intercept=False).solve(wanted, 0.0)
    np.testing.assert_allclose(change.weight, [[1.5]], atol=1e-6)
    assert ((wanted - change(X[:, :1])) ** 2).sum() == pytest.approx(1.5)
    assert ((wanted - X[:, :1]) ** 2).sum() == pytest.approx(2.0)


def test_an_intercept_takes_up_the_mean_and_is_not_damped() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 3)).astype(np.float32) + 4
    weight, shift = rng.standard_normal((3, 2)), np.array([30.0, -20.0])
    found = Regression(x).solve((x @ weight + shift).astype(np.float32), 1e-9)
    np.testing.assert_allclose(found.weight, weight, atol=1e-4)
    np.testing.assert_allclose(found.shift, shift, atol=1e-3)
    strong = Regression(x).solve((x @ weight + shift).astype(np.float32), 1e9)
    np.testing.assert_allclose(strong.shift, (x @ weight + shift).mean(axis=0), atol=1e-4)


def test_least_squares_does_not_mind_the_order_of_rows() -> None:
    rng = np.random.default_rng(1)
    x, y = (rng.standard_normal((97, k)).astype(np.float32) for k in (5, 3))
    order = rng.permutation(97)
    one, other = Regression(x).solve(y, 1e-2), Regression(x[order]).solve(y[order], 1e-2)
    np.testing.assert_allclose(one.weight, other.weight, atol=1e-6)
    np.testing.assert_allclose(one.shift, other.shift, atol=1e-6)


@pytest.mark.parametrize("intercept", [True, False])
def test_fewer_rows_than_columns_are_fitted_like_any(intercept: bool) -> None:
    rng = np.random.default_rng(4)
    x, y = (rng.standard_normal((23, k)).astype(np.float32) + 1 for k in (31, 5))
    for ridge in (1e-3, 0.5):
        found = Regression(x, intercept).solve(y, ridge)
        assert found.basis is not None
        mean = x.mean(axis=0, dtype=np.float64) if intercept else np.zeros(31)
        rows = x - mean
        normal = rows.T @ rows / 23
        normal += ridge * np.trace(normal) / 31 * np.eye(31)
        weight = np.linalg.solve(normal, rows.T @ y / 23)
        shift = y.mean(axis=0) - mean @ weight if intercept else np.zeros(5)
        np.testing.assert_allclose(found.weight, weight, atol=1e-5)
        np.testing.assert_allclose(found.shift, shift, atol=1e-5)
        np.testing.assert_allclose(found(x[:7]), x[:7] @ weight + shift, atol=1e-4)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("x", [np.ones((7, 3)), np.zeros((7, 3)), np.eye(2, 5), np.ones((1, 4))])
def test_singular_moments_are_damped(x: np.ndarray, ridge: float) -> None:
    found = Regression(x.astype(np.float32)).solve(np.ones((len(x), 2), np.float32), ridge)
    assert np.isfinite(found.weight).all()
    assert np.isfinite(found.shift).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_what_is_beyond_numbers_is_left_alone(value: float) -> None:
    x = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    x[3, 1] = value
    y = np.ones((20, 1), np.float32)
    with np.errstate(all="ignore"):
        assert fit(x, y, 0 * y, np.arange(20) % 5 == 2) is None


def test_behind_relu_and_clip_only_what_is_seen_is_aimed_at() -> None:
    wanted, predicted = np.array([2.0, -3.0, -3.0, 9.0, 9.0]), np.array([1.0, -5.0, 4.0, 7.0, 5.0])
    np.testing.assert_allclose(goal(wanted, predicted, (0, np.inf)), [2, -5 + 2 * PULL, -3 * PULL, 9, 9], rtol=1e-6)
    found = goal(wanted, predicted, (0, 6))
    np.testing.assert_allclose(found, [2, -5 + 2 * PULL, -3 * PULL, 7 + 2 * PULL, 6 + 3 * PULL], rtol=1e-6)
    np.testing.assert_array_equal(goal(wanted, predicted, (-np.inf, np.inf)), wanted)


def test_relu_aware_targets_fit_what_plain_ones_cannot() -> None:
    """One column of two is left; where ReLU lets nothing through it hardly has to fit."""
    rng = np.random.default_rng(2)
    a = rng.standard_normal((400, 1)).astype(np.float32)
    b = np.where(a > 0, 0, -np.abs(rng.standard_normal((400, 1))) * 9).astype(np.float32)
    wanted, held_out = a + b, np.arange(400) % 5 == 2
    start = 0.2 * a - 0.5
    found = {}
    for bounds in ((0.0, np.inf), (-np.inf, np.inf)):
        solved = fit(a, wanted, start, held_out, bounds=bounds, rounds=30)
        left = start if solved is None else start + solved[0](a)
        found[bounds] = float(((np.maximum(left, 0) - np.maximum(wanted, 0)) ** 2).mean())
    assert found[0.0, np.inf] < 0.3 * found[-np.inf, np.inf]


def test_nothing_is_changed_where_leaving_it_is_better() -> None:
    rng = np.random.default_rng(3)
    x, y = (rng.standard_normal((30, k)).astype(np.float32) for k in (20, 1))
    assert fit(x, y, y, np.arange(30) % 5 == 2) is None


# Flow ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(ZOO) - set(LARGE)))
def test_piece_by_piece_is_the_whole_model(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A piece for every third node."""
    analysis = Analysis(saved(name, tmp_path_factory.getbasetemp()))
    model, fed = analysis.prepared.model, samples(analysis, 2)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(serialized(model).SerializeToString(), options)
    outputs = [str(value.name) for value in model.graph.outputs if value.type is not None]  # maps have none
    wanted = [session.run(outputs, feed) for feed in fed]
    flow = Flow(model, fed, Sessions())
    for node in list(model.graph)[::3]:
        flow.values([str(out.name) for out in node.outputs if out.name][:1])
    for k, arrays in enumerate(flow.values(outputs)):
        for row, array in zip(wanted, arrays, strict=True):
            assert row[k].dtype == array.dtype
            np.testing.assert_allclose(array, row[k], rtol=2e-4, atol=1e-5)


# Whole repairs -------------------------------------------------------------------------------------------------------


def repaired(analysis: Analysis, plan: Plan, pruned: ir.Model, worker: Worker, **options: object) -> Repaired:
    given = Options(ratio=0.5, calibration="given", **options)  # type: ignore[arg-type]
    return Recovery(analysis, samples(analysis), given, worker).repair(plan, pruned)


def stored(model: ir.Model) -> dict[str, bytes]:
    return {str(name): value.const_value.tobytes() for name, value in initializers(model.graph).items()}  # type: ignore[union-attr]


def divergence(worker: Worker, analysis: Analysis, model: ir.Model) -> float:
    """On the half of the samples that a first repair is judged by."""
    half = Recovery(analysis, samples(analysis), Options(ratio=0.5, calibration="given"), worker).samples
    reconstruct.begin(worker, analysis.prepared.model, half.fitted, half.sampling(), judged=half.judged)
    return reconstruct.repair(worker, model, [], None, judge=True).divergence


@pytest.mark.parametrize("name", sorted({name for name in CASES if NORMS not in name} - set(LARGE)))
def test_a_repair_changes_what_it_lists_and_helps(
    name: str, worker: Worker, tmp_path_factory: pytest.TempPathFactory
) -> None:
    entry, inside = name.removesuffix(INSIDE), ("head-dim", "width", "channels", "layers", "experts")
    remove = inside if entry != name else ("all",)
    analysis = Analysis(saved(entry, tmp_path_factory.getbasetemp()), remove=remove)
    plan = draw(analysis.groups, len(name))
    pruned = analysis.rewrite(plan)
    before = stored(pruned)
    result = repaired(analysis, plan, pruned, worker)
    after = stored(result.model)
    assert stored(pruned) == before
    assert {name for name in after if after[name] != before.get(name)} == set(result.names)
    assert before.keys() - after.keys() == set()
    if not result.names:
        removed = any(not keep.all() for keep in plan.keep.values())
        assert not removed or result.warnings or divergence(worker, analysis, pruned) == 0
    elif entry != name or len(name) % 3 == 0:
        assert stored(repaired(analysis, plan, pruned, worker).model) == after
    assert [(n.op_type, len(n.inputs)) for n in result.model.graph] == [
        (n.op_type, len(n.inputs)) for n in pruned.graph
    ]
    for mine, theirs in (
        (result.model.graph.inputs, pruned.graph.inputs),
        (result.model.graph.outputs, pruned.graph.outputs),
    ):
        assert [(v.name, str(v.shape), v.dtype) for v in mine] == [(v.name, str(v.shape), v.dtype) for v in theirs]
