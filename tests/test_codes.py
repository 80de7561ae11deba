"""Repair of quantised models: weights stay the integers that their scales say, and come nearer to the dense model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx import numpy_helper, parser

from onnxprune.allocate import sites_of
from onnxprune.analysis import Analysis
from onnxprune.cli import main
from onnxprune.codes import Grid, fed_back, on_grid
from onnxprune.flow import Flow, Sessions
from onnxprune.parts import Part, numbers
from onnxprune.plugin import Problem, Solution
from onnxprune.rows import Rows, Sampling
from onnxprune.types import Plan

ort.set_default_logger_severity(4)

CNN = """
a = Conv<pads = [1,1,1,1]>(x, w0, b0) r0 = Relu(a) b = Conv<pads = [1,1,1,1], strides = [2,2]>(r0, w1, b1)
r1 = Relu(b) c = Conv<pads = [1,1,1,1]>(r1, w2, b2) s = Add(c, b) r2 = Relu(s) g = GlobalAveragePool(r2)
f = Flatten(g) y = Gemm(f, w3, b3)
"""
SIZES = {"w0": (24, 3, 3, 3), "b0": (24,), "w1": (32, 24, 3, 3), "b1": (32,), "w2": (32, 32, 3, 3), "b2": (32,),
         "w3": (32, 10), "b3": (10,)}  # fmt: skip


def images(count: int, seed: int) -> np.ndarray:
    """float32[count, 3, 12, 12] that have six directions and some noise."""
    rng, basis = np.random.default_rng(seed), np.random.default_rng(99).standard_normal((6, 432)) / 2.5
    flat = rng.standard_normal((count, 6)) @ basis + 0.3 * rng.standard_normal((count, 432))
    return flat.reshape(count, 3, 12, 12).astype(np.float32)


def cnn() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[n,3,12,12] x) => (float[n,10] y) {{ {CNN} }}'
    )
    for name, shape in SIZES.items():
        fan = np.prod(shape[1:]) if len(shape) > 2 else shape[0]
        array = (rng.standard_normal(shape) * np.sqrt(2 / fan)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def quantised(model: onnx.ModelProto, folder: Path, form: str, **how: Any) -> Path:
    """The network in integers, biases included: with Q and DQ around everything, or by operators of integers."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Once(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter([{"x": images(64, 3)}])

        def get_next(self) -> Any:
            return next(self.left, None)

    how["weight_type"] = QuantType[how.get("weight_type", "QInt8")]
    kinds = {"quant_format": QuantFormat[form], "activation_type": QuantType.QUInt8, **how}
    onnx.save(model, folder / "float.onnx")
    quantize_static(folder / "float.onnx", folder / "m.onnx", Once(), **kinds)
    return folder / "m.onnx"


def prune(model: Path, *more: object) -> tuple[Path, dict[str, Any]]:
    out, report, data = (model.parent / name for name in ("s.onnx", "r.json", "c.npz"))
    np.savez(data, x=images(200, 1))
    arguments = ["prune", model, "-o", out, "--target", "macs=0.5", "--effort", "quick", "--no-measure", "--force",
                 "--report", report, "--calibration", data, *more]  # fmt: skip
    result = CliRunner().invoke(main, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output
    return out, json.loads(report.read_text())


def off(dense: Path, pruned: Path) -> float:
    """The squared difference on fresh inputs, relative."""
    wanted, found = (ort.InferenceSession(path).run(None, {"x": images(100, 2)})[0] for path in (dense, pruned))
    return float(np.square(wanted - found).mean() / np.square(wanted).mean())


def arrays(path: Path) -> dict[str, np.ndarray]:
    return {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", ["QInt8", "QUInt8"])
def test_a_quantised_network_is_repaired_on_its_scales(kind: str, per_channel: bool, form: str, tmp_path: Path) -> None:
    dense = quantised(cnn(), tmp_path, form, per_channel=per_channel, weight_type=kind)
    out, _ = prune(dense, "--reconstruct", "none", "--criterion", "mag")
    naive, before = off(dense, out), arrays(out)
    out, report = prune(dense, "--criterion", "mag")
    assert off(dense, out) < 0.1 * naive
    after = arrays(out)
    assert {"w1_quantized", "w2_quantized", "w3_quantized", "b1_quantized"} <= set(report["repaired"])
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype and array.shape == after[name].shape
        assert name in report["repaired"] or array.tobytes() == after[name].tobytes()
    verified = CliRunner().invoke(main, ["verify", str(dense), str(out), "--plan", str(tmp_path / "r.json")])
    assert verified.exit_code == 0, verified.output


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_products_of_matrices_are_repaired_too(form: str, tmp_path: Path) -> None:
    """Three tokens of an image; what is added behind a product is added by an operator of its own."""
    rng = np.random.default_rng(0)
    text = "t = Reshape(x, s) a = MatMul(t, w0) b = Add(a, b0) r = Relu(b) c = MatMul(r, w1) d = Add(c, b1) y = Relu(d)"
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[n,3,12,12] x) => (float[n,3,20] y) {{ {text} }}'
    )
    stored = {"w0": (144, 48), "b0": (48,), "w1": (48, 20), "b1": (20,)}
    given = {name: (rng.standard_normal(n) / np.sqrt(n[0])).astype(np.float32) for name, n in stored.items()}
    for name, array in {**given, "s": np.array([0, 3, 144])}.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    dense = quantised(model, tmp_path, form)
    kinds = {node.op_type for node in onnx.load(dense).graph.node}
    assert ("QLinearMatMul" if form == "QOperator" else "MatMul") in kinds
    naive = off(dense, prune(dense, "--criterion", "mag", "--reconstruct", "none")[0])
    out, report = prune(dense, "--criterion", "mag")
    assert {"w0_quantized", "w1_quantized"} & set(report["repaired"])
    assert off(dense, out) < 0.5 * naive


def test_columns_still_to_come_take_over_what_rounding_leaves() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((500, 40)) @ rng.standard_normal((40, 40))).astype(np.float32)
    weight = rng.standard_normal((40, 7))
    grid = Grid(np.full((40, 7), 0.4), np.full((40, 7), -8.0), np.full((40, 7), 7.0))
    found, plain = fed_back(weight, grid, (x.T @ x / 500).astype(np.float64)), grid.nearest(weight)
    for array in (found, plain):
        count = array / 0.4
        np.testing.assert_allclose(count, np.rint(count), atol=1e-9)
        assert count.min() >= -8 and count.max() <= 7
    error = [np.square(x @ (array - weight)).mean() for array in (found, plain)]
    assert error[0] < 0.5 * error[1]


def test_what_has_no_steps_stays_and_what_is_masked_is_zero() -> None:
    rng = np.random.default_rng(1)
    weight, keep = rng.standard_normal((6, 3)), rng.random((6, 3)) < 0.6
    free = Grid(np.zeros((6, 3)), np.zeros((6, 3)), np.zeros((6, 3)))
    np.testing.assert_allclose(fed_back(weight, free, np.eye(6)), weight)
    found = fed_back(weight, Grid(np.full((6, 3), 0.1), np.full((6, 3), -9.0), np.full((6, 3), 9.0)), np.eye(6), keep)
    assert (found[~keep] == 0).all() and (found[keep] != 0).any()


def test_a_grid_too_coarse_to_help_leaves_everything_alone() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((1, 50, 4)).astype(np.float32)
    weight = rng.integers(-1, 2, (1, 4, 2)).astype(np.float64)
    wanted = (x[0] @ (weight[0] + 0.1)).astype(np.float32)
    current = (x[0] @ weight[0]).astype(np.float32)
    problem = Problem(x, weight, wanted, current, np.arange(50) % 5 == 2, (-np.inf, np.inf), False)
    coarse, fine = (Grid(np.full((1, 4, 2), step), np.full((1, 4, 2), -999.0), np.full((1, 4, 2), 999.0))
                    for step in (1.0, 0.01))  # fmt: skip
    solution = Solution(np.full((1, 4, 2), 0.1), np.zeros(2), 1e-3)
    assert on_grid(problem, solution, coarse) is None
    found = on_grid(problem, solution, fine)
    assert found is not None
    np.testing.assert_allclose(found.weight, 0.1, atol=0.006)


@pytest.mark.parametrize("per_channel", [False, True])
def test_an_operator_of_integers_is_its_product_rounded(per_channel: bool, tmp_path: Path) -> None:
    """What is fitted lies within half a step of what the operator gives, where that has room for it."""
    analysis = Analysis(quantised(cnn(), tmp_path, "QOperator", per_channel=per_channel))
    model, feed = analysis.prepared.model, {"x": images(16, 5)}
    sites = sites_of(analysis, Plan({}), model)
    assert {site.value for site in sites if not site.dense} == {f"{k}_quantized inside" for k in "abcy"}
    for site in sites:
        (operator,) = site.operators
        flow = Flow(model, [feed], Sessions(), {operator.x})
        read, made = (values[0] for values in flow.values([operator.x, operator.node]))
        shape = operator.layout.shape(read.shape, flow.array(operator.weight).shape)
        rows = Rows([shape], site.axes, [16], [None], Sampling())
        x = rows.read(numbers(flow, operator, [read]), operator.layout)
        k = 7 if operator.node.startswith("y") else 6
        step, zero = (float(flow.array((operator.node, k + n))) for n in (0, 1))
        found = np.clip(Part(flow, operator, x).output(), *site.bounds)
        assert np.abs(found - (rows.of([made], site.axes) - zero) * step).max() < 0.51 * step
