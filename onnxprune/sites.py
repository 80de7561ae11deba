"""Where a pruned model can be repaired: linear operators with stored weights, and the sums that they feed.

An operator's output may pass a bias, a gain and additions before anything else reads it. What is fitted is the value
at the end of that chain, the *site*: all operators that end in one site are fitted together, so that a residual sum
comes out right whatever its shortcut lost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxprune.chains import Chain, bounds_of, follow, range_of, step_of
from onnxprune.infer import attributes, bodies, walk
from onnxprune.layouts import Contraction, Convolution, Gates
from onnxprune.operators import (
    CODES,
    GATES,
    INSIDE,
    SCALED,
    Given,
    Operator,
    Slot,
    State,
    Step,
    apart,
    codes,
    kind_of,
    layout_of,
    may_weigh,
    operator_of,
    outputs_of,
    shape_of,
    size_at,
    stored,
    text_of,
    weight_of,
)
from onnxprune.types import Array, Axis, Mask, Positions, Shape


@dataclass(frozen=True)
class Site:
    """A value of the pruned model that should equal `kept` channels of `dense`, its counterpart.

    Channels lie along `axes`, in this order. `project` float64[dense channels, channels] takes the place of `kept`
    where channels are not mere positions. It is the sum of its operators, through their steps, and of the values in
    `rest`. Only what lies between `bounds` is seen by its readers.

    Inside an operator that does more than multiply, such a sum is no value of the graph: there is no `dense`, and what
    it is in the dense model follows from what the same operators read there. Then `order` is an axis of the dense model
    whose positions are the channels, or those of each run of them. Rows behind the ends of sequences do not count,
    where `lengths` names a value of the dense model.
    """

    value: str
    dense: str
    axes: tuple[int, ...]
    kept: Positions | None
    operators: tuple[Operator, ...]
    rest: tuple[str, ...]
    bounds: tuple[float, float] = (-np.inf, np.inf)
    project: Array | None = None
    order: Axis | None = None
    lengths: str = ""

    @property
    def axis(self) -> int:
        """The last axis of channels."""
        return self.axes[-1]

    @property
    def reads(self) -> list[str]:
        """Values of the dense model that its operators and their sum follow from."""
        sources = [operator.source for operator in self.operators]
        own = [name for one in sources for name in ([one] if isinstance(one, str) else one.reads)]
        return [*own, *self.rest, *([self.lengths] if self.lengths else [])]

    @property
    def needs(self) -> list[str]:
        """Values of the dense model that its target, and what is read as there in any case, follow from."""
        if not self.dense:
            return self.reads
        return [self.dense]


@dataclass(frozen=True)
class Visit:
    """Sites by number that are fitted at once, since they share weights; most often a single one.

    What those in `behind` read depends on the weights that are fitted, or on those of sites that come later.
    """

    sites: tuple[int, ...]
    behind: frozenset[int] = frozenset()


_Found = tuple[int, Operator, Chain]


def find_sites(
    pruned: ir.Model,
    dense: ir.Model,
    shapes: Mapping[str, Shape],
    keep: Callable[[Axis], Mask],
    stays: Collection[str] = (),
    untied: Collection[str] = (),
    joint: bool = False,
) -> list[Site]:
    """Sites in topological order; `shapes` and `keep` speak of the dense model, what `stays` names keeps its values.

    Weights that others read as well are fitted only where `untied` names them, or with `joint` where all of these are
    operators that can be fitted together.
    """
    every: list[_Found] = []
    alone = {str(value.name) for value in dense.graph.initializers.values() if len(value.uses()) == 1}
    given = Given(shapes, keep, stays, untied, joint, _readers(dense), alone)
    sites = []
    for index, node in enumerate(pruned.graph):
        sites += [(index, site) for site in (*_recurrent(node, given), *_scaled(node, given))]
        operator = operator_of(node, given)
        if operator is None:
            continue
        if node.op_type in INSIDE:
            inner = _inside(node, operator, given) if not operator.tie else None
            sites += [(index, inner)] if inner is not None else []
            continue
        every.append((index, operator, follow(node, operator.layout.axes, shapes, stays)))
    every = _joined(pruned, every)
    found: dict[str, list[_Found]] = defaultdict(list)
    for index, operator, chain in every:
        operator = replace(operator, steps=(*operator.steps, *chain.steps))
        found[str(chain.value.name)].append((index, operator, chain))
    places = {str(out.name): index for index, node in enumerate(pruned.graph) for out in node.outputs}
    for name, ending in found.items():
        value, axes = ending[0][2].value, ending[0][1].layout.axes
        parts = [part for part in ending if part[1].layout.axes == axes]
        counterpart = _counterpart(value, given.readers, shapes)
        mask = given.kept(counterpart, axes)
        if mask is None:
            continue
        paths = {p for _, _, chain in parts for p in chain.path}
        rest = dict.fromkeys(str(v.name) for _, _, chain in parts for v in chain.rest if v.name not in paths)
        operators = apart([operator for _, operator, _ in parts])
        site = Site(name, counterpart, axes, _positions(mask), operators, tuple(rest), bounds_of(value))
        sites.append((places[name], site))
    return _complete([site for _, site in sorted(sites, key=lambda pair: pair[0])], every)


def _complete(sites: list[Site], every: Sequence[_Found]) -> list[Site]:
    """Without sites of which some operator has its weight from one that is in no site."""
    while True:
        left = {operator.node for site in sites for operator in site.operators}
        open_ = {operator.tie for _, operator, _ in every if operator.tie and operator.node not in left}
        fewer = [site for site in sites if open_.isdisjoint(operator.tie for operator in site.operators)]
        if len(fewer) == len(sites):
            return sites
        sites = fewer


def _joined(model: ir.Model, every: Sequence[_Found]) -> list[_Found]:
    """Without operators whose weight others read in another way than they do.

    Where gains behind the readers of a weight differ, each is fitted before its gain: chains end there.
    """
    ties: dict[str, list[_Found]] = defaultdict(list)
    for part in every:
        ties[part[1].tie].append(part)
    names = _readers(model) if any(ties) else {}

    def gains(chain: Chain) -> list[tuple[object, ...]]:
        return [(s.kind, s.epsilon, *(names[slot] for slot in s.slots)) for s in chain.steps if s.kind != "add"]

    apart, bare = set(), set()
    for tie, parts in ties.items():
        first = parts[0]
        alike = all(_form(o) == _form(first[1]) for _, o, _ in parts)
        if tie and not (
            alike and _leaves(model.graph.initializers[tie]) == {(o.node, 1 - o.reads) for _, o, _ in parts}
        ):
            apart.add(tie)
        elif tie and any(gains(chain) != gains(first[2]) for _, _, chain in parts):
            bare.add(tie)
    ends = {id(chain): Chain(model.graph.node(k).outputs[0]) for k, o, chain in every if o.tie in bare}
    return [(k, o, ends.get(id(chain), chain)) for k, o, chain in every if o.tie not in apart]


def _form(operator: Operator) -> object:
    """What operators that share a weight must have in common: how the weight is a matrix, and what its codes mean."""
    layout = operator.layout
    if isinstance(layout, Contraction):
        roles = (layout.groups, layout.columns, layout.outputs)
        how: object = [[role.find(a) for role in roles] for a in layout.weight]
    elif isinstance(layout, Convolution):
        how = type(layout), layout.kernel, layout.groups
    else:
        how = layout
    return how, operator.weight if operator.coded else None


def _leaves(value: ir.Value) -> set[Slot] | None:
    """What reads an initializer, through Transpose, Cast and DequantizeLinear; None if it is an output."""
    found: set[Slot] = set()
    for use in value.uses():
        if use.node.op_type not in ("Transpose", "Cast", "DequantizeLinear") or use.idx:
            found.add((str(use.node.outputs[0].name), use.idx))
        elif (behind := _leaves(use.node.outputs[0])) is None:
            return None
        else:
            found |= behind
    return None if value.is_graph_output() else found


def visits(graph: ir.Graph, sites: Sequence[Site]) -> list[Visit]:
    """The order in which sites are fitted: what others read comes before them, as far as shared weights let it."""
    unit = list(range(len(sites)))
    first: dict[str, int] = {}
    for k, site in enumerate(sites):
        for operator in site.operators:
            if operator.tie and (other := unit[first.setdefault(operator.tie, k)]) != unit[k]:
                low, high = sorted((other, unit[k]))
                unit = [low if u == high else u for u in unit]
    if not first:
        return [Visit((k,)) for k in range(len(sites))]
    needs = _needs(graph, sites)
    waiting: dict[int, list[int]] = defaultdict(list)
    for k, u in enumerate(unit):
        waiting[u].append(k)
    found, done = [], 0
    while waiting:
        own = {u: sum(1 << k for k in members) for u, members in waiting.items()}
        open_ = {u: [k for k in members if needs[k] & ~done & ~own[u]] for u, members in waiting.items()}
        chosen = next((u for u, late in open_.items() if not late), next(iter(waiting)))
        behind = frozenset(k for k in waiting[chosen] if needs[k] & ~done)
        found.append(Visit(tuple(waiting.pop(chosen)), behind))
        done |= own[chosen]
    return found


def _needs(graph: ir.Graph, sites: Sequence[Site]) -> list[int]:
    """For each site the sites, as bits, that what it reads depends on."""
    bits: dict[str, int] = defaultdict(int)
    for k, site in enumerate(sites):
        for operator in site.operators:
            bits[operator.node] |= 1 << k
    reach: dict[str, int] = {}
    for node in graph:
        inner = [one for body in bodies(node).values() for one in walk(body)]
        ends = [value for body in bodies(node).values() for value in body.outputs]
        read = [*node.inputs, *ends, *(value for one in inner for value in one.inputs)]
        mask = bits.get(str(node.outputs[0].name), 0)
        for value in read:
            mask |= reach.get(str(value.name), 0) if value is not None else 0
        reach |= {str(out.name): mask for out in node.outputs}
    return [
        reduce(int.__or__, (reach.get(name, 0) for name in (*(o.x for o in site.operators), *site.rest)), 0)
        for site in sites
    ]


def _positions(mask: Mask) -> Positions | None:
    return None if mask.all() else np.flatnonzero(mask)


def _inside(node: ir.Node, operator: Operator, given: Given) -> Site | None:
    """The product in an operator that does more: before an activation, or before attention."""
    output = operator.node
    if node.op_type == "Attention":
        order = Axis(given.readers.get((output, 1), ""), 1)
        if order.value not in given.alone or order.value not in given.shapes:
            return None
        mask: Mask | None = given.keep(order)
    else:
        order = Axis(output, 1)
        mask = given.kept(output, (1,))
    if mask is None:
        return None
    rest = [str(value.name) for value in node.inputs[3:] if value is not None] if node.op_type == "FusedConv" else []
    if any(given.readers.get((output, 3)) != name for name in rest):  # what was added there before is gone
        return None
    activation = attributes(node).get("activation", "")
    bounds = (0.0, np.inf) if activation in ("Relu", b"Relu") else (-np.inf, np.inf)
    axes = operator.layout.axes
    return Site(f"{output} inside", "", axes, _positions(mask), (operator,), tuple(rest), bounds, order=order)


def _recurrent(node: ir.Node, given: Given) -> Iterator[Site]:
    """What the activations of a recurrent operator get: W x + R h + bias, of all gates that read the same x and h.

    h is what the dense model has in the place of the units that are left, so that a fit of one step is the fit of all
    where it is exact.
    """
    name, count = str(node.outputs[0].name), GATES.get(node.op_type, 0)
    if node.domain not in ("", "ai.onnx") or not count or len(given.shapes.get(name, ())) != 4:
        return
    x = node.inputs[0]
    weights = [weight_of(node, k, given.untied) for k in (1, 2)]
    biased = len(node.inputs) > 3 and node.inputs[3] is not None
    kept = [stored(node.inputs[3])] if biased else []
    attrs: Mapping[str, Any] = attributes(node)
    if x is None or x.const_value is not None or attrs.get("layout", 0):
        return  # ONNX Runtime has no operator with the batch first
    if any(order or not own for _, _, order, own in weights):
        return
    if any(value is None or str(value.name) in given.stays for value in (*(row[0] for row in weights), *kept)):
        return
    mask, columns = given.keep(Axis(name, 3)), given.keep(Axis(str(x.name), 2))
    direction = str(text_of(attrs.get("direction", "forward")))
    backward = {"forward": (False,), "reverse": (True,)}.get(direction, (False, True))
    activations = [text_of(each) for each in attrs.get("activations", ())]
    source = given.readers.get((name, 0), str(x.name))
    initial, lengths = (given.readers.get((name, k), "") for k in (5, 4))
    bias = (name, 3) if biased else None
    state = State(name, initial, lengths, backward)
    left = [(((axis, np.flatnonzero(m)),) if not m.all() else (), not m.all()) for axis, m in ((2, columns), (3, mask))]

    def operators(gates: tuple[int, ...], of: State) -> tuple[Operator, Operator]:
        reads, hands = (Gates(count, gates, of_state) for of_state in (False, True))
        return (
            Operator(name, reads, str(x.name), weights[0][1], bias, (), *left[0], source=source),
            Operator(name, hands, "", weights[1][1], bias, (), *left[1], source=of),
        )

    def site(gates: tuple[int, ...], parts: tuple[Operator, ...], what: str) -> Site:
        one = np.tile(mask, len(gates))
        bounds = (0.0, np.inf) if node.op_type == "RNN" and set(activations) == {"Relu"} else (-np.inf, np.inf)
        whole = _positions(np.tile(one, len(backward)))
        return Site(f"{name} {what}", "", (2, 3), whole, parts, (), bounds, order=Axis(name, 3), lengths=lengths)

    if node.op_type != "GRU":
        yield site(tuple(range(count)), operators(tuple(range(count)), state), "gates")
        return
    yield site((0, 1), operators((0, 1), state), "gates")
    if attrs.get("linear_before_reset", 0):
        reads, hands = operators((2,), state)
        yield site((2,), (reads,), "candidate of the input")
        yield site((2,), (hands,), "candidate of the state")
    elif set(activations[::2]) <= {"Sigmoid"}:
        reset = tuple(replace(one, left=()) for one in operators((1,), state))
        yield site((2,), operators((2,), replace(state, x=source, reset=reset)), "candidate")


def _scaled(node: ir.Node, given: Given) -> Iterator[Site]:
    """The product of integers before it is rounded to those of the output, as the numbers that they stand for."""
    name, (last, scale) = str(node.outputs[0].name), SCALED.get(kind_of(node), (-1, 0))
    known = {k for k, value in enumerate(node.inputs) if stored(value) is not None}
    if not scale or not {1, 2, 4, 5} <= known:
        return
    x, weight = node.inputs[0], node.inputs[3]
    if x is None or weight is None or x.const_value is not None or not given.shapes.keys() >= {name, str(x.name)}:
        return
    if weight.dtype not in CODES or len(weight.uses()) > 1 or str(weight.name) in given.stays:
        return
    layout = layout_of(node, 3, given.size(str(x.name)), shape_of(weight)) if len(shape_of(weight)) > 1 else None
    mask = given.kept(name, layout.axes) if layout is not None else None
    if layout is None or mask is None or any(size_at(node, k) != 1 for k in (1, 2)):
        return
    bias: Slot | None = None
    steps: tuple[Step, ...] = ()
    if len(node.inputs) > last >= 0 and node.inputs[last] is not None:
        step = step_of("add", [(node.inputs[last], (name, last))], given.stays)
        if last not in known or size_at(node, last) != outputs_of(layout, weight):
            return
        bias, steps = (None, (step,)) if step.fixed else (step.slots[0], ())
    masks = [given.keep(Axis(str(x.name), axis)) for axis in range(len(given.shapes[str(x.name)]))]
    left = tuple((axis, np.flatnonzero(mask)) for axis, mask in enumerate(masks) if not mask.all())
    lost, source = any(not masks[axis].all() for axis in layout.summed), given.readers.get((name, 0), str(x.name))
    operator = Operator(name, layout, str(x.name), (name, 3), bias, steps, left, lost, source, coded=True, scaled=True)
    bounds = range_of(*node.inputs[scale : scale + 2]) if len(node.inputs) > scale else (-np.inf, np.inf)
    order = Axis(name, layout.axes[-1])
    yield Site(f"{name} inside", "", layout.axes, _positions(mask), (operator,), (), bounds, order=order)


def scaled(node: ir.Node) -> tuple[int, int] | None:
    """(the axis of a weight of integers along which its scales lie, the input that is the bias) of such a product."""
    if kind_of(node) not in SCALED:
        return None
    turned = node.op_type == "QLinearConv" or bool(attributes(node).get("transB", 0))
    return 0 if turned else -1, SCALED[kind_of(node)][0]


def fitting(graph: ir.Graph, shapes: Mapping[str, Shape]) -> int:
    """MACs that fitting all operators of a model takes for each row: second moments, and products with the targets."""
    return sum(
        groups * columns * (columns + 4 * outputs) for node in graph for groups, columns, outputs in _fits(node, shapes)
    )


def _fits(node: ir.Node, shapes: Mapping[str, Shape]) -> Iterator[tuple[int, int, int]]:
    """(groups, columns, outputs) of the matrices that a node multiplies by."""
    weights = [
        shape_of(value) if (value := codes(each) or stored(each)) is not None else () for each in node.inputs[:3]
    ]
    if node.op_type in GATES and len(weights) > 2 and len(weights[1]) == len(weights[2]) == 3:
        yield weights[1][0], weights[1][2] + weights[2][2], weights[1][1]
    for k in may_weigh(node) if len(weights) > 1 else ():
        x = node.inputs[1 - k]
        if x is not None and len(weights[k]) > 1 and str(x.name) in shapes:
            layout = layout_of(node, k, shapes[str(x.name)], weights[k])
            if layout is not None:
                yield layout.sizes(weights[k])


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
