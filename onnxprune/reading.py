"""Reading models that strangers made: structure, sizes and external data are checked before memory is taken.

Weights outside the model file are mapped from descriptors that were opened and checked here; no path from a model is
ever handed to a library.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, NamedTuple, cast

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, Message

from onnxprune.ahead import ahead
from onnxprune.errors import InputError, MachineError, shown, shown_path
from onnxprune.weights import BLOCK, Mapped, Place, attach
from onnxprune.wire import without_weights

LIMIT = 2**31 - 1  # bytes that protobuf can parse
WHOLE = 1 << 24  # bytes up to which a model file is parsed with the weights in it
RANK = 64  # axes that NumPy can have
NESTING = 100  # subgraphs inside subgraphs
FORMATS = (
    (b"version https://git-lfs", "a git-lfs pointer; fetch the real file with 'git lfs pull'"),
    (b"PK\x03\x04", "a zip archive (PyTorch checkpoint, Keras or NumPy); export it to ONNX first"),
    (b"\x80\x02", "a pickle; export the network to ONNX first"),
    (b"\x89HDF", "HDF5 (Keras); export it to ONNX first"),
    (b"<", "HTML or XML: was it downloaded whole?"),
    (b"{", "JSON"),
    (b"ORTM", "in ORT format; use the .onnx it was made from"),
)
TensorType = onnx.TensorProto.DataType
AttributeType = onnx.AttributeProto.AttributeType
FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
PACKED = frozenset((TensorType.INT4, TensorType.UINT4, TensorType.FLOAT4E2M1))  # two elements in a byte
MAPS = "maps"  # where a graph keeps the types that are not in memory
UNDEFINED = "graph output that nothing defines"
COMPLEX = (TensorType.COMPLEX64, TensorType.COMPLEX128)


@dataclass(frozen=True)
class Source:
    """What was read: `bytes` counts the model file and its external data."""

    path: Path
    bytes: int
    external: bool
    files: tuple[Path, ...]
    states: tuple[tuple[int, ...], ...]

    @cached_property
    def sha256(self) -> str:
        """Hash over the model file and those of its data, when it is asked for. Raises MachineError if one changed."""
        begun: Future[str] | None = self.__dict__.get("ahead")
        return self._hashed() if begun is None else begun.result()

    def hash_ahead(self) -> None:
        """Begin with the hash of large files beside whatever else is done; that reads them into the cache as well."""
        if self.bytes <= WHOLE or "ahead" in self.__dict__:
            return
        self.__dict__["ahead"] = ahead(self._hashed)

    def _hashed(self) -> str:
        hashes = []
        for path, state in zip(self.files, self.states, strict=True):
            with os.fdopen(open_regular(path), "rb") as file:
                hashes.append(_hash(file))
                if _state(file.fileno()) != state:
                    raise MachineError("changed since it was read", file=path)
        for one in hashes[1:]:
            hashes[0].update(one.digest())
        return hashes[0].hexdigest()


def _hash(file: IO[bytes]) -> hashlib._Hash:
    """Of a file as it is mapped: what is large lies in the cache already, or will be read from there next."""
    found = hashlib.sha256()
    if size := os.fstat(file.fileno()).st_size:
        with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data, memoryview(data) as whole:
            data.madvise(mmap.MADV_SEQUENTIAL)
            for start in range(0, size, BLOCK):
                with whole[start : start + BLOCK] as part:
                    found.update(part)
    return found


def _state(descriptor: int) -> tuple[int, ...]:
    """What changes with the content of a file."""
    info = os.fstat(descriptor)
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def open_regular(path: str | Path, *, follow: bool = False) -> int:
    """A descriptor of a regular file. Raises InputError for anything else, MachineError without permission."""
    path = Path(path)
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise InputError("no such file", file=path) from None
    except PermissionError:
        raise MachineError("no permission to read it", file=path) from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK) and not follow:
            raise InputError(f"is a link; copy what it points to: cp -L {shown_path(path)} COPY", file=path) from None
        raise InputError(error.strerror or "cannot be opened", file=path) from None
    except ValueError:
        raise InputError("not a file name", file=path) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise InputError("is a folder" if stat.S_ISDIR(mode) else "not a regular file", file=path)
    return descriptor


def read_bytes(path: str | Path, limit: int = LIMIT) -> bytes:
    """A whole regular file. Raises InputError above `limit` bytes."""
    with os.fdopen(open_regular(path, follow=True), "rb") as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise InputError(f"larger than {limit:,} bytes", file=path)
        return file.read(limit + 1)


def read_model(path: str | Path) -> tuple[ir.Model, Source]:
    """A checked model, weights outside the file memory-mapped. Raises InputError with the culprit, MachineError."""
    path = Path(path)
    proto, weights, state = _parse(path)
    try:
        _check_opsets(proto)
        _check_functions(proto)
        _check_inputs(proto.graph)
        _check_graph(proto.graph, {o.domain: o.version for o in proto.opset_import})
        mapped, states = _map_external(proto, path)
        _densify(proto)
        model = deserialized(proto)
    except InputError as error:
        raise InputError(error.message, file=path, object=error.object) from None
    except (ValueError, TypeError, KeyError, NotImplementedError, ir.serde.SerdeError) as error:
        text = str(error.__cause__ or error)
        raise InputError(f"inconsistent model: {(text.splitlines() or ['?'])[0][:200]}", file=path) from None
    attach(model, weights | mapped)
    model.graph.sort()
    for function in model.functions.values():
        function.sort()
    states = {path: state} | states
    size = sum(state[2] for state in states.values())
    return model, Source(path, size, len(states) > 1, tuple(states), tuple(states.values()))


def deserialized(proto: onnx.ModelProto) -> ir.Model:
    """The model in memory, where maps have no type: those of graph outputs are kept aside for `serialized`."""
    maps: dict[str, bytes] = {}
    for graph in _graphs(proto):
        if nameless := [k for k, tensor in enumerate(graph.initializer) if not tensor.name]:  # nothing can read these
            for k in reversed(nameless):
                del graph.initializer[k]
        for value in (*graph.value_info, *graph.output):
            if _holds_map(value.type):
                maps[value.name] = value.type.SerializeToString()
                value.ClearField("type")
    model = ir.serde.deserialize_model(proto)
    if maps:
        model.graph.meta[MAPS] = {name: maps[name] for name in maps if any(v.name == name for v in model.graph.outputs)}
    return model


def serialized(model: ir.Model) -> onnx.ModelProto:
    """The protobuf message of a model. Raises InputError for a text that protobuf handed out undecoded."""
    try:
        proto = ir.serde.serialize_model(model)
    except ir.serde.SerdeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UnicodeDecodeError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise InputError(f"'{shown(cause.object)}' in it is not UTF-8") from None
    maps = model.graph.meta.get(MAPS, {})
    for value in proto.graph.output:
        if value.name in maps:
            value.type.ParseFromString(maps[value.name])
    return proto


def _holds_map(kind: onnx.TypeProto) -> bool:
    while kind.HasField("sequence_type") or kind.HasField("optional_type"):
        kind = (kind.sequence_type if kind.HasField("sequence_type") else kind.optional_type).elem_type
    return kind.HasField("map_type")


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and all inside its nodes."""
    yield proto.graph
    for node in _nodes(proto.graph.node):
        yield from _subgraphs(node)


def _parse(path: Path) -> tuple[onnx.ModelProto, dict[str, Mapped], tuple[int, ...]]:
    """The message, its large initializers where the file is large, mapped, and the state of the file."""
    with os.fdopen(open_regular(path), "rb") as file:
        state = _state(file.fileno())
        size = state[2]
        if not size:
            raise InputError("empty file", file=path)
        if size > LIMIT:
            raise InputError(
                "larger than 2 GB, which protobuf cannot read; store its weights as external data", file=path
            )
        data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size > WHOLE else file.read()
    for start, what in FORMATS:
        if data[: len(start)] == start:
            raise InputError(f"not an ONNX model: this looks like {what}", file=path)
    message, places = without_weights(data) if size > WHOLE else (data[:], {})
    try:
        proto = onnx.ModelProto.FromString(message)
    except (DecodeError, RecursionError):
        raise InputError("not an ONNX model, or cut short", file=path) from None
    if not proto.HasField("graph") or not proto.graph.output or not proto.ir_version:
        raise InputError("not an ONNX model: it has no graph with outputs", file=path)
    for part in (proto, proto.graph, *proto.metadata_props, *proto.graph.metadata_props, *proto.graph.node):
        _make_legible(part)
    weights: dict[str, Mapped] = {}
    for k, (offset, length) in places.items():
        tensor = proto.graph.initializer[k]
        if _is_plain(tensor, length) and tensor.name not in weights:
            place = Place(os.path.abspath(path), state[0], state[1], offset, length)
            kind, shape = ir.DataType(tensor.data_type), tuple(tensor.dims)
            weights[tensor.name] = Mapped.of(data, offset, place, kind, shape, tensor.name)
            _empty(tensor)
        else:
            tensor.raw_data = data[offset : offset + length]
    return proto, weights, state


def _make_legible(message: Message) -> None:
    """Escape what is not UTF-8 in texts that mean nothing to us, and that ONNX Runtime does not decode."""
    for field in ("doc_string", "producer_name", "producer_version", "key", "value"):
        if isinstance(text := getattr(message, field, ""), bytes):
            setattr(message, field, text.decode(errors="backslashreplace"))
    if isinstance(message, onnx.GraphProto) and isinstance(message.name, bytes):
        message.name = message.name.decode(errors="backslashreplace")


def _is_plain(tensor: onnx.TensorProto, length: int) -> bool:
    """Whether so many bytes are all the data of a tensor, as they should be, and none of them is packed."""
    if not isinstance(tensor.name, str) or tensor.data_type in (*PACKED, TensorType.STRING):
        return False
    if tensor.data_location == onnx.TensorProto.EXTERNAL or any(len(getattr(tensor, field)) for field in FIELDS):
        return False
    try:
        return needed_bytes(tensor) == length
    except InputError:
        return False


def _empty(tensor: onnx.TensorProto) -> None:
    """Make it a stand-in of no elements until a mapped tensor takes its place."""
    tensor.raw_data = b""
    tensor.dims[:] = [0]


# Structure ---------------------------------------------------------------------------------------------------------


def _check_opsets(proto: onnx.ModelProto) -> None:
    """Raise InputError where the default domain's opset is missing or from the future; "ai.onnx" is its other name."""
    newest = onnx.defs.onnx_opset_version()
    if not proto.opset_import:
        raise InputError("it imports no operator set")
    for entry in (*proto.opset_import, *(o for function in proto.functions for o in function.opset_import)):
        if entry.domain == "ai.onnx":
            entry.domain = ""
        if not entry.domain and not 1 <= entry.version <= newest:
            raise InputError(f"opset {entry.version} is unknown; this onnx package knows 1 to {newest}")


def _check_functions(proto: onnx.ModelProto) -> None:
    """Raise InputError where a function is defined twice, is given too much, or calls itself, through others too."""
    known = {(f.domain, f.name, f.overload): f for f in proto.functions}
    if len(known) < len(proto.functions):
        raise InputError("a function is defined twice")
    for node in (n for nodes in (proto.graph.node, *(f.node for f in proto.functions)) for n in _nodes(nodes)):
        function = known.get((node.domain, node.op_type, node.overload))
        if function is not None and (len(node.input) > len(function.input) or len(node.output) > len(function.output)):
            raise InputError(f"calls '{shown(function.name)}' with more values than it has", object=_title(node))
    calls = {key: {(n.domain, n.op_type, n.overload) for n in _nodes(f.node)} & set(known) for key, f in known.items()}
    while leaves := [key for key, called in calls.items() if not called & set(calls)]:
        for key in leaves:
            del calls[key]
    if calls:
        raise InputError("calls itself", object=f"function '{shown(next(iter(calls))[1])}'")
    for function in proto.functions:
        try:
            _check_graph(_as_graph(function), {o.domain: o.version for o in function.opset_import})
        except InputError as error:
            culprit = f": {error.object}" if error.object else ""
            text = f"function '{shown(function.name)}'{culprit}"
            raise InputError(error.message, object=text) from None


def _check_inputs(graph: onnx.GraphProto) -> None:
    for value in graph.input:
        if value.type.WhichOneof("value") in (None, "tensor_type") and not value.type.tensor_type.elem_type:
            raise InputError("has no type", object=f"graph input '{shown(value.name)}'")
        if (rank := len(value.type.tensor_type.shape.dim)) > RANK:
            raise InputError(f"{rank} axes, where {RANK} are the most", object=f"graph input '{shown(value.name)}'")


def _densify(proto: onnx.ModelProto) -> None:
    """Write sparse tensors out, as ONNX Runtime does when it loads them. Raises InputError."""
    room = LIMIT

    def dense(sparse: onnx.SparseTensorProto, title: str) -> onnx.TensorProto:
        nonlocal room
        found = onnx.TensorProto(name=sparse.values.name, data_type=sparse.values.data_type, dims=sparse.dims)
        try:
            room -= needed_bytes(found)
            check_tensor(sparse.values, "its values")
            check_tensor(sparse.indices, "its indices")
        except InputError as error:
            raise InputError(error.message, object=title) from None
        if room < 0:
            raise InputError("written out, sparse tensors take more than 2 GB", object=title)
        if found.data_type in (*PACKED, TensorType.STRING) or sparse.indices.data_type != TensorType.INT64:
            raise InputError("a sparse tensor of this type is not supported; store it dense", object=title)
        values, at = (onnx.numpy_helper.to_array(part) for part in (sparse.values, sparse.indices))
        shape, flat = tuple(sparse.dims), None
        if values.ndim != 1 or at.shape not in ((len(values),), (len(values), len(shape))):
            raise InputError("indices that do not suit the values of a sparse tensor", object=title)
        places, most = at if at.ndim == 2 else at[:, None], shape if at.ndim == 2 else (prod(shape),)
        if ((places >= 0) & (places < np.array(most, np.int64))).all():
            flat = np.ravel_multi_index(tuple(places.T), most)
        if flat is None or len(np.unique(flat)) < len(flat):
            raise InputError("indices of a sparse tensor that lie outside of it, or twice", object=title)
        whole = np.zeros(prod(shape), values.dtype)
        whole[flat] = values
        found.raw_data = whole.tobytes()
        return found

    for graph in _graphs(proto):
        graph.initializer.extend(dense(sparse, f"initializer '{shown(sparse.values.name)}'")
                                 for sparse in graph.sparse_initializer)  # fmt: skip
        graph.ClearField("sparse_initializer")
    for node in (n for nodes in (proto.graph.node, *(f.node for f in proto.functions)) for n in _nodes(nodes)):
        for attribute in node.attribute:
            if attribute.sparse_tensors or (attribute.HasField("sparse_tensor") and node.op_type != "Constant"):
                raise InputError("sparse tensors are not supported here; store it dense", object=_title(node))
            if attribute.HasField("sparse_tensor"):
                tensor = dense(attribute.sparse_tensor, _title(node))
                attribute.CopyFrom(onnx.AttributeProto(name="value", type=AttributeType.TENSOR, t=tensor))


def _as_graph(function: onnx.FunctionProto) -> onnx.GraphProto:
    """What a function says, under the names that a graph has for it."""
    ends = ([onnx.ValueInfoProto(name=name) for name in names] for names in (function.input, function.output))
    fields = dict(zip(("input", "output"), ends, strict=True))
    return cast(onnx.GraphProto, SimpleNamespace(node=function.node, initializer=(), sparse_initializer=(), **fields))


def _check_graph(graph: onnx.GraphProto, opsets: Mapping[str, int]) -> None:
    """Names defined once and before use (in some order), no cycles, tensors whose parts agree; all subgraphs too.

    Nodes read and make as many values as their operators, if these are known, and attributes have their types.
    """
    pending: list[tuple[onnx.GraphProto, tuple[frozenset[str], ...]]] = [(graph, ())]
    while pending:
        current, outer = pending.pop()
        if len(outer) > NESTING:
            raise InputError(f"subgraphs nest deeper than {NESTING}")
        for tensor in current.initializer:
            check_tensor(tensor, f"initializer '{shown(tensor.name)}'")
        scope = (_defined(current), *outer)
        for node in current.node:
            if not all(isinstance(text, str) for text in (node.name, node.op_type, node.domain, *node.input)):
                raise InputError("a name in it is not UTF-8", object=_title(node))
            for name in node.input:
                if name and not any(name in names for names in scope):
                    raise InputError(f"reads '{shown(name)}', which nothing defines", object=_title(node))
            _check_node(node, opsets)
            for attribute in node.attribute:
                for tensor in (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors):
                    check_tensor(tensor, f"attribute '{shown(attribute.name)}' of {_title(node)}")
            pending += [(subgraph, scope) for subgraph in _subgraphs(node)]
        for output in current.output:
            if output.name not in scope[0]:
                around = any(output.name in names for names in scope)
                what = "lies around the graph that gives it out; put an Identity between" if around else UNDEFINED
                raise InputError(what, object=output.name)
        _check_acyclic(current)


def _check_node(node: onnx.NodeProto, opsets: Mapping[str, int]) -> None:
    """What ONNX Runtime refuses as well, but not in one line."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    known = _signature(domain, node.op_type, opsets.get(domain, 0))
    for what, names, (least, most) in zip(("reads", "makes"), (node.input, node.output), known.arity, strict=True):
        if not least <= len(names) <= most:
            wanted = str(least) if least == most else f"{least} to {most}" if most < MANY else f"{least} and more"
            raise InputError(f"{what} {len(names)} values, {wanted} for {shown(node.op_type)}", object=_title(node))
    if (domain, node.op_type) == ("", "Constant") and len(node.attribute) != 1:
        raise InputError(f"has {len(node.attribute)} values instead of one", object=_title(node))
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            continue
        kind = known.attributes.get(attribute.name, attribute.type)
        if attribute.type == AttributeType.UNDEFINED or attribute.type != kind:
            found, wanted = (AttributeType.Name(k) for k in (attribute.type, kind))
            text = f"has type {found}" + (f", not {wanted}" if wanted != found else "")
            raise InputError(text, object=f"attribute '{shown(attribute.name)}' of {_title(node)}")


class Signature(NamedTuple):
    """(least, most) inputs and outputs of an operator, and the types of its attributes, as far as they are known."""

    arity: tuple[tuple[int, int], tuple[int, int]]
    attributes: Mapping[str, int]


MANY = 1 << 30
UNKNOWN = Signature(((0, MANY), (1, MANY)), {})


@lru_cache(maxsize=1024)
def _signature(domain: str, op_type: str, opset: int) -> Signature:
    try:
        schema = onnx.defs.get_schema(op_type, opset, domain)
    except (onnx.defs.SchemaError, TypeError):
        return UNKNOWN
    arity = (schema.min_input, schema.max_input), (schema.min_output, schema.max_output)
    return Signature(arity, {name: one.type.value for name, one in schema.attributes.items()})  # type: ignore[attr-defined]


def _title(node: onnx.NodeProto) -> str:
    return f"node '{shown(node.name or (node.output[0] if node.output else node.op_type))}'"


def _defined(graph: onnx.GraphProto) -> frozenset[str]:
    """Every name that a graph defines. Raises InputError where one is defined twice."""
    inputs = [value.name for value in graph.input]
    stored = [t.name for t in graph.initializer] + [t.values.name for t in graph.sparse_initializer]
    produced = [name for node in graph.node for name in node.output if name]
    for name in (*inputs, *stored, *produced):
        if not isinstance(name, str):  # protobuf hands out what it cannot decode as bytes
            raise InputError("its name is not UTF-8", object=f"value '{shown(name)}'")
    for names in (inputs + produced, stored + produced):  # an initializer may be the default of an input
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise InputError("defined twice", object=f"value '{shown(name)}'")
            seen.add(name)
    return frozenset((*inputs, *stored, *produced))


def _check_acyclic(graph: onnx.GraphProto) -> None:
    """Kahn's algorithm; what subgraphs capture counts as an input of their node."""
    producer = {name: k for k, node in enumerate(graph.node) for name in node.output if name}
    readers: list[list[int]] = [[] for _ in graph.node]
    waiting = [0] * len(graph.node)
    for k, node in enumerate(graph.node):
        for source in {producer[name] for name in _reads(node) if name in producer}:
            readers[source].append(k)
            waiting[k] += 1
    ready = [k for k, count in enumerate(waiting) if not count]
    done = 0
    while ready:
        done += 1
        for k in readers[ready.pop()]:
            waiting[k] -= 1
            if not waiting[k]:
                ready.append(k)
    if done < len(graph.node):
        stuck = next(k for k, count in enumerate(waiting) if count)
        raise InputError("depends on its own output", object=_title(graph.node[stuck]))


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes and those of their subgraphs."""
    pending = list(nodes)
    while pending:
        current = pending.pop()
        yield current
        for graph in _subgraphs(current):
            pending.extend(graph.node)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        yield from (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node and everything inside it reads."""
    for current in _nodes([node]):
        yield from current.input
        yield from (output.name for graph in _subgraphs(current) for output in graph.output)


def needed_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of data that the shape and type of a tensor call for. Raises InputError for odd ones."""
    if len(tensor.dims) > RANK:
        raise InputError(f"{len(tensor.dims)} axes, where {RANK} are the most")
    if any(d < 0 for d in tensor.dims):
        raise InputError(f"negative size in shape {list(tensor.dims)}")
    count = int(prod(tensor.dims))
    if tensor.data_type in PACKED:
        return (count + 1) // 2
    try:
        return count * int(ir.DataType(tensor.data_type).itemsize)
    except (ValueError, TypeError):
        raise InputError(f"unknown element type {tensor.data_type}") from None


def check_tensor(tensor: onnx.TensorProto, title: str) -> None:
    """dims x type = bytes of data. Raises InputError."""
    if tensor.data_type == TensorType.STRING:
        if len(tensor.string_data) != prod(tensor.dims):
            text = f"{len(tensor.string_data)} strings for shape {list(tensor.dims)}"
            raise InputError(text, object=title)
        return
    try:
        needed = needed_bytes(tensor)
    except InputError as error:
        raise InputError(error.message, object=title) from None
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return
    kind = ir.DataType(tensor.data_type).name
    typed = sum(len(getattr(tensor, field)) for field in FIELDS)
    if tensor.HasField("raw_data"):
        if typed:
            raise InputError("holds its data twice, raw and by element", object=title)
        held = len(tensor.raw_data)
        if held != needed:
            raise InputError(
                f"{held} bytes of data for shape {list(tensor.dims)} {kind} ({needed} needed)", object=title
            )
        return
    count = prod(tensor.dims) * (2 if tensor.data_type in COMPLEX else 1)
    if tensor.data_type in PACKED:
        count = (count + 1) // 2
    if typed != count:
        raise InputError(
            f"{typed} elements of data for shape {list(tensor.dims)} {kind} ({count} needed)", object=title
        )


# External data -------------------------------------------------------------------------------------------------------


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: initializers, attributes, subgraphs, functions, training graphs."""
    graphs = [proto.graph]
    nodes: list[Sequence[onnx.NodeProto]] = [f.node for f in proto.functions]
    for info in proto.training_info:
        graphs += [info.initialization, info.algorithm]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes.append(graph.node)
        for node in nodes.pop():
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                if attribute.HasField("g"):
                    graphs.append(attribute.g)
                graphs.extend(attribute.graphs)
                for sparse in (*([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []),
                               *attribute.sparse_tensors):  # fmt: skip
                    yield from (sparse.values, sparse.indices)


def _map_external(proto: onnx.ModelProto, path: Path) -> tuple[dict[str, Mapped], dict[Path, tuple[int, ...]]]:
    """{initializer: mapped tensor}, {file: state}; tensors elsewhere go into the message. Raises InputError."""
    descriptors: dict[str, int] = {}
    mapped: dict[str, Mapped] = {}
    folder = os.path.abspath(path.parent)
    room = LIMIT

    def resolve(tensor: onnx.TensorProto, keep_mapped: bool) -> None:
        nonlocal room
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return
        title = f"tensor '{shown(tensor.name)}'"
        location, offset, length = _external(tensor, title)
        if location not in descriptors:
            descriptors[location] = _open_inside(path.parent, location, title)
        file = descriptors[location]
        info = os.fstat(file)
        if offset + length > info.st_size:
            text = f"bytes {offset} to {offset + length} of {shown(location)}, which has {info.st_size}"
            raise InputError(text, object=title)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        if keep_mapped and tensor.data_type not in PACKED:
            place = Place(os.path.join(folder, location), info.st_dev, info.st_ino, offset, length)
            kind, shape = ir.DataType(tensor.data_type), tuple(tensor.dims)
            mapped[tensor.name] = Mapped.at(file, place, kind, shape, tensor.name)
            _empty(tensor)
        else:
            room -= length
            if room < 0:
                raise InputError("with it, tensors that cannot stay in their files take more than 2 GB", object=title)
            tensor.raw_data = os.pread(file, length, offset)

    try:
        for tensor in proto.graph.initializer:
            resolve(tensor, True)
        for tensor in _tensors(proto):
            resolve(tensor, False)
        states = {path.parent / location: _state(descriptors[location]) for location in sorted(descriptors)}
    finally:
        for file in descriptors.values():
            os.close(file)
    return mapped, states


def _external(tensor: onnx.TensorProto, title: str) -> tuple[str, int, int]:
    """(location, offset, length), checked against each other. Raises InputError."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    numbers = []
    needed = needed_bytes(tensor)
    for key, default in (("offset", 0), ("length", needed)):
        text = entries.get(key, str(default))
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise InputError(f"external {key} '{shown(text)}' is no number of bytes", object=title)
        numbers.append(int(text))
    if numbers[1] != needed:
        raise InputError(
            f"{numbers[1]} bytes of external data for shape {list(tensor.dims)} "
            f"{ir.DataType(tensor.data_type).name} ({needed} needed)",
            object=title,
        )
    parts = PurePosixPath(location).parts
    if not location or "\0" in location or location.startswith("/") or "\\" in location or ".." in parts:
        raise InputError(f"external data '{shown(location)}' lies outside the model's folder", object=title)
    return location, numbers[0], numbers[1]


def _open_inside(folder: Path, location: str, title: str) -> int:
    """Walk to a file below the model's folder without following a link. Raises InputError, MachineError."""
    here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    parts = PurePosixPath(location).parts
    try:
        for k, part in enumerate(parts):
            last = k == len(parts) - 1
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | (0 if last else os.O_DIRECTORY)
            found = os.open(part, flags, dir_fd=here)
            os.close(here)
            here = found
        info = os.fstat(here)
        if not stat.S_ISREG(info.st_mode):
            raise InputError(f"external data '{shown(location)}' is not a regular file", object=title)
        if info.st_nlink > 1:
            raise InputError(f"external data '{shown(location)}' has several hard links; copy it", object=title)
    except FileNotFoundError:
        os.close(here)
        raise InputError(f"external data '{shown(location)}' is missing", object=title) from None
    except PermissionError:
        os.close(here)
        raise MachineError(f"no permission to read '{shown(location)}'", object=title) from None
    except OSError:
        os.close(here)
        raise InputError(f"external data '{shown(location)}' is a link or no file; copy it", object=title) from None
    except InputError:
        os.close(here)
        raise
    return here
