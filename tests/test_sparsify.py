"""sparsify: the pattern lies where hardware reads it, in the file, and everything else is what it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper, parser
from zoo import ZOO

from onnxprune import nm, plugin, sparse
from onnxprune import report as reports
from onnxprune.analysis import Analysis
from onnxprune.cli import main
from onnxprune.errors import ImpossibleError, InputError, InternalError
from onnxprune.infer import initializers
from onnxprune.nm import NM, Layer, find_layers, kernel
from onnxprune.passes.nm_mag import Magnitude
from onnxprune.passes.nm_perm import ChannelPermutation
from onnxprune.runtime import ort as runtime
from onnxprune.sparsify import sparsify
from onnxprune.storage import dump
from onnxprune.types import Plan

Arrays = dict[str, np.ndarray]

# Residual, convolutions with a depthwise one among them, a Gemm either way round, a weight behind Transpose.
NET = """a = Conv<pads = [1,1,1,1]>(x, w0, b0)
b = Relu(a)
c = Conv<group = 12, pads = [1,1,1,1]>(b, wd)
d = Conv<pads = [1,1,1,1]>(c, w1, b1)
e = Relu(d)
f = Conv(e, w2, b2)
g = Add(b, f)
h = Relu(g)
i = GlobalAveragePool(h)
j = Flatten(i)
k = Gemm<transB = 1>(j, w3, b3)
l = Relu(k)
t = Transpose<perm = [1,0]>(w4)
m = MatMul(l, t)
o = Relu(m)
y = Gemm(o, w5, b5)"""
SHAPES = {"w0": (12, 3, 3, 3), "b0": (12,), "wd": (12, 1, 3, 3), "w1": (16, 12, 3, 3), "b1": (16,),
          "w2": (12, 16, 1, 1), "b2": (12,), "w3": (20, 12), "b3": (20,), "w4": (24, 20), "w5": (24, 5),
          "b5": (5,)}  # fmt: skip
AXES = {"w1": 1, "w2": 1, "w3": 1, "w4": 1, "w5": 0}  # what is summed over, where it is a multiple of four


def write(folder: Path, body: str = NET, shapes: dict | None = None, opset: int = 18,
          inputs: str = "float[n,3,7,6] x", outputs: str = "float[n,5] y") -> Path:  # fmt: skip
    """A model in ONNX text with random weights, or the arrays that are given."""
    rng = np.random.default_rng(0)
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]>\nnet ({inputs}) => ({outputs}) {{{body}}}'
    )
    for name, shape in (shapes or SHAPES).items():
        array = shape
        if isinstance(shape, tuple):
            array = (rng.standard_normal(shape) * max(np.prod(shape[1:]), 1) ** -0.5).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(model)
    path = folder / "net.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return write(tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    path = tmp_path / "data.npz"
    mixed = rng.standard_normal((48, 4)) @ rng.standard_normal((4, 126)) + 0.3 * rng.standard_normal((48, 126))
    np.savez(path, x=mixed.reshape(48, 3, 7, 6).astype(np.float32))
    return path


def arrays(path: Path) -> Arrays:
    return {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def holds(array: np.ndarray, axis: int, n: int = 2, m: int = 4, zero: int = 0) -> bool:
    runs = np.moveaxis(array != zero, axis, -1).reshape(-1, m)
    return bool((runs.sum(axis=1) <= n).all())


def error(dense: Path, other: Path, data: Path) -> float:
    """The squared difference of outputs on the samples, relative."""
    feed = dict(np.load(data))
    x, y = (next(iter(runtime.run(str(path), [feed])[0].values())) for path in (dense, other))
    return float(np.square(x - y).mean() / np.square(x).mean())


# The pattern ---------------------------------------------------------------------------------------------------------


def test_patterns_are_read() -> None:
    assert NM.parse("2:4") == NM(2, 4)
    assert str(NM.parse("4:32")) == "4:32"
    for text in ("2", "4:2", "0:4", "4:4", "2:33", "a:b", "2:4:8", "-1:4", "²:4", ""):
        with pytest.raises(InputError):
            NM.parse(text)


@pytest.mark.parametrize(
    ("n", "m", "most"),
    [(2, 4, 2), (1, 4, 1), (1, 2, 2), (4, 8, 4), (2, 8, 2), (3, 4, 3), (1, 6, 2), (1, 3, 2), (2, 6, 4)],
)
def test_how_dense_an_aligned_window_can_be(n: int, m: int, most: int) -> None:
    assert NM(n, m).densest(4) == most


# Where it lies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [NM(3, 7), NM(2, 5), NM(1, 3), NM(1, 2), NM(2, 4)], ids=str)
def test_every_model_of_the_zoo_has_it_wherever_it_can(pattern: NM, tmp_path: Path) -> None:
    names = [*ZOO][:: 3 if pattern == NM(3, 7) else 11]  # widths of seven are in nearly all
    seen = set()
    for name in names:
        path = tmp_path / "m.onnx"
        onnx.save(ZOO[name](), path)
        analysis = Analysis(path)
        model = analysis.rewrite(Plan({}))
        layers = find_layers(model, analysis.given, pattern)
        places = [(one.initializer, one.axis) for one in layers if not one.reason]
        stored = initializers(model.graph)
        for initializer, axis in places:
            value = stored[initializer]
            whole = value.const_value.numpy()
            found = nm.thinned(value, axis, pattern, Magnitude())
            zero = 0 if whole.dtype.kind == "f" else nm.zero(value, whole)
            assert holds(found, axis, pattern.n, pattern.m, zero), (name, initializer)
            kept = found != zero
            np.testing.assert_array_equal(found[kept], whole[kept])
            nm.put(value, found)
        assert nm.broken(model, pattern, places) == []
        seen |= {one.op_type for one in layers if not one.reason}
    assert {"Conv", "Gemm", "MatMul"} <= seen or pattern != NM(3, 7)


def test_it_lies_along_what_is_summed_over(net: Path, tmp_path: Path) -> None:
    out = tmp_path / "sparse.onnx"
    result = sparsify(net, out, measure=False)
    before, after = arrays(net), arrays(out)
    for name, axis in AXES.items():
        assert holds(after[name], axis), name
        kept = after[name] != 0
        assert kept.mean() == 0.5
        np.testing.assert_array_equal(after[name][kept], before[name][kept])
    for name in set(before) - set(AXES):
        np.testing.assert_array_equal(after[name], before[name])
    row = result.report.sparsity
    assert row is not None
    assert {layer.initializer: layer.reason for layer in row.layers if not layer.sparse} == {
        "w0": "3 inputs are no multiple of 4",
        "wd": "a depthwise convolution sums over 1 of 12 channels each",
    }
    assert [layer.criterion for layer in row.layers if layer.sparse] == ["nm-mag"] * 5


def integers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(40, 200, shape).astype(np.uint8)


@pytest.mark.parametrize("calibrated", [False, True])
def test_of_codes_the_zero_point_is_zero(calibrated: bool, tmp_path: Path, data: Path) -> None:
    rng = np.random.default_rng(3)
    point, scale = rng.integers(100, 150, 12).astype(np.uint8), rng.uniform(0.005, 0.01, 12).astype(np.float32)
    body = """q = QuantizeLinear(x, s, z)
        p = DequantizeLinear(q, s, z)
        w = DequantizeLinear<axis = 0>(w0, s0, z0)
        b = DequantizeLinear(b0, sb)
        a = Conv(p, w, b)
        h = Relu(a)
        r = QuantizeLinear(h, s, z)
        t = DequantizeLinear(r, s, z)
        v = DequantizeLinear(w1, s1, z1)
        g = GlobalAveragePool(t)
        f = Flatten(g)
        y = Gemm<transB = 1>(f, v)"""
    shapes = {"s": np.float32(0.05), "z": np.int8(3), "w0": integers(rng, 12, 8, 3, 3), "s0": scale, "z0": point,
              "b0": rng.integers(-90, 90, 12).astype(np.int32), "sb": np.float32(1e-3),
              "w1": integers(rng, 5, 12), "s1": np.float32(0.01), "z1": np.uint8(120)}  # fmt: skip
    path, out = write(tmp_path, body, shapes, inputs="float[n,8,4,4] x"), tmp_path / "sparse.onnx"
    given = {}
    if calibrated:
        np.savez(data, x=rng.standard_normal((90, 8, 4, 4)).astype(np.float32))
        given = {"calibration": str(data)}
    result = sparsify(path, out, measure=False, **given)
    after = arrays(out)
    assert holds(after["w0"] != point[:, None, None, None], 1)
    assert holds(after["w1"], 1, zero=120)
    assert after["w0"].dtype == np.uint8
    assert {layer.type for layer in result.report.sparsity.layers} == {"INT8"}
    if calibrated:
        assert [layer.criterion for layer in result.report.sparsity.layers] == ["nm-sparsegpt"] * 2
        plain = tmp_path / "plain.onnx"
        sparsify(path, plain, measure=False)
        assert error(path, out, data) < error(path, plain, data)


def test_float_weights_behind_a_quantiser(tmp_path: Path) -> None:
    body = """q = QuantizeLinear<axis = 1>(w, s, z)
        d = DequantizeLinear<axis = 1>(q, s, z)
        y = MatMul(x, d)"""
    shapes = {"w": (16, 5), "s": np.full(5, 0.01, np.float32), "z": np.array([0, 3, -5, 0, 1], np.int8)}
    out = tmp_path / "sparse.onnx"
    result = sparsify(write(tmp_path, body, shapes, inputs="float[n,16] x"), out, measure=False)
    assert holds(arrays(out)["w"], 0)
    assert result.report.sparsity.layers[0].type == "INT8"


def test_readers_of_one_weight_must_agree(tmp_path: Path) -> None:
    both = "h = MatMul(x, w)\ng = Relu(h)\ny = MatMul(g, w)"
    layers = layers_of(write(tmp_path, both, {"w": (40, 40)}, inputs="float[n,40] x", outputs="float[n,40] y"))
    assert [layer.reason for layer in layers] == ["", ""]
    turned = "h = MatMul(x, w)\ng = Relu(h)\ny = Gemm<transB = 1>(g, w)"
    layers = layers_of(write(tmp_path, turned, {"w": (40, 40)}, inputs="float[n,40] x", outputs="float[n,40] y"))
    assert {layer.reason for layer in layers} == {"its weight is shared: another node sums over another axis"}
    tied = "h = Gather(w, x)\ng = Relu(h)\nt = Transpose<perm = [1,0]>(w)\ny = MatMul(g, t)"
    layers = layers_of(write(tmp_path, tied, {"w": (70, 20)}, inputs="int64[n] x", outputs="float[n,70] y"))
    assert [layer.reason for layer in layers] == [
        "an embedding is looked up, not multiplied",
        "its weight is shared: Gather reads it as well",
    ]


def layers_of(path: Path) -> list[Layer]:
    analysis = Analysis(path)
    return find_layers(analysis.rewrite(Plan({})), analysis.given, NM(2, 4))


def test_the_table_says_what_share_of_the_time_a_layer_is(net: Path, tmp_path: Path) -> None:
    result = run("sparsify", net, "-o", tmp_path / "s.onnx", "--report", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    assert "of the time" in result.output
    row = json.loads((tmp_path / "r.json").read_text())["sparsity"]
    assert len(row["layers"]) == 7
    assert all(layer["ms"] > 0 and 0 < layer["time"] < 1 for layer in row["layers"])
    assert sum(layer["time"] for layer in row["layers"]) <= 1 + 1e-9
    assert row["sparse_time"] == pytest.approx(sum(layer["time"] for layer in row["layers"] if layer["sparse"]))
    assert row["kernel_time"] == 0
    more = ("--ratio", "0.3", "--pattern", "2:4", "--no-cache", "--report", tmp_path / "p.json")
    assert run("prune", net, "-o", tmp_path / "p.onnx", *more).exit_code == 0
    row = json.loads((tmp_path / "p.json").read_text())["sparsity"]
    assert all(layer["time"] > 0 for layer in row["layers"])


def test_without_measuring_there_are_shares_of_macs_only(net: Path, tmp_path: Path) -> None:
    result = run("sparsify", net, "-o", tmp_path / "s.onnx", "--no-measure", "--report", tmp_path / "r.json")
    assert result.exit_code == 0
    assert "of the time" not in result.output
    row = json.loads((tmp_path / "r.json").read_text())["sparsity"]
    assert row["kernel_time"] is None
    assert {layer["time"] for layer in row["layers"]} == {None}
    sums = reports.layers(reports.SparsityRow.model_validate(row))[-2:]
    assert [cells[4] for cells in sums] == [f"{row['sparse_macs']:.1%}", "0.0%"]
    assert {cells[5] for cells in sums} == {""}


def test_shares_of_time_are_of_the_whole_model_and_never_more_than_all() -> None:
    common = {"op": "Conv", "initializer": "w", "axis": 1, "inputs": 8, "outputs": 8, "type": "FLOAT", "macs": 1,
              "density": 0.5, "criterion": "nm-mag", "reason": "", "why": ""}  # fmt: skip
    layers = [
        reports.LayerRow(node=str(k), sparse=sparse, kernel=kernel, ms=ms, **common)
        for k, (sparse, kernel, ms) in enumerate([(True, True, 3.0), (True, False, 1.0), (False, False, None)])
    ]
    row = reports.SparsityRow(
        pattern="2:4", criterion="nm-mag", repair=None, sparse_macs=1, kernel_macs=1, layers=layers
    )
    for whole, wanted in ((10.0, (0.3, 0.1, None)), (2.0, (0.75, 0.25, None))):
        found = sparse.timed(row, whole)
        assert tuple(layer.time for layer in found.layers) == wanted
        assert (found.kernel_time, found.sparse_time) == (wanted[0], wanted[0] + wanted[1])


# With calibration data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["nm-mag", "nm-wanda", "nm-sparsegpt"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_repair_helps_and_keeps_the_pattern(
    criterion: str, pattern: str, net: Path, data: Path, tmp_path: Path
) -> None:
    plain, out = tmp_path / "plain.onnx", tmp_path / "sparse.onnx"
    given = {"pattern": pattern, "criterion": criterion, "calibration": str(data), "measure": False}
    sparsify(net, plain, reconstruct="none", **given)
    result = sparsify(net, out, **given)
    n = int(pattern[0])
    for path in (plain, out):
        found = arrays(path)
        assert all(holds(found[name], axis, n) for name, axis in AXES.items())
    assert error(net, out, data) < error(net, plain, data)
    assert {layer.criterion for layer in result.report.sparsity.layers if layer.sparse} == {criterion}
    assert set(AXES) <= set(result.report.repaired)


def test_without_repair_only_weights_that_go_change(net: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "sparse.onnx"
    sparsify(net, out, criterion="nm-wanda", reconstruct="none", calibration=str(data), measure=False)
    before, after = arrays(net), arrays(out)
    for name, axis in AXES.items():
        assert holds(after[name], axis)
        kept = after[name] != 0
        np.testing.assert_array_equal(after[name][kept], before[name][kept])


def test_latencies_are_kept_where_asked_and_change_nothing(net: Path, data: Path, tmp_path: Path) -> None:
    kept, made = tmp_path / "cache", []
    for k, extra in enumerate((("--cache", kept), ("--no-cache",))):
        out = tmp_path / f"{k}.onnx"
        command = ["sparsify", net, "-o", out, "--calibration", data, *extra]
        assert CliRunner().invoke(main, [str(a) for a in command]).exit_code == 0
        made.append((out.read_bytes(), sorted(path for path in kept.rglob("*") if path.is_file())))
    assert made[0][1]
    assert made[0] == made[1]


def test_the_surgeon_is_better_than_magnitude(net: Path, data: Path, tmp_path: Path) -> None:
    errors = {}
    for criterion in ("nm-mag", "nm-sparsegpt"):
        out = tmp_path / f"{criterion}.onnx"
        sparsify(net, out, criterion=criterion, reconstruct="none", calibration=str(data), measure=False)
        errors[criterion] = error(net, out, data)
    assert errors["nm-sparsegpt"] < errors["nm-mag"]


def test_what_cannot_be_fitted_is_thinned_out_by_magnitude(tmp_path: Path, data: Path) -> None:
    body = """w = Cast<to = 1>(w0)
        a = MatMul(x, w)
        b = Relu(a)
        y = MatMul(b, w1)"""
    stored = np.random.default_rng(0).standard_normal((12, 16)).astype(np.float64)
    path = write(tmp_path, body, {"w0": stored, "w1": (16, 5)}, inputs="float[n,12] x", outputs="float[n,5] y")
    np.savez(data, x=np.random.default_rng(0).standard_normal((90, 12)).astype(np.float32))
    result = sparsify(path, tmp_path / "s.onnx", calibration=str(data), measure=False)
    assert [layer.criterion for layer in result.report.sparsity.layers] == ["nm-mag", "nm-sparsegpt"]
    assert any("1 layers were thinned out by nm-mag" in text for text in result.report.warnings)


@pytest.mark.parametrize("one", [False, True])
def test_each_matrix_of_a_stack_has_the_pattern_and_is_fitted(one: bool, tmp_path: Path) -> None:
    """With one input for all matrices, and with one for each."""
    body = "e = Concat<axis = 1>(x, z)\na = MatMul(e, w0)\nb = Relu(a)\ny = MatMul(b, w1)"
    body = body.replace("Concat<axis = 1>(x, z)", "Identity(x)") if one else body
    shapes: dict = {"w0": (2, 12, 16), "w1": (2, 16, 5)}
    inputs = "float[n,1,7,12] x" if one else "float[n,1,7,12] x, float[n,1,7,12] z"
    path = write(tmp_path, body, shapes, inputs=inputs, outputs="float[n,2,7,5] y")
    rng = np.random.default_rng(1)
    mixed = rng.standard_normal((2, 40, 1, 7, 4)) @ rng.standard_normal((2, 1, 1, 4, 12))
    x, z = (mixed + 0.1 * rng.standard_normal(mixed.shape)).astype(np.float32)
    np.savez(tmp_path / "d.npz", **({"x": x} if one else {"x": x, "z": z}))
    left = {}
    for how in ("none", "admm"):
        out = tmp_path / f"{how}.onnx"
        options: dict = {"criterion": "nm-mag"} if how == "none" else {}
        result = sparsify(path, out, reconstruct=how, calibration=str(tmp_path / "d.npz"), measure=False, **options)
        assert all(layer.sparse for layer in result.report.sparsity.layers)
        assert all(holds(arrays(out)[name], 1) for name in shapes)
        left[how] = error(path, out, tmp_path / "d.npz")
    assert {layer.criterion for layer in result.report.sparsity.layers} == {"nm-sparsegpt"}
    assert left["admm"] < 0.5 * left["none"]


def test_a_super_weight_stays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = {f"w{k}": (16, 16) for k in range(6)}
    shapes: dict = {name: (rng.standard_normal(size) * 0.25).astype(np.float32) for name, size in sizes.items()}
    shapes["w2"][:, 5] = 0
    shapes["w2"][3, 5] = 300.0  # makes an outlier
    shapes["w3"][4:8, 9] = [500, 0.4, 600, 700]
    shapes["w3"][5, 9] = 400.0  # third in its run, and between two spikes
    shapes["tiny"] = np.float32(1e-6)
    layers = [f"h{k} = MatMul({'x' if k == 0 else f'r{k - 1}'}, w{k})\nr{k} = Relu(h{k})\n" for k in range(6)]
    body = "".join(layers).replace("Relu(h3)", "Mul(h3, tiny)")
    path = write(tmp_path, f"{body}y = Identity(r5)", shapes, inputs="float[n,16] x", outputs="float[n,16] y")
    data = tmp_path / "data.npz"
    np.savez(data, x=np.abs(rng.standard_normal((60, 16))).astype(np.float32))
    out = tmp_path / "s.onnx"
    result = sparsify(path, out, criterion="nm-mag", reconstruct="none", calibration=str(data), measure=False)
    protected = result.report.sparsity.protected
    assert ("w3", 5, 9) in protected
    assert arrays(out)["w3"][5, 9] == 400.0


# Order of channels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["residual CNN", "split, transform, merge", "dense block, one piece twice", "norms",
     "quantised weights and activations", "weight through Identity, Transpose, Cast and Reshape"],
)  # fmt: skip
def test_another_order_is_the_same_function(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(ZOO[name](), path)
    monkeypatch.setattr(Magnitude, "thin", lambda self, runs: plugin.Thinned(runs.weight, np.ones_like(runs.stays)))
    monkeypatch.setattr(nm, "broken", lambda *_: [])  # only the order is of interest here
    monkeypatch.setattr(
        ChannelPermutation, "order", lambda self, seats, *_: np.roll(np.arange(len(seats[0].places)), 2)
    )
    turned = 0
    for pattern in ("3:7", "2:5", "1:3", "1:2"):
        try:
            result = sparsify(path, pattern=pattern, permute=True, measure=False)
        except ImpossibleError:
            continue
        turned += len(result.report.sparsity.permuted)
        assert not any("our bug" in text for text in result.report.warnings)
        assert result.report.quality["relative-error"] < 1e-5
        assert len(result.report.rewrites) >= len(result.report.sparsity.permuted)
    assert turned


def test_another_order_keeps_more(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    strong = (rng.standard_normal((24, 5)) * (1 + 9 * (np.arange(24) < 6))[:, None]).astype(np.float32)
    body = "a = MatMul(x, w0)\nb = Add(a, b0)\nc = Relu(b)\ny = MatMul(c, w1)"
    path = write(tmp_path, body, {"w0": (3, 24), "b0": (24,), "w1": strong}, inputs="float[n,3] x")
    kept = []
    for permute in (False, True):
        out = tmp_path / f"{permute}.onnx"
        sparsify(path, out, permute=permute, measure=False)
        kept.append(np.abs(arrays(out)["w1"]).sum())
    assert kept[1] > 1.1 * kept[0]


def test_an_order_that_is_not_the_same_function_is_left(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sparse._Run._order
    broken = lambda self, axis, moved: None if axis.value == "b1" else real(self, axis, moved)  # noqa: E731
    monkeypatch.setattr(sparse._Run, "_order", broken)
    result = sparsify(net, permute=True, measure=False)
    assert any("could not be proven" in text for text in result.report.warnings)
    assert result.report.sparsity.permuted


def test_repair_knows_the_order(net: Path, data: Path, tmp_path: Path) -> None:
    errors = []
    for permute in (False, True):
        out = tmp_path / f"{permute}.onnx"
        result = sparsify(net, out, permute=permute, calibration=str(data), measure=False)
        errors.append(error(net, out, data))
    assert result.report.sparsity.permuted
    assert errors[1] < 1.3 * errors[0]


# After removal -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra", [(), ("--permute",), ("--calibration", "{data}"), ("--calibration", "{data}", "--permute")]
)
def test_in_one_run_with_removal(extra: tuple[str, ...], net: Path, data: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "s.onnx", tmp_path / "r.json"
    extra = tuple(str(data) if text == "{data}" else text for text in extra)
    args = ("--ratio", "0.4", "--round-to", "4", "--pattern", "2:4", "--no-measure", "--report", report, *extra)
    result = run("prune", net, "-o", out, *args)
    assert result.exit_code == 0, result.output
    found, row = arrays(out), json.loads(report.read_text())["sparsity"]
    assert found["w1"].shape[0] < 16
    sparse_layers = {layer["initializer"]: layer["axis"] for layer in row["layers"] if layer["sparse"]}
    assert sparse_layers == AXES
    assert all(holds(found[name], axis) for name, axis in sparse_layers.items())
    assert run("verify", net, out, "--plan", report).exit_code == 0
    again = run("sparsify", out, "-o", tmp_path / "t.onnx", "--no-measure")
    assert again.exit_code == 0
    assert all(np.array_equal(array, found[name]) for name, array in arrays(tmp_path / "t.onnx").items())


def test_widths_are_rounded_to_whole_runs(net: Path, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    args = ("--ratio", "0.2", "--pattern", "2:4", "--no-measure", "--report", report)
    assert run("prune", net, "-o", tmp_path / "s.onnx", *args).exit_code == 0
    layers = json.loads(report.read_text())["sparsity"]["layers"]
    assert {layer["initializer"] for layer in layers if layer["sparse"]} == set(AXES)


def test_verify_wants_the_pattern(net: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "s.onnx", tmp_path / "r.json"
    assert run("sparsify", net, "-o", out, "--no-measure", "--report", report).exit_code == 0
    assert run("verify", net, out, "--plan", report).exit_code == 0
    model = onnx.load(out)
    weight = next(i for i in model.graph.initializer if i.name == "w3")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + 1, weight.name))
    onnx.save(model, out)
    result = run("verify", net, out, "--plan", report)
    assert result.exit_code == 3
    assert "w3" in result.stderr
    assert "2:4" in result.stderr


def test_what_is_written_is_checked(net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxprune import pipeline

    monkeypatch.setattr(pipeline, "broken", lambda model, pattern, places: [places[0][0]])
    with pytest.raises(InternalError, match="the written weight is not 2:4"):
        sparsify(net, tmp_path / "s.onnx", measure=False)
    assert not (tmp_path / "s.onnx").exists()


# What is to be expected ----------------------------------------------------------------------------------------------

LARGE = Layer("n", "n", "Gemm", 1, inputs=512, outputs=1024, type="FLOAT16")


@pytest.mark.parametrize(
    ("change", "pattern", "expected"),
    [
        ({}, NM(2, 4), True),
        ({}, NM(1, 4), True),
        ({}, NM(4, 8), False),
        ({"type": "FLOAT"}, NM(2, 4), True),
        ({"type": "DOUBLE"}, NM(2, 4), False),
        ({"inputs": 520}, NM(2, 4), False),
        ({"inputs": 520, "type": "FLOAT"}, NM(1, 2), True),
        ({"outputs": 128}, NM(2, 4), False),
        ({"inputs": 64, "taps": 9}, NM(2, 4), True),
        ({"inputs": 64}, NM(2, 4), False),
        ({"type": "INT8", "codes": True}, NM(2, 4), False),
        ({"type": "INT8", "codes": True, "quantised": True}, NM(2, 4), True),
        ({"type": "INT8", "quantised": True, "inputs": 528}, NM(2, 4), False),
        ({"batched": True}, NM(2, 4), False),
        ({"reason": "--ignore"}, NM(2, 4), False),
    ],
)
def test_which_layers_get_a_sparse_kernel(change: dict, pattern: NM, expected: bool) -> None:
    from dataclasses import replace

    found, why = kernel(replace(LARGE, **change), pattern)
    assert found is expected
    assert why


def test_the_table_and_the_share_of_the_work(tmp_path: Path) -> None:
    body = "a = MatMul(x, w0)\nb = Relu(a)\nc = MatMul(b, w1)\nd = Relu(c)\ny = MatMul(d, w2)"
    shapes = {"w0": (64, 256), "w1": (256, 512), "w2": (512, 16)}
    path = write(tmp_path, body, shapes, inputs="float[n,64] x", outputs="float[n,16] y")
    out, report = tmp_path / "s.onnx", tmp_path / "r.md"
    result = run("sparsify", path, "-o", out, "--report", report)
    assert result.exit_code == 0, result.output
    whole = 64 * 256 + 256 * 512 + 512 * 16
    assert f"expected for {256 * 512 / whole:.1%}" in result.stdout
    assert "too small to gain" in result.stdout
    assert "zeros bring no speed on cpu" in result.stderr
    assert "2:4, layer by layer" in report.read_text()
    result = run("sparsify", path, "-o", out, "--force", "--json", "--no-measure")
    found = json.loads(result.stdout)
    assert found["sparsity"]["kernel_macs"] == pytest.approx(256 * 512 / whole)
    assert found["pruned"]["macs"] == found["dense"]["macs"]
    assert found["sparsity"]["sparse_macs"] == 1.0


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "say where to write with -o"),
        (["-o", "{out}", "--pattern", "4:2"], 2, "--pattern 4:2"),
        (["-o", "{out}", "--pattern", "half"], 2, "--pattern half"),
        (["-o", "{out}", "--pattern", "2:64"], 2, "M <= 32"),
        (["-o", "{out}", "--criterion", "mag"], 2, "unknown sparsifier"),
        (["-o", "{out}", "--criterion", "nm-wanda"], 2, "needs --calibration"),
        (["-o", "{out}", "--criterion", "nm-perm"], 2, "does not choose weights"),
        (["-o", "{out}", "--reconstruct", "admm"], 2, "needs --calibration"),
        (["-o", "{out}", "--reconstruct", "sequential", "--calibration", "{data}"], 2, "fill zeros"),
        (["-o", "{out}", "--calibration", "{folder}/none.npz"], 2, "none.npz"),
        (["-o", "{out}", "--calibration", "{odd}"], 2, "odd.npz"),
        (["-o", "{model}"], 2, "is an input"),
        (["-o", "{folder}/none/out.onnx"], 2, "its folder does not exist"),
        (["-o", "{out}", "--report", "r.txt"], 2, "r.txt"),
        (["-o", "{out}", "--pattern", "3:7"], 3, "no weight can be 3:7"),
        (["-o", "{out}", "--ignore", "*"], 3, "--ignore"),
    ],
)
def test_bad_arguments(arguments: list[str], code: int, text: str, net: Path, data: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.npz"
    np.savez(odd, x=np.zeros((3, 5, 7, 6), np.float32))
    names = {"out": tmp_path / "out.onnx", "model": net, "folder": tmp_path, "data": data, "odd": odd}
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    result = run("sparsify", net, *(argument.format(**names) for argument in arguments))
    assert result.exit_code == code, result.output
    assert len(result.stderr.splitlines()) == 1
    assert text in result.stderr
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("extra", [["--permute"], ["--sparsifier", "nm-mag"], ["--pattern", "4:4"]])
def test_prune_wants_a_pattern_that_is_one(extra: list[str], net: Path, tmp_path: Path) -> None:
    result = run("prune", net, "-o", tmp_path / "s.onnx", "--ratio", "0.5", *extra)
    assert result.exit_code == 2
    assert "--pattern" in result.stderr


def test_a_dry_run_writes_nothing_and_an_output_needs_force(net: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.onnx"
    result = run("sparsify", net, "-o", out, "--dry-run")
    assert result.exit_code == 0
    assert "would write" in result.stdout
    assert not out.exists()
    out.write_bytes(b"precious")
    assert run("sparsify", net, "-o", out, "--no-measure").exit_code == 2
    assert out.read_bytes() == b"precious"
    assert run("sparsify", net, "-o", out, "--no-measure", "--force").exit_code == 0


def test_the_same_input_gives_the_same_bytes(net: Path, data: Path, tmp_path: Path) -> None:
    files = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for file in files:
        sparsify(net, file, calibration=str(data), permute=True, measure=False)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_recipe_holds_it(net: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "r.yaml", tmp_path / "s.onnx"
    recipe.write_text("ratio: 0.0\npattern: '1:4'\nmeasure: false\n")
    assert run("prune", net, "-o", out, "--recipe", recipe).exit_code == 0
    assert all(holds(arrays(out)[name], axis, 1) for name, axis in AXES.items())


def test_half_precision(tmp_path: Path, data: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {name: (rng.standard_normal(size) * 0.2).astype(np.float16) for name, size in SHAPES.items()}
    path = write(tmp_path, NET, shapes, inputs="float16[n,3,7,6] x", outputs="float16[n,5] y")
    np.savez(data, x=np.load(data)["x"].astype(np.float16))
    out = tmp_path / "s.onnx"
    result = sparsify(path, out, calibration=str(data), measure=False)
    assert all(holds(arrays(out)[name], axis) for name, axis in AXES.items())
    assert {layer.type for layer in result.report.sparsity.layers} == {"FLOAT16"}


def test_initializers_that_are_graph_inputs_too(tmp_path: Path) -> None:
    path = write(tmp_path)
    model = onnx.load(path)
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.save(model, path)
    out = tmp_path / "s.onnx"
    sparsify(path, out, permute=True, measure=False)
    assert all(holds(arrays(out)[name], axis) for name, axis in AXES.items())
    dump(Analysis(out).dense, tmp_path, "again")
