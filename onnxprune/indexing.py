"""Values that are positions by number: where they come from, what they pick, and which axes that couples.

The indices that TopK gives are positions of the axis it looked along; a Gather that reads them picks positions of a
table. After removal both are numbered anew, and agree if both lost the same positions. So all axes that one set of
numbers speaks of are tied, as long as every operator on the way only moves numbers; any other use freezes them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from onnxprune import ops
from onnxprune.types import Axis, Named, Numbers, OpNode, View


@dataclass
class Numbered:
    """Axes whose positions one set of numbers speaks of, what else becomes of the numbers, and whether they are chosen.

    `named` are values that speak of some positions, by number. `reasons` are uses that need the numbers as they are;
    `chosen` means that they come from an operator of the model. `values` all hold them.
    """

    axes: list[Axis] = field(default_factory=list)
    named: list[Named] = field(default_factory=list)
    values: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    chosen: bool = False


def numbered(view: View, said: Iterable[tuple[OpNode, Numbers | Named]]) -> Iterator[Numbered]:
    """Follow what the rules said of values that hold positions; one answer for each set of values that share them."""
    spoken: dict[str, list[tuple[OpNode, Numbers | Named]]] = defaultdict(list)
    for node, relation in said:
        spoken[relation.numbers if isinstance(relation, Named) else relation.value].append((node, relation))
    readers: dict[str, list[tuple[OpNode, int]]] = defaultdict(list)
    makers: dict[str, OpNode] = {}
    if spoken:
        for node in view.nodes:
            makers |= dict.fromkeys(node.outputs, node)
            for k, name in enumerate(node.inputs):
                readers[name].append((node, k))
            for body in node.bodies.values():  # what a body hands out, its node passes on
                for name in body.outputs:
                    readers[name].append((node, len(node.inputs)))
    seen: set[str] = set()
    for first in tuple(spoken):
        if first in seen:
            continue
        found, pending = Numbered(), [first]
        seen.add(first)
        while pending:
            value = pending.pop()
            speakers = {node.outputs[0] for node, _ in spoken[value]}
            relations = [relation for _, relation in spoken[value]]
            found.axes += [Axis(said.whole, said.axis) for said in relations if isinstance(said, Numbers)]
            found.named += [said for said in relations if isinstance(said, Named)]
            found.values.append(value)
            maker = makers.get(value)
            found.chosen |= maker is not None and maker.outputs[0] in speakers
            found.reasons += _reasons(view, value, maker, readers[value], speakers)
            moved = [name for node, k in readers[value] if ops.carries(node, k) for name in node.outputs]
            if maker is not None:
                moved += [name for k, name in enumerate(maker.inputs) if ops.carries(maker, k)]
            fresh = [name for name in moved if name and name not in seen]
            seen.update(fresh)
            pending += fresh
        yield found


def _reasons(
    view: View, value: str, maker: OpNode | None, readers: Iterable[tuple[OpNode, int]], speakers: set[str]
) -> Iterator[str]:
    """Why the numbers in a value cannot change."""
    if maker is None:
        yield "by a graph input" if value in view.inputs else "by a table"
    elif maker.outputs[0] not in speakers and not any(ops.carries(maker, k) for k in range(len(maker.inputs))):
        yield f"by what {maker.op_type} computes"
    if value in view.outputs:
        yield "and a graph output shows the numbers"
    for node, k in readers:
        if node.outputs[0] not in speakers and not ops.carries(node, k):
            yield f"and {node.op_type} computes with the numbers"
