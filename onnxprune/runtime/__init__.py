"""Where models run: backends by name. Each runtime is imported in its own file only, inside the child process."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

from onnxprune.errors import InputError, MachineError

KNOWN = {
    "cpu": "ONNX Runtime on the CPU: pip install 'onnxprune[cpu]'",
    "cuda": "ONNX Runtime on an NVIDIA GPU: pip install 'onnxprune[gpu]' in an environment without onnxruntime",
    "openvino": "not built into this version yet",
    "tensorrt": "not built into this version yet",
    "tensorrt-rtx": "not built into this version yet",
}
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def _installed(package: str) -> bool:
    try:
        installed_version(package)
    except PackageNotFoundError:
        return False
    return True


def provider(backend: str) -> str:
    """ONNX Runtime's name of a backend. Raises InputError for an unknown one, MachineError for one that is missing."""
    if backend not in KNOWN:
        raise InputError(f"unknown backend; there are {', '.join(KNOWN)}", object=backend)
    if backend not in PROVIDERS:
        raise MachineError(KNOWN[backend], object=f"backend {backend}")
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]
    if len(both) == 2:
        raise MachineError(
            "onnxruntime and onnxruntime-gpu are both installed and exclude each other; uninstall both, install one"
        )
    if not both:
        raise MachineError("ONNX Runtime is not installed; pip install 'onnxprune[cpu]' (or [gpu])")
    return PROVIDERS[backend]
