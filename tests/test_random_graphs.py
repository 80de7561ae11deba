"""Random legal graphs under random plans: the pruned model equals the dense one with the removed slices at zero.

Sizes are small, so that lengths coincide often; weights are small integers, so that sums are exact in any order.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxprune import verify
from onnxprune.dims import couple
from onnxprune.groups import find_groups
from onnxprune.model import prepare, view
from onnxprune.rewrite import apply
from onnxprune.select import alive_labels
from onnxprune.types import Plan

ort.set_default_logger_severity(4)


class Draw:
    """A graph under construction: feature maps [n, c, h, w] that later steps may read."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []
        self.maps: list[tuple[str, int]] = [("x", 3)]
        self.side = 4
        self.rng = np.random.default_rng(data.draw(st.integers(0, 999)))
        self.zero_bias = ""

    def number(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def pick(self) -> tuple[str, int]:
        return self.maps[self.number(max(0, len(self.maps) - 3), len(self.maps) - 1)]

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.stored)}"
        values = self.rng.integers(-2, 3, shape).astype(np.float32)
        self.stored.append(numpy_helper.from_array(values, name))
        return name

    def ints(self, *values: int) -> str:
        name = f"w{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def op(self, kind: str, inputs: list[str], outputs: int = 1, **attrs: object) -> list[str]:
        names = [f"v{len(self.nodes)}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=f"n{len(self.nodes)}", **attrs))
        return names

    def keep(self, name: str, channels: int) -> None:
        self.maps.append((name, channels))

    # steps ------------------------------------------------------------------------------------------------------

    def conv(self) -> None:
        name, c = self.pick()
        out = self.number(1, 6)
        kernel = self.number(0, 1) * 2 + 1
        inputs = [name, self.weight(out, c, kernel, kernel)]
        if self.number(0, 1):
            inputs.append(self.weight(out))
        (y,) = self.op("Conv", inputs, pads=[kernel // 2] * 4)
        self.keep(y, out)

    def grouped(self) -> None:
        name, c = self.pick()
        groups = self.number(1, c)
        if c % groups:
            groups = c
        out = groups * self.number(1, 3)
        inputs = [name, self.weight(out, c // groups, 1, 1), self.weight(out)]
        (y,) = self.op("Conv", inputs, group=groups)
        self.keep(y, out)

    def transposed(self) -> None:
        name, c = self.pick()
        out = self.number(1, 5)
        (y,) = self.op("ConvTranspose", [name, self.weight(c, out, 3, 3), self.weight(out)], pads=[1] * 4)
        self.keep(y, out)

    def norm(self) -> None:
        name, c = self.pick()
        variance = f"w{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(np.ones(c, np.float32), variance))
        inputs = [name, self.weight(c), self.weight(c), self.weight(c), variance]
        (y,) = self.op("BatchNormalization", inputs, epsilon=0.0)
        self.keep(y, c)

    def act(self) -> None:
        name, c = self.pick()
        kind = ("Relu", "Neg", "Abs", "Identity", "HardSigmoid")[self.number(0, 4)]
        (y,) = self.op(kind, [name])
        self.keep(y, c)

    def affine(self) -> None:
        name, c = self.pick()
        shape = ((1, c, 1, 1), (c, 1, 1), (1,), (1, 1, 1, self.side))[self.number(0, 3)]
        sides = [name, self.weight(*shape)]
        (y,) = self.op(("Add", "Mul")[self.number(0, 1)], sides[:: self.number(0, 1) * 2 - 1])
        self.keep(y, c)

    def combine(self) -> None:
        name, c = self.pick()
        equal = [n for n, channels in self.maps if channels == c]
        other = equal[self.number(0, len(equal) - 1)]
        (y,) = self.op(("Add", "Mul", "Sub", "Max")[self.number(0, 3)], [name, other])
        self.keep(y, c)

    def concat(self) -> None:
        parts = [self.pick() for _ in range(self.number(2, 3))]
        (y,) = self.op("Concat", [n for n, _ in parts], axis=1)
        self.keep(y, sum(c for _, c in parts))

    def split(self) -> None:
        name, c = self.pick()
        if c < 2:
            return
        first = self.number(1, c - 1)
        a, b = self.op("Split", [name, self.ints(first, c - first)], 2, axis=1)
        self.keep(a, first)
        self.keep(b, c - first)

    def cut(self) -> None:
        name, c = self.pick()
        start = self.number(0, c - 1)
        end = self.number(start + 1, c)
        (y,) = self.op("Slice", [name, self.ints(start), self.ints(end), self.ints(1)])
        self.keep(y, end - start)

    def permute(self) -> None:
        name, c = self.pick()
        (y,) = self.op("Gather", [name, self.ints(*self.rng.permutation(c).tolist())], axis=1)
        self.keep(y, c)

    def pad(self) -> None:
        name, c = self.pick()
        before, after = self.number(0, 2), self.number(0, 2)
        (y,) = self.op("Pad", [name, self.ints(0, before, 0, 0, 0, after, 0, 0)])
        self.keep(y, c + before + after)

    def shuffle(self) -> None:
        name, c = self.pick()
        groups = next((g for g in (2, 3) if c % g == 0), 1)
        (a,) = self.op("Reshape", [name, self.ints(0, groups, c // groups, self.side, self.side)])
        (b,) = self.op("Transpose", [a], perm=[0, 2, 1, 3, 4])
        (y,) = self.op("Reshape", [b, self.ints(0, -1, self.side, self.side)])
        self.keep(y, c)

    def gate(self) -> None:
        name, c = self.pick()
        (pooled,) = self.op("GlobalMaxPool", [name])
        (y,) = self.op("Mul", [name, pooled])
        self.keep(y, c)

    def linear_last(self) -> None:
        """NHWC: the channels at the end, through a MatMul."""
        name, c = self.pick()
        out = self.number(1, 5)
        (a,) = self.op("Transpose", [name], perm=[0, 2, 3, 1])
        (b,) = self.op("MatMul", [a, self.weight(c, out)])
        (d,) = self.op("Add", [b, self.weight(out)])
        (y,) = self.op("Transpose", [d], perm=[0, 3, 1, 2])
        self.keep(y, out)

    def slopes(self) -> None:
        name, c = self.pick()
        (y,) = self.op("PRelu", [name, self.weight(c, 1, 1)])
        self.keep(y, c)

    def small(self) -> tuple[str, int]:
        """A map of small values, for what makes more of rounding errors the larger they are."""
        name, c = self.pick()
        return self.op("Clip", [name, self.scalar(-4.0), self.scalar(4.0)])[0], c

    def instance_norm(self) -> None:
        name, c = self.small()
        (y,) = self.op("InstanceNormalization", [name, self.weight(c), self.weight(c)], epsilon=1.0)
        self.keep(y, c)

    def resize(self) -> None:
        name, c = self.pick()
        scales = f"w{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), scales))
        (large,) = self.op("Resize", [name, "", scales], mode="nearest")
        (y,) = self.op("MaxPool", [large], kernel_shape=[2, 2], strides=[2, 2])
        self.keep(y, c)

    def reduced(self) -> None:
        """What is left of every channel is added to it again."""
        name, c = self.pick()
        keeps = self.number(0, 1)
        (top,) = self.op("ReduceMax", [name], axes=[2, 3], keepdims=keeps)
        if not keeps:
            (top,) = self.op("Unsqueeze", [top, self.ints(2, 3)])
        (y,) = self.op("Add", [name, top])
        self.keep(y, c)

    def weights_again(self) -> None:
        """A weight that another convolution has as well."""
        convs = [
            node for node in self.nodes if node.op_type == "Conv" and all(a.name != "group" for a in node.attribute)
        ]
        shapes = {tensor.name: tuple(tensor.dims) for tensor in self.stored}
        known = [(node, shapes[node.input[1]]) for node in convs if node.input[1] in shapes]
        if not known:
            return
        node, (out, c, kernel, _) = known[self.number(0, len(known) - 1)]
        fitting = [name for name, channels in self.maps if channels == c]
        if not fitting:
            return
        name = fitting[self.number(0, len(fitting) - 1)]
        (y,) = self.op("Conv", [name, node.input[1]], pads=[kernel // 2] * 4)
        self.keep(y, out)

    def branch(self) -> None:
        """Each branch has a convolution of its own over what it captures."""
        name, c = self.pick()
        out = self.number(1, 5)
        (total,) = self.op("ReduceSum", ["x"], keepdims=0)
        (flag,) = self.op("Greater", [total, self.scalar(0.0)])
        bodies = {}
        for key in ("then_branch", "else_branch"):
            inner, made = f"{key}{len(self.nodes)}", self.weight(out, c, 1, 1)
            ends = [helper.make_tensor_value_info(inner, TensorProto.FLOAT, None)]
            bodies[key] = helper.make_graph([helper.make_node("Conv", [name, made], [inner])], key, [], ends)
        (y,) = self.op("If", [flag], **bodies)
        self.keep(y, out)

    def called(self) -> None:
        """A function of the model's own."""
        name, c = self.pick()
        (y,) = self.op("Twice", [name], domain="own")
        self.keep(y, c)

    def tokens(self, name: str, c: int) -> str:
        """[n, positions, c]."""
        (a,) = self.op("Reshape", [name, self.ints(0, c, self.side**2)])
        return self.op("Transpose", [a], perm=[0, 2, 1])[0]

    def back(self, name: str, c: int) -> None:
        """A map again of [n, positions, c]."""
        (a,) = self.op("Transpose", [name], perm=[0, 2, 1])
        (y,) = self.op("Reshape", [a, self.ints(0, -1, self.side, self.side)])
        self.keep(y, c)

    def attention(self) -> None:
        name, c = self.small()
        heads, size, out = self.number(1, 3), self.number(1, 3), self.number(1, 5)
        tokens = self.tokens(name, c)
        parts = []
        for _ in range(3):
            (a,) = self.op("MatMul", [tokens, self.weight(c, heads * size)])
            (a,) = self.op("Clip", [a, self.scalar(-4.0), self.scalar(4.0)])
            (b,) = self.op("Reshape", [a, self.ints(0, self.side**2, heads, size)])
            parts += self.op("Transpose", [b], perm=[0, 2, 1, 3])
        (keys,) = self.op("Transpose", [parts[1]], perm=[0, 1, 3, 2])
        (scores,) = self.op("MatMul", [parts[0], keys])
        (shares,) = self.op("Softmax", [scores], axis=-1)
        (mixed,) = self.op("MatMul", [shares, parts[2]])
        (a,) = self.op("Transpose", [mixed], perm=[0, 2, 1, 3])
        (b,) = self.op("Reshape", [a, self.ints(0, self.side**2, heads * size)])
        self.back(*self.op("MatMul", [b, self.weight(heads * size, out)]), out)

    def recurrent(self) -> None:
        name, c = self.small()
        kind, hidden = ("RNN", "GRU", "LSTM")[self.number(0, 2)], self.number(1, 4)
        gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[kind]
        (steps,) = self.op("Transpose", [self.tokens(name, c)], perm=[1, 0, 2])
        weights = [self.weight(1, gates * hidden, c), self.weight(1, gates * hidden, hidden)]
        y, _ = self.op(kind, [steps, *weights, self.weight(1, 2 * gates * hidden)], 2, hidden_size=hidden)
        (a,) = self.op("Squeeze", [y, self.ints(1)])
        self.back(*self.op("Transpose", [a], perm=[1, 0, 2]), hidden)

    def embedding(self) -> None:
        """Rows of a table by which channel of the input is the largest: elsewhere rounding might decide."""
        (name, c), out = self.maps[0], self.number(1, 5)
        (index,) = self.op("ArgMax", [self.tokens(name, c)], axis=2, keepdims=0)
        self.back(*self.op("Gather", [self.weight(c, out), index]), out)

    def scalar(self, value: float) -> str:
        name = f"w{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(np.float32(value), name))
        return name

    STEPS = (conv, grouped, transposed, norm, act, affine, combine, concat, split, cut, permute, pad, shuffle, gate,
             linear_last, slopes, instance_norm, resize, reduced, weights_again, branch, called, attention, recurrent,
             embedding)  # fmt: skip

    def head(self) -> None:
        """Flatten the last map and, now and then, an earlier one to a few numbers."""
        for k, (name, c) in enumerate([self.maps[-1], self.pick()]):
            (flat,) = self.op("Flatten", [name])
            self.nodes.append(
                helper.make_node("Gemm", [flat, self.weight(2, c * self.side**2), self.weight(2)], [f"y{k}"], transB=1)
            )

    def model(self) -> onnx.ModelProto:
        side = self.side
        graph = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, side, side])],
            [helper.make_tensor_value_info(f"y{k}", TensorProto.FLOAT, ["n", 2]) for k in (0, 1)],
            self.stored,
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
        twice = helper.make_function("own", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], opsets)
        return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=[twice])


def outputs(model: ir.Model, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    return session.run(None, feed)


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_any_plan_on_any_graph_is_removal(data: st.DataObject) -> None:
    draw = Draw(data)
    for _ in range(draw.number(2, 12)):
        Draw.STEPS[draw.number(0, len(Draw.STEPS) - 1)](draw)
    draw.head()
    dense = ir.serde.deserialize_model(draw.model())
    feed = {"x": draw.rng.integers(-2, 3, (2, 3, draw.side, draw.side)).astype(np.float32)}
    outputs(dense, feed)  # the draw is legal
    prepared = prepare(dense.clone())
    seen = view(prepared)
    dims = couple(seen)
    groups = [g for g in find_groups(dims, seen) if g.exact and len(g.units) > 1]
    keep = {}
    for group in groups:
        keep[group.id] = draw.rng.random(len(group.units)) < 0.5
        keep[group.id][draw.number(0, len(group.units) - 1)] = True
    plan = Plan(keep)
    smaller = apply(prepared, dims, seen, alive_labels(groups, plan, len(dims.frozen)))
    removed = verify.removals(groups, plan)
    wanted, found = outputs(verify.reference(dense, removed), feed), outputs(smaller, feed)
    for a, b in zip(wanted, found, strict=True):
        scale = max(1.0, float(np.abs(a).max()))
        np.testing.assert_allclose(b / scale, a / scale, atol=1e-5)
    stored = {
        t.name: tuple(t.shape) for t in (v.const_value for v in smaller.graph.initializers.values()) if t is not None
    }
    for removal in removed:
        if removal.uses is None and removal.initializer in stored and removal.role != "index":
            before = dense.graph.initializers[removal.initializer].const_value
            assert before is not None
            gone = {
                p for r in removed if (r.initializer, r.axis) == (removal.initializer, removal.axis) for p in r.removed
            }
            assert stored[removal.initializer][removal.axis] == before.shape[removal.axis] - len(gone)
