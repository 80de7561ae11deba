"""A model that was read, with everything that coupling says about it: made once, used for any plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from onnxprune import feeds, plugin, storage, verify
from onnxprune import select as selection
from onnxprune.branches import Branches, Dropped, Sides, drop, find_branches, find_caches, with_branches
from onnxprune.cost import Cost, Costs
from onnxprune.dims import DimGraph, couple
from onnxprune.errors import InputError, PruneError
from onnxprune.groups import find_frozen, find_groups
from onnxprune.infer import initializers, true_inputs
from onnxprune.interface import KEY
from onnxprune.masked import narrowed
from onnxprune.model import Graph, Model, Prepared, input_sizes, prepare, view
from onnxprune.probes import cost_facts
from onnxprune.rewrite import apply
from onnxprune.types import Array, Frozen, Group, Mask, Plan, Shape, View
from onnxprune.weights import rows


class Analysis:
    """A model that was read, with everything that coupling says about it; computed once, used for any plan.

    Labels are those of coupling, and after them one for each branch. An axis of heads is cut by heads, or inside every
    head where `remove` names `head-dim` and not `heads`; normalised groups go whole, or in part where `remove` names
    `width` and not `channels`. With `interface`, graph inputs and outputs that lie inside a
    branch may go with it, and caches may lose positions. `read` is the model and its source, where it is not the one in
    the file.
    """

    def __init__(
        self,
        path: str | Path,
        input_shape: Mapping[str, Shape] | None = None,
        *,
        remove: Sequence[str] = (),
        interface: bool = False,
        read: tuple[Model, storage.Source] | None = None,
    ) -> None:
        self.dense, self.source = read or storage.read_model(path)
        self.dense.metadata_props.pop(KEY, None)  # which speaks of another model, that this one was made from
        self.given = named(path, lambda: input_sizes(self.dense, input_shape or {}))
        self.prepared: Prepared = prepare(self.dense.clone(), self.given)
        self.view: View = view(self.prepared)
        inside_heads = "head-dim" in remove and not {"heads", "all"} & set(remove)
        inside_norms = "width" in remove and not {"channels", "all"} & set(remove)
        probes, types = (self.prepared.facts.shapes, self.prepared.other.shapes), self.prepared.facts.types
        around = Sides(self.view, probes, types).around
        caches = find_caches(self.view, probes[0], types) if interface else ()
        self.dims: DimGraph = named(path, lambda: couple(self.view, inside_heads, around, inside_norms, caches))
        self.branches: Branches = find_branches(self.view, probes, types, interface, self.dims.tied)
        coupled = find_groups(self.dims, self.view)
        self.groups: tuple[Group, ...] = with_branches(coupled, self.branches, len(self.dims.frozen))

    @cached_property
    def costs(self) -> Costs:
        """Cost of any set of survivors, MACs at the given sizes (else batch 1 and stated defaults)."""
        return Costs(
            self.dims, self.view, cost_shapes(self.prepared.model, self.given, self.view.shapes), self.branches
        )

    @property
    def labels(self) -> int:
        """How many labels there are: the length of an alive mask."""
        return len(self.dims.frozen) + self.branches.free

    @cached_property
    def weights(self) -> plugin.Weights:
        """The initializers as criteria see them."""
        stored = initializers(self.prepared.model.graph)

        return plugin.Weights(lambda name: verify.meant(stored[name]), lambda name: rows(stored[name].const_value))

    def frozen(self, groups: Sequence[Group]) -> list[Frozen]:
        """What stays and why, if only these groups may shrink."""
        found = find_frozen(self.dims, self.view, self.groups, frozenset(g.id for g in groups))
        return [*found, *self.branches.refused]

    def alive(self, plan: Plan) -> Mask:
        """bool[labels]: what survives a plan."""
        return selection.alive_labels(self.groups, plan, self.labels)

    def dropped(self, alive: Mask) -> Dropped:
        """What goes with the branches of which the labels are not alive."""
        return self.without(self.branches.gone(alive))

    def without(self, goes: Mask) -> Dropped:
        """What goes with these branches (bool[branches])."""
        gone = drop(self.branches, self.groups, goes, len(self.dims.frozen))
        made = {f"{name}_folded" for name in self.prepared.folded}
        return replace(gone, initializers={k: v for k, v in gone.initializers.items() if k not in made})

    def removals(self, plan: Plan) -> list[verify.Removal]:
        """Everything that a plan removes, in the names and positions of the file as it was read."""
        return verify.removals(self.groups, plan, self.dropped(self.alive(plan)))

    def settled(self, plan: Plan) -> Plan:
        """The plan without groups that lie inside dropped branches as a whole: they go with them, not apart."""
        dead = self.dropped(self.alive(plan)).dead
        return Plan({g.id: plan.keep[g.id] for g in self.groups if g.id in plan.keep and not self.inside(g, dead)})

    @staticmethod
    def inside(group: Group, dead: Collection[str]) -> bool:
        """Whether all that a group could shrink goes with dropped branches."""
        return group.kind != "layers" and all(member.value in dead for member in group.members)

    def generates(self) -> bool:
        """Whether token ids go in, and a cache for the next step or the tokens' logits come out."""
        graph = self.prepared.model.graph
        tables = set(feeds.index_bounds(graph).values())
        ends = {self.view.shapes[name][-1] for name in self.view.outputs if len(self.view.shapes.get(name, ())) > 1}
        return bool(tables) and bool(self.branches.caches or tables & ends)

    def rewrite(self, plan: Plan) -> Model:
        """The smaller model of a plan, not yet proven."""
        return apply(self.prepared, self.dims, self.view, self.alive(plan), self.branches)

    def reference(self, gone: Sequence[verify.Removal], alive: Mask) -> Model:
        """The dense model without the units that are not alive, their slices being `gone`."""
        mixed = narrowed(self.dims, self.view, alive)
        constants = self.prepared.constants(removal.initializer for removal in gone)
        return verify.reference(self.dense, gone, mixed, self.prepared.facts.types, self.dropped(alive), constants)


def named(path: str | Path, call: Callable[[], Any]) -> Any:
    """Add the file's name to an error about what is in it."""
    try:
        return call()
    except PruneError as error:
        if error.file:
            raise
        raise error.about(Path(path).name) from None


def cost_shapes(
    model: Model, given: Mapping[str, int], ranks: Mapping[str, Shape] = MappingProxyType({})
) -> dict[str, Shape]:
    """Shapes at which cost is counted and latency measured: as given, else batch 1 and stated defaults.

    `ranks` are shapes of which the lengths do not matter; sizes are preferred at which all have as many axes.
    """
    return cost_facts(model, given, ranks).shapes


def cost_of(model: Model, given: Mapping[str, int], size: int) -> Cost:
    """What a model costs that was written in `size` bytes."""
    prepared = prepare(model.clone(), given)
    seen = view(prepared)
    dims = couple(seen)
    found = Costs(dims, seen, cost_shapes(prepared.model, given, seen.shapes)).of(np.ones(len(dims.frozen), np.bool_))
    return Cost(round(found["params"]), size, round(found["macs"]))


def data_files(*paths: str | Path | None) -> list[Path]:
    """The files of calibration and evaluation data, as far as they are there."""
    found = []
    for path in (Path(path) for path in paths if path is not None):
        found += [path] if path.is_file() else sorted(path.glob("*.npz")) if path.is_dir() else []
    return found


def samples_of(graph: Graph, path: str | None) -> tuple[list[dict[str, Array]], Array | None]:
    """(feeds, labels) of a calibration or evaluation file or folder; nothing without a path."""
    if path is None:
        return [], None
    folder = Path(path)
    wanted = {"labels", *(str(value.name) for value in true_inputs(graph))}
    if folder.is_dir():
        files = data_files(folder)
        if not files:
            raise InputError("the folder holds no .npz file", file=folder.name)
        return [feeds.complete(graph, storage.read_arrays(file, wanted), file.name) for file in files], None
    arrays = storage.read_arrays(path, wanted)
    return feeds.batches(graph, arrays, folder.name), arrays.get("labels")
