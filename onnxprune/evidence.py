"""What criteria look at: the weights, and what the operators that read a group are fed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune import plugin
from onnxprune.analysis import Analysis
from onnxprune.calibrate import Gather, Moments, MomentsOf, Reads
from onnxprune.sites import Operator, find_sites
from onnxprune.types import Array, Axis, Group, Mask


def evidence(
    analysis: Analysis, groups: Sequence[Group], seed: int, gather: Gather | None, budget: int
) -> plugin.Evidence:
    """Evidence about these groups; second moments are gathered for as many groups at once as `budget` (bytes) holds."""
    if gather is None:
        return plugin.Evidence(analysis.weights, seed)
    weights = _Operators(analysis)
    moments: dict[str, Moments] = {}

    def fetch(group: Group) -> None:
        start = [g.id for g in groups].index(group.id)
        wanted: dict[str, int] = {}
        for other in groups[start:]:
            new = {o.node: weights.bytes(o) for o, _ in weights.of(other)}
            if wanted and sum((wanted | new).values()) > budget:
                break
            wanted |= new
        moments.clear()
        requests = {node: MomentsOf(Reads(node)) for node in wanted}
        found = gather(list(requests.values()))
        moments.update({node: found[request] for node, request in requests.items()})

    def readers(group: Group) -> list[plugin.Reader]:
        operators = weights.of(group)
        if any(operator.node not in moments for operator, _ in operators):
            fetch(group)
        return [weights.reader(operator, columns, moments[operator.node]) for operator, columns in operators]

    return plugin.Evidence(analysis.weights, seed, readers)


class _Operators:
    """Linear operators of the dense model by the slot of their weight."""

    def __init__(self, analysis: Analysis) -> None:
        self.weights, self.shapes = analysis.weights, analysis.view.shapes

        def whole(axis: Axis) -> Mask:
            return np.ones(self.shapes[axis.value][axis.index], np.bool_)

        model = analysis.prepared.model
        sites = find_sites(model, model, self.shapes, whole)
        self.found = {operator.weight: operator for site in sites for operator in site.operators}
        self.names = {slot: s.initializer for s in analysis.view.stored.values() for slot in s.uses}
        self.free = {
            o.node for s in sites for o in s.operators if o.bias is not None or any(t.kind != "mul" for t in o.steps)
        }

    def of(self, group: Group) -> list[tuple[Operator, Array]]:
        """Operators that sum over units of a group, with the columns int64[units, ...] of each."""
        found = []
        for member in group.members if group.kind != "layers" else ():
            for slot in member.readers:
                operator = self.found.get(slot)
                if operator is None or member.role != "weight" or operator.attrs.get("group", 1) != 1:
                    continue
                shape = self.weights.array(member.initializer).shape
                if member.axis != (1 if operator.op_type == "Conv" or operator.transposed else 0):
                    continue
                patch = int(np.prod(shape[2:])) if operator.op_type == "Conv" else 1
                count = len(group.units)
                if (
                    len(member.positions) % count
                    or (np.bincount(member.units, minlength=count) != len(member.positions) // count).any()
                ):
                    continue
                positions = member.positions[np.argsort(member.units, kind="stable")].reshape(count, -1)
                columns = (positions[:, :, None] * patch + np.arange(patch)).reshape(count, -1)
                found.append((operator, columns))
        return found

    def matrix(self, operator: Operator, initializer: str) -> Array:
        """float64[columns, outputs]."""
        array = self.weights.array(initializer)
        return (
            array.reshape(len(array), -1).T if operator.op_type == "Conv" else array.T if operator.transposed else array
        )

    def bytes(self, operator: Operator) -> int:
        """What an operator's second moments take."""
        return 8 * int(np.prod(self.shape(operator))) ** 2

    def shape(self, operator: Operator) -> tuple[int, ...]:
        """Sizes whose product is the number of columns."""
        name = self.name(operator)
        shape = self.weights.array(name).shape
        return shape[1:] if operator.op_type == "Conv" or operator.transposed else shape[:1]

    def name(self, operator: Operator) -> str:
        """The operator's weight."""
        return self.names[operator.weight]

    def reader(self, operator: Operator, columns: Array, moments: Moments) -> plugin.Reader:
        """The operator as criteria see it."""
        free = operator.node in self.free
        second = moments.xx[0] / max(moments.count, 1)
        if not free:
            second = second + np.outer(moments.mean[0], moments.mean[0])
        return plugin.Reader(operator.node, self.matrix(operator, self.name(operator)), columns, second, free)
