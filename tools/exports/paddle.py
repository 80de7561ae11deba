"""python -m exports.paddle FOLDER [NAME...], in tools/: networks of PaddlePaddle, by paddle2onnx."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.static import InputSpec
from paddle.vision import models

from exports import export_all

IMAGE = (InputSpec([None, 3, 64, 64], "float32", "image"),)


@dataclass(frozen=True)
class Network:
    """A network and its inputs, None for dynamic axes."""

    model: nn.Layer
    inputs: Sequence[InputSpec] = IMAGE


def randomise(model: nn.Layer) -> nn.Layer:
    """Random numbers for everything that a fresh network has at zero or one: a proof must not pass by accident."""
    rng = np.random.default_rng(0)
    for name, tensor in model.state_dict().items():
        value = tensor.numpy()
        if name.endswith("_variance"):
            tensor.set_value(rng.uniform(0.5, 1.5, value.shape).astype(value.dtype))
        elif value.dtype.kind == "f" and value.size and value.min() == value.max():
            tensor.set_value(value + rng.uniform(-0.3, 0.3, value.shape).astype(value.dtype))
    model.eval()
    return model


def write(network: Network, path: Path, opset: int = 17) -> None:
    """Batch dynamic."""
    stem = str(path.with_suffix(""))
    try:
        paddle.onnx.export(randomise(network.model), stem, input_spec=list(network.inputs), opset_version=opset)
    except SystemExit:
        raise RuntimeError("paddle2onnx left the process; it has said why") from None


class Encoder(nn.Layer):
    """nn.TransformerEncoder over embedded tokens."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(101, 40)
        layer = nn.TransformerEncoderLayer(40, 5, 67, activation="gelu", normalize_before=norm_first)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(40, 13)

    def forward(self, ids: Any) -> Any:
        """int64[n, s] -> float32[n, s, 13]."""
        return self.head(self.layers(self.embed(ids)))


class Recurrent(nn.Layer):
    """Two recurrent layers and a classifier on the last step."""

    def __init__(self, cell: Any, both: bool) -> None:
        super().__init__()
        self.cells = cell(13, 29, num_layers=2, direction="bidirect" if both else "forward")
        self.head = nn.Linear(58 if both else 29, 7)

    def forward(self, x: Any) -> Any:
        """float32[n, s, 13] -> float32[n, 7]."""
        return self.head(self.cells(x)[0][:, -1])


class UNet(nn.Layer):
    """Skips, one step up learnt and one interpolated, GroupNorm and attention to channels."""

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Sequential(nn.Conv2D(3, 13, 3, padding=1), nn.BatchNorm2D(13), nn.ReLU())
        self.low = nn.Sequential(nn.Conv2D(13, 24, 3, 2, 1), nn.GroupNorm(4, 24), nn.Swish())
        self.lowest = nn.Sequential(nn.Conv2D(24, 37, 3, 2, 1), nn.InstanceNorm2D(37), nn.Hardswish())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2D(1), nn.Conv2D(37, 9, 1), nn.ReLU(), nn.Conv2D(9, 37, 1))
        self.up = nn.Conv2DTranspose(37, 19, 2, 2)
        self.middle = nn.Conv2D(43, 21, 3, padding=1)
        self.head = nn.Conv2D(34, 2, 1)

    def forward(self, image: Any) -> Any:
        """float32[n, 3, h, w] -> float32[n, 2, h, w]."""
        top = self.top(image)
        low = self.low(top)
        x = self.lowest(low)
        x = self.up(x * nn.functional.hardsigmoid(self.gate(x)))
        x = nn.functional.relu6(self.middle(paddle.concat([x, low], 1)))
        x = nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear")
        return self.head(paddle.concat([x, top], 1))


def encoder(norm_first: bool = False) -> Network:
    """Batch and length dynamic."""
    return Network(Encoder(norm_first), [InputSpec([None, None], "int64", "ids")])


def recurrent(cell: Any, both: bool = False) -> Network:
    """Batch and length dynamic."""
    return Network(Recurrent(cell, both), [InputSpec([None, None, 13], "float32", "x")])


def vision(build: Any, **given: Any) -> Network:
    """One of paddle.vision.models."""
    return Network(build(pretrained=False, num_classes=10, **given))


MODELS: dict[str, Callable[[], Network]] = {
    "mobilenet_v1": partial(vision, models.mobilenet_v1, scale=0.5),
    "mobilenet_v2": partial(vision, models.mobilenet_v2, scale=0.5),
    "mobilenet_v3_small": partial(vision, models.mobilenet_v3_small),
    "resnet18": partial(vision, models.resnet18),
    "resnet50": partial(vision, models.resnet50),
    "resnext50": partial(vision, models.resnext50_32x4d),
    "shufflenet_v2": partial(vision, models.shufflenet_v2_x0_25),
    "densenet121": partial(vision, models.densenet121),
    "squeezenet": partial(vision, models.squeezenet1_1),
    "googlenet": partial(vision, models.googlenet),
    "encoder": encoder,
    "encoder_prenorm": partial(encoder, True),
    "lstm": partial(recurrent, nn.LSTM),
    "lstm_both": partial(recurrent, nn.LSTM, True),
    "gru": partial(recurrent, nn.GRU),
    "gru_both": partial(recurrent, nn.GRU, True),
    "unet": lambda: Network(UNet()),
    "mlp": lambda: Network(
        nn.Sequential(nn.Linear(23, 67), nn.BatchNorm1D(67), nn.GELU(), nn.Linear(67, 41), nn.LeakyReLU(),
                      nn.Linear(41, 10)),
        [InputSpec([None, 23], "float32", "x")],
    ),
}  # fmt: skip

if __name__ == "__main__":
    export_all(__doc__, MODELS, {"paddle": write})
