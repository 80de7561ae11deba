"""How good outputs are: against labels, and against the dense model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from onnxprune.errors import InputError
from onnxprune.types import Array

Outputs = Sequence[Mapping[str, Array]]


def _first(outputs: Outputs) -> Array:
    name = next(iter(outputs[0]))
    return np.concatenate([np.atleast_1d(feed[name]) for feed in outputs])


def accuracy(outputs: Outputs, dense: Outputs, labels: Array | None) -> float:
    """Share of samples whose largest score in the first output, along the last axis, is the label's."""
    if labels is None:
        raise InputError("accuracy needs an array named 'labels'", object="--metric")
    scores = _first(outputs)
    guesses = scores if scores.ndim == labels.ndim and scores.dtype.kind in "iu" else scores.argmax(axis=-1)
    if guesses.shape != labels.shape:
        raise InputError(f"{list(labels.shape)} labels for predictions of shape {list(guesses.shape)}", object="labels")
    return float(np.mean(guesses == labels))


def agreement(outputs: Outputs, dense: Outputs, labels: Array | None) -> float:
    """Share of samples on which both models' first output has its largest score at the same place."""
    return float(np.mean(_first(outputs).argmax(axis=-1) == _first(dense).argmax(axis=-1)))


def relative_error(outputs: Outputs, dense: Outputs, labels: Array | None) -> float:
    """||pruned - dense|| / ||dense|| over all float outputs together; infinite where only one of the two is finite."""
    gap = size = 0.0
    for found, wanted in zip(outputs, dense, strict=True):
        for name, array in wanted.items():
            if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
                continue
            x, y = array.astype(np.float64), found[name].astype(np.float64)
            finite = np.isfinite(x)
            if x.shape != y.shape or not np.array_equal(finite, np.isfinite(y)):
                return float("inf")
            gap += float(((x[finite] - y[finite]) ** 2).sum())
            size += float((x[finite] ** 2).sum())
    return float(np.sqrt(gap / size)) if size else float(gap > 0)


def cosine(outputs: Outputs, dense: Outputs, labels: Array | None) -> float:
    """Mean cosine between both models' first outputs, sample by sample."""
    x, y = (_first(o).astype(np.float64) for o in (outputs, dense))
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    with np.errstate(all="ignore"):  # outputs that are not finite have no angle
        norms = np.maximum(np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1), 1e-30)
        return float(np.mean((x * y).sum(axis=1) / norms))


METRICS: Mapping[str, Callable[[Outputs, Outputs, Array | None], float]] = {
    "accuracy": accuracy,
    "agreement": agreement,
    "cosine": cosine,
    "relative-error": relative_error,
}


def metric(name: str) -> Callable[[Outputs, Outputs, Array | None], float]:
    """A metric by name. Raises InputError with the names there are."""
    if name not in METRICS:
        raise InputError(f"unknown metric; there are {', '.join(METRICS)}", object=name)
    return METRICS[name]
