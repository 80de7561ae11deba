"""Linear operators with stored weights, as they are read off a model's nodes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxprune.infer import attributes
from onnxprune.layouts import Contraction, Convolution, Layout, TransposedConvolution, before, einsum, matmul
from onnxprune.types import Array, Axis, Mask, Positions, Shape

Slot = tuple[str, int]  # first output of a node, number of its input
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
CODES = tuple(ir.DataType[name] for name in ("INT8", "UINT8", "INT16", "UINT16", "INT32"))  # that NumPy knows
MICROSOFT = "com.microsoft"
LINEAR = {  # (domain, operator): inputs that may be its weight; of those that are `INSIDE` the product is no value
    **{("", name): (1,) for name in ("Conv", "ConvTranspose", "Gemm")},
    **{("", name): (1, 0) for name in ("MatMul", "Einsum")},
    **{(MICROSOFT, name): (1,) for name in ("FusedConv", "FusedGemm", "Attention")},
    (MICROSOFT, "FusedMatMul"): (1, 0),
}
INSIDE = frozenset(("FusedConv", "FusedGemm", "Attention"))
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
SCALED = {  # products of integers that are scaled to others: inputs that are the bias and the scale of the output
    ("", "QLinearConv"): (8, 6),
    ("", "QLinearMatMul"): (-1, 6),
    (MICROSOFT, "QGemm"): (6, 7),
}


@dataclass(frozen=True)
class Step:
    """What a site's chain does to each channel: `add` or `mul` one number, or `norm` with running statistics.

    What is stored for it stays where it is `fixed`.
    """

    kind: str
    slots: tuple[Slot, ...]
    epsilon: float = 0.0
    fixed: bool = False


@dataclass(frozen=True)
class Operator:
    """A linear operator whose weight is stored.

    `left` has (axis, positions) of the dense operator's input that are left, where some are not; `lost` says that
    columns went, and not only whole groups. `x` is the node's input `reads`, `source` what the dense one has there;
    without an `x` what the dense one has is read in either case. Where `coded`, the weight is stored as integers that
    a DequantizeLinear reads. All operators of one `tie` have the same weight, and nothing else reads it; an operator
    without one has its own. Where `scaled`, `x` are integers as well, of which the node's next two inputs say what
    they stand for.
    """

    node: str
    layout: Layout
    x: str
    weight: Slot
    bias: Slot | None
    steps: tuple[Step, ...]
    left: tuple[tuple[int, Positions], ...] = ()
    lost: bool = False
    source: str | State = ""
    reads: int = 0
    coded: bool = False
    tie: str = ""
    scaled: bool = False

    @property
    def plain(self) -> Contraction | None:
        """The layout where the operator multiplies the last axis by one matrix."""
        return self.layout if isinstance(self.layout, Contraction) and self.layout.plain else None

    @property
    def convolves(self) -> bool:
        """Whether it is a Conv."""
        return type(self.layout) is Convolution

    def homes(self) -> list[Slot]:
        """Where a constant can be added: its bias, or what is stored for the first step that adds one."""
        free = [step for step in self.steps if step.kind != "mul" and not step.fixed]
        added = [step.slots[1 if step.kind == "norm" else 0] for step in free]
        return [self.bias] if self.bias is not None else added[:1]


@dataclass(frozen=True)
class State:
    """What each step of a recurrent operator gets from the one before: (n, t, directions, hidden), no value of a graph.

    It follows from the operator's output `y`, its first state and the lengths of its sequences. What a reset gate makes
    of it follows from the operators of that gate, which read `x` and this.
    """

    y: str
    initial: str
    lengths: str
    backward: tuple[bool, ...]
    x: str = ""
    reset: tuple[Operator, ...] = ()

    @property
    def reads(self) -> list[str]:
        """Values of the graph that it follows from."""
        return [name for name in (self.y, self.initial, self.lengths, self.x) if name]

    def of(self, values: Mapping[str, Array], array: Callable[[Slot], Array]) -> Array:
        """The state, from values of the graph and what is stored."""
        state = before(values[self.y], values.get(self.initial), values.get(self.lengths), self.backward)
        if not self.reset:
            return state
        n, t, directions, hidden = state.shape
        gate = np.zeros((directions, n * t, hidden), np.float32)
        for operator, x in zip(self.reset, (values[self.x], state), strict=True):
            weight = operator.layout.matrix(array(operator.weight)).astype(np.float32)
            gate += operator.layout.rows(x, np.arange(n * t)) @ weight
            if operator.bias is not None:
                gate += operator.layout.bias(array(operator.bias)).astype(np.float32).reshape(directions, 1, hidden)
        with np.errstate(over="ignore"):
            opened = 1 / (1 + np.exp(-gate))
        return np.asarray(state * opened.swapaxes(0, 1).reshape(n, t, directions, hidden))


@dataclass(frozen=True)
class Given:
    """What `find_sites` was given, and {(node, input): value} of the dense model."""

    shapes: Mapping[str, Shape]
    keep: Callable[[Axis], Mask]
    stays: Collection[str]
    untied: Collection[str]
    joint: bool
    readers: Mapping[Slot, str]
    alone: Collection[str]  # initializers that one node of the dense model reads

    def size(self, value: str) -> Shape:
        """What is left of the shape of a dense value."""
        return tuple(int(self.keep(Axis(value, k)).sum()) for k in range(len(self.shapes[value])))

    def kept(self, value: str, axes: Sequence[int]) -> Mask | None:
        """bool[channels] along these axes of a dense value; None where another axis lost something."""
        masks = [self.keep(Axis(value, k)) for k in range(len(self.shapes[value]))]
        if any(not mask.all() for k, mask in enumerate(masks) if k not in axes):
            return None
        return np.asarray(reduce(np.logical_and.outer, [masks[k] for k in axes]).reshape(-1))


def operator_of(node: ir.Node, given: Given) -> Operator | None:
    """The node as an operator that may be fitted, or None."""
    found = [made for k in may_weigh(node) if (made := _multiplied(node, k, given))]
    if not found:
        return None
    k, layout, weight, slot, own = found[0]
    output, x = str(node.outputs[0].name), str(node.inputs[1 - k].name)  # type: ignore[union-attr]
    bias: Slot | None = None
    steps: tuple[Step, ...] = ()
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        value, home, alone = kept_of(node.inputs[2], (output, 2))
        if value is None or value.const_value is None:
            return None
        shape = tuple(value.const_value.shape.numpy())
        whole = value.const_value.size == outputs_of(layout, weight) == (shape[-1] if shape else 1)
        if not whole and value.const_value.size != 1:
            return None
        if whole and alone and str(value.name) not in given.stays:
            bias = home
        else:
            steps = (Step("add", (home,), fixed=True),)
    masks = [given.keep(Axis(x, axis)) for axis in range(len(given.shapes[x]))]
    left = tuple((axis, np.flatnonzero(mask)) for axis, mask in enumerate(masks) if not mask.all())
    lost = any(not masks[axis].all() for axis in layout.summed)
    source = given.readers.get((output, 1 - k), x)
    coded, tie = weight.dtype not in FLOATS, "" if own else str(weight.name)
    return Operator(output, layout, x, slot, bias, steps, left, lost, source, 1 - k, coded, tie)


def _multiplied(node: ir.Node, k: int, given: Given) -> tuple[int, Layout, ir.Value, Slot, bool] | None:
    """If a node multiplies another input by input k: k, layout, what is stored for it, where, and if for it alone."""
    x, read = (node.inputs[1 - k], node.inputs[k]) if len(node.inputs) > 1 else (None, None)
    if x is None or read is None or x.const_value is not None or str(x.name) not in given.shapes:
        return None
    weight, slot, order, own = weight_of(node, k, given.untied)
    if (
        weight is None
        or not (own or given.joint)
        or str(weight.name) in given.stays
        or str(node.outputs[0].name) not in given.shapes
    ):
        return None
    shape = shape_of(weight)
    order = order or tuple(range(len(shape)))
    layout = (
        layout_of(node, k, given.size(str(x.name)), tuple(shape[axis] for axis in order)) if len(shape) > 1 else None
    )
    if isinstance(layout, Contraction):
        layout = replace(layout, weight="".join(layout.weight[order.index(axis)] for axis in range(len(shape))))
    elif order != tuple(range(len(shape))):
        return None
    return None if layout is None else (k, layout, weight, slot, own)


def may_weigh(node: ir.Node) -> tuple[int, ...]:
    """Numbers of the inputs that a node may multiply another input by, the usual one first."""
    return LINEAR.get(kind_of(node), ())


def kind_of(node: ir.Node) -> tuple[str, str]:
    """(domain, operator)."""
    return "" if node.domain == "ai.onnx" else node.domain, node.op_type


def layout_of(node: ir.Node, k: int, x: Shape, weight: Shape) -> Layout | None:
    """How a node multiplies by a weight that it reads as input k, if there is nothing else in it."""
    attrs: Mapping[str, Any] = attributes(node)
    found: Contraction | None = None
    if node.op_type in ("Gemm", "FusedGemm", "QGemm") and attrs.get("alpha", 1.0) == attrs.get("beta", 1.0) == 1.0:
        found = Contraction("kn" if attrs.get("transA", 0) else "nk", "mk" if attrs.get("transB", 0) else "km", "nm")
    elif node.op_type == "Attention" and len(x) == 3 and len(weight) == 2:
        found = matmul(x, weight)
    elif node.op_type in ("MatMul", "QLinearMatMul") and len(x) > 1:
        found = matmul(x, weight, left=k == 0)
    elif node.op_type == "FusedMatMul" and len(x) > 1 and attrs.get("alpha", 1.0) == 1.0:
        turned = [bool(attrs.get("transA", 0)), bool(attrs.get("transB", 0))]
        if not attrs.get("transBatchA", 0) and not attrs.get("transBatchB", 0):
            found = matmul(x, weight, left=k == 0, turned=(turned[1 - k], turned[k]))
    elif node.op_type == "Einsum":
        found = einsum(text_of(attrs.get("equation", "")), k, x, weight)
    elif node.op_type in ("Conv", "FusedConv", "QLinearConv", "ConvTranspose"):
        return _convolution(attrs, weight, node.op_type == "ConvTranspose")
    return found if found is not None and found.valid else None


def _convolution(attrs: Mapping[str, Any], weight: Shape, transposed: bool) -> Convolution:
    """The layout of a Conv or ConvTranspose."""
    kernel, still = weight[2:], (1,) * (len(weight) - 2)
    given: dict[str, Any] = {
        "kernel": kernel,
        "strides": tuple(attrs.get("strides", still)),
        "dilations": tuple(attrs.get("dilations", still)),
        "pads": tuple(attrs.get("pads", (0, 0) * len(kernel))),
        "groups": int(attrs.get("group", 1)),
        "auto_pad": text_of(attrs.get("auto_pad", "NOTSET")),
    }
    if not transposed:
        return Convolution(**given)
    more = tuple(attrs.get("output_padding", (0,) * len(kernel)))
    return TransposedConvolution(**given, output_padding=more, output_shape=tuple(attrs.get("output_shape", ())))


def weight_of(node: ir.Node, k: int, untied: Collection[str]) -> tuple[ir.Value | None, Slot, tuple[int, ...], bool]:
    """(the initializer behind input k; where it is read; the order of its axes there; whether it may change for one).

    No order is the one that it is stored in.
    """
    slot, value, own = (str(node.outputs[0].name), k), node.inputs[k], True
    order: tuple[int, ...] = ()
    while value is not None and not value.is_graph_output() and not value.is_graph_input():
        alone = own and len(value.uses()) == 1
        if (code := codes(value)) is not None:
            return code, (str(value.name), 0), order, alone and len(code.uses()) == 1
        if value.const_value is not None and value.is_initializer():
            found = value if value.dtype in FLOATS else None
            return found, slot, order, alone or (own and value.name in untied)
        turn = value.producer()
        if turn is not None and turn.op_type == "Cast" and attributes(turn).get("to") in FLOATS:
            slot, own, value = (str(value.name), 0), alone, turn.inputs[0]
            continue
        if turn is None or turn.op_type != "Transpose" or turn.inputs[0] is None:
            break
        rank = len(turn.inputs[0].shape or ())
        perm = [int(axis) for axis in attributes(turn).get("perm", range(rank)[::-1])]  # type: ignore[attr-defined]
        order = tuple(perm[axis] for axis in order or range(rank))
        slot, own, value = (str(value.name), 0), alone, turn.inputs[0]
    return None, slot, order, False


def codes(value: ir.Value | None) -> ir.Value | None:
    """The initializer of integers that a value is, through DequantizeLinear."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear" or any(v and v.const_value is None for v in node.inputs):
        return None
    found = node.inputs[0]
    return found if found is not None and found.is_initializer() and found.dtype in CODES else None


def stored(value: ir.Value | None) -> ir.Value | None:
    """The initializer that a value is, through Identity; None for what is computed or given."""
    while value is not None and (node := value.producer()) is not None and node.op_type == "Identity":
        value = node.inputs[0]
    if value is None or value.const_value is None or value.producer() is not None or value.is_graph_input():
        return None
    return value


def shape_of(weight: ir.Value) -> Shape:
    """The shape of what is stored."""
    return tuple(weight.const_value.shape.numpy()) if weight.const_value is not None else ()


def outputs_of(layout: Layout, weight: ir.Value) -> int:
    """Outputs of all groups."""
    groups, _, outputs = layout.sizes(shape_of(weight))
    return groups * outputs


def apart(operators: Sequence[Operator]) -> tuple[Operator, ...]:
    """Operators of one site: what is added behind the sum of several is a step of the first alone."""
    seen: set[Step] = set()
    found = []
    for operator in operators:
        found.append(replace(operator, steps=tuple(step for step in operator.steps if step not in seen)))
        seen.update(operator.steps)
    return tuple(found)


def text_of(given: object) -> str:
    """An attribute that is a string."""
    return given.decode() if isinstance(given, bytes) else str(given)


def size_at(node: ir.Node, k: int) -> int:
    """How many elements are stored for an input."""
    value = node.inputs[k]
    return value.const_value.size if value is not None and value.const_value is not None else 0


def kept_of(value: ir.Value | None, slot: Slot) -> tuple[ir.Value | None, Slot, bool]:
    """(the initializer behind one input of a node, where it is read, whether it may change for this node alone).

    It may lie behind Cast and DequantizeLinear. What a node reads itself it may have a copy of.
    """
    alone = True
    while value is not None and stored(value) is None:
        while (node := value.producer()) is not None and node.op_type == "Identity" and node.inputs[0] is not None:
            value = node.inputs[0]
        alone = alone and len(value.uses()) == 1
        if (code := codes(value)) is not None:
            return code, (str(value.name), 0), alone
        if node is None or node.op_type != "Cast" or attributes(node).get("to") not in FLOATS:
            return None, slot, False
        slot, value = (str(value.name), 0), node.inputs[0]
    found = stored(value)
    return (found if found is not None and found.dtype in (*FLOATS, *CODES) else None), slot, alone
