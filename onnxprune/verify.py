"""The proof: the pruned model must compute what the dense one computes without the removed units.

Without them means: every removed slice of a weight, bias, norm gain or norm shift at zero in the dense model as it
was read. That holds exactly where units are only combined linearly or passed through per-unit functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnxprune import ops
from onnxprune.branches import NOTHING, Dropped
from onnxprune.errors import InternalError
from onnxprune.infer import home, initializers, walk
from onnxprune.masked import Narrowed, narrow
from onnxprune.model import free_name, normalise, write_down
from onnxprune.types import Array, Group, Member, Plan
from onnxprune.weights import LEAST, Mapped, Part

ZEROED = frozenset({"weight", "bias", "norm"})
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2}
COARSEST = {"FLOAT16": "float16"}  # bfloat16 is computed in float32
QUANTISED = 3e-2  # of the output's range: a few steps of eight bits


@dataclass(frozen=True)
class Removal:
    """One slice that went: positions of an initializer's axis, in the names and numbers of the file as it was read.

    `removed` is "all" where nothing of the initializer is left, since it was part of a dropped branch.
    """

    initializer: str
    axis: int
    removed: tuple[int, ...] | Literal["all"]
    role: str
    group: int
    uses: tuple[tuple[str, int], ...] | None = None

    def entry(self) -> dict[str, Any]:
        """As in the report."""
        found: dict[str, Any] = asdict(self) | {
            "removed": self.removed if self.removed == "all" else list(self.removed)
        }
        found["uses"] = [{"node": node, "input": k} for node, k in self.uses or ()]
        if not self.uses:
            del found["uses"]
        return found


def removals(groups: Iterable[Group], plan: Plan, dropped: Dropped = NOTHING) -> list[Removal]:
    """Everything that a plan removes; slices that all readers of a shared initializer lose are listed once.

    What goes with a branch is listed as a whole, and no slice of it apart.
    """
    found = [Removal(name, 0, "all", role, group) for name, (role, group) in dropped.initializers.items()]
    shared: dict[tuple[str, int, int, tuple[int, ...], str], list[Member]] = {}
    for group in groups:
        keep = plan.keep.get(group.id)
        if keep is None or keep.all() or group.kind == "layers":
            continue
        for member in group.members:
            if member.value in dropped.dead:
                continue
            gone = tuple(sorted(member.positions[~keep[member.units]].tolist()))
            if not gone:
                continue
            if member.shared:
                shared.setdefault((member.initializer, member.axis, group.id, gone, member.role), []).append(member)
            else:
                found.append(Removal(member.initializer, member.axis, gone, member.role, group.id))
    for (initializer, axis, group_id, gone, role), members in shared.items():
        readers = tuple(sorted({reader for member in members for reader in member.readers}))
        found.append(Removal(initializer, axis, gone, role, group_id, readers))
    return sorted(found, key=lambda r: (r.group, r.initializer, r.axis, r.uses or ()))


def reference(
    dense: ir.Model,
    gone: Iterable[Removal],
    mixed: Iterable[Narrowed] = (),
    types: Mapping[str, int] | None = None,
    dropped: Dropped = NOTHING,
    constants: Mapping[str, ir.Value] | None = None,
) -> ir.Model:
    """A copy of the dense model, as it was read, with the removed slices at zero (the zero point, for integers).

    Nodes of `mixed` are computed over the survivors alone; `types` are element types of their outputs. What dropped
    branches add is zero too, whatever they compute; outputs that go with them are not compared. `constants` are
    computed values that keep what they are, as initializers: {value: initializer}.
    """
    gone, mixed = list(gone), list(mixed)
    changed = {*(item.node for item in mixed), *(node for node, _, _ in dropped.zeroed), *(constants or ())}
    model = _normal(dense, gone, changed)
    graph = model.graph
    nodes = {str(node.outputs[0].name): node for node in walk(graph)}
    computed = {str(value.name): value for node in walk(graph) for value in node.outputs}
    for name, constant in (constants or {}).items():
        value, tensor = computed[name], constant.const_value
        assert tensor is not None
        write_down(graph, value, str(constant.name), tensor, [(use.node, use.idx) for use in value.uses()])
    values = initializers(graph)
    by_place: dict[tuple[str, tuple[tuple[str, int], ...] | None], list[Removal]] = {}
    for removal in gone:
        if removal.role not in ZEROED or removal.removed == "all":
            continue
        readers = [removal.uses] if not removal.uses else [(use,) for use in removal.uses]
        for use in readers:
            by_place.setdefault((removal.initializer, use), []).append(removal)
    for (name, uses), entries in by_place.items():
        value = values[name]
        assert value.const_value is not None
        whole = value.const_value
        if isinstance(whole, Mapped) and whole.nbytes > LEAST and whole.dtype.is_floating_point():
            _put(graph, value, Part(whole, name, zeroed=_by_axis(entries)), uses, nodes)
            continue
        array = np.array(whole.numpy(), copy=True)
        for removal in entries:
            at = (slice(None),) * removal.axis + (np.array(removal.removed, np.int64),)
            array[at] = zero_of(value, array)[at] if array.dtype.kind in "iu" else 0
        _put(graph, value, ir.Tensor(array, dtype=whole.dtype, name=name), uses, nodes)
    for reader, k, kind in dropped.zeroed:
        _add_nothing(model, nodes[reader], k, ir.DataType(kind))
    for output in [value for value in graph.outputs if value.name in dropped.outputs]:
        graph.outputs.remove(output)
    narrow(model, mixed, types or {})
    return model


def _by_axis(entries: Iterable[Removal]) -> dict[int, Array]:
    """Everything that goes from each axis."""
    found: dict[int, list[int]] = {}
    for removal in entries:
        assert removal.removed != "all"
        found.setdefault(removal.axis, []).extend(removal.removed)
    return {axis: np.unique(np.array(positions, np.int64)) for axis, positions in found.items()}


def _put(
    graph: ir.Graph,
    value: ir.Value,
    tensor: ir.TensorProtocol,
    uses: Iterable[tuple[str, int]] | None,
    nodes: Mapping[str, ir.Node],
) -> None:
    """Change what an initializer holds, for these readers alone where there are some."""
    if uses is None:
        value.const_value = tensor
        return
    for reader, k in uses:
        own = free_name(graph, f"{value.name}_zeroed")
        copy = ir.Value(name=own, shape=value.shape, type=value.type, const_value=tensor)
        graph.register_initializer(copy)
        nodes[reader].replace_input_with(k, copy)
    if not value.uses() and not value.is_graph_output():  # before IR version 4, what nothing reads cannot be loaded
        (value.graph or graph).initializers.pop(str(value.name))


def _add_nothing(model: ir.Model, node: ir.Node, k: int, dtype: ir.DataType) -> None:
    """Let input `k` of a sum be zeros of the shape that it has, whatever it is (infinities and NaN too)."""
    graph, value = model.graph, node.inputs[k]
    assert value is not None
    zero = node.inputs[k + 2] if node.op_type == "QLinearAdd" else None
    if zero is None:
        name = free_name(graph, "nothing")
        tensor = ir.tensor(np.zeros((), np.float32), name=name) if dtype == ir.DataType.FLOAT else None
        tensor = tensor or ir.tensor(np.zeros((), dtype.numpy()), dtype=dtype, name=name)
        zero = ir.Value(name=name, shape=ir.Shape(()), type=ir.TensorType(dtype), const_value=tensor)
        graph.register_initializer(zero)
    if model.opset_imports.get("", 1) < 8:  # before there was Expand
        made = [ir.node("Mul", [value, zero])]
    else:
        size = ir.node("Shape", [value])
        made = [size, ir.node("Expand", [zero, size.outputs[0]])]
    for fresh in made:
        fresh.outputs[0].name = free_name(graph, f"{value.name}_nothing")
    home(node).insert_before(node, made)
    node.replace_input_with(k, made[-1].outputs[0])


def _normal(dense: ir.Model, gone: Sequence[Removal], changed: set[str]) -> ir.Model:
    """A copy that keeps its functions, if what goes lies outside of them, so that the proof covers inlining."""
    model = dense.clone()
    model.graph.meta.pop("names", None)
    if model.functions:
        normalise(model, inline=False)
        plain = [node for node in walk(model.graph) if node.op_identifier() not in model.functions]
        readers = {str(value.name) for node in plain for value in node.outputs}
        tensors = {name: value.const_value for name, value in initializers(model.graph).items()}
        outside = all(
            (tensor := tensors.get(r.initializer)) is not None
            and tensor.dtype.is_floating_point()
            and all(node in readers for node, _ in r.uses or ())
            for r in gone
            if r.role in ZEROED and r.removed != "all"
        )
        if outside and changed <= readers:
            return model
        model = dense.clone()
    normalise(model)
    return model


SCALELESS = ("ConvInteger", "MatMulInteger")  # what comes out of these is scaled later, all of it alike


def meant(value: ir.Value) -> Array:
    """float64: what an initializer stands for: (codes - zero point) x scale, where its first reader says so.

    Packed codes of MatMulNBits are spread along the last axis.
    """
    assert value.const_value is not None
    array: Array = np.asarray(value.const_value.numpy())
    place = _place(value)
    if place is None or array.dtype.kind not in "iu":
        return array.astype(np.float64)
    node, point, axis = place
    at = 3 if node.op_type == "MatMulIntegerToFloat" else point - 1
    given = node.inputs[at] if node.op_type not in SCALELESS and at < len(node.inputs) else None
    scale = None if given is None or given.const_value is None else np.asarray(given.const_value.numpy(), np.float64)
    codes = array.astype(np.float64)
    if node.op_type == "MatMulNBits":
        bits = _bits(node)
        codes, middle = _codes(array, bits), _codes(_packed_zero(node, array), bits)
        each = 1.0 if scale is None else scale.reshape(*array.shape[:2], 1)
        return np.asarray((codes - middle) * each)
    codes = codes - _aligned(node.inputs[point] if point < len(node.inputs) else None, array, axis)
    return codes if scale is None else codes * spread(scale, array, axis)


def _codes(packed: Array, bits: int) -> Array:
    """float64: the codes of some bits each in bytes, along the last axis."""
    shifts = np.arange(8 // bits, dtype=np.uint8) * bits
    found = (packed.astype(np.uint8)[..., None] >> shifts) & ((1 << bits) - 1)
    return found.reshape(*packed.shape[:-1], -1).astype(np.float64)


def _bits(node: ir.Node) -> int:
    return node.attributes["bits"].as_int() if "bits" in node.attributes else 4


def _place(value: ir.Value) -> tuple[ir.Node, int, int] | None:
    """(reader, input of the zero point, axis that it lies along) of a quantised weight."""
    for node, k in value.uses():
        place = ops.integers_of(node.domain, node.op_type).get(k)
        if place is None:
            continue
        point, axis = place
        if node.op_type == "DequantizeLinear" and "axis" in node.attributes:
            axis = node.attributes["axis"].as_int()
        if node.op_type == "QGemm" and "transB" in node.attributes and node.attributes["transB"].as_int():
            axis = 0
        return node, point, axis
    return None


def zero_of(value: ir.Value, array: Array) -> Array:
    """What zero is for a quantised weight: the zero point that its reader is given."""
    place = _place(value)
    if place is None:
        return np.zeros_like(array)
    node, point, axis = place
    if node.op_type == "MatMulNBits":
        return _packed_zero(node, array)
    return _aligned(node.inputs[point] if point < len(node.inputs) else None, array, axis)


def _aligned(point: ir.Value | None, array: Array, axis: int) -> Array:
    """A zero point spread over an array of which it scales one axis, or the leading and the last one."""
    if point is None or point.const_value is None:
        return np.zeros_like(array)
    return spread(np.asarray(point.const_value.numpy()), array, axis)


def spread(found: Array, array: Array, axis: int) -> Array:
    """One number, one for each position of an axis or of the leading and the last, or one for each block of an axis."""
    if found.ndim == array.ndim > 1 and found.shape != (1,) * array.ndim:
        for k, (size, whole) in enumerate(zip(found.shape, array.shape, strict=True)):
            if size != whole and size > 1:
                found = np.repeat(found, -(-whole // size), axis=k).take(np.arange(whole), axis=k)
        return np.broadcast_to(found, array.shape)
    shape = [1] * array.ndim
    if found.ndim == 2 and array.ndim != 2:
        shape[0], shape[-1] = found.shape
    elif found.size > 1:
        shape[axis] = found.size
    return np.broadcast_to(found.reshape(shape), array.shape)


def _packed_zero(node: ir.Node, array: Array) -> Array:
    """Bytes that stand for zero in MatMulNBits: each block's zero point, by default the middle of its range."""
    bits = _bits(node)
    per_byte = 8 // bits
    given = node.inputs[3].const_value if len(node.inputs) > 3 and node.inputs[3] is not None else None
    point: Array | None = None if given is None else given.numpy()
    codes: Array
    if point is None:
        codes = np.full(array.shape[:2], 1 << (bits - 1), np.uint8)
    elif point.dtype == np.uint8:
        rows = point.reshape(array.shape[0], -1)
        shifts = np.arange(per_byte, dtype=np.uint8) * bits
        codes = ((rows[..., None] >> shifts) & ((1 << bits) - 1)).reshape(len(rows), -1)[:, : array.shape[1]]
    else:
        codes = np.rint(point.reshape(array.shape[:2])).astype(np.uint8)
    filled = sum(codes.astype(np.uint8) << (bits * k) for k in range(per_byte))
    return np.broadcast_to(np.asarray(filled, np.uint8)[..., None], array.shape)


@dataclass(frozen=True)
class Difference:
    """How far one output of the pruned model lies from the reference, relative to the reference's largest value."""

    output: str
    relative: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the difference is numerical noise."""
        return self.relative <= self.tolerance


def tolerance_of(model: ir.Model) -> float:
    """What counts as noise, from the coarsest arithmetic in the model."""
    if any(node.op_type.startswith(("QLinear", "QuantizeLinear", "DynamicQuantize")) for node in walk(model.graph)):
        return QUANTISED
    types = {
        value.const_value.dtype.name for value in initializers(model.graph).values() if value.const_value is not None
    }
    types |= {value.dtype.name for node in walk(model.graph) for value in node.outputs if value.dtype is not None}
    return max(TOLERANCE[COARSEST[t]] if t in COARSEST else TOLERANCE["float32"] for t in types | {"FLOAT"})


def differ(wanted: Mapping[str, Array], found: Mapping[str, Array], tolerance: float) -> list[Difference]:
    """Per output: max |a - b| / max |a| over finite values; for integers and flags the share that differs."""
    rows = []
    for name, a in wanted.items():
        b = found[name]
        if a.shape != b.shape:
            rows.append(Difference(name, float("inf"), tolerance))
        elif (not np.issubdtype(a.dtype, np.number) and a.dtype.name != "bfloat16") or a.dtype.kind in "iu":
            rows.append(Difference(name, float(np.mean(a != b)) if a.size else 0.0, 0.02))
        else:
            x, y = a.astype(np.float64), b.astype(np.float64)
            finite = np.isfinite(x)
            same = bool(np.array_equal(finite, np.isfinite(y)))
            gap = float(np.abs(x[finite] - y[finite]).max(initial=0.0)) if same else float("inf")
            scale = float(np.abs(x[finite]).max(initial=0.0))
            rows.append(Difference(name, gap / max(scale, 1e-12) if gap else 0.0, tolerance))
    return rows


Outputs = Sequence[Mapping[str, Array]]  # of a model, for each feed


def compare(reference: Outputs, pruned: Outputs, tolerance: float) -> list[Difference]:
    """The largest difference of each output over all feeds."""
    worst: dict[str, Difference] = {}
    for wanted, found in zip(reference, pruned, strict=True):
        for row in differ(wanted, found, tolerance):
            if row.output not in worst or not row.relative <= worst[row.output].relative:
                worst[row.output] = row
    return list(worst.values())


def blame(suspects: Sequence[int], holds: Callable[[frozenset[int]], bool]) -> frozenset[int]:
    """The groups of `suspects` whose removal, each by itself or in halves, breaks the proof; never empty."""
    guilty: set[int] = set()
    pending = [tuple(suspects)]
    while pending:
        part = pending.pop()
        if holds(frozenset(part)):
            continue
        if len(part) == 1:
            guilty.add(part[0])
            continue
        middle = len(part) // 2
        halves = (part[:middle], part[middle:])
        if all(holds(frozenset(half)) for half in halves):  # only together: neither may go
            guilty.update(part)
        else:
            pending += halves
    if not guilty:
        raise InternalError("the proof fails, but no group is to blame")
    return frozenset(guilty)
