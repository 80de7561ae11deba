"""The child process: limits, crashes, errors that travel, and nobody left behind."""

from __future__ import annotations

import ctypes
import json
import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxprune import runtime
from onnxprune.errors import InputError, InternalError, MachineError
from onnxprune.worker import Worker, call

MB = 1 << 20


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process ends within some seconds; a zombie that init has yet to collect has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] in "ZX":
            return True
        time.sleep(0.02)
    return False


def test_result_comes_back() -> None:
    assert call(json.loads, '{"a": [1, 2]}') == {"a": [1, 2]}


def test_it_is_another_process_for_one_call_and_the_same_for_several() -> None:
    with Worker() as worker:
        first, second = worker.call(os.getpid), worker.call(os.getpid)
    assert first == second != os.getpid()
    assert gone(first)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (257, 1031)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_travel_whole(shape: tuple[int, ...], order: Any) -> None:
    sent = np.asarray(np.random.default_rng(0).standard_normal(shape), order=order)
    back = call(operator.neg, sent)
    np.testing.assert_array_equal(back, -sent)


def test_odd_arrays_travel() -> None:
    strings, strided = np.array(["a", "bc"], object), np.arange(12).reshape(3, 4)[:, ::2]
    back = call(operator.add, (strings,), (strided,))
    assert back[0].tolist() == ["a", "bc"]
    assert back[1].tolist() == strided.tolist()


def test_received_arrays_may_be_written_to() -> None:
    back = call(operator.pos, np.zeros(5))
    back += 1
    assert back.sum() == 5


def test_large_arrays_do_not_take_long() -> None:
    sent = np.ones(128 * MB // 8)
    start = time.perf_counter()
    assert call(operator.pos, sent).nbytes == sent.nbytes
    assert time.perf_counter() - start < 5


def test_chatter_does_not_reach_the_pipe_nor_block() -> None:
    with Worker(seconds=10) as worker:
        worker.call(os.system, "yes | head -c 300000; yes | head -c 300000 >&2")  # more than a pipe holds
        assert worker.call(operator.add, 1, 2) == 3


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    call(os.write, 1, b"out")
    call(os.write, 2, b"err")
    assert capfd.readouterr() == ("", "")


# What goes wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("crash", "said"),
    [
        ((signal.raise_signal, signal.SIGSEGV), "signal SEGV"),
        ((ctypes.string_at, 0), "signal SEGV"),
        ((os.abort,), "signal ABRT"),
        ((os._exit, 3), "exit code 3"),
    ],
)
def test_a_crash_is_an_error(crash: tuple[Any, ...], said: str) -> None:
    with pytest.raises(InternalError, match=said):
        call(*crash)


def test_a_crash_notes_where() -> None:
    with pytest.raises(InternalError) as caught:
        call(ctypes.string_at, 0)
    assert "string_at" in caught.value.__notes__[0]


def test_killed_by_the_system_is_the_machine() -> None:
    with pytest.raises(MachineError, match="memory is short"):
        call(signal.raise_signal, signal.SIGKILL)


def test_a_worker_goes_on_after_a_crash() -> None:
    with Worker() as worker:
        with pytest.raises(InternalError):
            worker.call(os.abort)
        assert worker.call(operator.add, 1, 2) == 3


def test_time_limit() -> None:
    start = time.perf_counter()
    with Worker(seconds=0.5) as worker:
        with pytest.raises(MachineError, match=r"longer than 0\.5 s") as caught:
            worker.call(time.sleep, 30)
        assert caught.value.code == 4
        assert worker.call(operator.add, 1, 2) == 3  # each call has its own
    assert time.perf_counter() - start < 4


def test_time_limit_holds_for_a_child_that_does_not_listen() -> None:
    with Worker(seconds=0.7) as worker:
        os.kill(worker.call(os.getpid), signal.SIGSTOP)
        with pytest.raises(MachineError, match="longer than"):
            worker.call(operator.pos, np.ones(MB))  # more than the pipe holds


def test_time_limit_ends_grandchildren(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with pytest.raises(MachineError, match="longer than"):
        call(subprocess.run, f"sleep 60 & echo $! >{note}; wait", shell=True, seconds=1)
    assert gone(int(note.read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_DATA on mapped memory")
def test_memory_limit() -> None:
    with Worker(memory=400 * MB) as worker:
        with pytest.raises(MachineError, match=r"out of memory.*raise --memory") as caught:
            worker.call(np.full, 100 * MB, 1.0)
        assert caught.value.code == 4
        assert worker.call(np.full, 100, 1.0).sum() == 100
        with pytest.raises(MachineError, match="out of memory"):
            worker.call(len, bytearray(500 * MB))  # the arguments alone


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_DATA on mapped memory")
def test_maps_of_files_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "weights.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (40 * MB,)})
        file.truncate(128 + 320 * MB)
    assert call(mapped_sum, str(path), memory=256 * MB) == 0


def mapped_sum(path: str) -> float:
    return float(np.load(path, mmap_mode="r")[::MB].sum())


def test_our_errors_keep_class_and_fields() -> None:
    with pytest.raises(InputError) as caught:
        call(runtime.known, "abacus")
    assert caught.value.fields() == {
        "code": 2,
        "file": "",
        "object": "abacus",
        "message": "unknown backend; there are cpu, cuda, openvino, tensorrt, tensorrt-rtx",
    }


def test_an_error_of_ours_leaves_the_child_alive() -> None:
    with Worker() as worker:
        before = worker.call(os.getpid)
        with pytest.raises(InputError, match="unknown backend"):
            worker.call(runtime.known, "abacus")
        assert worker.call(os.getpid) == before


def test_other_errors_are_one_line_and_internal() -> None:
    with pytest.raises(InternalError) as caught:
        call(json.loads, "{\n" * 500)
    assert "JSONDecodeError: Expecting property name" in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400
    assert "Traceback" in caught.value.__notes__[0]


def test_a_missing_file_is_the_machine(tmp_path: Path) -> None:
    with pytest.raises(MachineError) as caught:
        call(os.listdir, str(tmp_path / "absent"))
    assert caught.value.file.endswith("absent")


def test_system_exit_is_internal() -> None:
    with pytest.raises(InternalError, match="SystemExit"):
        call(sys.exit, 0)


def test_a_result_that_cannot_travel_is_internal() -> None:
    with pytest.raises(InternalError, match="TypeError"):
        call(open, os.devnull)


def local() -> Callable[[], None]:
    def inside() -> None:
        pass

    return inside


@pytest.mark.parametrize("function", [lambda: 1, local(), "".join, [].append, "os.abort"])
def test_only_functions_of_modules(function: Any) -> None:
    with pytest.raises(TypeError, match="top-level"):
        call(function)


def test_arguments_that_cannot_travel() -> None:
    with pytest.raises(TypeError):
        call(operator.pos, lambda: 1)


# Nobody left behind --------------------------------------------------------------------------------------------------

RUNNING = """
import os, sys, time
from onnxprune.worker import Worker
with Worker() as worker:
    print(worker.call(os.getpid), flush=True)
    try:
        worker.call(time.sleep, 60)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15), (signal.SIGKILL, -9)])
def test_the_child_ends_with_us(number: signal.Signals, code: int) -> None:
    if number != signal.SIGINT and sys.platform != "linux":
        pytest.skip("the child dies with its parent on Linux")
    with subprocess.Popen([sys.executable, "-c", RUNNING], stdout=subprocess.PIPE, text=True) as ours:
        assert ours.stdout is not None
        child = int(ours.stdout.readline())
        time.sleep(0.1)
        start = time.monotonic()
        ours.send_signal(number)
        assert ours.wait(5) == code
        assert gone(child)
        assert time.monotonic() - start < 5


def test_interrupt_is_not_the_childs_business() -> None:
    with Worker() as worker:
        assert worker.call(signal.raise_signal, signal.SIGINT) is None
        assert worker.call(operator.add, 1, 2) == 3


def test_the_current_folder_is_no_place_for_modules(tmp_path: Path) -> None:
    for name in ("ctypes", "pickle", "json", "numpy", "resource"):
        (tmp_path / f"{name}.py").write_text("open('canary', 'w').close()\nraise ImportError")
    code = "import json\nfrom onnxprune.worker import call\nassert call(json.loads, '1') == 1"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=with_path(), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert not (tmp_path / "canary").exists()


def with_path() -> dict[str, str]:
    root = str(Path(runtime.__file__).parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}


def test_onnx_runtime_leaves_no_files_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMPDIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    call(runtime.backend, "cpu")
    assert list(tmp_path.iterdir()) == []


def test_no_descriptors_are_lost() -> None:
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("needs /proc")
    call(os.getpid)
    before = len(list(folder.iterdir()))
    for _ in range(3):
        with Worker(seconds=5) as worker:
            worker.call(os.getpid)
            with pytest.raises(InternalError):
                worker.call(os.abort)
    assert len(list(folder.iterdir())) == before
