"""Writing: refuse early, write beside the target, check there, and rename in one step. And reading of data files."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import stat
import threading
import tokenize
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np
import onnx
import onnx_ir as ir

from onnxprune.ahead import ahead
from onnxprune.errors import InputError, MachineError, shown
from onnxprune.reading import Source, open_regular, read_bytes, read_model, serialized
from onnxprune.types import Array
from onnxprune.weights import contents, lifted, standing

__all__ = [
    "Drafts",
    "Source",
    "Written",
    "check_output",
    "check_outputs",
    "dump",
    "read_arrays",
    "read_bytes",
    "read_model",
    "size_of",
    "write_model",
    "write_text",
]

INLINE = 1_900_000_000  # bytes of weights above which they go to a file of their own
SMALL = 1024  # bytes up to which a tensor stays in the model file all the same
ALIGN = 4096
MEGABYTE = 1_000_000
ENGINES = (".engine", ".plan")
AT_ONCE = 1 << 26  # bytes after which the disk is told to write
SAYS = 0.2  # seconds after which it is said again how far what is waited for is
DIGITS = 12  # of the content's hash in the name of a data file
DATA_LIMIT = 16 * 2**30  # bytes of arrays that a data file may hold
HEADER_LIMIT = 1 << 16  # bytes of what says how one of them is laid out


class Written(tuple[Path, ...]):
    """The files of a model, and their `sha256` as Source.sha256 would have it; none of what is thrown away."""

    sha256 = ""


Told = Callable[[int, int], None]


def _nobody(done: int, total: int) -> None:
    """Nobody is told."""


@dataclass
class _Draft:
    """A model of which the data is being written; `reached` so many megabytes of how many."""

    model: ir.Model
    stop: threading.Event = field(default_factory=threading.Event)
    reached: tuple[int, int] = (0, 0)

    def told(self, done: int, total: int) -> None:
        """Note how far it is. Raises CancelledError when it is to stop."""
        self.reached = done, total
        if self.stop.is_set():
            raise CancelledError


class Drafts:
    """Data files that are written, in threads, before it is known whether they are wanted; by where they belong.

    What nobody took is gone at the end.
    """

    def __init__(self) -> None:
        self._begun: dict[Path, tuple[_Draft, Future[tuple[Path, bytes]]]] = {}

    def __enter__(self) -> Drafts:
        return self

    def __exit__(self, *_: object) -> None:
        for path in [*self._begun]:
            self._drop(path)

    def begin(self, model: ir.Model, path: Path, external: bool) -> None:
        """Write what `write_model` would, in the place of what was begun there before."""
        self._drop(path)
        if not _beside(model, external):
            return
        draft = _Draft(model)

        def written() -> tuple[Path, bytes]:
            _, tensors, starts = _apart(model)
            with _temporary(path) as (temporary, file):
                return temporary, _stream(tensors, starts, file, draft.told)

        self._begun[path] = draft, ahead(written)

    def take(self, model: ir.Model, path: Path, told: Told = _nobody) -> tuple[Path, bytes] | None:
        """(file, sha256) of a model's data if it was begun for this place; the file is the caller's. Raises OSError."""
        if path not in self._begun or self._begun[path][0].model is not model:
            return None
        draft, begun = self._begun[path]
        while wait([begun], SAYS).not_done:  # an interrupt here leaves it to `__exit__`
            told(*draft.reached)
        found = begun.result()
        del self._begun[path]
        return found

    def _drop(self, path: Path) -> None:
        if path in self._begun:
            draft, begun = self._begun.pop(path)
            draft.stop.set()
            with suppress(Exception):  # nobody wants it
                begun.result()[0].unlink()


def check_outputs(
    outputs: Iterable[str | Path], inputs: Sequence[Path], *, force: bool, engine: bool = False
) -> list[Path]:
    """Refuse outputs of which one cannot or must not be written, or two are one place. Raises InputError, MachineError.

    No output may be one of `inputs`, however its path is spelled.
    """
    found: dict[tuple[Path, str], Path] = {}
    for output in outputs:
        path = check_output(output, inputs, force=force, engine=engine)
        if found.setdefault((path.parent.resolve(), path.name), path) is not path:
            raise InputError("would be written twice; give it another name, or put {target} in it", file=path)
    return list(found.values())


def check_output(path: str | Path, inputs: Sequence[Path] = (), *, force: bool, engine: bool = False) -> Path:
    """Refuse one output. Raises InputError, MachineError."""
    path = Path(path)
    try:
        if path.suffix.lower() in ENGINES and not engine:
            raise InputError("engines are written by 'onnxprune build'", file=path)
        if not path.parent.is_dir():
            raise InputError("its folder does not exist", file=path)
        if path.is_dir():
            raise InputError("is a folder", file=path)
        if os.path.lexists(path):
            if path.exists() and any(path.samefile(file) for file in inputs):
                raise InputError("is an input; choose another output", file=path)
            if path.is_symlink() or not stat.S_ISREG(path.lstat().st_mode):
                raise InputError("exists and is not a regular file; choose another output", file=path)
            if not force:
                raise InputError("exists; use --force to replace it", file=path)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise MachineError("no permission to write there", file=path)
    except OSError as error:
        raise InputError(error.strerror or "cannot be written", file=path) from None
    except ValueError:
        raise InputError("not a file name", file=path) from None
    return path


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Failures of the disk as ours."""
    try:
        yield
    except OSError as error:
        raise MachineError(f"cannot be written: {error.strerror or error}", file=path) from None


@contextmanager
def _temporary(path: Path, durable: bool = True) -> Iterator[tuple[Path, IO[bytes]]]:
    """A new file beside the target under a random name; synced when the block ends, gone if it fails."""
    start = os.fsencode(path.name)[:100].decode(errors="ignore")  # a name may have 255 bytes, this one has 22 more
    name = path.with_name(f".{start}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield name, file
            file.flush()
            if durable:
                os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            name.unlink()
        raise


def _commit(temporary: Path, path: Path, force: bool, durable: bool = True) -> None:
    """Give a finished file its name in one step; without force somebody else's file wins. What fails leaves nothing."""
    fresh, named = not os.path.lexists(path), False
    try:
        if force:
            os.replace(temporary, path)
            named = True
        else:
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise InputError("exists; use --force to replace it", file=path) from None
            named = True
            temporary.unlink()
        if durable:
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException:
        for name in (temporary, *([path] if fresh and named else [])):
            with suppress(OSError):
                name.unlink()
        raise


def write_text(path: Path, text: str, *, force: bool = True) -> None:
    """Write a small file whole or not at all. Raises InputError, MachineError."""
    write_bytes(path, text.encode(), force=force)


def write_bytes(path: Path, data: bytes, *, force: bool = True) -> None:
    """Likewise, for any data."""
    with _disk(path):
        with _temporary(path) as (temporary, file):
            file.write(data)
        _commit(temporary, path, force)


@contextmanager
def _all_or_none() -> Iterator[list[Path]]:
    """A list of files that go again if what is inside fails."""
    done: list[Path] = []
    try:
        yield done
    except BaseException:
        for path in done:
            with suppress(OSError):
                path.unlink()
        raise


def write_files(files: Mapping[Path, bytes], *, force: bool = True) -> None:
    """Write small files, all of them or none: where one cannot be written, those that are new before it go again."""
    with _all_or_none() as done:
        for path, data in files.items():
            fresh = not os.path.lexists(path)
            write_bytes(path, data, force=force)
            done += [path] if fresh else []


def publish(files: Mapping[Path, Path], *, force: bool) -> None:
    """Give finished files {temporary: path} their names, the last one last; all lie on one disk. Raises as above.

    Where one cannot have its name, those that are new before it go again.
    """
    with _all_or_none() as done:
        for temporary, path in files.items():
            with _disk(path):
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                fresh = not os.path.lexists(path)
                _commit(temporary, path, force)
                done += [path] if fresh else []


def dump(model: ir.Model, folder: str | Path, name: str, *, external: bool = False) -> Path:
    """Write a throw-away copy to run or to weigh."""
    return write_model(model, Path(folder) / f"{name}.onnx", force=True, external=external, durable=False)[0]


def write_model(
    model: ir.Model,
    path: Path,
    *,
    force: bool,
    external: bool,
    prove: Callable[[Path], None] | None = None,
    durable: bool = True,
    drafts: Drafts | None = None,
    told: Told = _nobody,
) -> Written:
    """Write a model, whole or not at all; `prove` sees the finished file before it gets its name.

    `told` hears how many megabytes of how many are in the file that holds the weights.

    With `external`, or above 1.9 GB, weights go to `NAME.HASH.data` beside it, which is complete before the model
    file, the single point of commitment, is renamed. The data may have been written ahead, as one of `drafts`.
    Raises InputError, MachineError.
    """
    data: Path | None = None
    digest = b""
    made: int | None = None
    with _disk(path):
        try:
            if _beside(model, external):
                proto, data, digest, made = _with_data(model, path, durable, drafts, told)
            else:
                proto = _message(model)
            content = proto.SerializeToString(deterministic=True)
            with _temporary(path, durable) as (temporary, file):
                file.write(content)
            if prove is not None:
                try:
                    prove(temporary)
                except BaseException:
                    temporary.unlink()
                    raise
            _commit(temporary, path, force, durable)
        except BaseException:
            if data is not None and made is not None:
                with suppress(OSError):
                    if data.stat().st_ino == made:  # else another run has put its copy there, and relies on it
                        data.unlink()
            raise
    files = Written((path,) if data is None else (path, data))
    if durable:
        total = hashlib.sha256(content)
        total.update(digest)
        files.sha256 = total.hexdigest()
    return files


def _message(model: ir.Model) -> onnx.ModelProto:
    """The protobuf message, without shapes of initializers, which say nothing that the tensors do not."""
    proto = serialized(model)
    stored = {tensor.name for tensor in proto.graph.initializer}
    left = [value for value in proto.graph.value_info if value.name not in stored]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(left)
    return proto


def _apart(model: ir.Model) -> tuple[ir.Model, dict[str, ir.TensorProtocol], dict[str, int]]:
    """A copy without its large initializers, these, and where each starts in the data file; "" is that file's end."""
    skeleton, tensors = lifted(model, SMALL)
    starts: dict[str, int] = {}
    offset = 0
    for name, tensor in tensors.items():
        starts[name] = offset + -offset % ALIGN
        offset = starts[name] + tensor.nbytes
    return skeleton, tensors, starts | {"": offset}


def _with_data(
    model: ir.Model, path: Path, durable: bool, drafts: Drafts | None, told: Told
) -> tuple[onnx.ModelProto, Path, bytes, int | None]:
    """Stream large initializers to a data file named by its content.

    Gives the model that refers to it, the file, its sha256, and what the system knows it by where it was not there
    before.
    """
    skeleton, tensors, starts = _apart(model)
    if drafts is not None and (taken := drafts.take(model, path, told)) is not None:
        temporary, digest = taken
    else:
        with _temporary(path, durable) as (temporary, file):
            digest = _stream(tensors, starts, file, told)
    final = path.with_name(f"{path.name}.{digest.hex()[:DIGITS]}.data")
    try:
        made = None if os.path.lexists(final) else temporary.stat().st_ino
        if made is None and not _holds(final, digest):
            raise InputError("exists and holds something else; choose another output", file=final)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _commit(temporary, final, True, durable)
    for name, tensor in tensors.items():
        skeleton.graph.initializers[name].const_value = standing(tensor, name, final.name, starts[name])
    return _message(skeleton), final, digest, made


def _stream(
    tensors: Mapping[str, ir.TensorProtocol],
    starts: Mapping[str, int],
    file: IO[bytes],
    told: Told,
) -> bytes:
    """Write tensors to where they start in a file; its sha256."""
    content, sent = hashlib.sha256(), 0
    for name, tensor in tensors.items():
        for part in chain([b"\0" * (starts[name] - file.tell())], contents(tensor)):
            file.write(part)
            content.update(part)
            told(file.tell() // MEGABYTE, starts[""] // MEGABYTE)
            if file.tell() - sent >= AT_ONCE:  # lets the disk begin with what is there, for the sync at the end
                os.posix_fadvise(file.fileno(), sent, AT_ONCE, os.POSIX_FADV_DONTNEED)
                sent += AT_ONCE
    return content.digest()


def _holds(path: Path, digest: bytes) -> bool:
    """Whether a file is a regular one with this sha256."""
    with suppress(InputError, MachineError), os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").digest() == digest
    return False


def size_of(model: ir.Model, name: str, *, external: bool) -> int:
    """Bytes of the files that `write_model` would write under this name."""
    if not _beside(model, external):
        return _message(model).ByteSize()
    skeleton, tensors, starts = _apart(model)
    file = f"{name}.{'0' * DIGITS}.data"
    for key, tensor in tensors.items():
        skeleton.graph.initializers[key].const_value = standing(tensor, key, file, starts[key])
    return _message(skeleton).ByteSize() + starts[""]


def _beside(model: ir.Model, external: bool) -> bool:
    """Whether weights go to a file of their own: where that is wished and some are large, or all are too many."""
    held = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    sizes = [tensor.nbytes for tensor in held if tensor.dtype != ir.DataType.STRING]
    return sum(sizes) > INLINE or (external and max(sizes, default=0) > SMALL)


# Data files ------------------------------------------------------------------------------------------------------


def read_arrays(path: str | Path, wanted: Container[str] | None = None) -> dict[str, Array]:
    """Arrays of a .npz by name, or of a .npy under the name "". Never pickles. Raises InputError, MachineError.

    Arrays that are not `wanted` are not read: they are empty.
    """
    path = Path(path)
    with os.fdopen(open_regular(path, follow=True), "rb") as file:
        try:
            if path.suffix == ".npy":
                return {"": _array(file, path, "", os.fstat(file.fileno()).st_size)}
            found: dict[str, Array] = {}
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                for member in members:
                    name = member.filename.removesuffix(".npy")
                    if name in found:
                        raise InputError("stored twice", file=path, object=name)
                    if wanted is not None and name not in wanted:
                        found[name] = np.zeros(0)
                        continue
                    if sum(array.nbytes for array in found.values()) + member.file_size > DATA_LIMIT:
                        raise InputError(f"holds more than {DATA_LIMIT:,} bytes", file=path)
                    with archive.open(member) as stream:
                        found[name] = _array(stream, path, name, member.file_size)
            return found
        except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, KeyError, RuntimeError, OverflowError):
            raise InputError("not a .npz or .npy file, or damaged", file=path) from None
        except OSError as error:
            raise InputError(f"damaged: {error.strerror or error}", file=path) from None


def _array(stream: IO[bytes], path: Path, name: str, size: int) -> Array:
    """One array; its header must agree with the bytes that are there before any memory is taken."""
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise InputError("a version of the .npy format that is not supported", file=path, object=name)
    size_of_header = stream.read(2 if version == (1, 0) else 4)
    if (most := int.from_bytes(size_of_header, "little")) > HEADER_LIMIT:
        raise InputError("its header is damaged", file=path, object=name)
    try:
        shape, fortran, dtype = read(io.BytesIO(size_of_header + stream.read(most)))
    except (tokenize.TokenError, SyntaxError, TypeError, RecursionError, MemoryError):  # of Python's own parser
        raise InputError("its header is damaged", file=path, object=name) from None
    if dtype.hasobject or dtype.names is not None:
        raise InputError("holds Python objects, which are never unpickled", file=path, object=name)
    count = 1
    for length in shape:
        count *= int(length)
    needed = count * dtype.itemsize
    if needed > size or needed > DATA_LIMIT:
        raise InputError(
            f"shape {list(shape)} {dtype} needs {needed:,} bytes, {size:,} are there", file=path, object=name
        )
    data = stream.read(needed)
    if len(data) != needed:
        raise InputError("cut short", file=path, object=shown(name))
    array: Array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return array
