"""Where a pruned model can be repaired: linear operators with stored weights, and the sums that they feed.

An operator's output may pass a bias, a gain and additions before anything else reads it. What is fitted is the value
at the end of that chain, the *site*: all operators that end in one site are fitted together, so that a residual sum
comes out right whatever its shortcut lost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxprune.infer import attributes, bodies, walk
from onnxprune.layouts import Contraction, Convolution, Layout, matmul
from onnxprune.types import Array, Axis, Mask, Positions, Shape

Slot = tuple[str, int]  # first output of a node, number of its input
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
LINEAR = ("Conv", "Gemm", "MatMul")


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
    """A linear operator whose weight is stored for it alone.

    `left` has (axis, positions) of the dense operator's input that are left, where some are not; `lost` says that
    columns went, and not only whole groups. `source` is what the dense operator reads.
    """

    node: str
    layout: Layout
    x: str
    weight: Slot
    bias: Slot | None
    steps: tuple[Step, ...]
    left: tuple[tuple[int, Positions], ...] = ()
    lost: bool = False
    source: str = ""

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
class Site:
    """A value of the pruned model that should equal `kept` channels of `dense`, its counterpart.

    Channels lie along `axes`, in this order. `project` float64[dense channels, channels] takes the place of `kept`
    where channels are not mere positions. It is the sum of its operators, through their steps, and of the values in
    `rest`. Only what lies between `bounds` is seen by its readers.
    """

    value: str
    dense: str
    axes: tuple[int, ...]
    kept: Positions | None
    operators: tuple[Operator, ...]
    rest: tuple[str, ...]
    bounds: tuple[float, float] = (-np.inf, np.inf)
    project: Array | None = None

    @property
    def axis(self) -> int:
        """The last axis of channels."""
        return self.axes[-1]


@dataclass
class _Chain:
    value: ir.Value
    steps: list[Step] = field(default_factory=list)
    rest: list[ir.Value] = field(default_factory=list)
    path: list[str] = field(default_factory=list)


def find_sites(
    pruned: ir.Model,
    dense: ir.Model,
    shapes: Mapping[str, Shape],
    keep: Callable[[Axis], Mask],
    stays: Collection[str] = (),
    coded: Collection[str] = (),
    untied: Collection[str] = (),
) -> list[Site]:
    """Sites in topological order; `shapes` and `keep` speak of the dense model, what `stays` names keeps its values.

    Weights behind DequantizeLinear are fitted only where `coded` names them, those that others read as well only where
    `untied` does.
    """
    found: dict[str, list[tuple[int, Operator, _Chain]]] = defaultdict(list)
    readers = _readers(dense)
    for index, node in enumerate(pruned.graph):
        operator = _operator(node, shapes, keep, stays, coded, untied)
        if operator is None:
            continue
        chain = _follow(node, operator.layout.axes, shapes, stays)
        source = readers.get((operator.node, 0), operator.x)
        operator = replace(operator, steps=(*operator.steps, *chain.steps), source=source)
        found[str(chain.value.name)].append((index, operator, chain))
    places = {str(out.name): index for index, node in enumerate(pruned.graph) for out in node.outputs}
    sites = []
    for name, every in found.items():
        value, axes = every[0][2].value, every[0][1].layout.axes
        parts = [part for part in every if part[1].layout.axes == axes]
        counterpart = _counterpart(value, readers, shapes)
        if any(not keep(Axis(counterpart, k)).all() for k in range(len(shapes[counterpart])) if k not in axes):
            continue
        paths = {p for _, _, chain in parts for p in chain.path}
        rest = dict.fromkeys(str(v.name) for _, _, chain in parts for v in chain.rest if v.name not in paths)
        mask = reduce(np.logical_and.outer, [keep(Axis(counterpart, k)) for k in axes]).reshape(-1)
        kept = None if mask.all() else np.flatnonzero(mask)
        operators = _apart([operator for _, operator, _ in parts])
        sites.append((places[name], Site(name, counterpart, axes, kept, operators, tuple(rest), _bounds(value))))
    return [site for _, site in sorted(sites, key=lambda pair: pair[0])]


def fitting(graph: ir.Graph) -> int:
    """MACs that fitting all operators of a model takes for each row: second moments, and products with the targets."""
    count = 0
    for node in graph:
        value = node.inputs[1] if node.op_type in ("Conv", "Gemm", "MatMul") else None
        if value is not None and value.const_value is not None and len(value.const_value.shape) > 1:
            sizes = value.const_value.shape.numpy()
            turned = node.op_type == "Conv" or (node.op_type == "Gemm" and "transB" in node.attributes)
            columns = int(np.prod(sizes[1:] if turned else sizes[:-1]))
            count += columns * (columns + 4 * (sizes[0] if turned else sizes[-1]))
    return count


def _apart(operators: Sequence[Operator]) -> tuple[Operator, ...]:
    """Operators of one site: what is added behind the sum of several is a step of the first alone."""
    seen: set[Step] = set()
    found = []
    for operator in operators:
        found.append(replace(operator, steps=tuple(step for step in operator.steps if step not in seen)))
        seen.update(operator.steps)
    return tuple(found)


def _readers(dense: ir.Model) -> dict[Slot, str]:
    """{(node, input): value} of the dense model."""
    return {
        (str(node.outputs[0].name), k): str(value.name)
        for node in walk(dense.graph)
        for k, value in enumerate(node.inputs)
        if value is not None
    }


def _counterpart(value: ir.Value, readers: Mapping[Slot, str], shapes: Mapping[str, Shape]) -> str:
    """The dense value that all readers saw in this place: a later one, where a branch in between is gone."""
    seen = {readers.get((str(use.node.outputs[0].name), use.idx)) for use in value.uses()}
    name = next(iter(seen), None) if len(seen) == 1 else None
    if name is None or value.is_graph_output() or shapes.get(name) != shapes[str(value.name)]:
        return str(value.name)
    return name


def _operator(
    node: ir.Node,
    shapes: Mapping[str, Shape],
    keep: Callable[[Axis], Mask],
    stays: Collection[str],
    coded: Collection[str],
    untied: Collection[str],
) -> Operator | None:
    """The node as an operator that may be fitted, or None."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in LINEAR:
        return None
    x, given = node.inputs[0], node.inputs[1]
    output = str(node.outputs[0].name)
    if x is None or given is None or x.const_value is not None or output not in shapes or str(x.name) not in shapes:
        return None
    weight, slot, flips = _weight(node, coded, untied)
    if weight is None or str(weight.name) in stays or len(weight.shape or ()) < 2:
        return None
    layout = _layout(node, shapes[str(x.name)], weight, flips)
    if layout is None:
        return None
    bias: Slot | None = None
    steps: tuple[Step, ...] = ()
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        value, home = stored(node.inputs[2]), (output, 2)
        if (code := _code(node.inputs[2])) is not None:
            value, home = code, (str(node.inputs[2].name), 0)
        if value is None or value.const_value is None:
            return None
        shape = tuple(value.const_value.shape.numpy())
        whole = value.const_value.size == _outputs(layout, weight) == (shape[-1] if shape else 1)
        if not whole and value.const_value.size != 1:
            return None
        if whole and code is None and str(value.name) not in stays:
            bias = home
        else:
            steps = (Step("add", (home,), fixed=True),)
    masks = [keep(Axis(str(x.name), k)) for k in range(len(shapes[str(x.name)]))]
    left = tuple((k, np.flatnonzero(mask)) for k, mask in enumerate(masks) if not mask.all())
    lost = any(not masks[k].all() for k in layout.summed)
    return Operator(output, layout, str(x.name), slot, bias, steps, left, lost)


def _layout(node: ir.Node, x: Shape, weight: ir.Value, flips: bool) -> Layout | None:
    """How a node multiplies, if it is a product with nothing else in it."""
    attrs: Mapping[str, Any] = attributes(node)
    shape = _shape(weight)
    if node.op_type == "Gemm":
        if attrs.get("alpha", 1.0) != 1.0 or attrs.get("beta", 1.0) != 1.0:
            return None
        turned = flips ^ bool(attrs.get("transB", 0))
        return Contraction("kn" if attrs.get("transA", 0) else "nk", "mk" if turned else "km", "nm")
    if node.op_type == "MatMul":
        if len(shape) != 2 or len(x) < 2:
            return None
        found = matmul(x, shape[::-1] if flips else shape)
        return replace(found, weight=found.weight[::-1]) if found is not None and flips else found
    return None if flips else _convolution(attrs, shape)


def _convolution(attrs: Mapping[str, Any], weight: Shape) -> Convolution | None:
    """The layout of a Conv, whose padding must be written down."""
    kernel, still = weight[2:], [1] * (len(weight) - 2)
    auto_pad = attrs.get("auto_pad", "NOTSET")
    auto_pad = auto_pad.decode() if isinstance(auto_pad, bytes) else str(auto_pad)
    if auto_pad not in ("NOTSET", "VALID"):
        return None
    return Convolution(
        kernel,
        tuple(attrs.get("strides", still)),
        tuple(attrs.get("dilations", still)),
        tuple(attrs.get("pads", [0] * 2 * len(kernel))),
        int(attrs.get("group", 1)),
        auto_pad,
    )


def _weight(node: ir.Node, coded: Collection[str], untied: Collection[str]) -> tuple[ir.Value | None, Slot, bool]:
    """(the initializer behind a weight, if this reader may change it; where it is read; whether it is transposed)."""
    slot, flips = (str(node.outputs[0].name), 1), False
    value = node.inputs[1]
    while value is not None and not value.is_graph_output() and not value.is_graph_input():
        own = len(value.uses()) == 1
        if own and (code := _code(value)) is not None:
            place = (str(value.name), 0)
            return (code if code.name in coded and len(code.uses()) == 1 else None), place, flips
        if value.const_value is not None and value.is_initializer():
            return (value if value.dtype in FLOATS and (own or value.name in untied) else None), slot, flips
        turn = value.producer()
        if not own or turn is None or turn.op_type != "Transpose" or turn.inputs[0] is None:
            break
        order = attributes(turn).get("perm")
        if len(turn.inputs[0].shape or ()) != 2 or (order is not None and list(order) != [1, 0]):  # type: ignore[call-overload]
            break
        slot, flips, value = (str(value.name), 0), not flips, turn.inputs[0]
    return None, slot, flips


def _code(value: ir.Value) -> ir.Value | None:
    """The initializer of integers that a value is, through DequantizeLinear."""
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear" or any(v and v.const_value is None for v in node.inputs):
        return None
    return node.inputs[0]


def stored(value: ir.Value | None) -> ir.Value | None:
    """The initializer that a value is, through Identity; None for what is computed or given."""
    while value is not None and (node := value.producer()) is not None and node.op_type == "Identity":
        value = node.inputs[0]
    if value is None or value.const_value is None or value.producer() is not None or value.is_graph_input():
        return None
    return value


def _shape(weight: ir.Value) -> Shape:
    return tuple(weight.const_value.shape.numpy()) if weight.const_value is not None else ()


def _outputs(layout: Layout, weight: ir.Value) -> int:
    groups, _, outputs = layout.sizes(_shape(weight))
    return groups * outputs


def _follow(node: ir.Node, axes: tuple[int, ...], shapes: Mapping[str, Shape], stays: Collection[str]) -> _Chain:
    """What happens to an operator's output until something else than a gain, a shift or a sum reads it."""
    chain = _Chain(node.outputs[0], path=[str(node.outputs[0].name)])
    start = shapes[str(node.outputs[0].name)]
    while len(chain.value.uses()) == 1 and not chain.value.is_graph_output():
        use = next(iter(chain.value.uses()))
        reader, k = use.node, use.idx
        if reader.graph is not node.graph or bodies(reader) or reader.domain not in ("", "ai.onnx"):
            break
        out = reader.outputs[0]
        if shapes.get(str(out.name)) != start:
            break
        slot = str(out.name)
        other = reader.inputs[1 - k] if reader.op_type in ("Add", "Mul") and len(reader.inputs) == 2 else None
        if reader.op_type == "Identity":
            pass
        elif reader.op_type == "Add" and other is not None and _per_channel(other, axes, start):
            chain.steps.append(Step("add", ((slot, 1 - k),), fixed=_stays(other, stays)))
        elif (
            reader.op_type == "Add"
            and other is not None
            and shapes.get(str(other.name)) == start
            and other is not chain.value
        ):
            chain.rest.append(other)
        elif chain.rest:
            break
        elif reader.op_type == "Mul" and other is not None and _per_channel(other, axes, start):
            chain.steps.append(Step("mul", ((slot, 1 - k),), fixed=_stays(other, stays)))
        elif reader.op_type == "BatchNormalization" and k == 0 and axes == (1,) and len(reader.outputs) == 1:
            epsilon = float(attributes(reader).get("epsilon", 1e-5))  # type: ignore[arg-type]
            if any(stored(v) is None for v in reader.inputs[1:5]):
                break
            chain.steps.append(
                Step("norm", tuple((slot, i) for i in range(1, 5)), epsilon, _stays(reader.inputs[2], stays))
            )
        else:
            break
        chain.value = out
        chain.path.append(slot)
    return chain


def _stays(value: ir.Value | None, stays: Collection[str]) -> bool:
    """Whether a stored value is to keep its values."""
    source = stored(value)
    return source is not None and str(source.name) in stays


def _per_channel(value: ir.Value, axes: tuple[int, ...], shape: Shape) -> bool:
    """Whether a stored value has one number for each channel."""
    source = stored(value)
    if source is None or source.const_value is None:
        return False
    own = tuple(int(d) for d in source.const_value.shape.numpy())
    if len(own) > len(shape):
        return False
    padded = (1,) * (len(shape) - len(own)) + own
    if any(size > 1 for k, size in enumerate(padded) if k not in axes):
        return False
    return any(padded[k] > 1 for k in axes) or all(shape[k] == 1 for k in axes)


def _bounds(value: ir.Value) -> tuple[float, float]:
    """What readers see of a value: everything, or what a ReLU or Clip lets through."""
    if value.is_graph_output() or not value.uses():
        return -np.inf, np.inf
    found = {_passes(use.node) for use in value.uses()}
    return found.pop() if len(found) == 1 else (-np.inf, np.inf)


def _passes(node: ir.Node) -> tuple[float, float]:
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip":
        return -np.inf, np.inf
    limits: list[float] = []
    for k, (key, other) in enumerate((("min", -np.inf), ("max", np.inf)), start=1):
        value = node.inputs[k] if k < len(node.inputs) else None
        if value is not None and value.const_value is None:
            return -np.inf, np.inf
        tensor: Array | None = (
            value.const_value.numpy() if value is not None and value.const_value is not None else None
        )
        limits.append(float(tensor.reshape(-1)[0]) if tensor is not None else float(attributes(node).get(key, other)))  # type: ignore[arg-type]
    return limits[0], limits[1]
