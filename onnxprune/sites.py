"""Where a pruned model can be repaired: linear operators with stored weights, and the sums that they feed.

An operator's output may pass a bias, a gain and additions before anything else reads it. What is fitted is the value
at the end of that chain, the *site*: all operators that end in one site are fitted together, so that a residual sum
comes out right whatever its shortcut lost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxprune.infer import attributes, bodies, walk
from onnxprune.layouts import Contraction, Convolution, Gates, Layout, TransposedConvolution, before, einsum, matmul
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
class _Given:
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


@dataclass(frozen=True)
class Visit:
    """Sites by number that are fitted at once, since they share weights; most often a single one.

    What those in `behind` read depends on the weights that are fitted, or on those of sites that come later.
    """

    sites: tuple[int, ...]
    behind: frozenset[int] = frozenset()


@dataclass
class _Chain:
    value: ir.Value
    steps: list[Step] = field(default_factory=list)
    rest: list[ir.Value] = field(default_factory=list)
    path: list[str] = field(default_factory=list)


_Found = tuple[int, Operator, _Chain]


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
    given = _Given(shapes, keep, stays, untied, joint, _readers(dense), alone)
    sites = []
    for index, node in enumerate(pruned.graph):
        sites += [(index, site) for site in (*_recurrent(node, given), *_scaled(node, given))]
        operator = _operator(node, given)
        if operator is None:
            continue
        if node.op_type in INSIDE:
            inner = _inside(node, operator, given) if not operator.tie else None
            sites += [(index, inner)] if inner is not None else []
            continue
        every.append((index, operator, _follow(node, operator.layout.axes, shapes, stays)))
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
        operators = _apart([operator for _, operator, _ in parts])
        site = Site(name, counterpart, axes, _positions(mask), operators, tuple(rest), _bounds(value))
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

    def gains(chain: _Chain) -> list[tuple[object, ...]]:
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
    ends = {id(chain): _Chain(model.graph.node(k).outputs[0]) for k, o, chain in every if o.tie in bare}
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


def _inside(node: ir.Node, operator: Operator, given: _Given) -> Site | None:
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


def _recurrent(node: ir.Node, given: _Given) -> Iterator[Site]:
    """What the activations of a recurrent operator get: W x + R h + bias, of all gates that read the same x and h.

    h is what the dense model has in the place of the units that are left, so that a fit of one step is the fit of all
    where it is exact.
    """
    name, count = str(node.outputs[0].name), GATES.get(node.op_type, 0)
    if node.domain not in ("", "ai.onnx") or not count or len(given.shapes.get(name, ())) != 4:
        return
    x = node.inputs[0]
    weights = [_weight(node, k, given.untied) for k in (1, 2)]
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
    direction = str(_text(attrs.get("direction", "forward")))
    backward = {"forward": (False,), "reverse": (True,)}.get(direction, (False, True))
    activations = [_text(each) for each in attrs.get("activations", ())]
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


def _scaled(node: ir.Node, given: _Given) -> Iterator[Site]:
    """The product of integers before it is rounded to those of the output, as the numbers that they stand for."""
    name, (last, scale) = str(node.outputs[0].name), SCALED.get(_kind(node), (-1, 0))
    known = {k for k, value in enumerate(node.inputs) if stored(value) is not None}
    if not scale or not {1, 2, 4, 5} <= known:
        return
    x, weight = node.inputs[0], node.inputs[3]
    if x is None or weight is None or x.const_value is not None or not given.shapes.keys() >= {name, str(x.name)}:
        return
    if weight.dtype not in CODES or len(weight.uses()) > 1 or str(weight.name) in given.stays:
        return
    layout = _layout(node, 3, given.size(str(x.name)), _shape(weight)) if len(_shape(weight)) > 1 else None
    mask = given.kept(name, layout.axes) if layout is not None else None
    if layout is None or mask is None or any(_size(node, k) != 1 for k in (1, 2)):
        return
    bias: Slot | None = None
    steps: tuple[Step, ...] = ()
    if len(node.inputs) > last >= 0 and node.inputs[last] is not None:
        step = _step("add", [(node.inputs[last], (name, last))], given.stays)
        if last not in known or _size(node, last) != _outputs(layout, weight):
            return
        bias, steps = (None, (step,)) if step.fixed else (step.slots[0], ())
    masks = [given.keep(Axis(str(x.name), axis)) for axis in range(len(given.shapes[str(x.name)]))]
    left = tuple((axis, np.flatnonzero(mask)) for axis, mask in enumerate(masks) if not mask.all())
    lost, source = any(not masks[axis].all() for axis in layout.summed), given.readers.get((name, 0), str(x.name))
    operator = Operator(name, layout, str(x.name), (name, 3), bias, steps, left, lost, source, coded=True, scaled=True)
    bounds = _range(*node.inputs[scale : scale + 2]) if len(node.inputs) > scale else (-np.inf, np.inf)
    order = Axis(name, layout.axes[-1])
    yield Site(f"{name} inside", "", layout.axes, _positions(mask), (operator,), (), bounds, order=order)


def scaled(node: ir.Node) -> tuple[int, int] | None:
    """(the axis of a weight of integers along which its scales lie, the input that is the bias) of such a product."""
    if _kind(node) not in SCALED:
        return None
    turned = node.op_type == "QLinearConv" or bool(attributes(node).get("transB", 0))
    return 0 if turned else -1, SCALED[_kind(node)][0]


def _size(node: ir.Node, k: int) -> int:
    value = node.inputs[k]
    return value.const_value.size if value is not None and value.const_value is not None else 0


def _text(given: object) -> str:
    return given.decode() if isinstance(given, bytes) else str(given)


def fitting(graph: ir.Graph, shapes: Mapping[str, Shape]) -> int:
    """MACs that fitting all operators of a model takes for each row: second moments, and products with the targets."""
    return sum(
        groups * columns * (columns + 4 * outputs) for node in graph for groups, columns, outputs in _fits(node, shapes)
    )


def _fits(node: ir.Node, shapes: Mapping[str, Shape]) -> Iterator[tuple[int, int, int]]:
    """(groups, columns, outputs) of the matrices that a node multiplies by."""
    weights = [_shape(value) if (value := codes(each) or stored(each)) is not None else () for each in node.inputs[:3]]
    if node.op_type in GATES and len(weights) > 2 and len(weights[1]) == len(weights[2]) == 3:
        yield weights[1][0], weights[1][2] + weights[2][2], weights[1][1]
    for k in _may_weigh(node) if len(weights) > 1 else ():
        x = node.inputs[1 - k]
        if x is not None and len(weights[k]) > 1 and str(x.name) in shapes:
            layout = _layout(node, k, shapes[str(x.name)], weights[k])
            if layout is not None:
                yield layout.sizes(weights[k])


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


def _may_weigh(node: ir.Node) -> tuple[int, ...]:
    """Numbers of the inputs that a node may multiply another input by, the usual one first."""
    return LINEAR.get(_kind(node), ())


def _kind(node: ir.Node) -> tuple[str, str]:
    return "" if node.domain == "ai.onnx" else node.domain, node.op_type


def _operator(node: ir.Node, given: _Given) -> Operator | None:
    """The node as an operator that may be fitted, or None."""
    found = [made for k in _may_weigh(node) if (made := _multiplied(node, k, given))]
    if not found:
        return None
    k, layout, weight, slot, own = found[0]
    output, x = str(node.outputs[0].name), str(node.inputs[1 - k].name)  # type: ignore[union-attr]
    bias: Slot | None = None
    steps: tuple[Step, ...] = ()
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        value, home, alone = _kept(node.inputs[2], (output, 2))
        if value is None or value.const_value is None:
            return None
        shape = tuple(value.const_value.shape.numpy())
        whole = value.const_value.size == _outputs(layout, weight) == (shape[-1] if shape else 1)
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


def _multiplied(node: ir.Node, k: int, given: _Given) -> tuple[int, Layout, ir.Value, Slot, bool] | None:
    """If a node multiplies another input by input k: k, layout, what is stored for it, where, and if for it alone."""
    x, read = (node.inputs[1 - k], node.inputs[k]) if len(node.inputs) > 1 else (None, None)
    if x is None or read is None or x.const_value is not None or str(x.name) not in given.shapes:
        return None
    weight, slot, order, own = _weight(node, k, given.untied)
    if (
        weight is None
        or not (own or given.joint)
        or str(weight.name) in given.stays
        or str(node.outputs[0].name) not in given.shapes
    ):
        return None
    shape = _shape(weight)
    order = order or tuple(range(len(shape)))
    layout = _layout(node, k, given.size(str(x.name)), tuple(shape[axis] for axis in order)) if len(shape) > 1 else None
    if isinstance(layout, Contraction):
        layout = replace(layout, weight="".join(layout.weight[order.index(axis)] for axis in range(len(shape))))
    elif order != tuple(range(len(shape))):
        return None
    return None if layout is None else (k, layout, weight, slot, own)


def _layout(node: ir.Node, k: int, x: Shape, weight: Shape) -> Layout | None:
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
        found = einsum(_text(attrs.get("equation", "")), k, x, weight)
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
        "auto_pad": _text(attrs.get("auto_pad", "NOTSET")),
    }
    if not transposed:
        return Convolution(**given)
    more = tuple(attrs.get("output_padding", (0,) * len(kernel)))
    return TransposedConvolution(**given, output_padding=more, output_shape=tuple(attrs.get("output_shape", ())))


def _weight(node: ir.Node, k: int, untied: Collection[str]) -> tuple[ir.Value | None, Slot, tuple[int, ...], bool]:
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
            chain.steps.append(_step("add", [(other, (slot, 1 - k))], stays))
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
            chain.steps.append(_step("mul", [(other, (slot, 1 - k))], stays))
        elif reader.op_type == "BatchNormalization" and k == 0 and axes == (1,) and len(reader.outputs) == 1:
            epsilon = float(attributes(reader).get("epsilon", 1e-5))  # type: ignore[arg-type]
            read = [(value, (slot, i)) for i, value in enumerate(reader.inputs[1:5], start=1)]
            if any(_kept(value, place)[0] is None for value, place in read):
                break
            chain.steps.append(_step("norm", read, stays, epsilon))
        else:
            break
        chain.value = out
        chain.path.append(slot)
    return chain


def _step(
    kind: str, read: Sequence[tuple[ir.Value | None, Slot]], stays: Collection[str], epsilon: float = 0.0
) -> Step:
    """A step with what is stored for it; the number that is added stays where it has others to serve as well."""
    found = [_kept(value, slot) for value, slot in read]
    value, _, alone = found[1 if kind == "norm" else 0]
    fixed = not alone or (value is not None and str(value.name) in stays)
    return Step(kind, tuple(slot for _, slot, _ in found), epsilon, fixed)


def _kept(value: ir.Value | None, slot: Slot) -> tuple[ir.Value | None, Slot, bool]:
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


def _per_channel(value: ir.Value, axes: tuple[int, ...], shape: Shape) -> bool:
    """Whether a stored value has one number for each channel."""
    source, _, _ = _kept(value, ("", 0))
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
    """What readers see of a value: everything, or what ReLU, Clip and quantisation let through."""
    if value.is_graph_output() or not value.uses():
        return -np.inf, np.inf
    found = {_passes(use.node) for use in value.uses()}
    return found.pop() if len(found) == 1 else (-np.inf, np.inf)


def _passes(node: ir.Node) -> tuple[float, float]:
    if node.op_type == "Relu":
        behind = _bounds(node.outputs[0])
        return max(behind[0], 0.0), max(behind[1], 0.0)
    if node.op_type == "QuantizeLinear":
        return _range(*node.inputs[1:3]) if "output_dtype" not in node.attributes else (-np.inf, np.inf)
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


def _range(scale: ir.Value | None, zero: ir.Value | None = None) -> tuple[float, float]:
    """What integers of one scale can tell apart."""
    known = [v.const_value.numpy() for v in (scale, zero) if v is not None and v.const_value is not None]
    if scale is None or len(known) < 1 + (zero is not None) or known[0].size != 1:
        return -np.inf, np.inf
    point = known[1].reshape(-1) if len(known) > 1 else np.zeros(1, np.uint8)
    if point.dtype.name not in ("int8", "uint8", "int16", "uint16"):
        return -np.inf, np.inf
    limits, size, middle = np.iinfo(point.dtype), float(known[0].reshape(-1)[0]), int(point[0])
    return (limits.min - middle) * size, (limits.max - middle) * size
