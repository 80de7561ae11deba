"""Bodies and functions beyond what the zoo shows: cost, the feeds of a proof, names, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from test_zoo import analysed
from zoo import ZOO

from onnxprune import feeds, verify
from onnxprune.cost import Costs
from onnxprune.errors import InputError
from onnxprune.infer import Inference
from onnxprune.model import prepare, view
from onnxprune.reading import read_model


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("weights in both branches", 3 * 7 + max(7 * 11, 7 * 5 + 5 * 11) + 11 * 2),
        ("a state in a loop", 2 * 3 * 7 + 3 * (7 * 7 + 7 * 11 + 11 * 7) + 7 * 2),
        ("a cell over time along axis 1", 13 * (5 * 7 + 7 * 11 + 11 * 11 + 11 * 13 + 13 * 11 + 11 * 2)),
    ],
)
def test_a_body_costs_as_often_as_it_runs(name: str, macs: int) -> None:
    _, prepared, seen, dims, *_ = analysed(name)
    sizes = {key: 13 if key == "t" else 1 for key in prepared.sizes}
    costs = Costs(dims, seen, Inference(prepared.model).at(sizes).shapes)
    assert costs.of(np.ones(len(dims.frozen), np.bool_))["macs"] == macs


def test_feeds_run_through_every_combination_of_flags() -> None:
    graph = ir.serde.deserialize_model(ZOO["branches inside branches"]()).graph
    assert feeds.combinations(graph) == 4
    drawn = {tuple(feeds.combination(graph, k).values()) for k in range(4)}
    assert drawn == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_a_number_that_chooses_takes_the_values_it_is_compared_with() -> None:
    text = """<ir_version: 8, opset_import: ["": 18]> g (int64 rate, float[3] x) => (float[3] y) {
    low = Constant<value_int = 8000>() c = Equal(rate, low)
    y = If(c) <then_branch = a () => (float[3] p) { p = Relu(x) },
    else_branch = b () => (float[3] q) { q = Neg(x) }> }"""
    graph = ir.serde.deserialize_model(onnx.parser.parse_model(text)).graph
    assert [feeds.combination(graph, k) for k in range(2)] == [{"rate": 8000}, {"rate": 8001}]


def test_the_reference_keeps_functions_that_lose_nothing_inside() -> None:
    kept = verify.Removal("b0", 0, (1,), "bias", 0)
    inside = verify.Removal("v", 0, (1,), "weight", 0)
    for name, removal, functions in (
        ("a function with weights as arguments", kept, 1),
        ("functions with constants inside", inside, 0),
    ):
        assert len(verify.reference(analysed(name)[0], [removal]).functions) == functions


def test_a_function_that_calls_itself_is_refused(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 18, "local": 1]> g (float[3] x) => (float[3] y) { y = local.f(x) }
    <domain: "local", opset_import: ["": 18, "local": 1]> f (x) => (y) { a = local.h(x) y = Relu(a) }
    <domain: "local", opset_import: ["": 18, "local": 1]> h (x) => (y) { y = local.f(x) }"""
    path = tmp_path / "net.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    with pytest.raises(InputError, match="calls itself"):
        read_model(path)


def test_a_function_of_another_opset_stays_and_freezes() -> None:
    model = ZOO["a function with weights as arguments"]()
    model.functions[0].opset_import[0].version = 17
    prepared = prepare(ir.serde.deserialize_model(model))
    assert {node.op_type for node in view(prepared).nodes} == {"layer"}
