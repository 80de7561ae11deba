"""Labels -> units and groups: what can go, where each unit lives in the initializers, and what stays and why."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from onnxprune.dims import DimGraph
from onnxprune.types import Axis, Frozen, Group, Mask, Member, Positions, Stored, View


def find_groups(dims: DimGraph, view: View) -> tuple[Group, ...]:
    """Units that touch the same axes with the same number of positions form a group; ids follow the graph's order."""
    homes = _homes(dims, view)
    free = _free(dims, homes)
    if not free.any():
        return ()
    signature = _signatures(dims)
    labels = np.flatnonzero(free)
    _, first, which = np.unique(signature[:, labels], axis=1, return_index=True, return_inverse=True)
    position = np.full(len(free), len(dims.labels))
    np.minimum.at(position, dims.labels, np.arange(len(dims.labels)))
    start = np.full(len(first), len(dims.labels))
    np.minimum.at(start, which, position[labels])
    group_of = np.full(len(free), -1)
    group_of[labels] = np.argsort(np.argsort(start))[which]
    members_of = np.argsort(group_of[labels], kind="stable")
    units = np.split(labels[members_of], np.cumsum(np.bincount(group_of[labels]))[:-1])
    unit_of = np.zeros(len(free), np.int64)
    for members in units:
        unit_of[members] = np.arange(len(members))
    homed = _members(homes, group_of, unit_of)
    kinds = _kinds(dims, group_of, len(units))
    nodes = _nodes(view)
    least = [1] * len(units)
    for c, count in dims.least.items():
        for k in _groups_of_class(dims, group_of, c):
            least[k] = max(least[k], min(count, len(units[k])))
    return tuple(
        Group(
            id=k,
            kind=kinds[k][0],
            units=units[k],
            members=tuple(homed[k]),
            mixing=kinds[k][1],
            unit_positions=tuple(sorted({len(m.positions) // len(units[k]) for m in homed[k]})),
            nodes=tuple(sorted({nodes[use] for m in homed[k] for use in m.readers if use in nodes})),
            least=least[k],
        )
        for k in range(len(units))
    )


def _homes(dims: DimGraph, view: View) -> list[tuple[Stored, str, int, Positions]]:
    """(initializer, its name for coupling, axis, labels) of every initializer axis."""
    found = []
    for name, stored in view.stored.items():
        for axis in range(len(stored.shape)):
            labels = dims.labels_of(Axis(name, axis))
            if labels is not None:
                found.append((stored, name, axis, labels))
    return found


def _free(dims: DimGraph, homes: list[tuple[Stored, str, int, Positions]]) -> Mask:
    """bool[labels]: may go, and at least one weight shrinks with it."""
    has_weight = np.zeros(len(dims.frozen), np.bool_)
    for stored, _, _, labels in homes:
        if stored.role in ("weight", "norm", "bias"):
            has_weight[labels] = True
    axes = np.repeat(np.bincount(dims.classes, minlength=len(dims.offsets) - 1), np.diff(dims.offsets))
    alone = np.bincount(dims.labels, axes, len(dims.frozen)) == 1
    for stored, _, _, labels in homes:
        if stored.shared:  # of use to other readers only: a copy without it would save nothing
            has_weight[labels[alone[labels]]] = False
    return has_weight & (dims.frozen < 0)


def _signatures(dims: DimGraph) -> Positions:
    """int64[2, labels]: hash of the classes that a label touches, and how often."""
    random = np.random.default_rng(0)
    sizes = np.diff(dims.offsets)
    sums = []
    for _ in range(2):  # integers below 2^31 keep float64 sums exact
        code = random.integers(1, 2**31, len(sizes)).astype(np.float64)
        sums.append(np.bincount(dims.labels, np.repeat(code, sizes), len(dims.frozen)).astype(np.int64))
    return np.stack(sums)


def _members(
    homes: list[tuple[Stored, str, int, Positions]], group_of: Positions, unit_of: Positions
) -> dict[int, list[Member]]:
    found: dict[int, list[Member]] = defaultdict(list)
    for stored, name, axis, labels in homes:
        groups = group_of[labels]
        for k in np.unique(groups[groups >= 0]):
            at = np.flatnonzero(groups == k)
            found[int(k)].append(
                Member(
                    name,
                    stored.initializer,
                    stored.uses,
                    stored.shared,
                    axis,
                    at,
                    unit_of[labels[at]],
                    stored.role,
                    stored.slot,
                )
            )
    return found


def _kinds(dims: DimGraph, group_of: Positions, count: int) -> list[tuple[str, tuple[str, ...]]]:
    """(kind, mixing ops) of each group, from marks on the classes that it touches."""
    kinds = [("channels", list[str]()) for _ in range(count)]
    for c in sorted(dims.inner):
        for k in _groups_of_class(dims, group_of, c):
            kinds[k] = ("head-dim", kinds[k][1])
    for c, stacked in dims.batch.items():
        for k in _groups_of_class(dims, group_of, c):
            kinds[k] = ("experts" if stacked else "heads", kinds[k][1])
    for c, texts in sorted(dims.mixing.items()):
        for k in _groups_of_class(dims, group_of, c):
            kinds[k][1].extend(texts)
    return [(kind if kind != "channels" or not mixing else "width", tuple(mixing)) for kind, mixing in kinds]


def _groups_of_class(dims: DimGraph, group_of: Positions, c: int) -> list[int]:
    groups = np.unique(group_of[dims.labels[dims.offsets[c] : dims.offsets[c + 1]]])
    return [int(k) for k in groups if k >= 0]


def _nodes(view: View) -> dict[tuple[str, int], str]:
    """{reader: name of the node}, for `--ignore` and reports."""
    return {(node.outputs[0], k): node.name or node.outputs[0] for node in view.nodes for k in range(len(node.inputs))}


def find_frozen(dims: DimGraph, view: View, groups: tuple[Group, ...], chosen: frozenset[int]) -> list[Frozen]:
    """Initializer axes of which something stays that no group of `chosen` may remove, and why; no index tables."""
    mixing = {label: "; ".join(g.mixing[:2]) for g in groups if g.id not in chosen for label in g.units.tolist()}
    found: dict[Axis, Frozen] = {}
    for stored, name, index, labels in _homes(dims, view):
        axis = Axis(name.split("\0")[0], index)
        if stored.role == "index" or axis in found:
            continue
        reasons = [reason for label in np.unique(labels)[:64] if (reason := dims.reason(int(label)))]
        reasons += [f"{text} mixes its positions" for label in labels[:1] if (text := mixing.get(int(label)))]
        if reasons:
            found[axis] = Frozen(axis, reasons[0], int(np.prod(stored.shape, dtype=np.int64)))
    return list(found.values())
