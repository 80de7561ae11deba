"""Control flow: values of bodies are values like any others, and those of the node are tied to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onnxprune.ops import rule
from onnxprune.types import Freeze, OpNode, Pattern, Relation


@rule("If")
def branches(node: OpNode) -> Iterable[Relation]:
    """Condition -> outputs, each the same as that of either branch; one whose shape depends on the branch stays."""
    for name, *inner in zip(node.outputs, *(body.outputs for body in node.bodies.values()), strict=False):
        yield from _same(node, [*inner, name])


@rule("Loop")
def loop(node: OpNode) -> Iterable[Relation]:
    """Trip count, condition, carried -> carried, one value before, inside and after; what is collected is stacked."""
    body = node.bodies["body"]
    count = len(body.inputs) - 2
    outputs = [*node.outputs, *[""] * (len(body.outputs) - 1 - len(node.outputs))]
    for values in zip(node.inputs[2:], body.inputs[2:], body.outputs[1:], outputs, strict=False):
        yield from _same(node, values)
    for inner, outer in zip(body.outputs[1 + count :], outputs[count:], strict=False):
        yield from _stacked(node, inner, outer, 0)


@rule("Scan")
def scan(node: OpNode) -> Iterable[Relation]:
    """States, sequences -> states, sequences: states as in Loop, sequences without the scan axis inside; it stays."""
    body = node.bodies["body"]
    count = node.attrs["num_scan_inputs"]
    states = len(body.inputs) - count
    outputs = [*node.outputs, *[""] * (len(body.outputs) - len(node.outputs))]
    if len(node.inputs) != len(body.inputs):  # before opset 9: a batch, and lengths
        return
    for values in zip(node.inputs[:states], body.inputs, body.outputs, outputs, strict=False):
        yield from _same(node, values)
    axes = node.attr("scan_input_axes", [0] * count)
    for outer, inner, axis in zip(node.inputs[states:], body.inputs[states:], axes, strict=False):
        yield from _stacked(node, inner, outer, axis)
    axes = node.attr("scan_output_axes", [0] * (len(outputs) - states))
    for inner, outer, axis in zip(body.outputs[states:], outputs[states:], axes, strict=False):
        yield from _stacked(node, inner, outer, axis)


def _same(node: OpNode, values: Sequence[str]) -> Iterable[Relation]:
    """One value under several names; where its shape is not the same everywhere, it stays."""
    named = [name for name in values if name]
    shapes = [node.shapes.get(name) for name in named]
    first = shapes[0]
    if first is None or any(shape is None or len(shape) != len(first) for shape in shapes):
        for name in named:
            yield Freeze(name, None, f"{node.op_type}: its shape is not known, or not always the same")
        return
    for axis, sizes in enumerate(zip(*(shape for shape in shapes if shape is not None), strict=True)):
        if len(set(sizes)) > 1:
            for name in named:
                yield Freeze(name, axis, f"{node.op_type}: its size is not always the same")
    tokens = " ".join(
        "_" if len(set(sizes)) > 1 else f"a{axis}"
        for axis, sizes in enumerate(zip(*(shape for shape in shapes if shape is not None), strict=True))
    )
    if first:
        yield Pattern(", ".join([tokens] * (len(named) - 1)) + " -> " + tokens, operands=tuple(named))


def _stacked(node: OpNode, inner: str, outer: str, axis: int) -> Iterable[Relation]:
    """The outer value is the inner one of every round, side by side along an axis of its own."""
    shape, whole = node.shapes.get(inner), node.shapes.get(outer)
    if not outer:
        return
    if shape is None or whole is None or len(whole) != len(shape) + 1:
        for name in (inner, outer):
            yield Freeze(name, None, f"{node.op_type}: its shape is not known")
        return
    tokens = [f"a{k}" for k in range(len(shape))]
    stacked = list(tokens)
    stacked.insert(axis if axis >= 0 else len(whole) + axis, "!")
    if shape or whole[0] > 1:
        yield Pattern(f"{' '.join(tokens)} -> {' '.join(stacked)}", operands=(inner, outer))
