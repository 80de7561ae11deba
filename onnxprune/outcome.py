"""What one operator gives, from what is known about its inputs: values by the reference implementation, else shapes.

A deep network asks the same of every layer, and of every layer again at other sizes: answers are kept by the question.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from onnx.shape_inference import infer_node_outputs

from onnxprune import ops
from onnxprune.types import Array, OpNode, Shape

VALUE_LIMIT = 1 << 16  # elements of a value that is worth knowing
TERMS = 1 << 22  # products of elements that an operator may have to go through to give such a value
KEPT = 1 << 13  # answers
SHORT = 1 << 13  # bytes of values up to which an answer is kept
STAND_IN_OPSET = 13
PLAIN = frozenset(getattr(ir.AttributeType, name) for name in ("INT", "FLOAT", "STRING", "INTS", "FLOATS", "STRINGS"))
GRAPHS = frozenset((ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS))
Attributes = tuple[tuple[str, int, Any], ...]  # name, kind, and value or message


class Content(NamedTuple):
    """The value of an array, to compare and to hash."""

    dtype: np.dtype[Any]
    shape: Shape
    data: bytes | tuple[Any, ...]

    @classmethod
    def of(cls, array: Array) -> Content:
        """Of an array; strings are kept as they are."""
        return cls(array.dtype, array.shape, tuple(array.flat) if array.dtype.hasobject else array.tobytes())

    def array(self) -> Array:
        """The array again, read-only."""
        if isinstance(self.data, tuple):
            return np.array(self.data, self.dtype).reshape(self.shape)
        return np.frombuffer(self.data, self.dtype).reshape(self.shape)


class Known(NamedTuple):
    """What is known about an input; its type is ONNX's number."""

    type: int | None
    shape: Shape | None
    value: Content | None


class Question(NamedTuple):
    """An operator and all that its outputs may depend on; which of these are taken."""

    op_type: str
    domain: str
    opset: int
    attributes: Attributes
    inputs: tuple[Known | None, ...]
    outputs: tuple[bool, ...]

    @property
    def short(self) -> bool:
        """Whether little memory is needed to keep it."""
        return sum(len(known.value.data) for known in self.inputs if known and known.value) <= SHORT

    def proto(self) -> onnx.NodeProto:
        """The node, with inputs `0`, `1`, ... and outputs `out0`, ..."""
        node = onnx.NodeProto(op_type=self.op_type, domain=self.domain)
        node.input.extend(str(k) if known else "" for k, known in enumerate(self.inputs))
        node.output.extend(f"out{k}" if taken else "" for k, taken in enumerate(self.outputs))
        for name, kind, value in self.attributes:
            if kind in PLAIN:
                node.attribute.append(ir.serde.serialize_attribute(ir.Attr(name, ir.AttributeType(kind), value)))
            else:
                node.attribute.append(onnx.AttributeProto.FromString(value))
        return node


class Answer(NamedTuple):
    """Of each output its type and shape, sizes that depend on data being -1, or nothing; and what went wrong."""

    outputs: tuple[tuple[int, Shape | None] | None, ...]
    problem: str | None


def question_attributes(node: ir.Node) -> Attributes:
    """The attributes of a node without bodies, as a question has them."""
    return tuple(
        (name, int(a.type), _plain(a.value) if a.type in PLAIN else ir.serde.serialize_attribute(a).SerializeToString())
        for name, a in node.attributes.data.items()
        if a.type not in GRAPHS
    )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


ALIKE = frozenset("Identity Reshape Transpose Squeeze Unsqueeze Flatten Concat Split Slice Gather Expand".split())
POINTWISE = frozenset(
    """Abs Add And Cast Ceil Div Equal Exp Floor Greater GreaterOrEqual Less LessOrEqual Log Max Min Mod Mul Neg Not Or
    Pow Reciprocal Round Sign Sqrt Sub Where Xor""".split()
)


PRODUCTS = frozenset(  # take time for every pair of elements
    """Attention Conv ConvInteger ConvTranspose DFT DeformConv Det Einsum Gemm GridSample GRU LSTM MatMul MatMulInteger
    NonMaxSuppression QLinearConv QLinearMatMul RNN STFT""".split()
)


def _small(asked: Question) -> bool:
    """Whether the outputs are worth computing: no larger than what is kept, and not out of all proportion in time."""
    sizes = [prod(known.shape or ()) for known in asked.inputs if known]
    quick = asked.op_type in POINTWISE or (asked.op_type in ALIKE and asked.op_type != "Expand")
    if quick and prod(sizes) <= VALUE_LIMIT:
        return True
    if asked.op_type in PRODUCTS and prod(sizes) > TERMS:
        return False
    outputs = shaped(asked).outputs
    return all(prod(found[1]) <= VALUE_LIMIT for found in outputs if found is not None and found[1] is not None)


def computed(asked: Question) -> tuple[Array, ...] | None:
    """The outputs, read-only, of a node whose inputs are all known; None where there is no reference, or too much."""
    if not _small(asked):
        return None
    return (_computed if asked.short else _computed.__wrapped__)(asked)


@lru_cache(KEPT)
def _computed(asked: Question) -> tuple[Array, ...] | None:
    values = {str(k): known.value.array() for k, known in enumerate(asked.inputs) if known and known.value}
    found = evaluate(asked.proto(), asked.opset, values)
    if found is None:
        return None
    arrays = tuple(np.asarray(array) for array in found)
    for array in arrays:
        array.setflags(write=False)
    return arrays


def shaped(asked: Question) -> Answer:
    """Types and shapes of the outputs by the operator's own inference, or that of the operator that stands in."""
    return (_shaped if asked.short else _shaped.__wrapped__)(asked)


@lru_cache(KEPT)
def _shaped(asked: Question) -> Answer:
    proto, opset = asked.proto(), asked.opset
    inputs = {str(k): known for k, known in enumerate(asked.inputs) if known}
    like: int | None = None
    if (other := ops.stand_in_of(asked.domain, asked.op_type)) is not None:
        proto = _standing_in(proto, *other)
        known = [(name, inputs[name]) for name in proto.input if name in inputs]
        opset, like = STAND_IN_OPSET, known[0][1].type if known else None
        inputs = {name: k._replace(type=int(ir.DataType.FLOAT)) for name, k in known}  # most are for floats only
    problem = None
    found: dict[str, onnx.TypeProto] = {}
    try:
        schema = onnx.defs.get_schema(proto.op_type, opset, proto.domain)
        types = {
            n: onnx.helper.make_tensor_type_proto(k.type, k.shape) for n, k in inputs.items() if k.type is not None
        }
        if len(types) == len(inputs):
            data = {n: onnx.numpy_helper.from_array(k.value.array(), n) for n, k in inputs.items() if k.value}
            found = infer_node_outputs(schema, proto, types, data)
    except onnx.defs.SchemaError:  # nothing is known about the operator
        pass
    except Exception as error:
        problem = str(error).strip().splitlines()[-1]
    outputs: list[tuple[int, Shape | None] | None] = []
    for name in asked.proto().output:
        tensor = found[name].tensor_type if name in found else None
        if tensor is None or not tensor.elem_type:
            outputs.append(None)
            continue
        sizes = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
        outputs.append((like or tensor.elem_type, sizes if tensor.HasField("shape") else None))
    return Answer(tuple(outputs), problem)


def _standing_in(proto: onnx.NodeProto, op_type: str, inputs: tuple[int, ...]) -> onnx.NodeProto:
    """An ONNX node whose outputs have the shapes of this one's."""
    schema = onnx.defs.get_schema(op_type, STAND_IN_OPSET)
    node = onnx.NodeProto(op_type=op_type, output=proto.output)
    node.input.extend(proto.input[k] for k in inputs)
    node.attribute.extend(a for a in proto.attribute if a.name in schema.attributes)
    return node


def evaluate(proto: onnx.NodeProto, opset: int, values: Mapping[str, Array]) -> list[Array] | None:
    """The outputs of a node whose inputs are all known, by the reference implementation; None if it has none."""
    graph = onnx.helper.make_graph(
        [proto],
        "one",
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UNDEFINED, None) for n in values],
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UNDEFINED, None) for n in proto.output if n],
    )
    if proto.op_type in ("Expand", "ConstantOfShape", "Tile", "Range"):
        last = values[proto.input[-1]] if proto.op_type != "Range" else np.array([1])
        if proto.op_type != "Range" and np.prod(np.abs(last.astype(np.float64))) > VALUE_LIMIT:
            return None
        if proto.op_type == "Range":
            low, high, stride = (float(np.asarray(values[n]).reshape(-1)[0]) for n in proto.input)
            if not stride or abs((high - low) / stride) > VALUE_LIMIT:
                return None
    from onnx.reference import ReferenceEvaluator  # loads every operator

    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid(proto.domain, opset)])
    try:
        with np.errstate(all="ignore"):
            return list(ReferenceEvaluator(model).run(None, dict(values)))
    except Exception:  # an operator or type that the reference does not know: the value stays unknown
        return None


def run_node(node: OpNode, values: Mapping[str, Array]) -> list[Array] | None:
    """The outputs of a node as rules see it, all of whose inputs are given; None if they cannot be computed."""
    places = {name: f"value{k}" for k, name in enumerate(dict.fromkeys((*node.inputs, *node.outputs))) if name}
    inputs, outputs = ([places.get(name, "") for name in names] for names in (node.inputs, node.outputs))
    if any(isinstance(value, ir.Attr | ir.TensorProtocol) for value in node.attrs.values()):
        return None
    attrs = {key: value for key, value in node.attrs.items() if value is not None}
    proto = onnx.helper.make_node(node.op_type, inputs, outputs, domain=node.domain, **attrs)
    return evaluate(proto, node.opset, {places[name]: values[name] for name in dict.fromkeys(node.inputs) if name})
