"""Movement and index operators: the operator on survivors equals the survivors of the operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxprune.dims import couple, keep_of
from onnxprune.model import prepare, view
from onnxprune.rewrite import apply
from onnxprune.types import Axis

Draw = Callable[[int, int], int]


def single(
    op: str, shape: tuple[int, ...], consts: dict[str, object], attrs: dict[str, object], outs: int = 1, opset: int = 17
):
    """A model of one operator whose data is an initializer, so that every axis may go."""
    data = np.arange(1.0, 1 + np.prod(shape), dtype=np.float32).reshape(shape)
    stored = [numpy_helper.from_array(data, "x")]
    stored += [numpy_helper.from_array(np.asarray(v), k) for k, v in consts.items() if v is not None]
    outputs = [f"y{k}" for k in range(outs)]
    node = helper.make_node(op, ["x", *(k if v is not None else "" for k, v in consts.items())], outputs, **attrs)
    made = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph([node], "g", [], made, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


CASES: dict[str, Callable[[Draw], onnx.ModelProto]] = {}


def case(function: Callable[[Draw], onnx.ModelProto]) -> Callable[[Draw], onnx.ModelProto]:
    CASES[function.__name__] = function
    return function


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@case
def transpose(draw: Draw) -> onnx.ModelProto:
    return single("Transpose", (draw(2, 5), draw(2, 5), draw(2, 5)), {}, {"perm": [2, 0, 1]})


@case
def reshape_merge(draw: Draw) -> onnx.ModelProto:
    a, b, c = draw(2, 4), draw(2, 4), draw(2, 4)
    return single("Reshape", (a, b, c), {"s": i64(a, b * c)}, {})


@case
def reshape_split(draw: Draw) -> onnx.ModelProto:
    a, b, c = draw(2, 4), draw(2, 4), draw(2, 4)
    return single("Reshape", (a, b * c), {"s": i64(0, b, -1)}, {})


@case
def reshape_regroup(draw: Draw) -> onnx.ModelProto:
    a, b, c = draw(2, 3), draw(2, 3), draw(2, 3)
    return single("Reshape", (a * b, c), {"s": i64(a, b * c)}, {})


@case
def flatten(draw: Draw) -> onnx.ModelProto:
    return single("Flatten", (draw(2, 4), draw(2, 4), draw(1, 3)), {}, {"axis": 1})


@case
def squeeze(draw: Draw) -> onnx.ModelProto:
    return single("Squeeze", (draw(2, 4), 1, draw(2, 4)), {"axes": i64(1)}, {})


@case
def unsqueeze(draw: Draw) -> onnx.ModelProto:
    return single("Unsqueeze", (draw(2, 4), draw(2, 4)), {"axes": i64(0, -1)}, {})


@case
def expand(draw: Draw) -> onnx.ModelProto:
    return single("Expand", (draw(2, 4), 1), {"s": i64(draw(2, 3), 1, draw(2, 4))}, {})


@case
def split(draw: Draw) -> onnx.ModelProto:
    a, b = draw(1, 4), draw(1, 4)
    return single("Split", (a + b, draw(1, 3)), {"split": i64(a, b)}, {"axis": 0}, outs=2)


@case
def split_attribute(draw: Draw) -> onnx.ModelProto:
    a, b = draw(1, 4), draw(1, 4)
    return single("Split", (draw(1, 3), a + b), {}, {"axis": -1, "split": [a, b]}, outs=2, opset=11)


@case
def split_even(draw: Draw) -> onnx.ModelProto:
    return single("Split", (2 * draw(1, 4), 3), {}, {"axis": 0, "num_outputs": 2}, outs=2, opset=18)


@case
def slice_run(draw: Draw) -> onnx.ModelProto:
    size = draw(3, 9)
    start = draw(0, size - 2)
    end = draw(start + 1, size)
    return single(
        "Slice", (size, 3), {"starts": i64(start), "ends": i64(end - size if end < size else 2**62), "axes": i64(0)}, {}
    )


@case
def slice_flip(draw: Draw) -> onnx.ModelProto:
    consts = {"starts": i64(-1), "ends": i64(-(2**62)), "axes": i64(1), "steps": i64(-1)}
    return single("Slice", (2, draw(2, 8)), consts, {})


@case
def slice_attributes(draw: Draw) -> onnx.ModelProto:
    size = draw(3, 9)
    return single("Slice", (2, size), {}, {"starts": [1], "ends": [size - 1], "axes": [1]}, opset=9)


@case
def gather_vector(draw: Draw) -> onnx.ModelProto:
    size = draw(2, 7)
    picked = [draw(-size, size - 1) for _ in range(draw(1, 6))]
    return single("Gather", (3, size), {"i": i64(*picked)}, {"axis": 1})


@case
def gather_scalar(draw: Draw) -> onnx.ModelProto:
    size = draw(2, 7)
    return single("Gather", (size, 3), {"i": np.array(draw(-size, size - 1))}, {"axis": 0})


@case
def pad(draw: Draw) -> onnx.ModelProto:
    return single("Pad", (draw(2, 5), 3), {"p": i64(draw(0, 2), 0, draw(0, 2), 0), "v": np.float32(0)}, {})


@case
def pad_attribute(draw: Draw) -> onnx.ModelProto:
    return single("Pad", (3, draw(2, 5)), {}, {"pads": [0, draw(0, 2), 0, draw(0, 2)]}, opset=10)


@pytest.mark.parametrize("name", sorted(CASES))
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_survivors_commute_with_the_operator(name: str, data: st.DataObject) -> None:
    proto = CASES[name](lambda low, high: data.draw(st.integers(low, high)))
    prepared = prepare(ir.serde.deserialize_model(proto))
    seen = replace(view(prepared), outputs=())  # nothing reads the output: its axes may go too
    dims = couple(seen)
    free = np.flatnonzero(dims.frozen < 0)
    gone = [label for label in free if data.draw(st.booleans())]
    alive = np.ones(len(dims.frozen), np.bool_)
    alive[gone] = False
    shapes = {name: shape for name, shape in seen.shapes.items() if name == "x" or name.startswith("y")}
    keep = {
        a: keep_of(dims, alive, a, s) for n, shape in shapes.items() for k, s in enumerate(shape) if (a := Axis(n, k))
    }
    if not all(mask.any() for mask in keep.values()):
        return  # groups always keep a unit
    smaller = ir.serde.serialize_model(apply(prepared, dims, seen, alive))
    dense, found = (ReferenceEvaluator(m).run(None, {}) for m in (proto, smaller))
    for output, (wanted, got) in enumerate(zip(dense, found, strict=True)):
        for axis in range(wanted.ndim):
            wanted = np.compress(keep[Axis(f"y{output}", axis)], wanted, axis)
        np.testing.assert_array_equal(got, wanted)


def test_regrouping_frees_something() -> None:
    """The property above would hold if everything were frozen."""
    for name, build in CASES.items():
        prepared = prepare(ir.serde.deserialize_model(build(lambda low, high: high)))
        dims = couple(replace(view(prepared), outputs=()))
        assert (dims.frozen < 0).any(), name
