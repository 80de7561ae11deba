"""Half precision: which operators compute in it, the casts around them, and what that leaves wide.

As PyTorch's autocast: matrix products compute in half, what sums up or blows up stays in float32, and everything else
follows the widest of its inputs. What leaves the range of the type on data stays in float32 as well, whatever it is.
Inputs and outputs of the model keep their types.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from onnxprune import bfloat, quality
from onnxprune.errors import ImpossibleError, InputError, InternalError, PruneError, shown
from onnxprune.infer import bodies, graphs, home, walk
from onnxprune.model import Model, add_initializer, free_name, normalise
from onnxprune.runtime import ort
from onnxprune.storage import dump, read_model
from onnxprune.types import Array, Signature
from onnxprune.worker import Worker

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
HALVES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
NORMAL = {"fp16": (2.0**-14, 65504.0), "bf16": (2.0**-126, 3.38e38)}  # magnitudes that keep all their bits
BFLOAT = 13  # operator set from which on values can be cast to bfloat16
MARGIN = 4.0  # between what was seen on data and the largest number of the type
PRODUCTS = frozenset(
    """Attention Conv ConvTranspose DeformConv Einsum FusedConv FusedGemm FusedMatMul Gemm GroupQueryAttention MatMul
    MultiHeadAttention""".split()
)
# Sums over many, poles, powers, numbers that count something; and recurrences, of which ONNX Runtime has no half ones.
WIDE = frozenset(
    """Acos Asin Cosh CumSum DequantizeLinear EmbedLayerNormalization Exp GRU GroupNorm GroupNormalization
    InstanceNormalization LRN LSTM LayerNormalization Log LogSoftmax LpNormalization MeanVarianceNormalization Pow
    QuantizeLinear RMSNormalization RNN Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMean
    ReduceProd ReduceSum ReduceSumSquare SimplifiedLayerNormalization Sinh SkipLayerNormalization
    SkipSimplifiedLayerNormalization Softmax Softplus Tan""".split()
)
Run = Callable[[str, Sequence[Mapping[str, Array]], Sequence[str] | None], list[dict[str, Array]]]


@dataclass(frozen=True)
class Cast:
    """A model in another precision; `kept` are operators that were kept out, by their first output.

    `half` are those that compute in it, `copies` initializers that were added because others read the original in
    float32: {name: original}.
    """

    model: Model
    kept: tuple[str, ...] = ()
    half: frozenset[str] = frozenset()
    copies: Mapping[str, str] = field(default_factory=dict)


def check(precision: str, among: Sequence[str] = PRECISIONS) -> str:
    """Raise InputError for a precision that is not among these."""
    if precision not in among:
        raise InputError(f"unknown precision; there are {', '.join(among)}", object=f"--precision {precision}")
    return precision


def foreign(model: Model) -> list[tuple[str, str]]:
    """(domain, operator) of what ONNX itself does not define."""
    return sorted({(n.domain, n.op_type) for n in walk(model.graph) if n.domain not in ("", "ai.onnx", "ai.onnx.ml")})


def cast(
    model: Model,
    precision: str,
    types: Mapping[str, int],
    signatures: Mapping[tuple[str, str], Signature],
    *,
    ranges: Mapping[str, float] | None = None,
    kept: Collection[str] | None = None,
    strict: bool = True,
) -> Cast:
    """A copy of a model that computes in half precision where that is safe.

    `types` are ONNX element types by value, `signatures` those of operators of other domains, `ranges` the largest
    magnitude of values on data. With `kept` these operators stay as they are and nothing is judged: what an earlier
    cast did is done again. Not `strict`: what may compute in fp16 by the operator sets of the model may compute in
    bf16 too, which the sets allow only later.
    """
    model = model.clone()
    normalise(model)
    types = told(model, types, signatures)
    graph, kind = model.graph, HALVES[precision]
    if precision == "bf16" and model.opset_imports.get("", BFLOAT) < BFLOAT:
        raise ImpossibleError(f"bf16 needs operator set {BFLOAT} or later; export the model so, or take fp16")
    spelled = "tensor(bfloat16)" if strict and precision == "bf16" else "tensor(float16)"
    limits = Limits(*NORMAL[precision], ranges)
    half: set[ir.Value] = set()
    slots: dict[ir.Node, list[int]] = {}
    out: list[str] = []
    for node in (node for inner in graphs(graph) for node in inner):  # outer values before the bodies that read them
        signature = signatures.get((node.domain, node.op_type)) or _signature(node, model)
        found = _slots(node, types, signature, spelled) if signature is not None else None
        if found is None or not _wanted(node, found[0], half) or str(node.outputs[0].name) in (kept or ()):
            continue
        given, made = found
        if kept is None and not all(
            limits.hold(value) for value in (*(node.inputs[k] for k in given), *made) if value is not None
        ):
            out.append(str(node.outputs[0].name))
            continue
        slots[node] = given
        half.update(made)
    if not slots:
        raise ImpossibleError(_uncast(graph, types, precision, out))
    chosen = frozenset(str(node.outputs[0].name) for node in slots)
    copies = _insert(graph, slots, half, kind)
    return Cast(model, tuple(sorted(out if kept is None else kept)), chosen, copies)


def _uncast(graph: ir.Graph, types: Mapping[str, int], precision: str, out: Sequence[str]) -> str:
    """Why nothing of a graph was cast; `out` are operators whose values leave the range of the precision."""
    if out:
        return f"no operator of it stays within the range of {precision}; '{shown(out[0])}' is the first that leaves it"
    given = (value for node in walk(graph) for value in node.inputs if value is not None)
    if not any(_type(value, types) == ir.DataType.FLOAT for value in given):
        return f"no operator of it computes in fp32, so nothing is to be cast to {precision}; leave --precision out"
    return f"no operator of it can compute in {precision}: sums and norms stay wide, its operator set forbids others"


def told(model: Model, types: Mapping[str, int], signatures: Mapping[tuple[str, str], Signature]) -> dict[str, int]:
    """Element types of values, where an operator's signature does not deny them."""
    found = dict(types)
    for node in walk(model.graph):
        signature = signatures.get((node.domain, node.op_type))
        for k, value in enumerate(node.outputs if signature is not None and signature.outputs else ()):
            assert signature is not None
            port = signature.outputs[min(k, len(signature.outputs) - 1)]
            kind = found.get(str(value.name))
            if kind == ir.DataType.FLOAT and "tensor(float)" not in signature.allowed.get(port, (port,)):
                del found[str(value.name)]
    return found


@dataclass(frozen=True)
class Limits:
    """Magnitudes that a type can hold, and those of values on data."""

    least: float
    most: float
    ranges: Mapping[str, float] | None

    def hold(self, value: ir.Value) -> bool:
        """Whether a value keeps what it is, or nearly: not too large, and not all of it so small that bits go."""
        if value.const_value is not None:
            array = value.const_value.numpy()
            most, margin = float(np.abs(array).max(initial=0.0)), 1.0
        elif self.ranges is None or str(value.name) not in self.ranges:
            return True
        else:
            most, margin = self.ranges[str(value.name)], MARGIN
        return most == 0 or self.least <= most <= self.most / margin


def _signature(node: ir.Node, model: Model) -> Signature | None:
    """What the operator's schema says of its types; None without one."""
    version = model.opset_imports.get(node.domain)
    if version is None or bodies(node):
        return None
    try:
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    except onnx.defs.SchemaError:
        return None
    return Signature(
        tuple(port.type_str for port in schema.inputs),
        tuple(port.type_str for port in schema.outputs),
        {var.type_param_str: frozenset(var.allowed_type_strs) for var in schema.type_constraints},
    )


def _slots(
    node: ir.Node, types: Mapping[str, int], signature: Signature, spelled: str
) -> tuple[list[int], list[ir.Value]] | None:
    """(inputs, outputs) that would be half; None if the operator cannot, or if some type is not known."""
    kinds: list[tuple[ir.Value | None, str]] = []
    for values, ports in ((node.inputs, signature.inputs), (node.outputs, signature.outputs)):
        kinds += [(value, ports[min(k, len(ports) - 1)] if ports else "") for k, value in enumerate(values)]
    for value, _ in kinds:
        if value is not None and value.name and _type(value, types) is None:
            return None
    count = len(node.inputs)
    chosen = [
        (k, value, port)
        for k, (value, port) in enumerate(kinds)
        if value is not None and value.name and _type(value, types) == ir.DataType.FLOAT and port in signature.allowed
    ]
    given = [(k, port) for k, _, port in chosen if k < count]
    variables = {port for _, port in given}
    if not given or any(spelled not in signature.allowed[port] for port in variables):
        return None
    return [k for k, _ in given], [value for k, value, port in chosen if k >= count and port in variables]


def _type(value: ir.Value, types: Mapping[str, int]) -> ir.DataType | None:
    """The element type of a tensor."""
    if value.dtype is not None:
        return value.dtype if isinstance(value.type, ir.TensorType) else None
    kind = types.get(str(value.name))
    return None if kind is None else ir.DataType(kind)


def _wanted(node: ir.Node, given: Sequence[int], half: Collection[ir.Value]) -> bool:
    """Whether an operator that can compute in half precision should."""
    makers = [value.producer() for value in node.inputs if value is not None]
    if node.op_type in WIDE or any(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers):
        return False  # what is quantised stays so
    computed = [value for k in given if (value := node.inputs[k]) is not None and value.const_value is None]
    moves = any(value is not None and value.const_value is None for value in node.inputs)
    return moves and (node.op_type in PRODUCTS or all(value in half for value in computed))


def _insert(
    graph: ir.Graph, slots: Mapping[ir.Node, Sequence[int]], half: Collection[ir.Value], kind: ir.DataType
) -> dict[str, str]:
    """Give the operators half-precise inputs, and everybody else what they had; {copy of an initializer: original}."""
    suffix = f"_{kind.name.lower()}"
    places = {(node, k) for node, given in slots.items() for k in given}
    ready: dict[ir.Value, ir.Value] = {}
    for node, given in slots.items():
        for k in given:
            value = node.inputs[k]
            assert value is not None
            if value in half:
                continue
            if value not in ready:
                ready[value] = _narrowed(graph, value, places, kind, suffix)
            if ready[value] is not value:
                node.replace_input_with(k, ready[value])
    for value in sorted(half, key=lambda value: str(value.name)):
        _set(value, kind)
        others = [(use.node, use.idx) for use in value.uses() if (use.node, use.idx) not in places]
        producer = value.producer()
        assert producer is not None
        inner = home(producer)
        ends = [k for k, output in enumerate(inner.outputs) if output is value]
        if not others and not ends:
            continue
        name = str(value.name)
        if ends:
            value.name = free_name(graph, name + suffix)
        wide = _cast(graph, value, name if ends else free_name(graph, f"{name}_float"), ir.DataType.FLOAT)
        inner.insert_after(producer, wide.producer())  # type: ignore[arg-type]
        for node, k in others:
            node.replace_input_with(k, wide)
        for k in ends:
            inner.outputs[k] = wide
    stored = {value: made for value, made in ready.items() if value is not made and made.const_value is not None}
    return {str(made.name): str(value.name) for value, made in stored.items()}


def _narrowed(
    graph: ir.Graph, value: ir.Value, places: Collection[tuple[ir.Node, int]], kind: ir.DataType, suffix: str
) -> ir.Value:
    """A float32 value in half precision: an initializer that others do not read in place, else a copy or a cast."""
    if (tensor := value.const_value) is not None and value.is_initializer():
        alone = all((use.node, use.idx) in places for use in value.uses())
        inner = value.graph or graph
        ends = any(value is output for output in inner.outputs)
        name = str(value.name) if alone and not ends else free_name(graph, f"{value.name}{suffix}")
        small = ir.LazyTensor(
            lambda: ir.Tensor(tensor.numpy().astype(kind.numpy()), dtype=kind, name=name),
            dtype=kind,
            shape=ir.Shape(tuple(tensor.shape)),  # type: ignore[arg-type]
            name=name,
        )
        if name == value.name:
            value.const_value = small
            _set(value, kind)
            return value
        copy = ir.Value(name=name, shape=value.shape, type=ir.TensorType(kind), const_value=small)
        add_initializer(inner, copy)
        return copy
    made = _cast(graph, value, free_name(graph, f"{value.name}{suffix}"), kind)
    node = made.producer()
    assert node is not None
    inner = value.graph or graph
    if (producer := value.producer()) is not None:
        inner.insert_after(producer, node)
    else:
        inner.insert_before(inner[0], node)
    return made


def _cast(graph: ir.Graph, value: ir.Value, name: str, kind: ir.DataType) -> ir.Value:
    node = ir.node("Cast", [value], attributes={"to": int(kind)}, name=free_name(graph, f"{name}_cast"))
    made = node.outputs[0]
    made.name, made.shape = name, value.shape
    _set(made, kind)
    return made


def _set(value: ir.Value, kind: ir.DataType) -> None:
    value.type = ir.TensorType(kind)


def widened(model: Model) -> Model:
    """A model that rounds to half precision as this one does, but computes in float32: what any runtime can run.

    Kernels for half precision sum up in float32 too.
    """
    model = model.clone()
    graph = model.graph
    halves = frozenset(HALVES.values())
    for node in walk(graph):
        if node.op_type == "Cast" or bodies(node):
            continue
        for k, value in enumerate(node.inputs):
            if value is not None and value.dtype in halves:
                wide = _cast(graph, value, free_name(graph, f"{value.name}_wide"), ir.DataType.FLOAT)
                home(node).insert_before(node, wide.producer())  # type: ignore[arg-type]
                node.replace_input_with(k, wide)
        for value in node.outputs:
            if (kind := value.dtype) in halves:
                uses = [(use.node, use.idx) for use in value.uses()]
                _set(value, ir.DataType.FLOAT)
                small = _cast(graph, value, free_name(graph, f"{value.name}_small"), kind)
                home(node).insert_after(node, small.producer())  # type: ignore[arg-type]
                for reader, k in uses:
                    reader.replace_input_with(k, small)
    return model


# On data ------------------------------------------------------------------------------------------------------------


def ranges(model: Model, types: Mapping[str, int], feeds: Sequence[Mapping[str, Array]], run: Run) -> dict[str, float]:
    """{value: its largest magnitude on the feeds} of float32 values, infinite where one is not a number."""
    model = model.clone()
    normalise(model)
    graph = model.graph
    values = [v for v in graph.inputs if v.name not in graph.initializers]
    values += [value for node in graph for value in node.outputs if value.name]
    floats = [value for value in values if _type(value, types) == ir.DataType.FLOAT]
    if not floats:
        return {}
    flat = _constant(graph, "flat", np.array([-1], np.int64))
    zero = _constant(graph, "zero", np.zeros(1, np.float32))
    made = {str(value.name): _largest(graph, value, flat, zero) for value in floats}
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        found = run(str(dump(model, folder, "observed")), feeds, list(made.values()))
    most = {name: max(float(row[output].reshape(-1)[0]) for row in found) for name, output in made.items()}
    return {name: value if np.isfinite(value) else float("inf") for name, value in most.items()}


def _constant(graph: ir.Graph, wish: str, array: Array) -> ir.Value:
    name = free_name(graph, wish)
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    add_initializer(graph, value)
    return value


def _largest(graph: ir.Graph, value: ir.Value, flat: ir.Value, zero: ir.Value) -> str:
    """Let the graph compute the largest magnitude of a value, zero for one without elements; the output's name."""
    size = ir.node("Abs", [value])
    row = ir.node("Reshape", [size.outputs[0], flat])
    some = ir.node("Concat", [row.outputs[0], zero], attributes={"axis": 0})
    most = ir.node("ReduceMax", [some.outputs[0]], attributes={"keepdims": 1})
    for node in (size, row, some, most):
        node.outputs[0].name = node.name = free_name(graph, f"{value.name}_largest")
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        graph.append(node)
    most.outputs[0].shape = ir.Shape([1])
    graph.outputs.append(most.outputs[0])
    return str(most.outputs[0].name)


def culprit(
    made: Model, types: Mapping[str, int], wanted: Mapping[str, float], feeds: Sequence[Mapping[str, Array]], run: Run
) -> str:
    """The first value that is finite in float32 (`wanted`, its magnitudes) and not in this model; "" if none is."""
    found = ranges(widened(made), types, feeds, run)  # before each is rounded
    most: dict[ir.DataType | None, float] = {HALVES[name]: limits[1] for name, limits in NORMAL.items()}
    for value in (value for node in made.graph for value in node.outputs):
        name, limit = str(value.name), most.get(value.dtype, float(np.finfo(np.float32).max))
        if np.isfinite(wanted.get(name, 0.0)) and found.get(name, 0.0) > limit:
            return name
    return ""


def infinite(outputs: Sequence[Mapping[str, Array]], wanted: Sequence[Mapping[str, Array]]) -> Iterator[str]:
    """Names of outputs that hold what is not finite where it should be."""
    for row, dense in zip(outputs, wanted, strict=True):
        for name, array in dense.items():
            if name in row and array.dtype.kind == "f":
                should = np.isfinite(array)
                if row[name].shape == array.shape and not np.isfinite(row[name].astype(np.float64))[should].all():
                    yield name


def converted(
    model: Model,
    precision: str,
    types: Mapping[str, int],
    feeds: Sequence[Mapping[str, Array]],
    worker: Worker,
    *,
    threads: int = 1,
    strict: bool = True,
) -> Cast:
    """A model in another precision, judged and calibrated on feeds: half by casts, int8 by Q and DQ, fp32 as it is."""
    if precision == "fp32":
        return Cast(model)
    if bfloat.computes(model):
        raise ImpossibleError(f"it cannot be judged in {precision}: {bfloat.MISSING}")
    if precision == "int8":
        return _quantised(model, feeds, worker)
    run = running(worker, threads)
    signatures = worker.call(ort.signatures, foreign(model))
    seen = ranges(model, told(model, types, signatures), feeds, run) if feeds else None
    made = cast(model, precision, types, signatures, ranges=seen, strict=strict)
    if not strict or precision == "bf16":
        return made
    for others in _retreats(made):
        if (problem := _refused(made.model, worker)) is None:
            break
        kept = {*made.kept, *others}
        if made.half - kept:
            made = cast(model, precision, types, signatures, kept=kept)
    else:
        if (problem := _refused(made.model, worker)) is not None:
            raise ImpossibleError(f"ONNX Runtime cannot take it in {precision}: {problem.message}")
    return made


def _retreats(made: Cast) -> list[set[str]]:
    """Operators to leave in float32 if ONNX Runtime fails on the cast model: few of them, then more.

    It fuses norms in which casts stand that it does not expect, and crashes on some chains of movements.
    """
    nodes = {str(node.outputs[0].name): node for node in walk(made.model.graph)}
    names = {name: node for name in made.half if (node := nodes.get(name) or nodes.get(f"{name}_float16")) is not None}
    edge = {
        name
        for name, node in names.items()
        for value in node.outputs
        for use in value.uses()
        if use.node.op_type == "Cast" and any(reader.node.op_type in WIDE for reader in use.node.outputs[0].uses())
    }
    rest = {name for name, node in names.items() if node.op_type not in PRODUCTS}
    return [edge, rest, edge | rest]


def _refused(model: Model, worker: Worker) -> PruneError | None:
    """Why ONNX Runtime does not load a model; None if it does."""
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        try:
            worker.call(ort.interface, str(dump(model, folder, "half")))
        except (InputError, InternalError) as error:
            return error
    return None


def _quantised(model: Model, feeds: Sequence[Mapping[str, Array]], worker: Worker) -> Cast:
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        target = Path(folder) / "quantised.onnx"
        path = str(dump(model, folder, "whole"))
        worker.call(ort.quantise, path, str(target), [dict(feed) for feed in feeds], model.opset_imports.get("", 0))
        found, _ = read_model(target)
    if not any(node.op_type == "QuantizeLinear" for node in walk(found.graph)):
        raise ImpossibleError("no operator of it can compute in int8")
    return Cast(found)


def running(worker: Worker, threads: int, optimise: bool = True) -> Run:
    """ONNX Runtime on the CPU, in the child process."""

    def run(
        path: str, feeds: Sequence[Mapping[str, Array]], outputs: Sequence[str] | None = None
    ) -> list[dict[str, Array]]:
        rows: list[dict[str, Array]] = worker.call(
            ort.run, path, list(feeds), outputs, threads=threads, optimise=optimise
        )
        return rows

    return run


@dataclass(frozen=True)
class Difference:
    """How far outputs lie from those of the model as it was: relative error of floats, share of equal other entries.

    Either is None where there are no such outputs.
    """

    relative: float | None
    equal: float | None

    def data(self) -> dict[str, float | None]:
        """As in JSON."""
        return {"relative-error": self.relative, "equal": self.equal}

    def holds(self, most: float) -> bool:
        """Whether no more is off than noise explains."""
        return (self.relative is None or self.relative <= most) and (self.equal is None or self.equal >= 1 - most)

    def __str__(self) -> str:
        parts = [] if self.relative is None else [f"outputs differ by {self.relative:.1e}"]
        parts += [] if self.equal is None else [f"{self.equal:.2%} of integers are equal"]
        return ", ".join(parts) or "there is nothing to compare"


def difference(wanted: Sequence[Mapping[str, Array]], found: Sequence[Mapping[str, Array]]) -> Difference:
    """Over all feeds and outputs; infinite, or no entry equal, where an output is missing or has another shape."""
    floats, equal, count = False, 0, 0
    for row, other in zip(wanted, found, strict=True):
        if row.keys() != other.keys() or any(other[name].shape != array.shape for name, array in row.items()):
            return Difference(float("inf"), 0.0)
        for name, array in row.items():
            if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
                floats = True
            else:
                count += array.size
                equal += int(np.count_nonzero(array == other[name]))
    return Difference(quality.relative_error(found, wanted, None) if floats else None, equal / count if count else None)


def rounded(
    made: Model, precision: str, feeds: Sequence[Mapping[str, Array]], worker: Worker, external: bool = False
) -> list[dict[str, Array]]:
    """Outputs of a model whose values are all rounded to its precision.

    ONNX Runtime itself, on the CPU, has no kernels for bfloat16, and leaves values in float32 between some in float16.
    """
    half = precision in HALVES
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        path = str(dump(widened(made) if half else made, folder, "rounded", external=external))
        return running(worker, 1, optimise=not half)(path, feeds, None)


def check_finite(
    wanted: Sequence[Mapping[str, Array]],
    found: Sequence[Mapping[str, Array]],
    made: Model,
    dense: Model,
    types: Mapping[str, int],
    feeds: Sequence[Mapping[str, Array]],
    worker: Worker,
) -> None:
    """Raise ImpossibleError with the first value that is not finite, where an output was finite and is not any more."""
    if bad := next(infinite(found, wanted), None):
        run = running(worker, 1)
        guilty = culprit(made, types, ranges(dense, types, feeds, run), feeds, run)
        raise ImpossibleError("is not finite in this precision, and was in fp32", object=guilty or bad)


def judged(
    model: Model, precision: str, types: Mapping[str, int], feeds: Sequence[Mapping[str, Array]], worker: Worker
) -> tuple[Cast, Difference]:
    """`converted`, with how far that moves the outputs; what was finite on the feeds is so still."""
    made = converted(model, precision, types, feeds, worker)
    if not feeds:
        return made, Difference(None, None)
    wanted, found = rounded(model, "fp32", feeds, worker), rounded(made.model, precision, feeds, worker)
    check_finite(wanted, found, made.model, model, types, feeds, worker)
    return made, difference(wanted, found)
