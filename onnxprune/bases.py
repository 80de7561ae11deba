"""Subspaces instead of coordinates, where what couples positions is linear: head dimensions and the width under LayerNorm.

Removing r positions of such an axis need not mean r coordinates: any r-dimensional subspace can go, because a change of
basis folds into the weights before and after it. The plan says how many positions stay; here the basis is chosen in
which they lose least, and the weights of the plan's model are set accordingly, as the start of its repair. Sources:
METHODS D11 (SliceGPT, Ashkboos et al. 2024), D13 (intra-module low rank).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.calibrate import Columns, Moments, MomentsOf, Request, RowsOf, collect
from onnxprune.dims import keep_of
from onnxprune.infer import evaluate
from onnxprune.plugin import Feeds
from onnxprune.sites import Operator, Site, Slot, find_sites
from onnxprune.types import Array, Axis, Group, Mask, OpNode, Positions
from onnxprune.worker import Worker

MOVES = frozenset("Identity Reshape Transpose Squeeze Unsqueeze Flatten Split Slice Gather Expand Cast Dropout".split())
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
class Width:
    """A residual width that only LayerNormalization reads: who writes it, who reads which norm, what is stored of it."""

    group: Group
    streams: tuple[str, ...]
    norms: Mapping[str, tuple[Slot, Slot | None]]
    readers: Mapping[str, str]
    stored: tuple[tuple[Slot, int], ...]
    axes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """What a plan's model starts its repair from: its sites with their targets' projections, and arrays by slot."""

    sites: list[Site]
    arrays: Mapping[Slot, Array]


class Bases:
    """All changes of basis that a model allows, and what they need to know of the data."""

    def __init__(self, analysis: Analysis, feeds: Feeds, worker: Worker, padding: str | None, seed: int, budget: int) -> None:
        self.analysis, self.feeds, self.worker = analysis, feeds, worker
        self.padding, self.seed, self.budget = padding, seed, budget
        self.shapes = analysis.view.shapes
        model = analysis.prepared.model
        sites = find_sites(model, model, self.shapes, lambda axis: np.ones(self.shapes[axis.value][axis.index], np.bool_))
        self.sites = {site.value: site for site in sites if self._plain(site)}
        self.operators = {o.node: (site, o) for site in self.sites.values() for o in site.operators}
        self.nodes = {name: node for node in analysis.view.nodes for name in node.outputs}
        self.stored = {(str(node.outputs[0].name), k): str(value.name) for node in model.graph
                       for k, value in enumerate(node.inputs) if value is not None}  # fmt: skip
        self.heads = self._find_heads()
        self.widths = [width for group in analysis.groups if (width := self._find_width(group)) is not None]

    @staticmethod
    def _plain(site: Site) -> bool:
        """Whether a site is one operator with at most a bias, so that a matrix at its output folds into it."""
        return all(
            all(step.kind == "add" for step in o.steps) and (o.bias is not None) + len(o.steps) <= 1 for o in site.operators
        )

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
            if operator.op_type == "Conv" or len(site.operators) > 1:
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
            if node is None or node.within or not all(name in node.shapes for name in (*node.inputs, *node.outputs) if name):
                return None
            scaled = node.op_type in ("Mul", "Div") and [k for k in (0, 1) if (c := node.const(k)) is None]
            moves = node.op_type in MOVES and node.const(0) is None
            if moves and (node.op_type in SHAPED or all(node.const(k) is not None for k in range(1, len(node.inputs)))):
                value = node.inputs[0]
            elif scaled and len(scaled) == 1 and (node.op_type == "Mul" or scaled == [0]) and np.size(node.const(1 - scaled[0])) == 1:
                value = node.inputs[scaled[0]]
            else:
                return None
            path.append(node)
        return value, path[::-1]

    def _push(self, path: Sequence[OpNode], start: str, array: Array) -> Array | None:
        """What becomes of an array that takes the place of a value."""
        import onnx_ir as ir

        values: dict[str, Array] = {start: np.asarray(array, np.int64)}
        protos = self._protos
        for node in path:
            if node.op_type in ("Mul", "Div", "Cast", "Dropout", "Identity"):
                source = next(name for name in node.inputs if name in values)
                values[node.outputs[0]] = np.broadcast_to(values[source], node.out_shape())
                continue
            if node.op_type in SHAPED:
                moved, shape = values[node.inputs[0]], node.out_shape()
                values[node.outputs[0]] = np.broadcast_to(moved, shape) if node.op_type == "Expand" else moved.reshape(shape)
                continue
            given = {name: c for k, name in enumerate(node.inputs) if (c := node.const(k)) is not None}
            found = evaluate(ir.serde.serialize_node(protos[node.outputs[0]]), node.opset, given | values)
            if found is None:
                return None
            values |= dict(zip(node.outputs, found, strict=False))
        return values[path[-1].outputs[0]] if path else values[start]

    @cached_property
    def _protos(self) -> Mapping[str, object]:
        return {str(node.outputs[0].name): node for node in self.analysis.prepared.model.graph}

    def _find_width(self, group: Group) -> Width | None:
        """The group as a width under LayerNormalization, if nothing else looks at it."""
        if group.kind != "width" or not all("LayerNormalization" in text for text in group.mixing):
            return None
        dims, domain = self.analysis.dims, dict[str, str]()
        units = set(group.units.tolist())
        axes: dict[str, int] = {}
        norms: dict[str, tuple[Slot, Slot | None]] = {}
        readers: dict[str, str] = {}
        stored: list[tuple[Slot, int]] = []
        used: set[str] = set()

        def axis_of(name: str) -> int | None:
            for k in range(len(self.shapes.get(name, ()))):
                labels = dims.labels_of(Axis(name, k))
                if labels is not None and len(labels) and int(labels[0]) in units:
                    return k if set(labels.tolist()) == units and len(labels) == len(units) else -1
            return None

        for node in self.analysis.view.nodes:
            touched = [(k, name, axis) for k, name in enumerate(node.inputs) if name and (axis := axis_of(name)) is not None]
            out = axis_of(node.outputs[0]) if node.outputs[0] else None
            if not touched and out is None:
                continue
            if node.within or -1 in [axis for _, _, axis in touched] or out == -1:
                return None
            operator = self.operators.get(node.outputs[0])
            slots = [(node.outputs[0], k) for k, name, _ in touched if name not in domain]
            if operator is not None:
                site, op = operator
                if (x := domain.get(node.inputs[0])) is not None and not x.startswith("norm:"):
                    return None
                if x is not None:
                    readers[op.node] = x.removeprefix("norm:")
                if out is not None:
                    domain[node.outputs[0]] = "stream"
                used.update(_slots(site))
            elif node.op_type == "LayerNormalization" and domain.get(node.inputs[0]) == "stream" and out is not None:
                rank = len(node.shape(0))
                if node.attr("axis", -1) % rank != rank - 1 or len([n for n in node.outputs if n]) > 1:
                    return None
                shift = (node.outputs[0], 2) if node.has(2) else None
                norms[node.outputs[0]] = ((node.outputs[0], 1), shift)
                domain[node.outputs[0]] = f"norm:{node.outputs[0]}"
            elif node.op_type in (*MOVES, "Concat", "Add") and out is not None:
                kinds = {domain.get(name, "stream") for _, name, _ in touched}
                if len(kinds) > 1 or (node.op_type == "Add" and kinds != {"stream"}):
                    return None
                for name in node.outputs:
                    if axis_of(name) is not None:
                        domain[name] = kinds.copy().pop()
                if node.op_type == "Gather" and any(k for k, _, _ in touched):
                    return None
                stored += [(slot, axis) for slot, (k, name, axis) in zip(slots, [t for t in touched if t[1] not in domain or t[0] == -1], strict=False)]
            else:
                return None
            for name in node.outputs:
                if (axis := axis_of(name)) is not None:
                    axes[name] = axis
        kept = []
        for member in group.members:
            for slot in member.readers:
                if slot in used or any(slot in pair for pair in norms.values()) or self._weight_of(slot):
                    continue
                kept.append((slot, member.axis))
        streams = tuple(site for site in self.sites if domain.get(site) == "stream")
        if not norms or not readers or not all(self._homes(readers[r], norms) for r in readers):
            return None
        return Width(group, streams, norms, readers, tuple(dict.fromkeys(kept)), axes)

    def _weight_of(self, slot: Slot) -> bool:
        return any(slot in (o.weight, o.bias) or any(slot in step.slots for step in o.steps) for _, o in self.operators.values())

    @staticmethod
    def _homes(norm: str, norms: Mapping[str, tuple[Slot, Slot | None]]) -> bool:
        return norm in norms

    # Data ------------------------------------------------------------------------------------------------------------

    @cached_property
    def _data(self) -> tuple[dict[str, Moments], dict[str, Array]]:
        """(second moments of every value that a head's basis depends on, tokens of every norm's input)."""
        values = {h.first_site: self.sites[h.first_site].axis for h in self.heads}
        values |= {h.second_site: self.sites[h.second_site].axis if not h.reader else len(self.shapes[h.second_site]) - 1 for h in self.heads}
        norms = {self.nodes[norm].inputs[0] for width in self.widths for norm in width.norms}
        requests: dict[str, Request[Moments]] = {name: MomentsOf(Columns(name, axis)) for name, axis in values.items()}
        rows: dict[str, Request[Array]] = {name: RowsOf(Columns(name, -1), max(64, ROWS // max(len(norms), 1))) for name in norms}
        found = collect(
            self.worker, self.analysis.prepared.model, self.feeds, [*requests.values(), *rows.values()],
            padding=self.padding, seed=self.seed, budget=self.budget,
        )  # fmt: skip
        return {n: found[r] for n, r in requests.items()}, {n: found[r][0] for n, r in rows.items()}

    def _second(self, value: str, channels: Positions, centred: bool) -> Array:
        """float64[size, size]: second moments of some channels of a value."""
        moments = self._data[0][value]
        xx = moments.xx[0][np.ix_(channels, channels)] / max(moments.count, 1)
        mean = moments.mean[0][channels]
        return xx if centred else xx + np.outer(mean, mean)

    def directions(self, width: Width) -> Array:
        """float64[width, width - 1]: orthonormal, mean-free, the ones that carry most of the normalised tokens first."""
        total = 0.0
        for norm in width.norms:
            x = self._data[1][self.nodes[norm].inputs[0]].astype(np.float64)
            x = x - x.mean(axis=1, keepdims=True)
            x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-12)
            total = total + x.T @ x / len(x)
        values, vectors = np.linalg.eigh(total)
        order = np.argsort(-values)
        ones = np.ones(len(values)) / np.sqrt(len(values))
        kept = [vectors[:, k] for k in order]
        basis = np.linalg.qr(np.stack([ones, *kept], axis=1))[0][:, 1 : len(values)]
        return np.asarray(basis)

    # Starting --------------------------------------------------------------------------------------------------------

    def start(self, alive: Mask, sites: Sequence[Site]) -> Start:
        """Targets and first weights of a plan's model, given which labels are alive."""
        analysis = self.analysis

        def keep(value: str, axis: int) -> Mask:
            return keep_of(analysis.dims, alive, Axis(value, axis), self.shapes[value][axis])

        present = {site.value: site for site in sites}
        operators = {o.node: o for site in sites for o in site.operators}
        outputs: dict[str, Array] = {}
        inputs: dict[str, Array] = {}
        offsets: dict[str, Array] = {}
        arrays: dict[Slot, Array] = {}

        def output(value: str) -> Array:
            mask = keep(value, self.sites[value].axis)
            return outputs.setdefault(value, np.eye(len(mask))[:, mask])

        def entrance(node: str) -> Array:
            x = self.operators[node][1].x
            mask = keep(x, len(self.shapes[x]) - 1)
            return inputs.setdefault(node, np.eye(len(mask))[mask])

        for heads in self.heads:
            if heads.first_site not in present or (heads.reader or heads.second_site) not in (operators if heads.reader else present):
                continue
            mask = keep(heads.first_site, self.sites[heads.first_site].axis)
            if mask[heads.first].all() or (mask[heads.first].sum(axis=1) % heads.first.shape[1] == 0).all():
                continue
            self._turn(heads, mask, output, entrance, keep)
        for width in self.widths:
            left = int(alive[width.group.units].sum())
            size = len(width.group.units)
            if left == size or not set(width.readers) <= set(operators) or any(s in self.sites and s not in present for s in width.streams):
                continue
            self._narrow(width, left, keep, outputs, inputs, offsets, arrays)
        moved = []
        for site in sites:
            operators_here = []
            for operator in site.operators:
                if site.value in outputs or operator.node in inputs:
                    self._set(operator, site, outputs.get(site.value), inputs.get(operator.node), offsets.get(operator.node), keep, arrays)
                operators_here.append(operator)
            moved.append(replace(site, project=outputs.get(site.dense)) if site.dense in outputs else site)
        return Start(moved, arrays)

    def _turn(self, heads: Heads, mask: Mask, output, entrance, keep) -> None:  # type: ignore[no-untyped-def]
        """Set the blocks of one attention's heads: queries against keys, or values against what reads them."""
        shared: dict[bytes, list[int]] = defaultdict(list)
        key = heads.first if heads.reader else heads.second
        for h in range(len(key)):
            shared[key[h].tobytes()].append(h)
        for group in shared.values():
            if heads.reader:
                values = heads.first[group[0]]
                left = np.flatnonzero(mask[values])
                if not 0 < len(left) < len(values):
                    continue
                weight = self._matrix(self.operators[heads.reader][1])
                second = sum(self._second(heads.second_site, heads.second[h], True) for h in group)
                root, inverse = _roots(second)
                product = np.concatenate([root @ weight[heads.second[h]] for h in group], axis=1)
                u = np.linalg.svd(product, full_matrices=False)[0][:, : len(left)]
                p, n = inverse @ u, u.T @ root
                into = output(heads.first_site)
                columns = _places(mask, values[left])
                into[np.ix_(values, columns)] = p
                x = self.operators[heads.reader][1].x
                there = keep(x, len(self.shapes[x]) - 1)
                matrix = entrance(heads.reader)
                for h in group:
                    rows = heads.second[h]
                    matrix[np.ix_(_places(there, rows[there[rows]]), rows)] = n
            else:
                keys = heads.second[group[0]]
                there = keep(heads.second_site, self.sites[heads.second_site].axis)
                left = np.flatnonzero(there[keys])
                if not 0 < len(left) < len(keys):
                    continue
                root, inverse = _roots(self._second(heads.second_site, keys, True))
                stack = np.concatenate([_roots(self._second(heads.first_site, heads.first[h], False))[0] @ root for h in group])
                v = np.linalg.svd(stack, full_matrices=False)[2].T[:, : len(left)]
                output(heads.second_site)[np.ix_(keys, _places(there, keys[left]))] = inverse @ v
                for h in group:
                    queries = heads.first[h]
                    output(heads.first_site)[np.ix_(queries, _places(mask, queries[mask[queries]]))] = root @ v

    def _narrow(self, width: Width, left: int, keep, outputs, inputs, offsets, arrays) -> None:  # type: ignore[no-untyped-def]
        """Set the projections of a width: the best directions, as a zero-sum hyperplane of the new width."""
        size = len(width.group.units)
        helmert = np.linalg.qr(np.column_stack([np.ones(left), np.eye(left)[:, : left - 1]]))[0][:, 1:]
        project = self.directions(width)[:, : left - 1] @ helmert.T
        for value in width.streams:
            outputs[value] = project
        for gain, shift in width.norms.values():
            arrays[gain] = np.ones(left)
            if shift is not None:
                arrays[shift] = np.zeros(left)
        weights = self.analysis.weights
        for node, norm in width.readers.items():
            gain, shift = width.norms[norm]
            scale = weights.array(self.stored[gain])
            inputs[node] = project.T * np.sqrt(size / left) * scale
            if shift is not None:
                offsets[node] = weights.array(self.stored[shift])
        for slot, axis in width.stored:
            arrays[slot] = np.moveaxis(np.moveaxis(weights.array(self.stored[slot]), axis, -1) @ project, -1, axis)

    def _matrix(self, operator: Operator) -> Array:
        """float64[columns, outputs]."""
        array = self.analysis.weights.array(self.stored[operator.weight])
        return array.T if operator.transposed else array

    def _set(self, operator: Operator, site: Site, output: Array | None, entrance: Array | None, offset: Array | None, keep, arrays) -> None:  # type: ignore[no-untyped-def]
        """First weight and bias of an operator whose output or input is in another basis."""
        dense = self.analysis.weights.array(self.stored[operator.weight])
        own = self.sites[site.value]
        if operator.op_type == "Conv":
            mask = keep(operator.x, 1)
            kernel = dense[:, mask] if operator.attrs.get("group", 1) == 1 else dense
            if output is not None:
                arrays[operator.weight] = np.tensordot(output.T, kernel, axes=1)
        else:
            matrix = dense.T if operator.transposed else dense
            mask = keep(operator.x, len(self.shapes[operator.x]) - 1)
            wide = matrix[mask] if entrance is None else entrance @ matrix
            there = keep(site.value, own.axis)
            wide = wide[:, there] if output is None else wide @ output
            arrays[operator.weight] = wide.T if operator.transposed else wide
        home = operator.bias or (operator.steps[0].slots[0] if operator.steps else None)
        if home is not None:
            there = keep(site.value, own.axis)
            bias = self.analysis.weights.array(self.stored[home])
            flat = np.broadcast_to(bias.reshape(-1), len(there)).astype(np.float64)
            if offset is not None and operator.op_type != "Conv":
                flat = flat + offset @ (dense.T if operator.transposed else dense)
            moved = flat[there] if output is None else flat @ output
            shape = [1 if k == 1 or bias.ndim == 1 else 1 for k in range(bias.ndim)]
            axis = int(np.argmax(bias.shape)) if bias.ndim else 0
            shape[axis:axis + 1] = [len(moved)]
            arrays[home] = moved.reshape(shape)


def _slots(site: Site) -> set[Slot]:
    return {slot for o in site.operators for slot in (o.weight, *([o.bias] if o.bias else []), *(s for step in o.steps for s in step.slots))}


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
