"""Residual widths that nothing but norms reads, so that the stream between them can be turned into any basis.

A norm is LayerNormalization, RMSNormalization, one of ONNX Runtime's fused forms, or what exporters spell out: a mean
square over the width under a root that the stream, with or without its mean taken off, is divided by. Nodes are
followed in order; one that is not understood ends the search, and the width is cut by positions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from onnxprune.operators import Operator, Slot
from onnxprune.types import Group, OpNode, Shape, View

MOVES = frozenset(
    "Identity Reshape Transpose Squeeze Unsqueeze Flatten Split Slice Gather GatherND Expand Cast Dropout".split()
)
FUSED = {
    "LayerNormalization": (True, 1, 2),
    "RMSNormalization": (False, 1, None),
    "SimplifiedLayerNormalization": (False, 1, None),
    "SkipLayerNormalization": (True, 2, 3),
    "SkipSimplifiedLayerNormalization": (False, 2, None),
}  # whether the mean is taken off, inputs that hold gain and shift
EXTRAPOLATED = "tf_crop_and_resize"  # which writes a number of its own where it leaves the image


@dataclass(frozen=True)
class Norm:
    """The stream's value `source` over its size, where `gain` and `shift` are stored; `centred`: less its mean.

    `scale` is what the shift was multiplied by before it is read, `mean` the node that takes the mean off.
    """

    source: str
    centred: bool
    gain: Slot | None = None
    shift: Slot | None = None
    scale: float = 1.0
    mean: str = ""

    @property
    def whole(self) -> bool:
        """Whether one node takes the mean off and adds the shift."""
        return self.shift is not None and self.shift[0] == self.mean


@dataclass(frozen=True)
class Width:
    """A residual width that only norms read.

    `streams` are the sites that write it, `readers` {operator: the norm that it reads}, `stored` what else of it is
    stored, with the axis.
    """

    group: Group
    streams: tuple[str, ...]
    readers: Mapping[str, Norm]
    stored: tuple[tuple[Slot, int], ...]

    @property
    def norms(self) -> list[Norm]:
        """The norms, each once."""
        return list(dict.fromkeys(self.readers.values()))

    @property
    def centred(self) -> bool:
        """Whether its norms take the mean off."""
        return self.norms[0].centred


@dataclass(frozen=True)
class _Stat:
    """One number for each token: the mean, mean square, root of it or its inverse, of the stream's value `source`."""

    kind: str
    source: str
    centred: bool = False


@dataclass(frozen=True)
class _Part:
    """A value on the way to a norm: the stream less its mean, or a square."""

    kind: str
    source: str
    centred: bool = False
    mean: str = ""


STREAM = _Part("stream", "")
Known = _Stat | _Part | Norm


def find_width(
    group: Group,
    view: View,
    along: Callable[[str], int | None],
    operators: Mapping[str, Operator],
    sites: Collection[str],
) -> Width | None:
    """The group as a width under norms, if nothing else looks at it.

    `along` answers which axis of a value is the group: None for none, -1 for more or less than an axis.
    """
    steps = [step for operator in operators.values() for step in operator.steps]
    gains = {node for step in steps if step.kind == "mul" for node, _ in step.slots}
    known: dict[str, Known] = {}
    readers: dict[str, Norm] = {}
    for node in view.nodes:
        axes = {name: axis for name in (*node.inputs, *node.outputs) if (axis := along(name)) is not None}
        entering = {name: known[name] for name in node.inputs if name in known}
        if (not axes and not entering) or node.op_type == "Shape":
            continue
        if node.within or -1 in axes.values():
            return None
        out = node.outputs[0]
        if out in operators:
            reads = entering.get(node.inputs[0])
            if reads is not None and (not isinstance(reads, Norm) or not operators[out].layout.summed):
                return None
            if reads is not None:
                readers[out] = reads
            found: Mapping[str, Known] | None = {out: STREAM} if out in axes else {}
        elif out in gains:
            found = {out: STREAM} if out in axes else {}
        else:
            found = _after(node, entering, axes, view.shapes)
        if found is None or any(name in view.outputs for name in found):
            return None
        known |= found
    norms = set(readers.values())
    if not norms or len({norm.centred for norm in norms}) > 1:
        return None
    homes = {slot for o in operators.values() for slot in (o.weight, o.bias)}
    homes |= {slot for step in steps for slot in step.slots}
    homes |= {slot for norm in norms for slot in (norm.gain, norm.shift) if slot is not None}
    stored = [(slot, m.axis) for m in group.members for slot in m.readers if slot not in homes]
    streams = tuple(value for value in sites if known.get(value) is STREAM)
    return Width(group, streams, readers, tuple(dict.fromkeys(stored)))


def _after(
    node: OpNode, entering: Mapping[str, Known], axes: Mapping[str, int], shapes: Mapping[str, Shape]
) -> Mapping[str, Known] | None:
    """What a node makes of what is known; None where that is not understood."""
    out = node.outputs[0]
    if node.op_type in FUSED:
        return _fused(node, entering, axes)
    kinds = set(entering.values())
    if node.op_type in (*MOVES, "Concat") and len(kinds) < 2:
        if any(isinstance(kind, _Stat) for kind in kinds) and node.op_type not in ("Cast", "Identity"):
            return None
        return dict.fromkeys([name for name in node.outputs if name in axes or kinds], next(iter(kinds), STREAM))
    if node.op_type == "ReduceMean":
        return _mean(node, entering, axes, shapes)
    left = entering.get(node.inputs[0])
    right = entering.get(node.inputs[1]) if len(node.inputs) > 1 else None
    found: Known | None = None
    match node.op_type, left, right:
        case "Add", _, _ if kinds == {STREAM}:  # with another value of the stream, or with what is stored for it
            found = STREAM
        case (("Mul" | "Div"), _Part(kind="stream"), None) if _number(node, 1) is not None:
            found = STREAM
        case "Mul", None, _Part(kind="stream") if _number(node, 0) is not None:
            found = STREAM
        case "Resize", _Part(kind="stream"), _ if node.attr("coordinate_transformation_mode", "") != EXTRAPOLATED:
            found = STREAM
        case "Pow", _Part(), None if _number(node, 1) == 2:
            found = _squared(node.inputs[0], left)
        case "Mul", _Part(), _Part() if node.inputs[0] == node.inputs[1]:
            found = _squared(node.inputs[0], left)
        case "Sub", _Part(kind="stream"), _Stat(kind="mean", source=source) if source == node.inputs[0]:
            found = _Part("centred", source, True, out)
        case "Add", _Stat(kind="square"), None if _number(node, 1) is not None:
            found = left
        case "Add", None, _Stat(kind="square") if _number(node, 0) is not None:
            found = right
        case "Sqrt", _Stat(kind="square"), _:
            found = replace(left, kind="root")
        case "Pow", _Stat(kind="square"), None if _number(node, 1) in (0.5, -0.5):
            found = replace(left, kind="root" if _number(node, 1) == 0.5 else "inverse")
        case "Reciprocal", _Stat(kind="root"), _:
            found = replace(left, kind="inverse")
        case "Div", None, _Stat(kind="root") if _number(node, 0) == 1:
            found = replace(right, kind="inverse")
        case "Div", _Part(), _Stat(kind="root"):
            found = _normed(node.inputs[0], left, right)
        case "Mul", _Part(), _Stat(kind="inverse"):
            found = _normed(node.inputs[0], left, right)
        case "Mul", _Stat(kind="inverse"), _Part():
            found = _normed(node.inputs[1], right, left)
        case (("Mul" | "Div"), Norm(), None) if factor := _number(node, 1):
            found = replace(left, scale=left.scale * factor if node.op_type == "Mul" else left.scale / factor)
        case "Mul", None, Norm() if factor := _number(node, 0):
            found = replace(right, scale=right.scale * factor)
        case "Mul", Norm(gain=None, shift=None), None if out in axes:
            found = replace(left, gain=(out, 1)) if _vector(node, 1, shapes) else None
        case "Mul", None, Norm(gain=None, shift=None) if out in axes:
            found = replace(right, gain=(out, 0)) if _vector(node, 0, shapes) else None
        case "Add", Norm(shift=None), None:
            found = replace(left, shift=(out, 1), scale=1.0) if _vector(node, 1, shapes) else None
        case "Add", None, Norm(shift=None):
            found = replace(right, shift=(out, 0), scale=1.0) if _vector(node, 0, shapes) else None
    return None if found is None else {out: found}


def _fused(node: OpNode, entering: Mapping[str, Known], axes: Mapping[str, int]) -> Mapping[str, Known] | None:
    """A norm in one node, with the sum that some give out as well."""
    centred, gain, shift = FUSED[node.op_type]
    last, out = len(node.out_shape()) - 1, node.outputs[0]
    skips = node.op_type.startswith("Skip")
    if set(entering.values()) != {STREAM} or node.attr("axis", -1) not in (-1, last):
        return None
    sums = [name for name in node.outputs[1:] if name]
    if any(name not in axes for name in sums) or (sums and not skips):
        return None
    source = sums[0] if sums else node.inputs[0]
    if skips and not sums:  # the sum has no name, so that its directions could not be looked at
        return None
    held = (out, shift) if shift is not None and node.has(shift) else None
    mean = out if node.op_type == "LayerNormalization" and not any(node.outputs[1:]) else ""
    return {out: Norm(source, centred, (out, gain), held, mean=mean), **dict.fromkeys(sums, STREAM)}


def _mean(
    node: OpNode, entering: Mapping[str, Known], axes: Mapping[str, int], shapes: Mapping[str, Shape]
) -> Mapping[str, Known] | None:
    """A mean over the width alone, or over tokens, which turns with the width."""
    name = node.inputs[0]
    known = entering.get(name)
    if node.outputs[0] in axes and (known is STREAM or isinstance(known, Norm)):
        return {node.outputs[0]: known}
    if not isinstance(known, _Part) or node.out_shape() != (*shapes[name][:-1], 1):
        return None
    if known is STREAM:
        return {node.outputs[0]: _Stat("mean", name)}
    if known.kind == "square":
        return {node.outputs[0]: _Stat("square", known.source, known.centred)}
    return None


def _squared(name: str, part: _Part) -> _Part | None:
    if part.kind not in ("stream", "centred"):
        return None
    return _Part("square", name if part is STREAM else part.source, part.centred)


def _normed(name: str, part: _Part, stat: _Stat) -> Norm | None:
    """A value over the root of its own mean square."""
    source = name if part is STREAM else part.source
    if part.kind == "square" or (source, part.centred) != (stat.source, stat.centred):
        return None
    return Norm(source, part.centred, mean=part.mean)


def _number(node: OpNode, k: int) -> float | None:
    """The one number that is stored for an input."""
    stored = node.const(k)
    return float(stored.reshape(-1)[0]) if stored is not None and stored.size == 1 else None


def _vector(node: OpNode, k: int, shapes: Mapping[str, Shape]) -> bool:
    """Whether an input is stored, a number for each position of the width."""
    shape = shapes[node.inputs[k]]
    return bool(shape) and shape[-1] == node.out_shape()[-1] and all(size == 1 for size in shape[:-1])
