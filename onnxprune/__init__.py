"""Make exported neural networks smaller and faster: structured pruning of ONNX models, proven before it is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxprune.analysis import Analysis
    from onnxprune.errors import ImpossibleError, InputError, InternalError, MachineError, PruneError
    from onnxprune.pipeline import Result, prune
    from onnxprune.recipe import Options

__all__ = [
    "Analysis",
    "ImpossibleError",
    "InputError",
    "InternalError",
    "MachineError",
    "Options",
    "PruneError",
    "Result",
    "prune",
]

_HOMES = {"Analysis": "analysis", "Options": "recipe", "Result": "pipeline", "prune": "pipeline"}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that `onnxprune --help` starts at once."""
    if name not in __all__:
        raise AttributeError(name)
    from importlib import import_module

    return getattr(import_module(f"onnxprune.{_HOMES.get(name, 'errors')}"), name)
