"""Recurrent operators: a hidden unit is a row of every gate, a column of the recurrence and a position of the state."""

from __future__ import annotations

from collections.abc import Iterable

from onnxprune.ops import Edit, Resizing, resize, rule, shape
from onnxprune.types import OpNode, Pattern, Relation, Shape

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@rule("LSTM", "GRU", "RNN", roles={1: "weight", 2: "weight", 3: "bias", 4: "index", 7: "weight"})
def recurrent(node: OpNode) -> Iterable[Relation]:
    """X (t, b, i), W (d, q h, i), R (d, q h, h), B (d, 2 q h), states (d, b, h) -> Y (t, d, b, h), last states.

    Both directions live in one tensor, so a unit goes from both at the same position.
    """
    gates = GATES[node.op_type]
    hidden = node.shape(2)[-1]
    sizes = {"q": gates, "z": 2 * gates, "p": 3, "h": hidden}
    if node.attr("layout", 0):
        x, state, y = "b t i", "b d h", "b t d h"
    else:
        x, state, y = "t b i", "d b h", "t d b h"
    inputs = [x, "d (q h) i", "d (q h) h", "d (z h)", "b", state, state, "d (p h)"]
    text = ", ".join(inputs[: len(node.inputs)]) + " -> " + ", ".join([y, state, state][: len(node.outputs)])
    yield Pattern(text, sizes, fixed=("q", "z", "p", "d", "t"))


@rule(
    "com.microsoft::DynamicQuantizeLSTM",
    roles={3: "bias", 4: "index"} | dict.fromkeys(range(8, 12), "quant"),
    integers={1: (9, 0), 2: (11, 0)},
)
def dynamic_quantize_lstm(node: OpNode) -> Iterable[Relation]:
    """As LSTM, with W (d, i, q h) and R (d, h, q h) in integers, and scales and zero points (d) or (d, q h)."""
    hidden = node.attrs["hidden_size"]
    vectors = ["d (q h)" if node.has(k) and len(node.shape(k)) == 2 else "d" for k in range(8, len(node.inputs))]
    inputs = ["t b i", "d i (q h)", "d h (q h)", "d (z h)", "b", "d b h", "d b h", "d (p h)", *vectors]
    text = ", ".join(inputs) + " -> " + ", ".join(["t d b h", "d b h", "d b h"][: len(node.outputs)])
    yield Pattern(text, {"q": 4, "z": 8, "p": 3, "h": hidden}, fixed=("q", "z", "p", "d", "t"))


@shape("com.microsoft::DynamicQuantizeLSTM")
def dynamic_quantize_lstm_shape(node: OpNode) -> tuple[Shape, ...]:
    """Y (t, d, b, h) and the last states (d, b, h)."""
    steps, batch, _ = node.shape(0)
    directions, hidden = node.shape(2)[:2]
    state = (directions, batch, hidden)
    return ((steps, *state), state, state)


@resize("LSTM", "GRU", "RNN", "com.microsoft::DynamicQuantizeLSTM")
def hidden_size(this: Resizing) -> Edit | None:
    """`hidden_size` is the number of units that are left."""
    axis = 1 if this.dense.op_type == "DynamicQuantizeLSTM" else 2
    now = this.wanted[this.node.inputs[2]][axis]
    return None if now == this.dense.shape(2)[axis] else Edit(attrs={"hidden_size": now})
