"""N:M: which weights can have it and along which axis, whether they do, and where a sparse kernel is to be expected.

Hardware reads a weight along the axis that is summed over: the input channels of a convolution, at every place of its
kernel by itself, or the inner axis of a matrix product. Every M consecutive positions hold at most N that are not zero;
of integers, zero is the zero point. A weight is followed from its operator back to what is stored.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm, prod

import numpy as np
import onnx_ir as ir

from onnxprune.cost import mac_terms
from onnxprune.errors import InputError
from onnxprune.infer import attributes, initializers, walk
from onnxprune.model import Model, prepare, view
from onnxprune.operators import Slot
from onnxprune.plugin import Runs, Sparsifier
from onnxprune.probes import cost_facts
from onnxprune.types import Array, Mask, OpNode, Shape
from onnxprune.verify import meant, zero_of
from onnxprune.weights import Shelf, shelved

MOST = 32  # the largest M
CODES = ("INT8", "UINT8")
FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")
CHUNK = 1 << 22  # weights that are looked at together
THROUGH = frozenset("Identity Cast Transpose QuantizeLinear DequantizeLinear".split())  # a zero stays one
WORTH = 256  # inputs (times the places of the kernel) and outputs below which dense kernels are as fast
MULTIPLE = {"FLOAT16": 16, "BFLOAT16": 16, "INT8": 32}


@dataclass(frozen=True)
class NM:
    """At most n of every m consecutive weights are not zero."""

    n: int
    m: int

    @classmethod
    def parse(cls, text: str) -> NM:
        """From `2:4`. Raises InputError."""
        n, colon, m = text.partition(":")
        if not colon or not all(part.isascii() and part.isdigit() and len(part) < 4 for part in (n, m)):
            raise InputError("expected N:M, as in 2:4", object=f"--pattern {text}")
        if not 1 <= int(n) < int(m) <= MOST:
            raise InputError(f"1 <= N < M <= {MOST}", object=f"--pattern {text}")
        return cls(int(n), int(m))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def densest(self, window: int) -> int:
        """How many are not zero at most in an aligned window of this many."""
        return max(
            sum(
                min(self.n, min(start + window, run + self.m) - max(start, run))
                for run in range(start // self.m * self.m, start + window, self.m)
            )
            for start in range(0, lcm(self.m, window), window)
        )

    def held(self, nonzero: Mask, axis: int) -> bool:
        """Whether a weight has the pattern along an axis; nonzero bool[...]."""
        moved = np.moveaxis(nonzero, axis, -1)
        return bool((moved.reshape(-1, self.m).sum(axis=1) <= self.n).all())


@dataclass(frozen=True)
class Layer:
    """A node that multiplies by a stored weight, or would, and why it stays dense if it does.

    `axis` of `initializer` is summed over; `slot` is what reads the initializer, `inputs` are the channels summed over
    at each of `taps` places. `type` is the weight's as the node gets it, `codes` say that it is stored as integers, and
    `quantised` that the node's other operand is quantised as well.
    """

    node: str
    name: str
    op_type: str
    macs: int
    reason: str = ""
    initializer: str = ""
    axis: int = 0
    slot: Slot = ("", 0)
    inputs: int = 0
    taps: int = 1
    outputs: int = 0
    batched: bool = False
    type: str = ""
    codes: bool = False
    quantised: bool = False


# Which weights -------------------------------------------------------------------------------------------------------


def find_layers(model: Model, given: Mapping[str, int], nm: NM, ignore: Sequence[str] = ()) -> list[Layer]:
    """Every node that costs multiplications or looks rows up, in order; MACs at the given sizes, else the usual."""
    prepared = prepare(model.clone(), given)
    seen = view(prepared)
    shapes = cost_facts(prepared.model, given, seen.shapes).shapes
    nodes = {str(node.outputs[0].name): node for node in walk(prepared.model.graph)}
    found = []
    for node in seen.nodes:
        macs = _macs(node, shapes)
        real = nodes[node.outputs[0]]
        layer = Layer(node.outputs[0], node.name or node.outputs[0], node.op_type, macs)
        if node.op_type == "Gather" and _is_table(real):
            found.append(replace(layer, reason="an embedding is looked up, not multiplied"))
        elif macs:
            found.append(_layer(layer, node, real, nm))
    return _ignored(_agreed(found, prepared.model, nodes), ignore)


def _macs(node: OpNode, shapes: Mapping[str, Shape]) -> int:
    if any(name and name not in node.shapes for name in (*node.inputs, *node.outputs)):
        return 0
    sizes = [[shapes.get(a.value, node.shapes[a.value])[a.index] for a in axes] for axes in mac_terms(node)]
    return sum(prod(each) for each in sizes)


def _is_table(node: ir.Node) -> bool:
    value = node.inputs[0]
    known = value is not None and value.const_value is not None and value.const_value.dtype.name in FLOATS
    return bool(known and len(value.shape or ()) == 2)  # type: ignore[union-attr]


def _layer(layer: Layer, node: OpNode, real: ir.Node, nm: NM) -> Layer:
    """The layer with its weight, or with the reason why it stays dense."""
    if node.domain or node.op_type not in ("Conv", "Gemm", "MatMul"):
        return replace(layer, reason=f"no sparse kernel reads the weights of {node.op_type}")
    if node.within:
        return replace(layer, reason="it lies inside the body of another node")
    traced = [(k, found) for k, axis in _sides(node) if not isinstance(found := _trace(real, k, axis), str)]
    if not traced:
        texts = [str(_trace(real, k, axis)) for k, axis in _sides(node)]
        computed = [text for text in texts if text]
        return replace(layer, reason=computed[0] if computed else "it multiplies two activations")
    k, (value, axis, slot, codes, kind) = traced[0]
    array = value.const_value
    assert array is not None
    shape = tuple(int(size) for size in array.shape.numpy())
    size, taps = shape[axis], 1 if node.op_type != "Conv" else prod(shape[2:])
    other = real.inputs[1 - k].producer() if real.inputs[1 - k] is not None else None  # type: ignore[union-attr]
    layer = replace(
        layer,
        initializer=str(value.name),
        axis=axis,
        slot=slot,
        inputs=size,
        taps=taps,
        outputs=prod(shape) // max(size * taps, 1),
        batched=node.op_type == "MatMul" and len(shape) > 2,
        type=kind,
        codes=codes,
        quantised=other is not None and other.op_type == "DequantizeLinear",
    )
    if node.op_type == "Conv" and (groups := int(node.attr("group", 1))) != 1:
        kind = "depthwise" if size == 1 else "grouped"
        return replace(layer, reason=f"a {kind} convolution sums over {size} of {size * groups} channels each")
    if array.dtype.name not in (*FLOATS, *CODES):
        return replace(layer, reason=f"no sparse kernel reads {array.dtype.name} weights")
    if size % nm.m:
        return replace(layer, reason=f"{size} inputs are no multiple of {nm.m}")
    return layer


def _sides(node: OpNode) -> list[tuple[int, int]]:
    """(input, axis of it that is summed over) of what may be the weight, the usual one first."""
    if node.op_type == "Conv":
        return [(1, 1)]
    if node.op_type == "Gemm":
        return [(1, 1 if node.attr("transB", 0) else 0), (0, 0 if node.attr("transA", 0) else 1)]
    ranks = [len(node.shape(k)) for k in (0, 1)]
    return [(k, axis) for k, axis in ((1, ranks[1] - 2), (0, ranks[0] - 1)) if ranks[k] > 1]


def _trace(node: ir.Node, k: int, axis: int) -> tuple[ir.Value, int, Slot, bool, str] | str:
    """(initializer, axis of it, its reader, whether codes are stored, type as the node gets it); else why not.

    Nothing is said of what depends on the graph's inputs.
    """
    value, codes, quantised = node.inputs[k], False, False
    slot = (str(node.outputs[0].name), k)
    while value is not None and (maker := value.producer()) is not None:
        if maker.op_type not in THROUGH or maker.domain not in ("", "ai.onnx"):
            return f"its weight is computed by {maker.op_type}" if _constant(value) else ""
        given = attributes(maker)
        if maker.op_type in ("QuantizeLinear", "DequantizeLinear"):
            if given.get("block_size", 0):
                return "its weight is quantised in blocks"
            quantised, codes = True, maker.op_type == "DequantizeLinear"
        elif maker.op_type == "Transpose":
            order = given.get("perm")
            rank = len(value.shape or ()) or axis + 1
            axis = list(order)[axis] if order is not None else rank - 1 - axis  # type: ignore[call-overload]
        slot, value = (str(maker.outputs[0].name), 0), maker.inputs[0]
    if value is None or value.const_value is None:
        return ""
    kind = value.const_value.dtype.name
    codes = codes and kind in CODES
    return value, axis, slot, codes, "INT8" if quantised or kind in CODES else kind


def _constant(value: ir.Value) -> bool:
    """Whether a value follows from what is stored alone."""
    pending, seen = [value], set()
    while pending:
        here = pending.pop()
        if here in seen or here.const_value is not None:
            continue
        seen.add(here)
        node = here.producer()
        if node is None:
            return False
        pending += [each for each in node.inputs if each is not None]
    return True


def _agreed(layers: Sequence[Layer], model: Model, nodes: Mapping[str, ir.Node]) -> list[Layer]:
    """The layers, dense where others read the same weight and not in the same way."""
    readers = defaultdict(list)
    for layer in layers:
        if layer.initializer:
            readers[layer.initializer].append(layer)
    stored = initializers(model.graph)
    why: dict[str, str] = {}
    for name, every in readers.items():
        ends = _ends(stored[name])
        odd = [node for node in ends if node is None or str(node.outputs[0].name) not in {one.node for one in every}]
        dense = next((one.reason for one in every if one.reason), "")
        if odd:
            reader = "the graph's outputs hold it" if odd[0] is None else f"{odd[0].op_type} reads it"
            why[name] = f"its weight is shared: {reader} as well"
        elif len(every) > 1 and (dense or len({one.axis for one in every}) > 1):
            why[name] = f"its weight is shared: {dense or 'another node sums over another axis'}"
    return [
        replace(one, reason=one.reason or why[one.initializer]) if one.initializer in why else one for one in layers
    ]


def _ends(value: ir.Value) -> list[ir.Node | None]:
    """What finally reads an initializer; None stands for the graph's outputs."""
    found: list[ir.Node | None] = [None] if value.is_graph_output() else []
    for node, k in value.uses():
        if node.op_type in THROUGH and k == 0:
            found += [end for out in node.outputs for end in _ends(out)]
        else:
            found.append(node)
    return found


def _ignored(layers: Iterable[Layer], ignore: Sequence[str]) -> list[Layer]:
    """The layers, dense where the user wants it."""
    return [
        replace(one, reason="--ignore")
        if any(fnmatch.filter({one.name, one.node, one.initializer}, pattern) for pattern in ignore)
        else one
        for one in layers
    ]


# The weights themselves ----------------------------------------------------------------------------------------------


def thinned(value: ir.Value, axis: int, nm: NM, sparsifier: Sparsifier) -> Array:
    """The initializer with the pattern along an axis, by a sparsifier that looks at weights alone."""
    assert value.const_value is not None
    array: Array = value.const_value.numpy()
    worth = np.moveaxis(meant(value), axis, 0)
    flat = worth.reshape(len(worth), -1)
    keep = np.ones(flat.shape, np.bool_)
    step = max(1, CHUNK // len(flat))
    for k in range(0, flat.shape[1], step):
        part = flat[:, k : k + step]
        keep[:, k : k + step] = sparsifier.thin(
            Runs(part, nm.n, nm.m, len(flat) // nm.m, np.zeros(part.shape, np.bool_))
        ).keep
    whole = np.moveaxis(keep.reshape(worth.shape), 0, axis)
    return np.ascontiguousarray(np.where(whole, array, zero(value, array)))


def put(value: ir.Value, array: Array, shelf: Shelf | None = None) -> None:
    """Give an initializer other values of its shape and type, which lie on a shelf if there is one."""
    assert value.const_value is not None
    if shelf is None or array.nbytes != value.const_value.nbytes:  # of types below a byte
        value.const_value = ir.Tensor(array, dtype=value.const_value.dtype, name=value.name)
        return
    found = shelved({"": array}, shelf.path)[""]
    found.name = value.name
    shelf.take([found])
    value.const_value = found


def nonzero(value: ir.Value) -> Mask:
    """bool[...]: which elements of an initializer are not zero, of integers not the zero point."""
    assert value.const_value is not None
    array: Array = value.const_value.numpy()
    return np.asarray(array != zero(value, array))


def zero(value: ir.Value, array: Array) -> Array:
    """What zero is for an initializer: for integers the zero point."""
    return zero_of(value, array) if array.dtype.kind in "iu" else np.zeros((), array.dtype)


def broken(model: Model, nm: NM, places: Iterable[tuple[str, int]]) -> list[str]:
    """Of (initializer, axis) that should have the pattern those that are not there or do not."""
    stored = initializers(model.graph)
    return [name for name, axis in places if name not in stored or not nm.held(nonzero(stored[name]), axis)]


# Which of them are faster --------------------------------------------------------------------------------------------


def kernel(layer: Layer, nm: NM) -> tuple[bool, str]:
    """Whether a sparse tensor-core kernel is to be expected for a layer with the pattern, and why (not).

    Hardware reads 2:4 in fp16, bf16 and int8, 1:2 in tf32 (cuSPARSELt, types). Both sizes of the weight are multiples
    of 16 (fp16, bf16), 32 (int8) or 8 (tf32) there; of int8 both operands are quantised. TensorRT has no sparse kernels
    for grouped convolutions (its issue 4054), and takes the dense one where that is as fast: mostly up to 256 channels
    in or out, where a 3x3 convolution counts 9 times as many in (issues 3849, 4065). Whether one is taken shows in the
    engine's layer information only.
    """
    if layer.reason:
        return False, layer.reason
    if nm.densest(4) > 2:
        return False, f"tensor cores read 2:4, of which {nm} is no case"
    if layer.type == "DOUBLE":
        return False, "there are no sparse kernels for DOUBLE"
    tf32 = layer.type == "FLOAT" and nm.densest(2) == 1
    multiple = 8 if tf32 else MULTIPLE.get(layer.type, 16)
    if layer.inputs % multiple or layer.outputs % multiple:
        return False, f"{layer.inputs} x {layer.outputs} are no multiples of {multiple}"
    if layer.inputs * layer.taps < WORTH or layer.outputs < WORTH:
        return False, f"{layer.inputs * layer.taps} x {layer.outputs} is too small to gain"
    if layer.type == "INT8" and not layer.quantised:
        return False, "its weight is quantised, its input is not"
    if layer.batched:
        return False, "its weight is a batch of matrices"
    if layer.type == "FLOAT":
        return True, "in tf32" if tf32 else "once its weight is fp16 or bf16"
    return True, f"in {layer.type.lower()}"
