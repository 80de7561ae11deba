"""python -m exports.sklearn FOLDER [NAME...], in tools/: perceptrons of scikit-learn, by skl2onnx."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from skl2onnx import to_onnx
from sklearn.decomposition import PCA
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, PolynomialFeatures, StandardScaler

from exports import export_all

ROWS = np.random.default_rng(0).standard_normal((200, 11)).astype(np.float32)
SUM = ROWS.sum(axis=1)
CLASSES = np.digitize(SUM, [-2, 0, 2])
TARGETS = {
    "binary": SUM > 0,
    "classes": CLASSES,
    "names": np.array(["ash", "birch", "cedar", "elm"])[CLASSES],
    "labels": np.stack([SUM > 0, ROWS[:, 0] > 0, ROWS[:, 1] > 0], axis=1).astype(int),
    "number": SUM,
    "numbers": ROWS[:, :3] * SUM[:, None],
}


def perceptron(target: str, *before: Any, widths: tuple[int, ...] = (37, 23), activation: str = "relu") -> Any:
    """A fitted pipeline (few rounds: its weights need not be good)."""
    kind = MLPRegressor if target.startswith("number") else MLPClassifier
    network = kind(hidden_layer_sizes=widths, activation=activation, max_iter=3, random_state=0)
    return make_pipeline(*before, network).fit(ROWS, TARGETS[target])


def write(model: Any, path: Path, **options: Any) -> None:
    """Batch dynamic, as skl2onnx writes it."""
    given = {"options": {id(model): options}} if options and hasattr(model, "predict_proba") else {}
    path.write_bytes(to_onnx(model, ROWS[:1], **given).SerializeToString())


MODELS: dict[str, Callable[[], Any]] = {
    **{f"mlp_{target}": partial(perceptron, target) for target in TARGETS},
    "mlp_tanh": partial(perceptron, "classes", activation="tanh"),
    "mlp_logistic": partial(perceptron, "number", activation="logistic", widths=(31,)),
    "mlp_scaled": partial(perceptron, "classes", StandardScaler(), widths=(41, 29, 19)),
    "mlp_ranged": partial(perceptron, "number", MinMaxScaler()),
    "mlp_reduced": partial(perceptron, "classes", StandardScaler(), PCA(7)),
    "mlp_powers": partial(perceptron, "number", PolynomialFeatures(2, include_bias=False)),
}

if __name__ == "__main__":
    export_all(__doc__, MODELS, {"skl": write, "skl_arrays": partial(write, zipmap=False)})
