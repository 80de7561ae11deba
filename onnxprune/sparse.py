"""N:M brought into a model: channels in a better order, weights chosen, what is left repaired; after all removal.

The order of the steps is that of the effects: removal moves the borders of runs, so that N:M comes after it, and it
decides which zeros a later quantisation must keep. Without calibration data only weights are looked at. With it, the
layers are visited as repair visits them: each is thinned out, and fitted to what the dense model computes, on what the
model in front of it, sparse already, feeds it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from onnxprune import bfloat, cache, nm, pace, plugin, reconstruct, timing, verify
from onnxprune import report as reports
from onnxprune.analysis import Analysis, cost_shapes
from onnxprune.calibrate import Answers, Columns, ProfileOf, Reads, Request, collect
from onnxprune.dims import keep_of
from onnxprune.errors import ImpossibleError, InputError, InternalError
from onnxprune.evidence import SHARE
from onnxprune.infer import initializers
from onnxprune.layerwise import Thinning
from onnxprune.model import Model
from onnxprune.nm import NM, Layer
from onnxprune.operators import Slot
from onnxprune.plugin import Permuter, Protector, Reconstructor, Seat, Sparsifier, trait
from onnxprune.prove import Prover
from onnxprune.recipe import Methods, Options
from onnxprune.recovery import Recovery
from onnxprune.rewrite import permute
from onnxprune.sites import Site, find_sites
from onnxprune.types import Array, Axis, Group, Mask, Plan, Positions
from onnxprune.weights import LEAST, Shelf
from onnxprune.worker import Worker

ROUNDS = 8  # how often protection looks again
HALF = 0.5  # share of the MACs below which a user is told that little will be faster


@dataclass(frozen=True)
class Sparse:
    """A model with the pattern.

    `names` are the initializers that changed, `rewrites` steps that did not change the function.
    """

    model: Model
    names: list[str]
    rewrites: list[str]
    row: reports.SparsityRow
    warnings: list[str]


def sparsified(
    analysis: Analysis, plan: Plan, model: Model, options: Options, recovery: Recovery, prover: Prover, worker: Worker
) -> Sparse:
    """The model of a plan, repaired or not, with the pattern that the options name.

    Raises ImpossibleError where no weight can have it, InternalError where one ends without it.
    """
    return _Run(analysis, plan, model, options, recovery, prover, worker).result()


class _Run:
    """One model on its way to the pattern."""

    def __init__(
        self,
        analysis: Analysis,
        plan: Plan,
        model: Model,
        options: Options,
        recovery: Recovery,
        prover: Prover,
        worker: Worker,
    ) -> None:
        self.analysis, self.model, self.options, self.recovery = analysis, model.clone(), options, recovery
        self.prover, self.worker = prover, worker
        self.model.graph.meta.pop("names", None)
        self.alive, self.plan = analysis.alive(plan), plan
        assert options.pattern is not None
        self.nm = NM.parse(options.pattern)
        self.name = str(Methods.of(options).sparsifier)
        self.sparsifier: Sparsifier = plugin.build("sparsifiers", self.name)
        self.permuter: Permuter | None = plugin.build("sparsifiers", "nm-perm") if options.permute else None
        self.protector: Protector = plugin.build("sparsifiers", "superweight")
        self.feeds = recovery.given
        self.moved = np.arange(analysis.labels)  # label whose positions come where this one's were
        self.names: set[str] = set()
        self.rewrites: list[str] = []
        self.warnings: list[str] = []
        self.by: dict[str, str] = {}  # {initializer: what chose its weights}

    @cached_property
    def layers(self) -> list[Layer]:
        """Every layer of the model; where a weight has the pattern nothing else depends on the order of steps."""
        return nm.find_layers(self.model, self.analysis.given, self.nm, self.options.ignore)

    @property
    def free(self) -> list[Layer]:
        """Layers that get the pattern."""
        return [layer for layer in self.layers if not layer.reason]

    def result(self) -> Sparse:
        """See `sparsified`."""
        if not self.free:
            raise ImpossibleError(f"no weight can be {self.nm}: {_reasons(self.layers)}",
                                  file=self.analysis.source.path)  # fmt: skip
        permuted = self._permuted() if self.permuter is not None else []
        protected = self._protected() if self.feeds else {}
        self._thin(protected)
        if left := nm.broken(self.model, self.nm, {(one.initializer, one.axis) for one in self.free}):
            raise InternalError(f"is not {self.nm} after all", file=self.analysis.source.path, object=left[0])
        row = self._row(permuted, protected)
        told = self.warnings + _warnings(row, self.options)
        return Sparse(self.model, sorted(self.names), self.rewrites, row, told)

    def _gather(self, requests: Sequence[Request[Any]]) -> Answers:
        """Statistics of the model as it is now."""
        return collect(
            self.worker,
            self.model,
            self.recovery.samples.feeds,
            requests,
            padding=self.recovery.samples.padding,
            seed=self.options.seed,
            budget=self.recovery.memory // SHARE,
            threads=self.options.threads,
            memory=self.recovery.memory,
        )

    @property
    def measured(self) -> list[Layer]:
        """Layers whose inputs statistics can be gathered of."""
        nodes = {str(node.outputs[0].name): node for node in self.model.graph}
        return [one for one in self.free if one.node in nodes and not one.batched]

    @cached_property
    def shelf(self) -> Shelf | None:
        """Where weights of a model lie that does not fit into the memory."""
        return None if self.prover.runner(self.worker).fits(self.analysis.dense) else Shelf()

    # Order

    def _permuted(self) -> list[int]:
        """Bring the units of groups into an order that N:M costs less in; the groups. Nothing else changes."""
        assert self.permuter is not None
        sizes = self._sizes()
        orders: dict[int, Positions] = {}
        for group in self.analysis.groups:
            seats = self._seats(group, sizes)
            if seats:
                order = self.permuter.order(seats, self.nm.n, self.nm.m, self.options.seed)
                if (order != np.arange(len(order))).any():
                    orders[group.id] = order
        if not orders:
            return []
        if not self.prover.feeds:
            self.warnings.append("no order of channels was changed: without inputs that cannot be proven")
            return []
        tried = self._reordered(orders, orders)
        taken = set(orders)
        if tried is None:
            taken -= verify.blame(sorted(orders), lambda ids: self._reordered(orders, ids) is not None)
            tried = self._reordered(orders, taken)
            self.warnings.append(f"the order of groups {sorted(set(orders) - taken)} could not be proven and stays; "
                                 "this is our bug, please report it")  # fmt: skip
        if tried is None or not taken:
            return []
        self.model, names, self.moved = tried
        self.names |= set(names)
        self.rewrites += [f"units of group {k} in another order" for k in sorted(taken)]
        del self.layers
        return sorted(taken)

    def _reordered(
        self, orders: Mapping[int, Positions], ids: Collection[int]
    ) -> tuple[Model, list[str], Positions] | None:
        """(model, initializers that changed, labels) with the units of these groups in order; None if not proven."""
        moved = np.arange(self.analysis.labels)
        for group in self.analysis.groups:
            if group.id in ids:
                units = group.units[self.alive[group.units]]
                moved[units] = units[orders[group.id]]
        try:
            model, names = permute(self.model, self.analysis.view, lambda axis: self._order(axis, moved))
            rows = self.prover.compare(self.worker, self.model, model)
        except (InternalError, InputError):
            return None
        return (model, names, moved) if all(row.holds for row in rows) else None

    def _order(self, axis: Axis, moved: Positions) -> Positions | None:
        """int64[positions]: which of the positions that are left comes where; None where none moves."""
        labels = self.analysis.dims.labels_of(axis)
        if labels is None:
            return None
        labels = labels[self.alive[labels]]
        if (moved[labels] == labels).all():
            return None
        places = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[places], labels)
        rank = np.empty(len(labels), np.int64)
        rank[places] = np.arange(len(labels))
        return np.asarray(places[np.searchsorted(labels[places], moved[labels]) + rank - starts])

    def _seats(self, group: Group, sizes: Mapping[str, Array]) -> list[Seat]:
        """What the layers that are to have the pattern read of a group's units; none where order means something."""
        if group.kind == "layers" or any(member.role == "index" for member in group.members):
            return []
        alive = self.alive[group.units]
        stored = initializers(self.model.graph)
        found = []
        for member in group.members:
            every = [one for one in self.free if one.slot in member.readers and one.axis == member.axis]
            labels = self.analysis.dims.labels_of(Axis(member.value, member.axis))
            if not every or labels is None or len(member.positions) != len(group.units) or alive.sum() < 2:
                continue
            behind = np.cumsum(self.alive[labels]) - 1
            places = np.empty(len(group.units), np.int64)
            places[member.units] = behind[member.positions]
            for one in every:
                weight = np.abs(np.moveaxis(verify.meant(stored[one.initializer]), one.axis, 0))
                weight = weight.reshape(len(weight), -1)
                if one.node in sizes:
                    weight = weight * _spread(sizes[one.node], one, weight)
                found.append(Seat(weight.astype(np.float32), places[alive]))
        return found

    def _sizes(self) -> dict[str, Array]:
        """{node: norm of each column that it reads}; nothing without calibration data."""
        wanted = {one.node: ProfileOf(Reads(one.node)) for one in self.measured}
        if not self.feeds or not wanted:
            return {}
        found = self._gather(list(wanted.values()))
        return {node: found[request].l2 for node, request in wanted.items()}

    # Protection

    def _protected(self) -> dict[Slot, list[tuple[int, int]]]:
        """{weight: (column, output) of what must stay}: looked for anew with what was found at zero."""
        layers = {one.node: one for one in self.measured if one.slot in self._operators}
        found: dict[Slot, list[tuple[int, int]]] = {}
        whole = self.model
        for _ in range(ROUNDS if layers else 0):
            wanted = {
                node: (ProfileOf(Reads(node)), ProfileOf(Columns(node, 1 if one.op_type == "Conv" else -1)))
                for node, one in layers.items()
            }
            answers = self._gather([request for pair in wanted.values() for request in pair])
            peaks = [plugin.Peak(node, answers[x].largest, answers[y].largest) for node, (x, y) in wanted.items()]
            fresh = [
                (node, column, output)
                for node, column, output in self.protector.protect(peaks)
                if (column, output) not in found.get(layers[node].slot, [])
            ]
            if not fresh:
                break
            self.model = self.model.clone()
            for node, column, output in fresh:
                found.setdefault(layers[node].slot, []).append((column, output))
                _silence(self.model, layers[node], column, output)
        self.model = whole
        return found

    # Weights

    @cached_property
    def _operators(self) -> dict[Slot, Site]:
        """The sites of the weights that can be fitted."""
        free = {one.slot for one in self.free}
        return {operator.weight: site for site in self._sites for operator in site.operators if operator.weight in free}

    @cached_property
    def _sites(self) -> list[Site]:
        """Where the model can be fitted to the dense one, in its present order."""
        shapes = self.analysis.view.shapes

        def keep(axis: Axis) -> Mask:
            return keep_of(self.analysis.dims, self.alive, axis, shapes[axis.value][axis.index])

        dense = self.analysis.prepared.model
        sites = find_sites(self.model, dense, shapes, keep, self.recovery.stays)
        return [turned for site in sites if (turned := self._turned(site, keep)) is not None]

    def _turned(self, site: Site, keep: Callable[[Axis], Mask]) -> Site | None:
        """A site that aims at the dense positions in the order of the permuted model; None where that is not known."""
        axes = [Axis(site.dense, axis) for axis in site.axes] if site.order is None else [site.order]
        orders = [self._order(axis, self.moved) for axis in axes]
        if all(order is None for order in orders):
            return site
        order = orders[0]
        return replace(site, kept=np.flatnonzero(keep(axes[0]))[order]) if site.dense and len(axes) == 1 else None

    def _thin(self, protected: Mapping[Slot, Sequence[tuple[int, int]]]) -> None:
        """Choose weights, and repair where there is data."""
        fitted = self._operators if self.feeds else {}
        self._by_weight([one for one in self.free if one.slot not in fitted])
        if not fitted:
            return
        slots = {}
        for one in self.free:
            if one.slot in fitted:
                places = np.array(protected.get(one.slot, ()), np.int64).reshape(-1, 2)
                slots[one.slot] = places[:, 0], places[:, 1]
                self.by[one.initializer] = self.name
        thin = Thinning(self.nm.n, self.nm.m, self.sparsifier, self.repair, slots)
        samples, options = self.recovery.samples, self.options
        reconstruct.begin(
            self.worker,
            self.analysis.prepared.model,
            samples.feeds,
            samples.sampling(),
            threads=options.threads,
            memory=self.recovery.memory,
        )
        found = reconstruct.repair(
            self.worker,
            self.model,
            self._sites,
            thin,
            progress=lambda done, total: self.recovery.progress("thin out", done, total),
        )
        self.names |= set(reconstruct.apply(self.model, found.changes))
        left = set(nm.broken(self.model, self.nm, {(one.initializer, one.axis) for one in self.free}))
        self._by_weight([one for one in self.free if one.initializer in left])

    @cached_property
    def repair(self) -> Reconstructor | None:
        """What repairs the weights that are kept: what the user names if it knows masks, else admm."""
        built = self.recovery.reconstructor
        if built is None or not self.feeds:
            return None
        return built if trait(built, "masked") else plugin.build("reconstructors", "admm")

    def _by_weight(self, layers: Sequence[Layer]) -> None:
        """Give weights the pattern by what they are: by magnitude, where the sparsifier needs more than that."""
        alone = not trait(self.sparsifier, "calibrated")
        name = self.name if alone else "nm-mag"
        sparsifier = self.sparsifier if alone else plugin.build("sparsifiers", name)
        stored = initializers(self.model.graph)
        for one in {layer.initializer: layer for layer in layers}.values():
            value = stored[one.initializer]
            assert value.const_value is not None
            array = nm.thinned(value, one.axis, self.nm, sparsifier)
            if array.tobytes() != value.const_value.tobytes():
                nm.put(value, array, self.shelf if array.nbytes > LEAST else None)
                self.names.add(one.initializer)
            self.by[one.initializer] = name

    # What is told

    def _times(self) -> dict[str, float]:
        """{node: ms of it alone, dense}, on the backend of the options; nothing where they do not measure."""
        options, analysis = self.options, self.analysis
        if not options.measure or options.dry_run or not self.prover.feeds:
            return {}
        if not self.prover.runner(self.worker).fits(analysis.dense) or bfloat.computes(analysis.dense):
            return {}
        self.recovery.progress("measure operators")
        shapes = cost_shapes(analysis.prepared.model, analysis.given, analysis.view.shapes)
        operators = timing.Operators(analysis, dict(shapes), np.zeros(analysis.labels, np.bool_))
        with pace.alone(options, cache.opened(options.cache, options.no_cache)) as clock:
            return timing.singly(operators, clock, self.alive)

    def _row(self, permuted: Sequence[int], protected: Mapping[Slot, Sequence[tuple[int, int]]]) -> reports.SparsityRow:
        stored = initializers(self.model.graph)
        times = self._times()
        rows = []
        for one in self.layers:
            expected, why = nm.kernel(one, self.nm)
            dense = bool(one.reason)
            rows.append(
                reports.LayerRow(
                    node=one.name,
                    op=one.op_type,
                    initializer=one.initializer,
                    axis=one.axis,
                    inputs=one.inputs,
                    outputs=one.outputs,
                    type=one.type,
                    macs=one.macs,
                    sparse=not dense,
                    density=1.0 if dense else float(nm.nonzero(stored[one.initializer]).mean()),
                    criterion="" if dense else self.by[one.initializer],
                    reason=one.reason,
                    kernel=expected,
                    why=why,
                    ms=times.get(one.node),
                )
            )
        total = sum(row.macs for row in rows) or 1
        names = {one.slot: one.initializer for one in self.free}
        chosen = [row.criterion for row in rows if row.sparse]  # of the name, or by magnitude
        return reports.SparsityRow(
            pattern=str(self.nm),
            criterion=self.name if self.name in chosen else chosen[0],
            repair=None if self.repair is None else type(self.repair).__name__.lower(),
            sparse_macs=sum(row.macs for row in rows if row.sparse) / total,
            kernel_macs=sum(row.macs for row in rows if row.kernel) / total,
            permuted=list(permuted),
            protected=[(names[slot], column, output) for slot, every in protected.items() for column, output in every],
            layers=rows,
        )


def timed(row: reports.SparsityRow, whole: float) -> reports.SparsityRow:
    """The row with shares of time; `whole` is what the model takes, in ms, or the layers one by one if that is more."""
    known = [(layer, layer.ms) for layer in row.layers if layer.ms is not None]
    if not known:
        return row
    whole = max(whole, sum(ms for _, ms in known)) or 1.0
    return row.model_copy(
        update={
            "layers": [
                layer.model_copy(update={"time": None if layer.ms is None else layer.ms / whole})
                for layer in row.layers
            ],
            "sparse_time": sum(ms for layer, ms in known if layer.sparse) / whole,
            "kernel_time": sum(ms for layer, ms in known if layer.kernel) / whole,
        }
    )


def _reasons(layers: Sequence[Layer]) -> str:
    """Why layers stay dense, the most frequent reasons first."""
    every = [layer.reason for layer in layers]
    if not every:
        return "no operator multiplies by a weight"
    ordered = sorted(set(every), key=lambda reason: (-every.count(reason), reason))
    return "; ".join(f"{reason} ({every.count(reason)})" for reason in ordered[:3])


def _spread(sizes: Array, layer: Layer, weight: Array) -> Array:
    """float64[inputs, places and outputs]: the norms of an operator's columns for each element of its weight."""
    if layer.op_type != "Conv":
        return sizes[:, None]
    own = np.broadcast_to(sizes.reshape(layer.inputs, 1, layer.taps), (layer.inputs, layer.outputs, layer.taps))
    return own.reshape(weight.shape)


def _silence(model: Model, layer: Layer, column: int, output: int) -> None:
    """Put one weight of a layer at zero."""
    value = initializers(model.graph)[layer.initializer]
    assert value.const_value is not None
    array: Array = value.const_value.numpy()
    whole = np.moveaxis(np.arange(array.size).reshape(array.shape), layer.axis, 0)
    place = whole.reshape(layer.inputs, layer.outputs, layer.taps)[column // layer.taps, output, column % layer.taps]
    left = np.where(np.arange(array.size).reshape(array.shape) == place, nm.zero(value, array), array)
    nm.put(value, left)


def _warnings(row: reports.SparsityRow, options: Options) -> list[str]:
    """What a user of the model should not expect."""
    found = []
    if row.kernel_macs < HALF:
        found.append(f"sparse kernels are to be expected for {row.kernel_macs:.1%} of the MACs only; "
                     "the table of layers says why")  # fmt: skip
    if options.backend in ("cpu", "openvino"):
        found.append(f"zeros bring no speed on {options.backend}: they cost as much there as other weights")
    others = {layer.criterion for layer in row.layers if layer.sparse} - {row.criterion}
    if others:
        count = sum(layer.sparse and layer.criterion in others for layer in row.layers)
        found.append(
            f"{count} layers were thinned out by {', '.join(sorted(others))}: their inputs cannot be fitted to, "
            "or not within --memory"
        )
    return found
