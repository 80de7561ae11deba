"""How good outputs are: against labels, and against the dense model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

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
    """Mean cosine between both models' first outputs, sample by sample; feeds may differ in length."""
    name, found = next(iter(outputs[0])), []
    for pair in zip(outputs, dense, strict=True):
        x, y = (np.atleast_1d(feed[name]).astype(np.float64) for feed in pair)
        x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
        with np.errstate(all="ignore"):  # outputs that are not finite have no angle
            norms = np.maximum(np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1), 1e-30)
            found.append((x * y).sum(axis=1) / norms)
    return float(np.mean(np.concatenate(found)))


def divergence(found: Outputs, dense: Outputs) -> float:
    """How far outputs are from the dense ones, without labels: lower is better, zero is equal.

    For scores (two or three axes, the last of at least three positions) the mean KL divergence of their softmax, or
    of themselves where they are probabilities already; for anything, a hundredth of the squared error relative to the
    dense output's variance, which counts alone for what is no score. Outputs are averaged.
    """
    totals = []
    for name, whole in dense[0].items():
        if name not in found[0] or (whole.dtype.kind != "f" and whole.dtype.name != "bfloat16"):
            continue
        pairs = [(a[name].astype(np.float64), b[name].astype(np.float64)) for a, b in zip(found, dense, strict=True)]
        if any(x.shape != y.shape or not np.array_equal(np.isfinite(x), np.isfinite(y)) for x, y in pairs):
            return float("inf")
        pairs = [(np.where(np.isfinite(x), x, 0), np.where(np.isfinite(y), y, 0)) for x, y in pairs]
        size = sum(y.size for _, y in pairs)
        mean = sum(y.sum() for _, y in pairs) / max(size, 1)
        spread = sum(((y - mean) ** 2).sum() for _, y in pairs) or 1.0
        error = sum(((x - y) ** 2).sum() for x, y in pairs) / spread
        scores = whole.ndim in (2, 3) and whole.shape[-1] >= 3
        totals.append(0.01 * error + _kl(pairs) if scores else error)
    return float(np.mean(totals)) if totals else 0.0


def jensen_shannon(found: Outputs, dense: Outputs) -> float:
    """Mean Jensen-Shannon divergence of the rows of all outputs, as scores or probabilities; at most ln 2.

    Outputs that are no scores count as in `divergence`.
    """
    totals = []
    for name, pairs in _pairs(found, dense):
        if pairs[0][1].ndim not in (2, 3) or pairs[0][1].shape[-1] < 2:
            whole = [{name: pair[1]} for pair in pairs]
            totals.append(divergence([{name: pair[0]} for pair in pairs], whole))
            continue
        likely = all((y >= 0).all() and np.allclose(y.sum(axis=-1), 1, atol=1e-3) for _, y in pairs)
        total = rows = 0.0
        for x, y in pairs:
            p, q = (np.exp(_log(np.maximum(v, 1e-12) if likely else v, likely)) for v in (x, y))
            middle = (p + q) / 2
            total += 0.5 * float((p * np.log(p / middle) + q * np.log(q / middle)).sum())
            rows += x.size / x.shape[-1]
        totals.append(total / max(rows, 1))
    return float(np.mean(totals)) if totals else 0.0


def angle(found: Outputs, dense: Outputs) -> float:
    """Mean angle between the rows of all outputs along their last axes, as a share of a straight angle."""
    totals = []
    for _, pairs in _pairs(found, dense):
        x, y = (
            np.concatenate([v.reshape(-1, v.shape[-1] if v.ndim else 1) for v in side])
            for side in zip(*pairs, strict=True)
        )
        norms = np.maximum(np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1), 1e-30)
        totals.append(float(np.mean(np.arccos(np.clip((x * y).sum(axis=1) / norms, -1, 1))) / np.pi))
    return float(np.mean(totals)) if totals else 0.0


def _pairs(found: Outputs, dense: Outputs) -> Iterator[tuple[str, list[tuple[Array, Array]]]]:
    """(name, [(found, dense) for each feed]) of the float outputs that both have, what is no number as zero."""
    for name, whole in dense[0].items():
        if name in found[0] and (whole.dtype.kind == "f" or whole.dtype.name == "bfloat16"):
            yield (
                name,
                [
                    (np.nan_to_num(row[name].astype(np.float64)), np.nan_to_num(other[name].astype(np.float64)))
                    for row, other in zip(found, dense, strict=True)
                ],
            )


def _kl(pairs: Sequence[tuple[Array, Array]]) -> float:
    """Mean KL divergence of the second from the first, over rows along the last axis."""
    likely = all((y >= 0).all() and np.allclose(y.sum(axis=-1), 1, atol=1e-3) for _, y in pairs)
    total = rows = 0.0
    for x, y in pairs:
        p, q = (_log(np.maximum(v, 1e-12) if likely else v, likely) for v in (y, x))
        total += float((np.exp(p) * (p - q)).sum())
        rows += x.size / x.shape[-1]
    return total / max(rows, 1)


def _log(values: Array, likely: bool) -> Array:
    """Logarithms of probabilities, given as such or as scores."""
    if likely:
        return np.asarray(np.log(values / values.sum(axis=-1, keepdims=True)))
    shifted = values - values.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


MEASURES: Mapping[str, Callable[[Outputs, Outputs], float]] = {
    "angle": angle,
    "divergence": divergence,
    "jensen-shannon": jensen_shannon,
}
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
