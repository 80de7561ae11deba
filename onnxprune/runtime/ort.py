"""ONNX Runtime, on the CPU and through CUDA. Everything here runs in the child process of worker.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnxprune import runtime
from onnxprune.errors import InputError, MachineError
from onnxprune.types import Array

if TYPE_CHECKING:
    import onnxruntime


@dataclass(frozen=True)
class Port:
    """An input or output: name, element type as ONNX Runtime spells it, dims (names for dynamic ones)."""

    name: str
    type: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Interface:
    """What a model takes and gives."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def _said(error: Exception) -> str:
    """ONNX Runtime's reason in one line, without its status code."""
    text = " ".join(str(error).split())
    return text.split(" : ", 3)[-1][:300]


def session(
    path: str, *, threads: int = 1, optimise: bool = True, backend: str = "cpu"
) -> onnxruntime.InferenceSession:
    """A session. Raises InputError if the model cannot be loaded, MachineError if the backend is not there."""
    provider = runtime.provider(backend)
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        made = onnxruntime.InferenceSession(path, options, providers=[provider])
    except MemoryError:
        raise
    except Exception as error:
        raise InputError(f"ONNX Runtime cannot load the model: {_said(error)}") from None
    if provider not in made.get_providers():
        raise MachineError(runtime.KNOWN[backend], object=f"backend {backend}")
    return made


def infer_once(made: onnxruntime.InferenceSession, feed: Mapping[str, Array]) -> list[Any]:
    """One run. Raises InputError with ONNX Runtime's reason."""
    try:
        return list(made.run(None, dict(feed)))
    except MemoryError:
        raise
    except Exception as error:
        raise InputError(f"ONNX Runtime cannot run the model: {_said(error)}") from None


def run(
    path: str,
    feeds: Sequence[Mapping[str, Array]],
    *,
    threads: int = 1,
    optimise: bool = True,
    backend: str = "cpu",
) -> list[dict[str, Array]]:
    """{output: array} for each feed."""
    made = session(path, threads=threads, optimise=optimise, backend=backend)
    names = [output.name for output in made.get_outputs()]
    return [dict(zip(names, infer_once(made, feed), strict=True)) for feed in feeds]


def interface(path: str) -> Interface:
    """Inputs and outputs as ONNX Runtime sees them: proof that the file loads."""
    made = session(path)
    inputs, outputs = (
        tuple(Port(p.name, p.type, tuple(p.shape)) for p in ports) for ports in (made.get_inputs(), made.get_outputs())
    )
    return Interface(inputs, outputs)
