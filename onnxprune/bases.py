"""Subspaces instead of coordinates where coupling is linear: head dimensions, and the width under norms.

Removing r positions of such an axis need not mean r coordinates: any r-dimensional subspace can go, because a change of
basis folds into the weights before and after it. The plan says how many positions stay; here the basis is chosen in
which they lose least, and the weights of the plan's model are set accordingly, as the start of its repair. Sources:
METHODS D11 (SliceGPT, Ashkboos et al. 2024), D13 (intra-module low rank).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx_ir as ir

from onnxprune.analysis import Analysis
from onnxprune.calibrate import Columns, Gather, Moments, MomentsOf, RowsOf
from onnxprune.dims import keep_of
from onnxprune.operators import Operator, Slot
from onnxprune.outcome import evaluate
from onnxprune.rms import by_root_mean_square
from onnxprune.sites import Site, find_sites
from onnxprune.types import Array, Axis, Group, Mask, OpNode, Positions
from onnxprune.widths import MOVES, Norm, Width, find_width

SHAPED = frozenset("Reshape Flatten Squeeze Unsqueeze Expand".split())  # of which the result's shape says everything
ROWS = 8_000  # tokens from which the directions of the width are found


@dataclass(frozen=True)
class Heads:
    """One attention: for each head the channels of its queries, keys or values on the sites that write them.

    `first` and `second` are int64[heads, head size]: queries and keys, or values and the columns of the operator that
    reads them; heads that share keys or values have equal rows.
    """

    first_site: str
    first: Positions
    second_site: str
    second: Positions
    reader: str = ""


@dataclass(frozen=True)
class Start:
    """What a plan's model starts its repair from: its sites with their targets' projections, and arrays by slot.

    `rewrites` says which bases were turned; `model` does not take the mean off where `norms` of the plan's model did.
    """

    model: ir.Model
    sites: list[Site]
    arrays: Mapping[Slot, Array]
    rewrites: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()


class Bases:
    """All changes of basis that a model allows, and what they need to know of the data.

    With `untie` the operator that shares its weight with an embedding may have one of its own. `means` are nodes that
    need not take the mean off, since what writes the width can.
    """

    def __init__(self, analysis: Analysis, gather: Gather | None = None, *, untie: bool = True) -> None:
        self.analysis, self._gather = analysis, gather
        self.shapes = analysis.view.shapes
        model = analysis.prepared.model
        self.tied = _tied(model) if untie else frozenset()
        sites = find_sites(
            model,
            model,
            self.shapes,
            lambda axis: np.ones(self.shapes[axis.value][axis.index], np.bool_),
            untied=self.tied,
        )
        self.sites = {site.value: site for site in sites if _turns(site)}
        self.operators = {o.node: (site, o) for site in self.sites.values() for o in site.operators}
        self._plain = {name: operator for name, (_, operator) in self.operators.items()}
        self.nodes = {name: node for node in analysis.view.nodes for name in node.outputs}
        self.stored = {(str(node.outputs[0].name), k): str(value.name) for node in model.graph
                       for k, value in enumerate(node.inputs) if value is not None}  # fmt: skip
        self.heads = self._find_heads()
        self.widths = [width for group in analysis.groups if (width := self._find_width(group)) is not None]
        self.means: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.heads or self.widths)

    # Finding ---------------------------------------------------------------------------------------------------------

    def _find_heads(self) -> list[Heads]:
        found = []
        contexts: dict[str, tuple[str, Positions]] = {}
        for node in self.analysis.view.nodes:
            if node.op_type != "MatMul" or node.within or node.const(0) is not None or node.const(1) is not None:
                continue
            left, right = self._origin(node.inputs[0]), self._origin(node.inputs[1])
            if left is not None and right is not None:
                queries, keys = _rows(left[1], -1), _rows(right[1], -2)
                if queries is not None and keys is not None and len(queries) == len(keys):
                    pairs = np.unique(np.concatenate([queries, keys], axis=1), axis=0)
                    size = queries.shape[1]
                    found.append(Heads(left[0], pairs[:, :size], right[0], pairs[:, size:]))
            elif right is not None and (values := _rows(right[1], -1)) is not None:
                contexts[node.outputs[0]] = (right[0], values)
        for name, (site, operator) in self.operators.items():
            if not operator.plain or len(site.operators) > 1:
                continue
            source = self._trace(operator.x, set(contexts))
            if source is None:
                continue
            context = source[0]
            written, values = contexts[context]
            shape = self.shapes[context]
            count, size = values.shape
            if int(np.prod(shape[:-2])) != count:
                continue
            ids = np.broadcast_to(np.arange(count).reshape(*shape[:-2], 1, 1) * size + np.arange(size), shape)
            columns = _first(self._push(source[1], context, ids))
            if columns is None:
                continue
            heads = [np.flatnonzero(columns // size == h) for h in range(count)]
            heads = [h[np.argsort(columns[h])] for h in heads]
            seen = [k for k, h in enumerate(heads) if len(h) == size]  # those of one sample
            if len(seen) * size == len(columns):
                found.append(Heads(written, values[seen], operator.x, np.stack([heads[k] for k in seen]), name))
        return found

    def _origin(self, value: str) -> tuple[str, Array] | None:
        """(the site that a value only moves, which of its channels each element is)."""
        source = self._trace(value, set(self.sites))
        if source is None:
            return None
        site = self.sites[source[0]]
        shape = self.shapes[site.value]
        channels = np.arange(shape[site.axis]).reshape(-1, *[1] * (len(shape) - 1 - site.axis % len(shape)))
        found = self._push(source[1], site.value, np.broadcast_to(channels, shape))
        return None if found is None else (site.value, found)

    def _trace(self, value: str, ends: set[str]) -> tuple[str, list[OpNode]] | None:
        """(one of `ends` that a value is moved from, the nodes in between), scaling by one number being nothing."""
        path: list[OpNode] = []
        while value not in ends:
            node = self.nodes.get(value)
            if node is None or node.within or any(n not in node.shapes for n in (*node.inputs, *node.outputs) if n):
                return None
            moves = node.op_type in MOVES and node.const(0) is None
            if moves and (node.op_type in SHAPED or all(node.const(k) is not None for k in range(1, len(node.inputs)))):
                value = node.inputs[0]
            elif (scaled := _scaled(node)) is not None:
                value = scaled
            else:
                return None
            path.append(node)
        return value, path[::-1]

    def _push(self, path: Sequence[OpNode], start: str, array: Array) -> Array | None:
        """What becomes of an array that takes the place of a value."""
        values: dict[str, Array] = {start: np.asarray(array, np.int64)}
        protos = self._protos
        for node in path:
            if node.op_type in ("Mul", "Div", "Cast", "Dropout", "Identity"):
                source = next(name for name in node.inputs if name in values)
                values[node.outputs[0]] = np.broadcast_to(values[source], node.out_shape())
                continue
            if node.op_type in SHAPED:
                moved, shape = values[node.inputs[0]], node.out_shape()
                if node.op_type != "Expand" and moved.size != math.prod(shape):  # a model that cannot run
                    return None
                values[node.outputs[0]] = (
                    np.broadcast_to(moved, shape) if node.op_type == "Expand" else moved.reshape(shape)
                )
                continue
            given = {name: c for k, name in enumerate(node.inputs) if (c := node.const(k)) is not None}
            found = evaluate(ir.serde.serialize_node(protos[node.outputs[0]]), node.opset, given | values)
            if found is None:
                return None
            values |= dict(zip(node.outputs, found, strict=False))
        return values[path[-1].outputs[0]] if path else values[start]

    @cached_property
    def _protos(self) -> Mapping[str, ir.Node]:
        return {str(node.outputs[0].name): node for node in self.analysis.prepared.model.graph}

    def _find_width(self, group: Group) -> Width | None:
        """The group as a width under norms."""
        if group.kind != "width":
            return None
        return find_width(group, self.analysis.view, lambda value: self._along(value, group), self._plain, self.sites)

    def _along(self, value: str, group: Group) -> int | None:
        """The axis of a value that is the group; -1 if it is more or less than that; None if it is none of it."""
        for k in range(len(self.shapes.get(value, ()))):
            labels = self.analysis.dims.labels_of(Axis(value, k))
            if labels is not None and len(labels) and labels[0] in group.units:
                return k if len(labels) == len(group.units) and np.isin(labels, group.units).all() else -1
        return None

    # Data ------------------------------------------------------------------------------------------------------------

    @cached_property
    def _data(self) -> tuple[dict[str, Moments], dict[str, Array]]:
        """(second moments of every value that a head's basis depends on, tokens of every norm's input)."""
        assert self._gather is not None
        axes = {h.first_site: self.sites[h.first_site].axis for h in self.heads}
        for h in self.heads:
            axes[h.second_site] = len(self.shapes[h.second_site]) - 1 if h.reader else self.sites[h.second_site].axis
        norms = {norm.source for width in self.widths for norm in width.norms}
        moments = {name: MomentsOf(Columns(name, axis)) for name, axis in axes.items()}
        rows = {name: RowsOf(Columns(name, -1), max(64, ROWS // len(norms))) for name in sorted(norms)}
        found = self._gather([*moments.values(), *rows.values()])
        return {n: found[r] for n, r in moments.items()}, {n: found[r][0] for n, r in rows.items()}

    def second(self, value: str, channels: Positions, centred: bool) -> Array:
        """float64[size, size]: second moments of some channels of a value."""
        moments = self._data[0][value]
        xx = moments.xx[0][np.ix_(channels, channels)] / max(moments.count, 1)
        mean = moments.mean[0][channels]
        return np.asarray(xx if centred else xx + np.outer(mean, mean))

    def mean(self, value: str, channels: Positions) -> Array:
        """float64[size]: means of some channels of a value."""
        return np.asarray(self._data[0][value].mean[0][channels])

    def directions(self, width: Width) -> Array:
        """float64[width, directions]: orthonormal, what carries most of the normalised tokens first.

        Where the norms take the mean off they are mean-free, and one fewer than the width.
        """
        total = np.zeros((len(width.group.units),) * 2)
        for norm in width.norms:
            x = self._data[1][norm.source].astype(np.float64)
            x = x - x.mean(axis=1, keepdims=True) if width.centred else x
            x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-12)
            total = total + x.T @ x / len(x)
        vectors = np.linalg.eigh(total)[1][:, ::-1]
        if not width.centred:
            return np.asarray(vectors)
        ones = np.ones((len(total), 1)) / np.sqrt(len(total))
        return np.asarray(np.linalg.qr(np.concatenate([ones, vectors], axis=1))[0][:, 1 : len(total)])

    def untied(self, alive: Mask) -> dict[str, int]:
        """{embedding: parameters} that readers of a width which a plan narrows get copies of.

        None where that would leave more than the dense model has.
        """
        found = {}
        for width in self.widths:
            left = int(alive[width.group.units].sum())
            for node in width.readers if 1 < left < len(width.group.units) else ():
                slot = self.operators[node][1].weight
                if (name := self.stored[slot]) in self.tied:
                    found[name] = self.size(name) * left // len(width.group.units)
        costs = self.analysis.costs
        fits = costs.of(alive)["params"] + sum(found.values()) <= costs.of(np.ones_like(alive))["params"]
        return found if fits else {}

    def size(self, name: str) -> int:
        """How many numbers an initializer has."""
        return math.prod(self.analysis.prepared.facts.shapes[name])

    # Starting --------------------------------------------------------------------------------------------------------

    def removable(self) -> frozenset[str]:
        """Nodes that need not take the mean off, in single precision, where squares do not overflow."""
        types = self.analysis.prepared.facts.types
        norms = [norm for width in self.widths for norm in width.norms if norm.mean]
        return frozenset(norm.mean for norm in norms if types.get(norm.source) == ir.DataType.FLOAT)

    def start(self, pruned: ir.Model, alive: Mask, sites: Sequence[Site]) -> Start:
        """Targets and first weights of a plan's model, given which labels are alive."""
        turned = _Turned(self, pruned, alive, sites)
        for heads in self.heads:
            if heads.reader:
                turned.values(heads)
            else:
                turned.scores(heads)
        for width in self.widths:
            turned.narrow(width)
        return turned.start()

    def whole(self, model: ir.Model, sites: Sequence[Site]) -> Start:
        """The dense model with widths turned that lose nothing: into the plane without a mean, or not at all."""
        turned = _Turned(self, model, np.ones(self.analysis.labels, np.bool_), sites)
        for width in self.widths:
            turned.narrow(width, whole=True)
        return turned.start()

    def matrix(self, operator: Operator) -> Array:
        """float64[columns, outputs] of a Gemm or MatMul."""
        return np.asarray(operator.layout.matrix(self.array(operator.weight))[0])

    def array(self, slot: Slot) -> Array:
        """What the dense model stores for one input of one node, float64."""
        return self.analysis.weights.array(self.stored[slot])


class _Turned:
    """The changes of basis of one plan.

    `outputs` has [dense channels, channels] by site, `inputs` [columns, dense columns] by operator, `offsets` what its
    dense input has in each column besides (the shift of a norm, a mean that is lost), `arrays` what is set outside of
    operators.
    """

    def __init__(self, bases: Bases, model: ir.Model, alive: Mask, sites: Sequence[Site]) -> None:
        self.bases, self.model, self.alive, self.sites = bases, model, alive, sites
        self.here = {str(node.outputs[0].name) for node in model.graph}
        self.present = {site.value for site in sites if _turns(site)}
        every = [operator for site in sites if site.dense for operator in site.operators]
        self.operators = {operator.node for operator in every}
        self.plain = {o.node for site in sites if site.value in self.present for o in site.operators}
        self.biased = {o.node for o in every if o.homes() and _plain(o) and o.plain}  # a convolution may pad
        self.outputs: dict[str, Array] = {}
        self.inputs: dict[str, Array] = {}
        self.offsets: dict[str, Array] = {}
        self.arrays: dict[Slot, Array] = {}
        self.told: list[str] = []
        self.means: set[str] = set()

    def kept(self, value: str, axis: int) -> Mask:
        """bool[positions] of a dense value's axis that stay."""
        return keep_of(self.bases.analysis.dims, self.alive, Axis(value, axis), self.bases.shapes[value][axis])

    def written(self, value: str) -> Mask:
        """bool[channels] of a site that stay."""
        return self.kept(value, self.bases.sites[value].axis)

    def read(self, node: str) -> Mask:
        """bool[columns] of a Gemm or MatMul that stay."""
        x = self.bases.operators[node][1].x
        return self.kept(x, len(self.bases.shapes[x]) - 1)

    def output(self, value: str) -> Array:
        """The matrix of a site's output, to be filled in."""
        mask = self.written(value)
        return self.outputs.setdefault(value, np.eye(len(mask))[:, mask])

    def input(self, node: str) -> Array:
        """The matrix of an operator's input, to be filled in."""
        mask = self.read(node)
        return self.inputs.setdefault(node, np.eye(len(mask))[mask])

    def values(self, heads: Heads) -> None:
        """Values against what reads them: the best subspace of what reaches the reader's output."""
        if heads.first_site not in self.present or heads.reader not in self.operators:
            return
        wrote, reads = self.written(heads.first_site), self.read(heads.reader)
        weight = self.bases.matrix(self.bases.operators[heads.reader][1])
        for group in _shared(heads.first):
            values = heads.first[group[0]]
            left = np.flatnonzero(wrote[values])
            if not 0 < len(left) < len(values):
                continue
            free = heads.reader in self.biased  # a bias takes the mean up
            second = np.sum([self.bases.second(heads.second_site, heads.second[h], free) for h in group], axis=0)
            root, inverse = _roots(second)
            product = np.concatenate([root @ weight[heads.second[h]] for h in group], axis=1)
            u = np.linalg.eigh(product @ product.T)[1][:, ::-1][:, : len(left)]  # also where outputs are few
            self.output(heads.first_site)[np.ix_(values, _places(wrote, values[left]))] = inverse @ u
            for h in group:
                columns = heads.second[h]
                place = np.ix_(_places(reads, columns[reads[columns]]), columns)
                self.input(heads.reader)[place] = u.T @ root
                if free:
                    mean = self.bases.mean(heads.second_site, columns)
                    lost = self.offsets.setdefault(heads.reader, np.zeros(len(reads)))
                    lost[columns] += mean - mean @ inverse @ u @ u.T @ root
            self.told.append(f"turned {len(values)} channels of {heads.first_site}, {len(left)} of which are left")

    def scores(self, heads: Heads) -> None:
        """Queries against keys: the best subspace of their products; softmax does not see the mean of the keys."""
        if not {heads.first_site, heads.second_site} <= self.present:
            return
        queried, keyed = self.written(heads.first_site), self.written(heads.second_site)
        for group in _shared(heads.second):
            keys = heads.second[group[0]]
            left = np.flatnonzero(keyed[keys])
            if not 0 < len(left) < len(keys):
                continue
            root, inverse = _roots(self.bases.second(heads.second_site, keys, True))
            queries = [heads.first[h] for h in group]
            roots = [_roots(self.bases.second(heads.first_site, q, False))[0] for q in queries]
            v = np.linalg.svd(np.concatenate([r @ root for r in roots]), full_matrices=False)[2].T[:, : len(left)]
            self.output(heads.second_site)[np.ix_(keys, _places(keyed, keys[left]))] = inverse @ v
            self.told.append(f"turned {len(keys)} channels of {heads.second_site}, {len(left)} of which are left")
            for q in queries:
                self.output(heads.first_site)[np.ix_(q, _places(queried, q[queried[q]]))] = root @ v

    def narrow(self, width: Width, whole: bool = False) -> None:
        """A narrower width: the best directions, less one where what stays is a plane whose mean is zero.

        Norms that take the mean off leave that plane alone. Where a reader has nowhere to put what a norm's shift gave
        it, the direction across the plane, which the stream never has, carries a one to all readers of that norm.
        """
        left, size = int(self.alive[width.group.units].sum()), len(width.group.units)
        readers = {node: norm for node, norm in width.readers.items() if node in self.here}
        writers = [o.node for value in width.streams for o in self.bases.sites[value].operators if o.node in self.here]
        if not (1 < left < size or whole) or not readers.keys() <= self.operators or not self.plain.issuperset(writers):
            return
        norms = list(dict.fromkeys(readers.values()))
        shifted = {norm.shift for norm in norms if norm.shift is not None and self.bases.array(norm.shift).any()}
        bare = {norm.shift for node, norm in readers.items() if norm.shift in shifted and node not in self.biased}
        means = {n.mean for n in norms if n.mean in self.bases.means and not (n.whole and n.shift in bare)}
        plane = bool(bare) or any(norm.centred and norm.mean not in means for norm in norms)
        if whole and bare and not width.centred:  # no direction is free
            return
        project = self._project(width, left, plane)
        self.told.append(f"turned the width of group {width.group.id}, {left} of {size} directions are left")
        if means:
            self.means |= means
            self.told.append(f"took the mean off what writes group {width.group.id} instead of in {len(means)} norms")
        for value in width.streams:
            self.outputs[value] = project
        for place, axis in width.stored:
            if place[0] in self.here:
                self.arrays[place] = np.moveaxis(np.moveaxis(self.bases.array(place), axis, -1) @ project, -1, axis)
        for norm in norms:
            shift = None if norm.whole and norm.mean in means else norm.shift
            for slot, number in ((norm.gain, 1.0), (shift, 1.0 if norm.shift in bare else 0.0)):
                if slot is not None:
                    self.arrays[slot] = np.full((*self.bases.array(slot).shape[:-1], left), number)
        for node, norm in readers.items():
            self._reads(node, norm, project)

    def _reads(self, node: str, norm: Norm, project: Array) -> None:
        """What an operator makes of a norm over the projected width, with the gain, and the shift if it has no bias."""
        size, left = project.shape
        gain = self.bases.array(norm.gain).reshape(-1) if norm.gain is not None else np.ones(size)
        self.inputs[node] = project.T * np.sqrt(size / left) * gain
        if (name := self.tied(self.bases.operators[node][1])) is not None:
            more = self.bases.size(name) * left // size
            self.told.append(f"{node} no longer shares its weight with {name}: {more:,} parameters more")
        if norm.shift is None:
            return
        added = self.bases.array(norm.shift).reshape(-1)
        if node in self.biased:
            self.offsets[node] = added * norm.scale
        else:
            self.inputs[node] += added / left

    def _project(self, width: Width, left: int, plane: bool) -> Array:
        """float64[width, left]: the directions that stay, in a plane of zero mean or in all of what is left."""
        size = len(width.group.units)
        if left == size:
            return np.eye(size) - (1 / size if width.centred else 0)
        directions = self.bases.directions(width)
        if not plane:
            return directions[:, :left]
        helmert = np.linalg.qr(np.column_stack([np.ones(left), np.eye(left)[:, : left - 1]]))[0][:, 1:]
        return np.asarray(directions[:, : left - 1] @ helmert.T)

    def tied(self, operator: Operator) -> str | None:
        """The embedding that an operator shares its weight with."""
        name = self.bases.stored[operator.weight]
        return name if name in self.bases.tied else None

    def start(self) -> Start:
        """Sites and arrays of the plan's model; a weight that is tied is no site, where it need not be copied."""
        for site in self.sites:
            for operator in site.operators:
                if site.dense in self.outputs or operator.node in self.inputs:
                    self._set(operator)
        own = [s for s in self.sites if all(o.node in self.inputs or not self.tied(o) for o in s.operators)]
        sites = [replace(s, project=self.outputs[s.dense]) if s.dense in self.outputs else s for s in own]
        means = tuple(sorted(self.means))
        model = by_root_mean_square(self.model, means) if means else self.model
        return Start(model, sites, self.arrays, tuple(dict.fromkeys(self.told)), means)

    def _set(self, operator: Operator) -> None:
        """First weight and bias of an operator whose output or input is in another basis."""
        dense, own = self.bases.array(operator.weight), self.bases.operators[operator.node][0]
        wrote = self.written(own.value)
        output = self.outputs.get(own.value, np.eye(len(wrote))[:, wrote])
        gain, constant = np.ones(len(wrote)), np.zeros(len(wrote))
        steps = _steps(operator) if _plain(operator) else []
        for kind, slot in steps:
            values = self.bases.array(slot).reshape(-1)
            gain = gain * values if kind == "mul" else gain
            constant = constant * values if kind == "mul" else constant + values
        after = gain[:, None] * output
        entered = self.inputs.get(operator.node)
        if operator.convolves:
            if entered is not None:
                moved = np.moveaxis(np.tensordot(entered, dense, axes=(1, 1)), 0, 1)
            else:
                moved = dense[:, self.kept(operator.x, 1)] if operator.layout.summed else dense
            self.arrays[operator.weight] = np.tensordot(after.T, moved, axes=1)
        else:
            assert operator.plain is not None
            matrix = dense.T if operator.plain.transposed else dense
            product = (matrix[self.read(operator.node)] if entered is None else entered @ matrix) @ after
            self.arrays[operator.weight] = product.T if operator.plain.transposed else product
        added = constant @ output
        if operator.node in self.offsets:
            added = added + self.offsets[operator.node] @ matrix @ after
        for kind, slot in steps:
            shape = self.bases.array(slot).shape
            left = tuple(output.shape[1] if size == len(wrote) else size for size in shape)
            self.arrays[slot] = np.ones(left) if kind == "mul" else added.reshape(left)
            if kind == "add":
                added = np.zeros_like(added)


def _tied(model: ir.Model) -> frozenset[str]:
    """Initializers that a single operator multiplies by, and of which Gathers look up rows."""
    found = []
    for value in model.graph.initializers.values():
        uses = [(use.node.op_type, use.idx) for use in value.uses()]
        rest = [use for use in uses if use not in (("Gather", 0), ("GatherND", 0))]
        if len(rest) == 1 < len(uses) and rest[0] in (("MatMul", 1), ("Gemm", 1), ("Transpose", 0)):
            found.append(str(value.name))
    return frozenset(found)


def _scaled(node: OpNode) -> str | None:
    """The value that a node multiplies or divides by one number."""
    for k in {"Mul": (0, 1), "Div": (0,)}.get(node.op_type, ()):
        factor = node.const(1 - k)
        if factor is not None and factor.size == 1:
            return node.inputs[k]
    return None


def _plain(operator: Operator) -> bool:
    """Whether all that an operator's output is multiplied by and added to is stored, so that a matrix folds into it."""
    own = not operator.coded and not operator.tie
    return own and all(step.kind != "norm" and not step.fixed for step in operator.steps)


def _turns(site: Site) -> bool:
    """Whether matrices fold into all operators of a site, into what they read as well as into what they make."""
    plain = [_plain(operator) and (operator.convolves or operator.plain is not None) for operator in site.operators]
    return bool(site.dense) and all(plain)


def _steps(operator: Operator) -> list[tuple[str, Slot]]:
    """What a plain operator's output is multiplied by and added to, in order: (mul or add, where it is stored)."""
    bias = [("add", operator.bias)] if operator.bias is not None else []
    return bias + [(step.kind, slot) for step in operator.steps for slot in step.slots]


def _shared(rows: Positions) -> list[list[int]]:
    """Numbers of equal rows, together."""
    found: dict[bytes, list[int]] = defaultdict(list)
    for k, row in enumerate(rows):
        found[row.tobytes()].append(k)
    return list(found.values())


def _rows(channels: Array | None, axis: int) -> Positions | None:
    """int64[heads, size]: the channels along `axis`, of the last two, where the other of the two changes nothing."""
    if channels is None or channels.ndim < 2:
        return None
    moved = np.swapaxes(channels, -1, -2) if axis == -2 else channels
    if not (moved == moved[..., :1, :]).all():
        return None
    return np.asarray(moved[..., 0, :].reshape(-1, moved.shape[-1]), np.int64)


def _first(columns: Array | None) -> Positions | None:
    """The last axis, where along the others (samples, tokens) everything moves on by the same number."""
    if columns is None:
        return None
    flat = columns.reshape(-1, columns.shape[-1])
    return np.asarray(flat[0], np.int64) if (flat - flat[:, :1] == flat[:1] - flat[0, 0]).all() else None


def _roots(second: Array) -> tuple[Array, Array]:
    """The square root of a second moment, damped, and its inverse."""
    size = len(second)
    values, vectors = np.linalg.eigh(second + 1e-6 * max(float(np.trace(second)) / size, 1e-12) * np.eye(size))
    values = np.sqrt(np.maximum(values, 1e-20))
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def _places(mask: Mask, positions: Positions) -> Positions:
    """Where positions that stay are among those that do."""
    return np.asarray(np.cumsum(mask)[positions] - 1)
