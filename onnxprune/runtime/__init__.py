"""Where models run: backends by name. Each runtime is imported in its own file only, inside the child process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from onnxprune.errors import InputError, MachineError
from onnxprune.types import Array

LATER = "not built into this version yet"
KNOWN: Mapping[str, str] = {
    "cpu": "ONNX Runtime on the CPU: pip install 'onnxprune[cpu]'",
    "cuda": "ONNX Runtime on an NVIDIA GPU: pip install 'onnxprune[gpu]' in an environment without onnxruntime",
    "openvino": "OpenVINO on the CPU: pip install 'onnxprune[openvino]'",
    "tensorrt": LATER,
    "tensorrt-rtx": LATER,
}


class Session(Protocol):
    """A model that is ready to run."""

    def run(self, feed: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """{output: array}, of all outputs unless some are named."""
        ...

    def bound(self, feed: Mapping[str, Array]) -> Callable[[], object]:
        """One run on inputs that are in place already: what is timed."""
        ...


class Backend(Protocol):
    """One way to run models."""

    @property
    def name(self) -> str:
        """As `--backend` takes it."""
        ...

    def available(self) -> str | None:
        """None, or why it cannot be used and what to install."""
        ...

    def session(self, model: str, *, threads: int = 1, optimise: bool = True) -> Session:
        """Load the model at a path."""
        ...


def known(name: str) -> str:
    """The name of a backend of this version. Raises InputError for an unknown one, MachineError for a later one."""
    if name not in KNOWN:
        raise InputError(f"unknown backend; there are {', '.join(KNOWN)}", object=name)
    if KNOWN[name] == LATER:
        raise MachineError(f"{LATER}; use cpu, cuda or openvino", object=f"backend {name}")
    return name


def backend(name: str) -> Backend:
    """A backend by name, ready to use; imports its runtime, so call it in the child. Raises as `known` does."""
    from onnxprune.runtime import openvino, ort

    found: Backend = openvino.VinoBackend() if known(name) == "openvino" else ort.BACKENDS[name]
    if reason := found.available():
        raise MachineError(reason, object=f"backend {name}")
    return found
