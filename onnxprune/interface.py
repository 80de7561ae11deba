"""Graph inputs and outputs that a pruned model has narrower than the dense one, and which positions are left of them.

A KV cache loses heads with the attention that keeps it. The file says which, so that whoever has arrays of the dense
model can hand the pruned one its part of them, and compare what both make.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from onnxprune.types import Array, Positions

KEY = "onnxprune.interface"  # among the model's metadata
Narrowed = Mapping[str, Mapping[int, Positions]]  # {graph input or output: {axis: positions of the dense one}}


def note(narrowed: Narrowed) -> dict[str, str]:
    """The metadata that says so; nothing where nothing is narrower."""
    found = {name: {str(axis): at.tolist() for axis, at in axes.items()} for name, axes in sorted(narrowed.items())}
    return {KEY: json.dumps(found)} if found else {}


def noted(metadata: Mapping[str, str]) -> Narrowed:
    """What `note` wrote; nothing where metadata are silent or of somebody else."""
    try:
        found = json.loads(metadata.get(KEY, "{}"))
        return {
            str(name): {int(axis): np.array(at, np.uint32).reshape(-1).astype(np.int64) for axis, at in axes.items()}
            for name, axes in found.items()
        }
    except (AttributeError, OverflowError, TypeError, ValueError, RecursionError):
        return {}


def narrow(arrays: Mapping[str, Array], narrowed: Narrowed) -> dict[str, Array]:
    """Arrays of the dense model as the narrower one has them; others, and what is as narrow already, as they are."""
    found = dict(arrays)
    for name in narrowed.keys() & found.keys():
        for axis, positions in narrowed[name].items():
            array = found[name]
            if len(positions) and axis < array.ndim and array.shape[axis] > max(len(positions) - 1, positions.max()):
                found[name] = array if array.shape[axis] == len(positions) else array.take(positions, axis)
    return found
