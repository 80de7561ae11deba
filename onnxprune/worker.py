"""The child process in which models run: native code that crashes, hangs or eats memory does so there.

Functions, arguments and results travel by pickle over pipes between our own two processes. That is safe because both
ends are ours: what is called and with what comes from the package, never from a file that somebody made.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from types import TracebackType
from typing import Any, cast

from onnxprune.errors import InternalError, LateError, MachineError, PruneError
from onnxprune.types import Progress, quietly

# Not `-m onnxprune.worker`, which would look for modules in the current folder first, beside a stranger's model.
BOOT = "import sys; sys.path[:] = sys.argv[2:]; from onnxprune.worker import serve; serve(int(sys.argv[1]))"
CHATTER = 1 << 16  # bytes of what native code printed that are kept: what a pipe holds
NUMBER = struct.Struct(">Q")

Frames = Sequence[bytes | bytearray | memoryview]


class Worker:
    """One child process that answers calls in turn, within `seconds` and `memory` bytes for each.

    It starts with the first call, and anew after a call that it did not survive. Use it in the thread that made it:
    Linux ends the child with the thread that started it. `progress` hears what a function says by `tell`.
    """

    def __init__(self, *, seconds: float = 600.0, memory: int | None = None, progress: Progress = quietly) -> None:
        self.seconds, self.memory, self.progress = seconds, memory, progress
        self._child: subprocess.Popen[bytes] | None = None
        self._chatter = -1

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the child and everything that it started, at once: it has nothing to save."""
        child, self._child = self._child, None
        if child is None:
            return
        _kill(child)
        child.wait()
        os.close(self._chatter)
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    @contextlib.contextmanager
    def within(self, seconds: float, memory: int | None = None) -> Iterator[None]:
        """Tighter limits for the calls inside."""
        before = self.seconds, self.memory
        self.seconds = min(seconds, self.seconds)
        self.memory = min((limit for limit in (memory, self.memory) if limit), default=None)
        try:
            yield
        finally:
            self.seconds, self.memory = before

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """function(*args, **kwargs) in the child; the function is a module's own, so that the child can import it.

        Raises the PruneError that the function raised, MachineError over a limit of time or memory, InternalError if
        the child crashed or the function failed in a way that nobody foresaw (notes hold where), TypeError for a
        function or an argument that cannot travel.
        """
        request = _packed((self.memory or 0, _importable(function), args, kwargs))
        child = self._started()
        late = threading.Event()

        def stop() -> None:
            late.set()
            _kill(child)

        clock = threading.Timer(min(self.seconds, threading.TIMEOUT_MAX), stop)
        try:
            clock.start()
            with contextlib.suppress(BrokenPipeError):  # how the child ended says why
                _send(cast(FileIO, child.stdin), request)
            while (answer := _unpacked(_received(cast(FileIO, child.stdout))))[0] == "progress":
                self.progress(*answer[1])
            status, value = answer
            clock.cancel()
            clock.join()
        except EOFError:
            raise self._ended(child, late) from None
        except BaseException:
            self.close()
            raise
        finally:
            clock.cancel()
        if status == "fatal" or late.is_set():
            self.close()
        if status != "result":
            raise value
        return value

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self.close()
        self._chatter, end = os.pipe()
        # Full means that the rest is dropped, not that the child waits: a cap without a file and without a thread.
        os.set_blocking(end, False)
        os.set_blocking(self._chatter, False)
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-c", BOOT, str(os.getpid()), *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=end,
                bufsize=0,
                start_new_session=True,  # a group of its own to kill, and Ctrl-C reaches us alone
                # A pool for NumPy costs start-up, and its stacks would count against `memory` on a large machine. What
                # ONNX Runtime would keep of the run in the user's cache is nobody's business.
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"},
            )
        except BaseException:
            os.close(self._chatter)
            raise
        finally:
            os.close(end)
        return self._child

    def _ended(self, child: subprocess.Popen[bytes], late: threading.Event) -> PruneError:
        """Why there is no answer. Leaves no child behind."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(1.0)
        code, killed = child.returncode, late.is_set()
        said = b""
        with contextlib.suppress(OSError):
            said = os.read(self._chatter, CHATTER)
        self.close()
        if killed:
            return LateError(f"running the model took longer than {self.seconds:.3g} s; raise --timeout")
        if self.memory and b"bad_alloc" in said:
            return _short(self.memory)
        if code == -signal.SIGKILL:
            return MachineError("the system killed the run (signal KILL), most likely because memory is short")
        error = InternalError(f"the runtime {_fate(code)} while running the model")
        if said:
            error.add_note(said.decode(errors="backslashreplace"))
        return error


def call(
    function: Callable[..., Any], *args: Any, seconds: float = 600.0, memory: int | None = None, **kwargs: Any
) -> Any:
    """One call in a child of its own; see Worker.call."""
    with Worker(seconds=seconds, memory=memory) as worker:
        return worker.call(function, *args, **kwargs)


def _importable(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, if a child can import it by name."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    found = getattr(sys.modules.get(str(module)), name, None) is function
    if not found or module == "__main__":
        raise TypeError(f"{function!r} is not the top-level function of a module")
    return function


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill the child's group, unless it was waited for and its number may be another's."""
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)


def _fate(code: int | None) -> str:
    if code is None:
        return "closed its pipe"
    if code >= 0:
        return f"ended without an answer (exit code {code})"
    names = {s.value: s.name.removeprefix("SIG") for s in signal.Signals}
    return f"crashed (signal {names.get(-code, -code)})"


def _short(memory: int) -> MachineError:
    """Out of memory, as an error that says what the limit was."""
    limit = f"; it may use {memory / 1e6:.0f} MB, raise --memory" if memory else ""
    return MachineError(f"out of memory while running the model{limit}")


# Both ends: a pickle, and the arrays in it as they lie in memory ----------------------------------------------------


def _packed(value: object) -> Frames:
    arrays: list[pickle.PickleBuffer] = []
    try:
        data = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    except (pickle.PicklingError, AttributeError) as error:
        raise TypeError(f"cannot travel between processes: {error}") from None
    return [data, *(array.raw() for array in arrays)]


def _unpacked(frames: Frames) -> Any:
    return pickle.loads(frames[0], buffers=frames[1:])


def _send(pipe: FileIO, frames: Frames) -> None:
    sizes = [len(frame) for frame in frames]
    for part in (b"".join(NUMBER.pack(n) for n in (len(sizes), *sizes)), *frames):
        rest = memoryview(part)
        while rest:
            rest = rest[pipe.write(rest) :]


def _received(pipe: FileIO) -> Frames:
    """Raises EOFError if the other end is gone."""
    (count,) = NUMBER.unpack(_exactly(pipe, NUMBER.size))
    sizes = [size for (size,) in NUMBER.iter_unpack(_exactly(pipe, NUMBER.size * count))]
    return [_exactly(pipe, size) for size in sizes]


def _exactly(pipe: FileIO, size: int) -> bytearray:
    data = bytearray(size)  # arrays are built in it, and may be written to
    rest = memoryview(data)
    while rest:
        if not (count := pipe.readinto(rest)):
            raise EOFError
        rest = rest[count:]
    return data


# The child's end ---------------------------------------------------------------------------------------------------


_outgoing: FileIO | None = None
_speaking = threading.Lock()  # one message at a time


def tell(stage: str, done: int, total: int) -> None:
    """Say how far a call is, while it runs."""
    if _outgoing is not None:
        with _speaking:
            _send(_outgoing, _packed(("progress", (stage, done, total))))


def serve(parent: int) -> None:
    """Answer calls until the pipe closes. Nothing that native code prints can reach the pipe."""
    global _outgoing
    _confine(parent)
    incoming, outgoing = FileIO(os.dup(0), "r"), FileIO(os.dup(1), "w")
    _outgoing = outgoing
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    while True:
        try:
            request = _received(incoming)
        except EOFError:
            os._exit(0)
        except MemoryError:
            _send(outgoing, _packed(("fatal", _short(0))))
            os._exit(0)
        _send(outgoing, _answer(request))


def _answer(request: Frames) -> Frames:
    """Result or error of one call. After a fatal one the child is not called again."""
    status, memory = "fatal", 0
    try:
        memory, function, args, kwargs = _unpacked(request)
        _limit(memory)
        return _packed(("result", function(*args, **kwargs)))
    except PruneError as ours:
        status, error = "error", ours
    except MemoryError:
        error = _short(memory)
    except OSError as failed:
        error = MachineError(failed.strerror or str(failed), file=failed.filename or "")
    except BaseException as failed:
        first = (f"{type(failed).__name__}: {failed}".splitlines() or [""])[0][:300]
        error = InternalError(f"while running the model: {first}")
        error.add_note(traceback.format_exc())
    return _packed((status, error))


def _confine(parent: int) -> None:
    """No orphan, no core file, no interrupt of its own."""
    import ctypes
    import faulthandler
    import resource

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent
    if os.getppid() != parent:  # it died before that
        os._exit(1)
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit(memory: int) -> None:
    """No more memory than so many bytes, or than the system allows without a number.

    What may be written to counts, not all that is mapped: RLIMIT_AS would also count files that are only read, and the
    address space that allocators and CUDA reserve without using it. (ONNX Runtime maps external weights writable, and
    packs most of them into a second copy: both count.)
    """
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limits = [limit for limit in (memory or resource.RLIM_INFINITY, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits, default=resource.RLIM_INFINITY), hard))
