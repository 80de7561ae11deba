"""A graph run piece by piece over all samples, in the child process: a piece ends where a weight is to be changed.

Weights are inputs of a piece, so that a piece is loaded once and serves every set of weights, and every plan under
which its operators stay the same. Between pieces only what later ones read is kept.
"""

from __future__ import annotations

import math
import mmap
import tempfile
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxprune import bfloat, interface
from onnxprune.infer import bodies, walk
from onnxprune.operators import Slot, stored
from onnxprune.runtime import ort
from onnxprune.types import Array, Shape
from onnxprune.weights import ALIGN, Part

LOADED = 1024  # pieces that stay loaded
FED = frozenset(("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"))  # types of initializers that are inputs of a piece
SLAB = 1 << 26  # bytes of an unnamed file, which many arrays share: a process may map some 65,000 of them


class Room:
    """So many bytes of memory for arrays that are kept; what goes beyond that lies in unnamed files."""

    def __init__(self, size: int = 1 << 30) -> None:
        self.size, self.taken = size, 0
        self._open: dict[bool, tuple[Any, int]] = {}  # the file that is being filled, and how far it is

    def keep(self, array: Array, stays: bool = False) -> Array:
        """The array, or one like it on disk. It takes memory until nobody has it any more.

        A file goes when all of its arrays have gone: those that stay for long lie in files of their own.
        """
        if not array.nbytes or array.dtype.hasobject:
            return array
        if self.taken + array.nbytes <= self.size:
            self.taken += array.nbytes
            weakref.finalize(array, self._leave, array.nbytes).atexit = False
            return array
        if 4 * array.nbytes > SLAB:
            kept = _view(_unnamed(array.nbytes), 0, array)
        else:
            slab, end = self._open.get(stays, (b"", 0))
            if end + array.nbytes > len(slab):
                slab, end = _unnamed(SLAB), 0
            kept = _view(slab, end, array)
            self._open[stays] = slab, end + array.nbytes + -array.nbytes % ALIGN
        kept[...] = array
        return kept

    def _leave(self, size: int) -> None:
        self.taken -= size


def _unnamed(size: int) -> mmap.mmap:
    """A file without a name, mapped."""
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        return mmap.mmap(file.fileno(), size)


def _view(data: mmap.mmap, start: int, like: Array) -> Array:
    """What will lie there, in the shape and type of an array."""
    return np.frombuffer(data, like.dtype, like.size, start).reshape(like.shape)


class Sessions:
    """Loaded pieces by what they are; the oldest go first."""

    def __init__(self, threads: int = 1, loaded: int = LOADED, shared: bool = False) -> None:
        self.threads, self.loaded, self.shared = threads, loaded, shared
        self._made: OrderedDict[bytes, ort.OrtSession] = OrderedDict()

    def session(self, model: bytes) -> ort.OrtSession:
        """The piece as ONNX Runtime loads it, as written."""
        if model not in self._made:
            if len(self._made) == self.loaded:
                self._made.popitem(last=False)
            made = ort.BACKENDS["cpu"].session(
                model, threads=self.threads, optimise=False, arena=False, shared=self.shared
            )
            self._made[model] = made
        self._made.move_to_end(model)
        return self._made[model]


class Flow:
    """What a model computes from a list of feeds, as far as it was asked for.

    No piece reads more than `most` bytes of weights, but for those of a single node; values are kept in `room`. One run
    of a piece is for up to `most_feeds`, since half floats are cast in each. `told` counts nodes that ran, of those
    that were asked for.
    """

    def __init__(
        self,
        model: ir.Model,
        feeds: Sequence[Mapping[str, Array]],
        sessions: Sessions,
        pinned: Collection[str] = (),
        *,
        most: float = math.inf,
        room: Room | None = None,
        most_feeds: int = 1,
        told: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.model, self.sessions, self.told = model, sessions, told
        self.most, self.room, self.most_feeds = most, room or Room(), most_feeds
        runs = bfloat.single(model)
        self.single = runs is not model
        self.nodes = list(runs.graph)
        self.functions = [ir.serde.serialize_function(function) for function in runs.functions.values()]
        self.stored = {str(value.name): value for value in model.graph.initializers.values()}
        self.reads = [_reads(node) for node in self.nodes]
        self.maker = {str(out.name): k for k, node in enumerate(self.nodes) for out in node.outputs}
        self.waiting = Counter(name for names in self.reads for name in names)
        self.done = [False] * len(self.nodes)
        self.outputs = {str(value.name) for value in model.graph.outputs if value.type is not None} | set(pinned)
        given = {str(value.name) for value in model.graph.inputs} - set(self.stored)
        narrowed = interface.noted(model.metadata_props)
        feeds = [interface.narrow(bfloat.fed(feed) if self.single else feed, narrowed) for feed in feeds]
        self.live: dict[str, list[Array]] = {name: [np.asarray(feed[name]) for feed in feeds] for name in given}
        self.count = len(feeds)
        self._changed: dict[Slot, Array] = {}
        self._arrays: dict[str, Array] = {}
        self._space = np.empty(0, np.uint8)
        self._slots: dict[Slot, str] = {
            (str(node.outputs[0].name), k): str(value.name)
            for node in self.nodes
            for k, value in enumerate(map(stored, node.inputs))
            if value is not None
        }

    def name(self, slot: Slot) -> str:
        """The initializer that one input of one node is."""
        return self._slots[slot]

    def array(self, slot: Slot) -> Array:
        """What is stored for one input of one node."""
        changed = self._changed.get(slot)
        return self._stored(self._slots[slot]) if changed is None else changed

    def shape(self, slot: Slot) -> Shape:
        """Its shape, for which nothing is read."""
        if (changed := self._changed.get(slot)) is not None:
            return changed.shape
        tensor = self.stored[self._slots[slot]].const_value
        assert tensor is not None
        return tuple(tensor.shape.numpy())

    def change(self, slot: Slot, array: Array) -> Array:
        """Let one input of one node, not yet run, read this from now on; the array as it is kept."""
        self._changed.pop(slot, None)
        self._changed[slot] = self.room.keep(array, stays=True)
        return self._changed[slot]

    def changed(self, changes: Mapping[Slot, Array]) -> None:
        """Let inputs of nodes, not yet run, read what another flow keeps."""
        self._changed |= changes

    def due(self, names: Sequence[str]) -> int:
        """How many nodes must run for these values."""
        return len(self._ancestors(name for name in names if name not in self.stored))

    def values(self, names: Sequence[str]) -> list[list[Array]]:
        """For each name its arrays, one for each feed."""
        wanted = [name for name in names if name not in self.live and name not in self.stored]
        if wanted:
            todo, done = self._ancestors(wanted), 0
            for part in self._parts(todo):
                self._run(part, set(wanted))
                done += len(part)
                self.told(done, len(todo))
        return [self.live[n] if n in self.live else [self._stored(n)] * self.count for n in names]

    def _stored(self, name: str) -> Array:
        if name not in self._arrays:
            tensor = self.stored[name].const_value
            assert tensor is not None
            if isinstance(tensor, Part):
                return tensor.numpy()
            self._arrays[name] = np.asarray(tensor.numpy())
        return self._arrays[name]

    def _made(self, parts: Mapping[str, Part]) -> dict[str, Array]:
        """What is left of weights, in the memory that those of the piece before were in."""
        sizes = [part.nbytes + -part.nbytes % ALIGN for part in parts.values()]
        if sum(sizes) > len(self._space):
            self._space = np.empty(sum(sizes), np.uint8)
        found, start = {}, 0
        for (name, part), size in zip(parts.items(), sizes, strict=True):
            place = self._space[start : start + part.nbytes]
            found[name] = place.view(part.dtype.numpy()).reshape(part.shape.numpy())
            part.fill(found[name])
            start += size
        return found

    def _parts(self, todo: Sequence[int]) -> Iterator[list[int]]:
        """These nodes in runs that read `most` bytes of weights."""
        part: list[int] = []
        seen: set[str] = set()
        size = 0
        for k in todo:
            fresh = [name for name in self.reads[k] if name in self.stored and name not in seen]
            more = sum(value.const_value.nbytes for n in fresh if (value := self.stored[n]).const_value is not None)
            if part and size + more > self.most:
                yield part
                part, seen, size = [], set(), 0
                fresh = [name for name in self.reads[k] if name in self.stored]
                more = sum(value.const_value.nbytes for n in fresh if (value := self.stored[n]).const_value is not None)
            part.append(k)
            seen.update(fresh)
            size += more
        if part:
            yield part

    def _ancestors(self, names: Iterable[str]) -> list[int]:
        """Nodes that must still run for these values, in order."""
        found: set[int] = set()
        stack = list(names)
        while stack:
            name = stack.pop()
            k = self.maker.get(name)
            if name in self.live or k is None or k in found:
                continue
            if self.done[k]:
                raise RuntimeError(f"{name} is asked for after it went")
            found.add(k)
            stack.extend(self.reads[k])
        return sorted(found)

    def _run(self, todo: Sequence[int], wanted: set[str]) -> None:
        """Run these nodes over all feeds; keep what is wanted or read later."""
        inside = Counter(name for k in todo for name in self.reads[k])
        made = [str(out.name) for k in todo for out in self.nodes[k].outputs if out.name]
        later = [n for n in made if n in wanted or n in self.outputs or self.waiting[n] > inside[n]]
        results: dict[str, list[Array]] = {name: [] for name in later}
        feeds = self._at_once(todo)
        piece, weights = self._piece(todo, later, feeds)
        session = self.sessions.session(piece)
        entering = {port.name for port in session.interface.inputs if port.name not in weights}
        for first in range(0, self.count, feeds):
            given = {
                own: self.live[name][first + k]
                for name in self.live
                for k in range(feeds)
                if (own := _own(name, k)) in entering
            }
            found = session.run(weights | given)
            for k in range(feeds):
                for name in later:
                    results[name].append(self.room.keep(found[_own(name, k)]))
        self.live |= results
        self.waiting -= inside
        for k in todo:
            self.done[k] = True
        for name in [n for n in self.live if not self.waiting[n] and n not in wanted and n not in self.outputs]:
            del self.live[name]

    def knows(self, name: str) -> bool:
        """Whether a value exists here."""
        return name in self.maker or name in self.live or name in self.stored

    def gone(self, name: str) -> bool:
        """Whether a value was computed and forgotten."""
        k = self.maker.get(name)
        return k is not None and self.done[k] and name not in self.live

    def _at_once(self, todo: Sequence[int]) -> int:
        """How many feeds a piece computes in one run: as many as leave no rest."""
        if any(bodies(self.nodes[k]) for k in todo):
            return 1
        return max(some for some in range(1, self.most_feeds + 1) if self.count % some == 0)

    def _piece(self, todo: Sequence[int], outputs: Sequence[str], feeds: int) -> tuple[bytes, dict[str, Array]]:
        """(a model of these nodes, for so many feeds at once, {its inputs that are weights: array})."""
        import onnx

        weights: dict[str, Array] = {}
        parts: dict[str, Part] = {}
        constants: dict[str, ir.Value] = {}
        made: set[str] = set()
        entering: dict[str, Array] = {}
        protos = []
        for k in todo:
            node = self.nodes[k]
            proto = ir.serde.serialize_node(node)
            for out in proto.output:
                made.add(out)
            proto.ClearField("metadata_props")
            proto.ClearField("doc_string")
            for i, name in enumerate(proto.input):
                slot = (str(node.outputs[0].name), i)
                if slot in self._changed:
                    proto.input[i] = f"{name}\0{slot[0]}\0{i}"
                    weights[proto.input[i]] = self._changed[slot]
            protos.append(proto)
            for name in self.reads[k]:
                if name in self.stored and name not in self.live:
                    value = self.stored[name]
                    tensor = value.const_value
                    if tensor is not None and tensor.size > 1 and tensor.dtype.name in FED:
                        if isinstance(tensor, Part):
                            parts[name] = tensor
                            continue
                        weights.setdefault(name, self._stored(name))
                    else:
                        constants[name] = value
                elif name not in made:
                    entering[name] = self.live[name][0]
        read = {name for proto in protos for name in proto.input} | {n for k in todo for n in _captured(self.nodes[k])}
        weights = {name: array for name, array in weights.items() if name in read}
        weights |= self._made({name: part for name, part in parts.items() if name in read})
        weights = {name: self._fed(array) for name, array in weights.items()}
        graph = onnx.GraphProto(name="piece")
        ours = {*made, *entering}
        for proto in protos:
            for k in range(feeds):
                own = graph.node.add()
                own.CopyFrom(proto)
                own.name = _own(proto.name, k)
                own.input[:] = [_own(name, k) if name in ours else name for name in proto.input]
                own.output[:] = [_own(name, k) for name in proto.output]
        inner = any(bodies(self.nodes[k]) for k in todo)  # what a body hands out needs a shape, found from these
        each = {_own(name, k): array for k in range(feeds) for name, array in entering.items()}
        for name, array in (*each.items(), *weights.items()):
            dims = [size if name in weights else None for size in array.shape]
            graph.input.append(onnx.helper.make_tensor_value_info(name, _element(array), dims if inner else None))
        for k in range(feeds):
            graph.output.extend(onnx.ValueInfoProto(name=_own(name, k)) for name in outputs)
        for name, value in constants.items():
            assert value.const_value is not None
            whole = bfloat.wide(value.const_value) if self.single else value.const_value
            texts = whole.dtype == ir.DataType.STRING
            small = whole if texts else ir.tensor(whole.numpy(), dtype=whole.dtype)
            graph.initializer.append(ir.serde.serialize_tensor(small))
            graph.initializer[-1].name = name
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in self.model.opset_imports.items()]
        version = min(self.model.ir_version or 8, 10)
        model = onnx.ModelProto(ir_version=version, opset_import=opsets, graph=graph, functions=self.functions)
        return model.SerializeToString(deterministic=True), weights

    def _fed(self, array: Array) -> Array:
        """What stored numbers are for the nodes that run."""
        return bfloat.widened(array) if self.single else array


def _own(name: str, feed: int) -> str:
    """A value's name in a piece, for one of its feeds; what is left out has none."""
    return f"{name}\0{feed}" if name and feed else name


def _element(array: Array) -> int:
    import onnx

    return int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))


def _reads(node: ir.Node) -> list[str]:
    """Names of the values that a node reads, those that its bodies capture among them."""
    found = dict.fromkeys(str(value.name) for value in node.inputs if value is not None)
    return list(found | dict.fromkeys(_captured(node)))


def _captured(node: ir.Node) -> list[str]:
    """Names of outer values that the bodies of a node read."""
    found: dict[str, None] = {}
    for body in bodies(node).values():
        own = {value.name for value in (*body.inputs, *body.initializers.values())}
        inner = list(walk(body))
        own |= {out.name for one in inner for out in one.outputs}
        for one in inner:
            for graph in bodies(one).values():
                own |= {value.name for value in (*graph.inputs, *graph.initializers.values())}
        for value in (v for one in inner for v in (*one.inputs,)):
            if value is not None and value.name not in own:
                found[str(value.name)] = None
        for value in body.outputs:
            if value.name not in own:
                found[str(value.name)] = None
    return list(found)
