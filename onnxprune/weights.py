"""Weights that stay in their file: mapped, and sliced or zeroed block by block when somebody looks at them.

They travel to a child process as what they are: a range of a file, which is opened and checked there once more.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import onnx_ir as ir

from onnxprune.errors import InputError
from onnxprune.types import Array

BLOCK = 1 << 22  # bytes that are copied at a time: they stay in the cache of a core
LEAST = 1 << 16  # bytes below which a slice is made at once
ALIGN = 64  # bytes

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Place:
    """A range of a file that was opened and checked: by its path, and by what the system knows it as."""

    path: str
    device: int
    inode: int
    offset: int
    length: int


_maps: WeakValueDictionary[tuple[int, int, int], mmap.mmap] = WeakValueDictionary()  # each holds a descriptor


class Shelf:
    """A folder of arrays that take no memory; it goes with the last tensor that lies on it."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="onnxprune-")
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def take(self, tensors: Iterable[Mapped]) -> None:
        """Stay as long as these are there."""
        for tensor in tensors:
            tensor.shelf = self


class Mapped(ir.Tensor[Any]):
    """A tensor in a file; `place` says where, and `shelf` is there if the file is ours to keep."""

    def __init__(self, array: Array, dtype: ir.DataType, name: str, place: Place) -> None:
        super().__init__(array, dtype=dtype, name=name)
        self.place = place
        self.shelf: Shelf | None = None

    @classmethod
    def of(cls, data: Any, offset: int, place: Place, dtype: ir.DataType, shape: tuple[int, ...], name: str) -> Mapped:
        """What lies from `offset` on in mapped memory."""
        raw = np.frombuffer(data, np.uint8, place.length, offset)
        return cls(raw.view(dtype.numpy()).reshape(shape), dtype, name, place)

    @classmethod
    def at(cls, file: int, place: Place, dtype: ir.DataType, shape: tuple[int, ...], name: str) -> Mapped:
        """A range of an open file, read only."""
        if not place.length:
            return cls(np.zeros(shape, dtype.numpy()), dtype, name, place)
        info = os.fstat(file)
        key = info.st_dev, info.st_ino, info.st_size
        if (data := _maps.get(key)) is None:
            data = _maps[key] = mmap.mmap(file, info.st_size, access=mmap.ACCESS_READ)
        return cls.of(data, place.offset, place, dtype, shape, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.place, int(self.dtype), tuple(self.numpy().shape), self.name)


def _again(place: Place, dtype: int, shape: tuple[int, ...], name: str) -> Mapped:
    """In another process. Raises InputError if another file has taken the path."""
    file = os.open(place.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        info = os.fstat(file)
        if (info.st_dev, info.st_ino) != (place.device, place.inode) or info.st_size < place.offset + place.length:
            raise InputError("changed while it was read", file=place.path)
        return Mapped.at(file, place, ir.DataType(dtype), shape, name)
    finally:
        os.close(file)


def shelved(arrays: Mapping[K, Array], folder: str) -> dict[K, Mapped]:
    """Arrays in a new file of a folder."""
    starts = []
    descriptor, path = tempfile.mkstemp(dir=folder)
    with os.fdopen(descriptor, "w+b") as file:
        for array in arrays.values():
            starts.append(file.seek(-file.tell() % ALIGN, os.SEEK_CUR))
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        info = os.fstat(descriptor)
        return {
            key: Mapped.at(
                descriptor,
                Place(path, info.st_dev, info.st_ino, start, array.nbytes),
                ir.DataType.from_numpy(array.dtype),
                array.shape,
                "",
            )
            for (key, array), start in zip(arrays.items(), starts, strict=True)
        }


class Part(ir.LazyTensor):
    """What is left of a tensor in a file: these positions of each axis, and zeros at those; made anew each time."""

    def __init__(
        self,
        whole: Mapped,
        name: str,
        taken: Mapping[int, Array] | None = None,
        zeroed: Mapping[int, Array] | None = None,
    ) -> None:
        self.whole, self.taken, self.zeroed = whole, dict(taken or {}), dict(zeroed or {})
        sizes = [len(self.taken[k]) if k in self.taken else size for k, size in enumerate(whole.numpy().shape)]
        super().__init__(self._made, dtype=whole.dtype, shape=ir.Shape(sizes), name=name)

    def __reduce__(self) -> tuple[Any, ...]:
        return Part, (self.whole, self.name, self.taken, self.zeroed)

    def blocks(self) -> Iterator[Array]:
        """Its rows, as many at a time as lie in some BLOCK bytes."""
        shape, step = self.shape.numpy(), self._step()
        for start in range(0, shape[0], step):
            block = np.empty((min(step, shape[0] - start), *shape[1:]), self.dtype.numpy())
            self._fill(block, start)
            yield block

    def fill(self, found: Array) -> None:
        """Make it in this array of its shape and type, which lies in one piece."""
        step = self._step()
        for start in range(0, len(found), step):
            self._fill(found[start : start + step], start)

    def _step(self) -> int:
        return max(1, BLOCK // max(1, self.nbytes // max(1, self.shape.numpy()[0])))

    def _made(self) -> ir.Tensor[Any]:
        found = np.empty(self.shape.numpy(), self.dtype.numpy())
        self.fill(found)
        return ir.Tensor(found, dtype=self.dtype, name=self.name)

    def _fill(self, block: Array, start: int) -> None:
        """Its rows from `start` on, as many as `block` has."""
        whole = self.whole.numpy()
        unit = f"u{min(whole.itemsize, 8)}"  # half floats are slow to take from, and bits can be masked
        out, source = (array.reshape(*array.shape, 1).view(unit) for array in (block, whole))
        stop = start + len(block)
        if (rows := self.taken.get(0)) is None:
            source = source[start:stop]
        inner = [axis for axis in self.taken if axis]
        if rows is not None or not inner:  # with `clip`, nothing is copied on the way to `out`
            chosen = np.arange(len(source)) if rows is None else rows[start:stop]
            source = np.take(source, chosen, 0, out=None if inner else out, mode="clip")
        for axis in inner:
            source = np.take(source, self.taken[axis], axis, out=out if axis == inner[-1] else None, mode="clip")
        for axis, gone in self.zeroed.items():
            stays = np.full(whole.shape[axis], -1).astype(unit)
            stays[gone] = 0
            stays = stays[self.taken[axis]] if axis in self.taken else stays
            out &= (stays if axis else stays[start:stop]).reshape(-1, *[1] * (whole.ndim - axis))


def taken(tensor: ir.TensorProtocol, keep: Mapping[int, Array], name: str) -> ir.TensorProtocol:
    """These positions of each axis; a view of what lies in a file where that is large."""
    if isinstance(tensor, Mapped) and tensor.nbytes > LEAST:
        return Part(tensor, name, taken=keep)
    if isinstance(tensor, Part) and not tensor.zeroed:
        before = tensor.taken
        return Part(tensor.whole, name, before | {k: before[k][at] if k in before else at for k, at in keep.items()})
    array = tensor.numpy()
    for axis, positions in keep.items():
        array = np.take(array, positions, axis)
    return ir.Tensor(array, dtype=tensor.dtype, name=name)


SHOWN = 1 << 22  # bytes of a tensor that are looked at at a time


def rows(tensor: ir.TensorProtocol | None) -> Iterator[Array] | None:
    """Its rows, a few at a time, where it is a large one of floats in a file."""
    if not isinstance(tensor, Mapped) or tensor.nbytes <= SHOWN or not tensor.dtype.is_floating_point():
        return None
    array = tensor.numpy()
    step = max(1, SHOWN // max(1, array[:1].nbytes))
    return (array[start : start + step] for start in range(0, len(array), step))


def contents(tensor: ir.TensorProtocol) -> Iterator[memoryview | bytes]:
    """The bytes of a tensor in order, some BLOCK at a time where they lie in a file."""
    if isinstance(tensor, Part):
        yield from (np.ascontiguousarray(block).reshape(-1).view(np.uint8).data for block in tensor.blocks())
    elif isinstance(tensor, Mapped):
        plain = tensor.numpy().reshape(-1).view(np.uint8)
        yield from (plain[start : start + BLOCK].data for start in range(0, len(plain), BLOCK))
    else:
        yield tensor.tobytes()


def lifted(model: ir.Model, least: int) -> tuple[ir.Model, dict[str, ir.TensorProtocol]]:
    """A copy of a model with stand-ins for initializers of more than `least` bytes, and these by name."""
    skeleton = model.clone()
    found: dict[str, ir.TensorProtocol] = {}
    for name, value in skeleton.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > least and tensor.dtype != ir.DataType.STRING:
            found[name] = tensor
            value.const_value = standing(tensor, name, "", 0)
    return skeleton, found


def standing(tensor: ir.TensorProtocol, name: str, file: str, offset: int) -> ir.ExternalTensor:
    """What stands in a model for a tensor that lies in a file beside it."""
    return ir.ExternalTensor(file, offset, tensor.nbytes, tensor.dtype, shape=_shape(tensor), name=name)


def attach(model: ir.Model, tensors: Mapping[str, ir.TensorProtocol]) -> None:
    """Put tensors in the place of their stand-ins."""
    for name, tensor in tensors.items():
        value = model.graph.initializers[name]
        if (old := value.const_value) is not None and isinstance(tensor, Mapped):
            tensor.doc_string = old.doc_string
            tensor.metadata_props.update(old.metadata_props)
        value.const_value, value.shape = tensor, _shape(tensor)


def _shape(tensor: ir.TensorProtocol) -> ir.Shape:
    return ir.Shape([int(size) for size in tensor.shape])  # type: ignore[arg-type]
