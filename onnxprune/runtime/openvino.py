"""OpenVINO on the CPU. Everything here runs in the child process of worker.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxprune.errors import ImpossibleError, InputError, MachineError, PruneError
from onnxprune.types import Array


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """OpenVINO's exceptions as ours: ImpossibleError with its reason, which follows where in its sources it arose."""
    try:
        yield
    except (MemoryError, PruneError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and "failed at src/" not in line]
        raise ImpossibleError(f"OpenVINO cannot {doing} the model: {' '.join(lines[:4]) or error}") from None


@dataclass(frozen=True)
class VinoSession:
    """A compiled model."""

    request: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, feed: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """{output: array}. Raises ImpossibleError with OpenVINO's reason."""
        with translated("run"):
            found = self.request.infer(self._given(feed))
        named = {name: np.array(found[k]) for k, name in enumerate(self.outputs)}
        return {name: array for name, array in named.items() if outputs is None or name in outputs}

    def bound(self, feed: Mapping[str, Array]) -> Callable[[], object]:
        """One run on inputs that are set already."""
        with translated("run"):
            self.request.infer(self._given(feed))
        return lambda: self.request.infer()

    def _given(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """The inputs that are left: those that nothing reads go when a model is converted."""
        if missing := [name for name in self.inputs if name not in feed]:
            raise InputError("there is no value for this input", object=missing[0])
        return {name: feed[name] for name in self.inputs}


@dataclass(frozen=True)
class VinoBackend:
    """OpenVINO with one device."""

    name: str = "openvino"
    device: str = "CPU"

    def available(self) -> str | None:
        """None, or what to install."""
        try:
            import openvino  # noqa: F401
        except ImportError:
            return "OpenVINO is not installed; pip install 'onnxprune[openvino]'"
        return None

    def session(self, model: str, *, threads: int = 1, optimise: bool = True) -> VinoSession:
        """Load .onnx, or .xml with its .bin; float32 stays float32. `optimise` False changes nothing here."""
        import openvino

        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
        with translated("load"):
            compiled = openvino.Core().compile_model(model, self.device, settings)
        return VinoSession(
            compiled.create_infer_request(),
            tuple(port.any_name for port in compiled.inputs),
            tuple(port.any_name for port in compiled.outputs),
        )


def convert(model: str, target: str) -> None:
    """Write an ONNX model as IR: `target`, which ends in .xml, and a .bin beside it; weights keep their types."""
    if reason := VinoBackend().available():
        raise MachineError(reason, object="backend openvino")
    import openvino

    with translated("convert"):
        openvino.save_model(openvino.convert_model(model), target, compress_to_fp16=False)
