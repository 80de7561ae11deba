"""Residual branches: what is added to a stream, serves nothing else, and can go as a whole.

A branch is one operand of a sum together with its cone: the nodes from which every path to a graph output runs through
that operand. Cones are subtrees of one post-dominator tree. The operand that stays and one that the branch starts from
must be one value, but for operators with one input; of two such operands the deeper one is the branch, so that a
projection beside it is the shortcut.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from types import MappingProxyType

import numpy as np

from onnxprune import ops
from onnxprune.types import Axis, Branch, Frozen, Group, Mask, Member, OpNode, Positions, Shape, Side, Stored, View

Edge = tuple[int, int]  # (node, input)
PLAIN = frozenset({("", "Add"), ("", "Sum")})
STACK = ("", "Concat")
SKIP_NORMS = {"SkipLayerNormalization": 4, "SkipSimplifiedLayerNormalization": 3}  # and where their bias is
CUTTING = frozenset({"weight", "bias", "norm"})
NOT_CACHES = 3  # a cache has at least this rank: fewer axes hold states that cannot grow


@dataclass(frozen=True)
class Branches:
    """All branches of a model that may go, those that stay although they could go, and why.

    `view` has the nodes of the main graph alone, each with what is read inside it. The last ones found are experts;
    `tied` are the labels that these go with.
    """

    view: View
    found: tuple[Branch, ...]
    tied: Positions
    refused: tuple[Frozen, ...]
    types: Mapping[str, int]
    caches: tuple[tuple[str, str], ...]

    @property
    def free(self) -> int:
        """How many branches have labels of their own, after those of coupling."""
        return len(self.found) - len(self.tied)

    def gone(self, alive: Mask) -> Mask:
        """bool[branches]: which go, given all labels that are alive."""
        return np.concatenate([~alive[len(alive) - self.free :], ~alive[self.tied]])


@dataclass(frozen=True)
class Dropped:
    """What goes with a set of branches: everything that reaches a graph output through them only.

    `zeroed` are the operands (first output of the sum, input, ONNX element type) that count as zero, `dead` what is
    stored for readers that go, `initializers` those that nothing reads any more, each with its role and group, `inputs`
    and `outputs` the part of the interface that goes, `bypass` the sums that another operand passes through.
    """

    zeroed: tuple[tuple[str, int, int], ...] = ()
    dead: frozenset[str] = frozenset()
    initializers: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    bypass: tuple[str, ...] = ()


def operands(node: OpNode) -> tuple[int, ...]:
    """The inputs that a node adds up, or stacks; none if it is nothing that branches can end in."""
    if (node.domain, node.op_type) in {*PLAIN, STACK}:
        return tuple(range(len(node.inputs)))
    if node.domain == "com.microsoft" and node.op_type in SKIP_NORMS:
        return (0, 1)
    return (0, 3) if (node.domain, node.op_type) == ("com.microsoft", "QLinearAdd") else ()


NOTHING = Dropped()

# Finding ---------------------------------------------------------------------------------------------------------


def _main(view: View) -> View:
    """The nodes of the main graph alone; one with bodies reads what is read inside them. Branches end out here."""
    nodes: list[OpNode] = []
    read: dict[str, None] = {}
    made: set[str] = set()
    for node in view.nodes:  # those of bodies come before the node that holds them
        made.update(name for body in node.bodies.values() for name in body.inputs)
        if node.within:
            read |= dict.fromkeys(node.inputs)
            made.update(node.outputs)
        else:
            extra = tuple(name for name in read if name and name not in made)
            nodes.append(replace(node, inputs=(*node.inputs, *extra)) if extra else node)
            read, made = {}, set()
    return replace(view, nodes=tuple(nodes))


class _Tree:
    """Post-dominators of the nodes: the parent of a node is the next one that all its paths to an output run through.

    One walk backwards; ancestors in common by skewed jump pointers, O(log n) each. Source: Myers 1983.
    """

    def __init__(self, flow: _Flow, exits: Collection[str]) -> None:
        count = len(flow.view.nodes)
        self.parent = [-1] * (count + 1)
        self.parent[count] = count
        self.depth = [0] * (count + 1)
        self.jump = [count] * (count + 1)
        for i in range(count - 1, -1, -1):
            outputs = [name for name in flow.view.nodes[i].outputs if name]
            meet = count if any(name in exits for name in outputs) else -1
            for name in outputs:
                for reader, _ in flow.readers[name]:
                    if self.parent[reader] >= 0:  # else it reaches no output
                        meet = reader if meet < 0 else self.common(meet, reader)
            if meet >= 0:
                over = self.jump[meet]
                even = self.depth[meet] - self.depth[over] == self.depth[over] - self.depth[self.jump[over]]
                self.parent[i], self.depth[i] = meet, self.depth[meet] + 1
                self.jump[i] = self.jump[over] if even else meet
        size = [1] * (count + 1)
        for i in range(count):
            if self.parent[i] >= 0:
                size[self.parent[i]] += size[i]
        self.size, self.start, after = size, [-1] * (count + 1), [1] * (count + 1)
        self.start[count] = 0
        for i in range(count - 1, -1, -1):
            parent = self.parent[i]
            if parent >= 0:
                self.start[i] = after[parent]
                after[parent] += size[i]
                after[i] = self.start[i] + 1
        self.order = np.full(count + 1, count)
        placed = np.array(self.start)
        self.order[placed[placed >= 0]] = np.flatnonzero(placed >= 0)

    def common(self, a: int, b: int) -> int:
        """The first node that all paths of both run through."""
        jump, depth, parent = self.jump, self.depth, self.parent
        if depth[a] < depth[b]:
            a, b = b, a
        while depth[a] > depth[b]:
            a = jump[a] if depth[jump[a]] >= depth[b] else parent[a]
        while a != b:
            a, b = (jump[a], jump[b]) if jump[a] != jump[b] else (parent[a], parent[b])
        return a

    def cone(self, node: int) -> Positions:
        """int64[n]: the nodes that reach outputs only through this one, and itself."""
        return np.sort(self.order[self.start[node] : self.start[node] + self.size[node]])


class _Flow:
    """Who makes and reads each value, and what each value follows from."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.maker = {name: i for i, node in enumerate(view.nodes) for name in node.outputs if name}
        self.readers: dict[str, list[Edge]] = defaultdict(list)
        self.depth = dict.fromkeys(view.inputs, 0)  # of values that follow from a graph input, in nodes
        for i, node in enumerate(view.nodes):
            for k, name in enumerate(node.inputs):
                if name:
                    self.readers[name].append((i, k))
            known = [self.depth[name] for name in node.inputs if name in self.depth]
            if known:
                self.depth.update(dict.fromkeys((name for name in node.outputs if name), max(known) + 1))
        self.spring = {name: name for name in view.inputs}  # up the operators with one input that lead to a value
        for i, node in enumerate(view.nodes):
            sources = set(self.data(i))
            made = [name for name in node.outputs if name in self.depth]
            first = self.spring[sources.pop()] if len(sources) == 1 else None
            if first is None and node.op_type in SKIP_NORMS:
                first = made[-1]  # the norm follows from the sum, where that is an output
            self.spring.update((name, first or name) for name in made)

    def alone(self, value: str, exits: Collection[str]) -> int | None:
        """The node that makes a value, if it makes nothing else and only one input reads this."""
        maker = self.maker.get(value)
        if maker is None or value in exits or len(self.readers[value]) != 1:
            return None
        others = [name for name in self.view.nodes[maker].outputs if name and name != value]
        return None if any(self.readers[name] for name in others) else maker

    def data(self, i: int) -> list[str]:
        """The values with data that a node reads: no initializers, and nothing that is asked for its size only."""
        node = self.view.nodes[i]
        if node.op_type in ("Shape", "Size") and not node.domain:
            return []
        return [
            name
            for k, name in enumerate(node.inputs)
            if name in self.depth and not ops.is_slot(node.domain, node.op_type, k)
        ]


@dataclass(frozen=True)
class _Candidate:
    """An operand of a sum (`root`: of the sum that it is nested in) with its cone."""

    root: int
    edge: Edge
    value: str
    cone: Positions
    through: str


class Sides:
    """The operands of sums and stacks that hold weights, and that what leads to them serves alone.

    Whatever else such an operand starts from, it can go if a position of some axis goes that it alone picks.
    """

    def __init__(self, view: View, probes: Sequence[Mapping[str, Shape]], types: Mapping[str, int]) -> None:
        self.flow = flow = _Flow(_main(view))
        self.tree = tree = _Tree(flow, set(view.outputs))
        nodes, outside = flow.view.nodes, set(view.outputs)
        stacks = [
            (i, [((i, k), name) for k, name in enumerate(node.inputs)])
            for i, node in enumerate(nodes)
            if (node.domain, node.op_type) == STACK and tree.parent[i] >= 0
        ]
        heavy = np.zeros(len(tree.order) + 1, np.int64)  # nodes with weights, counted in the order of the tree
        heavy[1:] = np.cumsum([i < len(nodes) and _heavy(nodes[i], view) for i in tree.order])
        ends: dict[int, Side] = {}
        for root, leaves in [*_sums(flow, tree, probes, types), *stacks]:
            for edge, value in leaves:
                maker = flow.alone(value, outside)
                if maker is None or tree.parent[maker] < 0:
                    continue
                start = tree.start[maker]
                if heavy[start + tree.size[maker]] > heavy[start]:
                    ends[maker] = Side(root, *edge, value)
        self.nearest = [-1] * (len(nodes) + 1)  # the innermost of them that a node serves alone, by its maker
        for i in range(len(nodes) - 1, -1, -1):
            self.nearest[i] = i if i in ends else self.nearest[tree.parent[i]]
        for name in view.inputs:  # who reads an input alone stays, or the input would go with it
            end = self._end(name)
            while end >= 0:
                ends.pop(end, None)
                end = self.nearest[tree.parent[end]]
        self.ends = ends

    def _end(self, value: str) -> int:
        readers = [i for i, _ in self.flow.readers[value] if self.tree.parent[i] >= 0]
        return self.nearest[reduce(self.tree.common, readers)] if readers else -1

    def around(self, value: str) -> list[Side]:
        """The operands that a value is or serves alone, the innermost first."""
        maker = self.flow.maker.get(value, -1)
        end = maker if maker in self.ends and self.ends[maker].value == value else self._end(value)
        found = []
        while end >= 0:
            if end in self.ends:
                found.append(self.ends[end])
            end = self.nearest[self.tree.parent[end]]
        return found


def _heavy(node: OpNode, view: View) -> bool:
    return any(
        name in view.stored and view.stored[name].role == "weight" and len(view.stored[name].shape) > 1
        for name in node.inputs
    )


def find_branches(
    view: View,
    probes: Sequence[Mapping[str, Shape]],
    types: Mapping[str, int],
    interface: bool = False,
    tied: Mapping[Side, int] = MappingProxyType({}),
) -> Branches:
    """Branches in the order of their sums. `probes` are the shapes at both sets of dynamic sizes.

    Those with graph inputs or outputs inside, as a KV cache is, may go only with consent to change the `interface`.
    Experts are `tied` to a label.
    """
    view = _main(view)
    flow = _Flow(view)
    caches = find_caches(view, probes[0], types)
    roles = {name: stored.role for name, stored in view.stored.items()}
    found: list[tuple[_Candidate, tuple[str, ...], tuple[str, ...]]] = []
    refused = []
    exits = set(view.outputs)
    hidden = {out for _, out in caches}
    experts = {(side.sum, side.operand) for side in tied}
    for candidate in _ends(flow, exits, hidden, probes, types, experts):
        inside = set(candidate.cone.tolist())
        nodes = [view.nodes[i] for i in candidate.cone]
        if not any(roles.get(name) == "weight" for node in nodes for name in node.inputs):
            continue  # no layer: half of a rotary embedding, say
        taken = {name for node in nodes for name in node.inputs if name in view.inputs}
        inputs = tuple(name for name in view.inputs if name in taken and _only(flow.readers[name], inside))
        made = _made(flow, candidate)
        outputs = tuple(name for name in view.outputs if name in made)
        if reason := _reason(inputs, outputs, caches, interface):
            refused.append(_stays(view, candidate, nodes, reason))
        else:
            found.append((candidate, inputs, outputs))
    streams = _streams(flow, [candidate for candidate, _, _ in found])
    branches = [
        Branch(*candidate.edge, candidate.value, candidate.cone, stream, inputs, outputs)
        for (candidate, inputs, outputs), stream in zip(found, streams, strict=True)
    ]
    tree = _Tree(flow, exits)
    for side in tied:
        cone = tree.cone(flow.maker[side.value])
        branches.append(Branch(side.sum, side.operand, side.value, cone, -1, (), ()))
    labels = np.array([*tied.values()], np.int64)
    return Branches(view, tuple(branches), labels, tuple(refused), types, caches)


def _ends(
    flow: _Flow,
    exits: set[str],
    hidden: set[str],
    probes: Sequence[Mapping[str, Shape]],
    types: Mapping[str, int],
    experts: Collection[Edge],
) -> list[_Candidate]:
    """Candidates by their sums; those that make `hidden` outputs are seen where these do not count as exits."""
    found = {candidate.edge: candidate for candidate in _candidates(flow, _Tree(flow, exits), probes, types, experts)}
    if hidden and exits - hidden:
        for candidate in _candidates(flow, _Tree(flow, exits - hidden), probes, types, experts):
            if not hidden.isdisjoint(_made(flow, candidate)):
                found[candidate.edge] = candidate
    return sorted(found.values(), key=lambda candidate: (candidate.root, candidate.edge))


def _made(flow: _Flow, candidate: _Candidate) -> set[str]:
    return {name for i in candidate.cone.tolist() for name in flow.view.nodes[i].outputs}


def _only(readers: Iterable[Edge], inside: Collection[int]) -> bool:
    return all(i in inside for i, _ in readers)


def find_caches(view: View, shapes: Mapping[str, Shape], types: Mapping[str, int]) -> tuple[tuple[str, str], ...]:
    """(input, output) pairs of one type and shape, but for the length of one axis."""
    free: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name in view.inputs:
        shape = shapes.get(name, ())
        for axis in range(len(shape) if len(shape) >= NOT_CACHES else 0):
            free[types.get(name), axis, *shape[:axis], *shape[axis + 1 :]].append(name)
    pairs, taken = [], set()
    for name in view.outputs:
        shape = shapes.get(name, ())
        keys = [(types.get(name), axis, *shape[:axis], *shape[axis + 1 :]) for axis in range(len(shape))]
        source = next((i for key in keys for i in free.get(key, ()) if i not in taken), None)
        if source is not None:
            taken.add(source)
            pairs.append((source, name))
    return tuple(pairs)


def _reason(
    inputs: Sequence[str], outputs: Sequence[str], caches: Sequence[tuple[str, str]], interface: bool
) -> str | None:
    """Why a branch with these graph inputs and outputs of its own stays, or None."""
    if not inputs and not outputs:
        return None
    kinds = {out: inp for inp, out in caches}
    if len(outputs) > len(inputs) or not all(out in kinds for out in outputs):
        return f"the branch makes graph output '{outputs[0]}'"
    if interface:
        return None
    made = f" and makes output '{outputs[0]}'" if outputs else ""
    return f"the branch alone reads graph input '{inputs[0]}'{made} (--allow-interface-change)"


def _stays(view: View, candidate: _Candidate, nodes: Sequence[OpNode], reason: str) -> Frozen:
    stored = {view.stored[name] for node in nodes for name in node.inputs if name in view.stored}
    size = sum(int(np.prod(item.shape, dtype=np.int64)) for item in stored if item.role in CUTTING)
    return Frozen(Axis(candidate.value, 0), reason, size)


def _candidates(
    flow: _Flow,
    tree: _Tree,
    probes: Sequence[Mapping[str, Shape]],
    types: Mapping[str, int],
    experts: Collection[Edge],
) -> Iterator[_Candidate]:
    """Operands that serve only their sum and start from what stays."""
    for root, leaves in _sums(flow, tree, probes, types, experts):
        yield from (found for found in _of_sum(flow, tree, root, leaves, types) if found.edge not in experts)


def _sums(
    flow: _Flow,
    tree: _Tree,
    probes: Sequence[Mapping[str, Shape]],
    types: Mapping[str, int],
    experts: Collection[Edge] = frozenset(),
) -> Iterator[tuple[int, list[tuple[Edge, str]]]]:
    """Sums that no other sum takes in, and what they add up in the end; a sum of experts is one operand of another."""
    view, outside = flow.view, set(flow.view.outputs)
    nested: dict[int, list[tuple[Edge, str]]] = {}  # sums whose operands are those of the sum that reads them
    for i, node in enumerate(view.nodes):
        summed = operands(node)
        if not summed or tree.parent[i] < 0:
            continue
        if node.op_type in SKIP_NORMS and any(flow.readers[n] or n in outside for n in node.outputs[1:3] if n):
            continue
        total = node.outputs[0]

        def alike(value: str, total: str = total) -> bool:
            same = all(value in p and total in p and p[value] == p[total] for p in probes)
            return value in flow.depth and same and types.get(value) == types.get(total)

        plain = (node.domain, node.op_type) in PLAIN
        here = {(i, k) for k in summed}
        leaves: list[tuple[Edge, str]] = []
        for k in summed:
            value = node.inputs[k]
            if plain and value in flow.maker and flow.maker[value] in nested:
                inner = nested.pop(flow.maker[value])
                apart = here.isdisjoint(experts) and any(edge in experts for edge, _ in inner)
                leaves += [((i, k), value)] if apart else inner
            elif alike(value):
                leaves.append(((i, k), value))
        whole = plain and all(alike(node.inputs[k]) for k in summed)
        readers = flow.readers[total]
        if whole and len(readers) == 1 and total not in outside:
            reader = view.nodes[readers[0][0]]
            others = [reader.inputs[k] for k in operands(reader)]
            if (reader.domain, reader.op_type) in PLAIN and all(alike(value) for value in others):
                nested[i] = leaves
                continue
        yield i, leaves


def _of_sum(
    flow: _Flow, tree: _Tree, root: int, leaves: list[tuple[Edge, str]], types: Mapping[str, int]
) -> Iterator[_Candidate]:
    """The branches among the operands of one sum, in the order of the operands; the shallowest operand never is one."""
    kept = set(flow.view.outputs)
    leaves = sorted(leaves, key=lambda leaf: flow.depth[leaf[1]])
    depths = [flow.depth[value] for _, value in leaves]
    found = []
    for edge, value in leaves:
        maker = flow.alone(value, kept)
        if maker is None or tree.parent[maker] < 0:
            continue
        cone = tree.cone(maker)
        inside = set(cone.tolist())
        starts = {name for i in inside for name in flow.data(i) if flow.maker.get(name, -1) not in inside}
        shapes = flow.view.shapes
        rank = len(shapes.get(value, ()))
        starts = {n for n in starts if types.get(n) == types.get(value) and len(shapes.get(n, ())) == rank}
        for _, other in leaves[: bisect_left(depths, flow.depth[value])]:
            if _leads(flow, other, starts):
                found.append(_Candidate(root, edge, value, cone, other))
                break
    yield from sorted(found, key=lambda candidate: candidate.edge)


def _leads(flow: _Flow, other: str, starts: Collection[str]) -> bool:
    """Whether what stays is or follows from one of `starts`, or one of these was only normalised on its way here."""
    shapes, least = flow.view.shapes, min((flow.depth[name] for name in starts), default=0)
    if any(flow.spring[name] == flow.spring[other] and shapes[name] == shapes[other] for name in starts):
        return True
    value = other
    while value not in starts:
        sources = set(flow.data(flow.maker[value])) if value in flow.maker else set()
        if len(sources) != 1 or flow.depth[value] <= least:
            return False
        value = sources.pop()
    return True


def _streams(flow: _Flow, found: Sequence[_Candidate]) -> list[int]:
    """A number for the stream of each branch: sums that follow one another inside the same branch share one."""
    owner = np.full(len(flow.view.nodes), -1)
    for k in sorted(range(len(found)), key=lambda k: -len(found[k].cone)):
        owner[found[k].cone] = k
    ends: dict[int, list[int]] = defaultdict(list)
    for k, candidate in enumerate(found):
        ends[candidate.root].append(k)
    numbers: dict[tuple[int, int], int] = {}
    streams = [0] * len(found)
    label: dict[str, tuple[int, int]] = {}
    for i, node in enumerate(flow.view.nodes):
        if i in ends:
            inside = int(owner[i])
            here = label.get(found[ends[i][0]].through, (-2, 0))
            here = here if here[0] == inside else (inside, i)
            for k in ends[i]:
                streams[k] = numbers.setdefault(here, len(numbers))
        else:
            known = next((label[name] for name in node.inputs if name in label), None)
            if known is None:
                continue
            here = known
        label.update(dict.fromkeys((name for name in node.outputs if name), here))
    return streams


# As groups ---------------------------------------------------------------------------------------------------------


def with_branches(coupled: Sequence[Group], branches: Branches, first_unit: int) -> tuple[Group, ...]:
    """The groups of coupling, with experts where they go with a unit, and those of the other branches after them.

    Of these there is one for each stream; unit `first_unit + k` is branch k. Members are whole initializers, along
    axis 0.
    """
    groups = [_with_experts(group, branches) for group in coupled]
    by_stream: dict[int, list[int]] = defaultdict(list)
    for k, branch in enumerate(branches.found[: branches.free]):
        by_stream[branch.stream].append(k)
    for listed in by_stream.values():
        members: list[Member] = []
        nodes: set[str] = set()
        for unit, k in enumerate(listed):
            members += _members(branches, k, unit)
            nodes |= _names(branches, k)
        units = np.array(listed, np.int64) + first_unit
        groups.append(Group(len(groups), "layers", units, tuple(members), (), (), tuple(sorted(nodes))))
    return tuple(groups)


def _with_experts(group: Group, branches: Branches) -> Group:
    """A group with what only its experts read, as a whole."""
    place = {label: unit for unit, label in enumerate(group.units.tolist())}
    listed = [(k, place[label]) for k, label in enumerate(branches.tied.tolist(), branches.free) if label in place]
    if not listed:
        return group
    read = Counter(name for node in branches.view.nodes for name in node.inputs if name in branches.view.stored)
    members = []
    for k, unit in listed:
        inside = Counter(name for i in branches.found[k].nodes for name in branches.view.nodes[i].inputs)
        members += [m for m in _members(branches, k, unit) if m.role != "index" and inside[m.value] == read[m.value]]
    nodes = set(group.nodes).union(*(_names(branches, k) for k, _ in listed))
    return replace(group, kind="experts", members=(*group.members, *members), nodes=tuple(sorted(nodes)))


def _members(branches: Branches, k: int, unit: int) -> list[Member]:
    view = branches.view
    read = dict.fromkeys(name for i in branches.found[k].nodes for name in view.nodes[i].inputs if name in view.stored)
    return [_member(view.stored[name], name, unit) for name in read if view.stored[name].shape]


def _names(branches: Branches, k: int) -> set[str]:
    nodes = (branches.view.nodes[i] for i in branches.found[k].nodes)
    return {node.name or node.outputs[0] for node in nodes}


def _member(stored: Stored, name: str, unit: int) -> Member:
    count = stored.shape[0]
    positions, units = np.arange(count), np.full(count, unit)
    place = (stored.initializer, stored.uses, stored.shared, 0)
    return Member(name, *place, positions, units, stored.role, stored.slot)


# What goes -----------------------------------------------------------------------------------------------------------


def cut_edges(branches: Branches, goes: Mask) -> set[Edge]:
    """The inputs that go with these branches; a sum of which nothing is left goes from the sum that reads it."""
    nodes = branches.view.nodes
    edges: set[Edge] = set()
    pending = [(branches.found[k].sum, branches.found[k].operand) for k in np.flatnonzero(goes)]
    while pending:
        i, k = pending.pop()
        edges.update((i, other) for other in _with(nodes[i], k))
        if all((i, other) in edges for other in operands(nodes[i])):
            total = nodes[i].outputs[0]
            pending.append(
                next((j, nodes[j].inputs.index(total)) for j in range(i, len(nodes)) if total in nodes[j].inputs)
            )
    return edges


def _with(node: OpNode, k: int) -> list[int]:
    """The inputs that go with an operand: a quantised one's scale and zero point, the bias of a normalised sum."""
    if node.op_type == "QLinearAdd":
        return [k, k + 1, k + 2]
    bias = SKIP_NORMS.get(node.op_type)
    return [k] if bias is None or not node.has(bias) else [k, bias]


def living(branches: Branches, goes: Mask) -> tuple[Mask, set[str]]:
    """Which nodes (bool[nodes]) still reach a graph output without these branches, and the values that those read."""
    view = branches.view
    edges = cut_edges(branches, goes)
    cut = {i for i, _ in edges}
    lost = {name for k in np.flatnonzero(goes) for name in branches.found[k].outputs}
    needed = set(view.outputs) - lost
    alive = np.zeros(len(view.nodes), np.bool_)
    for i in range(len(view.nodes) - 1, -1, -1):
        node = view.nodes[i]
        if not needed.isdisjoint(node.outputs):
            alive[i] = True
            kept = (name for k, name in enumerate(node.inputs) if (i, k) not in edges) if i in cut else node.inputs
            needed.update(kept)
            needed.discard("")
    return alive, needed


def drop(branches: Branches, groups: Sequence[Group], goes: Mask, first_unit: int) -> Dropped:
    """What goes with these branches (bool[branches])."""
    if not goes.any():
        return Dropped()
    view = branches.view
    alive, needed = living(branches, goes)
    inner = {i for k in np.flatnonzero(goes) for i in branches.found[k].nodes.tolist()}
    outer = [k for k in np.flatnonzero(goes).tolist() if branches.found[k].sum not in inner]
    owners = {label: g.id for g in groups for label in g.units.tolist()}
    labels = [*range(first_unit, first_unit + branches.free), *branches.tied.tolist()]
    group_of = [owners.get(label, -1) for label in labels]
    zeroed: list[tuple[str, int, int]] = []
    owner: dict[str, int] = {}
    for k in outer:
        branch = branches.found[k]
        node = view.nodes[branch.sum]
        taken = _with(node, branch.operand)
        data = [branch.operand] if node.op_type == "QLinearAdd" else taken
        zeroed += [(node.outputs[0], at, branches.types[branch.value]) for at in data]
        read = [name for i in branch.nodes for name in view.nodes[i].inputs] + [node.inputs[at] for at in taken]
        owner.update(dict.fromkeys(read, group_of[k]))
    dead = frozenset(view.stored.keys() - needed)
    left = {view.stored[name].initializer for name in view.stored.keys() & needed} | {*view.outputs}
    initializers: dict[str, tuple[str, int]] = {}
    for name in sorted(dead):
        stored = view.stored[name]
        if stored.initializer not in left:
            initializers.setdefault(stored.initializer, (stored.role, owner.get(name, group_of[outer[0]])))
    totals = [view.nodes[i].outputs for i in sorted({i for i, _ in cut_edges(branches, goes)}) if alive[i]]
    return Dropped(
        zeroed=tuple(zeroed),
        dead=dead,
        initializers=initializers,
        inputs=tuple(name for k in outer for name in branches.found[k].inputs),
        outputs=tuple(name for k in outer for name in branches.found[k].outputs),
        bypass=tuple(next(name for name in (*names[3:], names[0]) if name) for names in totals),
    )
