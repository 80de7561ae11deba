"""Where models run: backends by name. Each runtime is imported in its own file only, inside the child process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from onnxprune.errors import InputError, MachineError
from onnxprune.types import Array

KNOWN: Mapping[str, str] = {
    "cpu": "ONNX Runtime on the CPU",
    "cuda": "ONNX Runtime on an NVIDIA GPU",
    "openvino": "OpenVINO on the CPU",
    "tensorrt": "TensorRT 10 or 11 on an NVIDIA GPU",
    "tensorrt-rtx": "TensorRT-RTX on an NVIDIA GPU; engines are built without one too",
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
    """The name of a backend. Raises InputError for an unknown one."""
    if name not in KNOWN:
        raise InputError(f"unknown backend; there are {', '.join(KNOWN)}", object=name)
    return name


def found(name: str) -> Backend:
    """A backend by name, whether it can be used here or not. Raises InputError for an unknown one."""
    from onnxprune.runtime import openvino, ort, tensorrt

    if known(name) in tensorrt.NAMES:
        return tensorrt.EngineBackend(name)
    return openvino.VinoBackend() if name == "openvino" else ort.BACKENDS[name]


def backend(name: str) -> Backend:
    """A backend by name, ready to use; imports its runtime, so call it in the child. Raises MachineError without it."""
    wanted = found(name)
    if reason := wanted.available():
        raise MachineError(reason, object=f"backend {name}")
    return wanted


def missing() -> dict[str, str | None]:
    """{backend: None, or why it cannot be used here and what to install}; call it in the child."""
    reasons: dict[str, str | None] = {}
    for name in KNOWN:
        try:
            reasons[name] = found(name).available()
        except MachineError as error:
            reasons[name] = error.message
    return reasons
