"""The child process in which models run: native code that crashes, hangs or eats memory does so there.

Arguments and results travel by pickle over pipes between our own two processes; nothing from a file is unpickled.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, Any

from onnxprune import errors
from onnxprune.errors import InternalError, MachineError, PruneError

HEADER = struct.Struct(">Q")


def _send(pipe: IO[bytes], value: object) -> None:
    data = pickle.dumps(value, protocol=5)
    pipe.write(HEADER.pack(len(data)))
    pipe.write(data)
    pipe.flush()


class Worker:
    """One child process that answers calls in turn; each call has the whole time limit."""

    def __init__(self, *, seconds: float = 600.0, memory: int | None = None) -> None:
        self.seconds, self.memory = seconds, memory
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the child and everything that it started."""
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """function(*args, **kwargs) in the child.

        Raises the PruneError that the function raised, MachineError over the limits of time and memory, InternalError
        if the child crashed or the function failed in a way that nobody foresaw.
        """
        child = self._started()
        assert child.stdin is not None and child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # the reason is in how the child ended
                _send(child.stdin, (function.__module__, function.__qualname__, args, kwargs))
            status, value = pickle.loads(self._receive(child.stdout))
        except BaseException:
            self.close()
            raise
        if status == "result":
            return value
        if status == "ours":
            name, message, file, culprit = value
            raise getattr(errors, name)(message, file=file, object=culprit)
        self.close()
        if status == "memory":
            raise MachineError("out of memory while running the model")
        raise InternalError(f"while running the model: {value}")

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._child = subprocess.Popen(
                [sys.executable, "-m", "onnxprune.worker", str(self.memory or 0), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self._child

    def _receive(self, pipe: IO[bytes]) -> bytes:
        end = time.monotonic() + self.seconds
        (length,) = HEADER.unpack(self._read(pipe, HEADER.size, end))
        return self._read(pipe, length, end)

    def _read(self, pipe: IO[bytes], count: int, end: float) -> bytes:
        found = bytearray()
        while len(found) < count:
            left = end - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise MachineError(f"running the model took longer than {self.seconds:g} s; raise --timeout")
            part = os.read(pipe.fileno(), min(count - len(found), 1 << 20))
            if not part:
                raise self._ended()
            found += part
        return bytes(found)

    def _ended(self) -> PruneError:
        assert self._child is not None
        code = self._child.wait()
        if code == -signal.SIGKILL and self.memory is None:
            return MachineError("the process that ran the model was killed; is memory short?")
        how = signal.Signals(-code).name if code < 0 else f"exit {code}"
        return InternalError(f"the runtime crashed while running the model ({how})")


def call(
    function: Callable[..., Any], *args: Any, seconds: float = 600.0, memory: int | None = None, **kwargs: Any
) -> Any:
    """One call in a child of its own; see Worker.call."""
    with Worker(seconds=seconds, memory=memory) as worker:
        return worker.call(function, *args, **kwargs)


def _limit(memory: int, parent: int) -> None:
    """Limits of the child: no core files, memory that it may allocate (maps of files do not count), no orphan."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent
    if os.getppid() != parent:
        sys.exit(1)


def _serve() -> None:
    """Answer calls until the pipe closes; nothing that native code prints can reach the pipe."""
    _limit(int(sys.argv[1]), int(sys.argv[2]))
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(null, stream)
    while header := incoming.read(HEADER.size):
        answer: tuple[str, object]
        try:
            module, name, args, kwargs = pickle.loads(incoming.read(HEADER.unpack(header)[0]))
            answer = ("result", getattr(importlib.import_module(module), name)(*args, **kwargs))
        except PruneError as error:
            answer = ("ours", (type(error).__name__, error.message, error.file, error.object))
        except MemoryError:
            answer = ("memory", None)
        except Exception as error:
            answer = ("failed", f"{type(error).__name__}: {error}".splitlines()[0][:500])
        _send(outgoing, answer)


if __name__ == "__main__":
    _serve()
