"""python -m exports.keras FOLDER [NAME...], in tools/: networks of Keras with the TensorFlow backend, by tf2onnx."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import applications, layers
from tf2onnx.handler import tf_op

from exports import export_all

IMAGE = (64, 64, 3)


@tf_op("Erfc")
class Erfc:
    """Keras writes GELU with it, and tf2onnx does not know it."""

    @classmethod
    def version_9(cls, ctx: Any, node: Any, **_: Any) -> None:
        """1 - Erf."""
        shapes, types = node.output_shapes, node.output_dtypes
        ctx.remove_node(node.name)
        erf = ctx.make_node("Erf", node.input, shapes=shapes, dtypes=types)
        one = ctx.make_const(f"{node.name}_one", np.ones((), np.float32))
        given = [one.output[0], erf.output[0]]
        ctx.make_node("Sub", given, outputs=node.output, shapes=shapes, dtypes=types)


def randomise(model: keras.Model) -> keras.Model:
    """Random numbers for everything that a fresh network has at zero or one: a proof must not pass by accident."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        value = np.asarray(variable)
        if "variance" in variable.path:
            variable.assign(rng.uniform(0.5, 1.5, value.shape))
        elif value.dtype.kind == "f" and value.size and value.min() == value.max():
            variable.assign(value + rng.uniform(-0.3, 0.3, value.shape))
    return model


def write(model: keras.Model, path: Path) -> None:
    """Batch dynamic, lengths where they are None."""
    (given,) = model.inputs
    model(
        np.zeros([size or 3 for size in given.shape], given.dtype)
    )  # before its first call it has no inputs to export
    randomise(model).export(path, format="onnx", verbose=False)


def application(build: Any, **given: Any) -> keras.Model:
    """One of keras.applications, narrow where it can be."""
    return build(weights=None, input_shape=IMAGE, classes=10, **given)


def encoder(causal: bool = False, norm_first: bool = False) -> keras.Model:
    """Two transformer blocks over token ids of any length."""
    ids = keras.Input((None,), dtype="int32")
    x = layers.Embedding(101, 40)(ids)
    for _ in range(2):
        given = layers.LayerNormalization()(x) if norm_first else x
        mixed = layers.MultiHeadAttention(5, 9, value_dim=11)(given, given, use_causal_mask=causal)
        x = x + mixed if norm_first else layers.LayerNormalization()(x + mixed)
        given = layers.LayerNormalization()(x) if norm_first else x
        wide = layers.Dense(40)(layers.Dense(67, activation="gelu")(given))
        x = x + wide if norm_first else layers.LayerNormalization()(x + wide)
    return keras.Model(ids, layers.Dense(13)(layers.GlobalAveragePooling1D()(x)))


def vit() -> keras.Model:
    """A small ViT; patches by a convolution."""
    image = keras.Input((32, 32, 3))
    x = layers.Reshape((16, 40))(layers.Conv2D(40, 8, 8)(image))
    x = layers.Dropout(0.1)(x + layers.Dense(40, use_bias=False)(x))
    for _ in range(2):
        given = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, 10)(given, given)
        x = x + layers.Dense(40)(layers.Dense(76, activation="gelu")(layers.LayerNormalization()(x)))
    return keras.Model(image, layers.Dense(11)(layers.Flatten()(x)))


def grouped() -> keras.Model:
    """Grouped queries."""
    x = keras.Input((None, 23))
    y = layers.GroupQueryAttention(9, 6, 3)(*[layers.Dense(40)(x)] * 2)
    return keras.Model(x, layers.Dense(11)(y))


def recurrent(cell: Any, both: bool = False, **given: Any) -> keras.Model:
    """Two recurrent layers over sequences of any length."""
    wrap = layers.Bidirectional if both else (lambda layer: layer)
    x = keras.Input((None, 13))
    y = wrap(cell(29, return_sequences=True, **given))(x)
    y = wrap(cell(17, **given))(y)
    return keras.Model(x, layers.Dense(7)(y))


def unet() -> keras.Model:
    """Encoder and decoder with concatenated skips, one step up learnt and one interpolated."""
    image = keras.Input((32, 32, 3))

    def twice(x: Any, width: int) -> Any:
        for _ in range(2):
            x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same")(x)))
        return x

    top = twice(image, 13)
    middle = twice(layers.MaxPooling2D()(top), 23)
    low = twice(layers.MaxPooling2D()(middle), 37)
    up = layers.Conv2DTranspose(19, 2, 2)(low)
    x = twice(layers.Concatenate()([up, middle]), 21)
    x = twice(layers.Concatenate()([layers.UpSampling2D(interpolation="bilinear")(x), top]), 11)
    return keras.Model(image, layers.Conv2D(2, 1, activation="sigmoid")(x))


def text_cnn() -> keras.Model:
    """Convolutions of several lengths over embedded tokens."""
    ids = keras.Input((40,), dtype="int32")
    x = layers.Embedding(101, 23)(ids)
    pooled = [layers.GlobalMaxPooling1D()(layers.Conv1D(17 + k, k, activation="relu")(x)) for k in (3, 4, 5)]
    return keras.Model(ids, layers.Dense(5, activation="softmax")(layers.Concatenate()(pooled)))


def small(*parts: Any, shape: tuple[int | None, ...] = (32, 32, 3)) -> keras.Model:
    """A chain of layers with a classifier behind it."""
    return keras.Sequential([keras.Input(shape), *parts, layers.Dense(10)])


MODELS: dict[str, Callable[[], keras.Model]] = {
    "resnet50": partial(application, applications.ResNet50),
    "resnet50_v2": partial(application, applications.ResNet50V2),
    "mobilenet": partial(application, applications.MobileNet, alpha=0.5),
    "mobilenet_v2": partial(application, applications.MobileNetV2, alpha=0.5),
    "mobilenet_v3_small": partial(application, applications.MobileNetV3Small),
    "efficientnet_b0": partial(application, applications.EfficientNetB0),
    "efficientnet_v2_b0": partial(application, applications.EfficientNetV2B0),
    "densenet121": partial(application, applications.DenseNet121),
    "nasnet_mobile": partial(application, applications.NASNetMobile),
    "convnext_tiny": partial(application, applications.ConvNeXtTiny),
    "xception": lambda: applications.Xception(weights=None, input_shape=(71, 71, 3), classes=10),
    "inception_v3": lambda: applications.InceptionV3(weights=None, input_shape=(75, 75, 3), classes=10),
    "vgg16": lambda: applications.VGG16(weights=None, input_shape=IMAGE, include_top=False, pooling="avg"),
    "encoder": encoder,
    "encoder_causal": partial(encoder, causal=True, norm_first=True),
    "vit": vit,
    "grouped_queries": grouped,
    "lstm": partial(recurrent, layers.LSTM),
    "lstm_both": partial(recurrent, layers.LSTM, both=True),
    "gru": partial(recurrent, layers.GRU),
    "gru_both": partial(recurrent, layers.GRU, both=True),
    "gru_reset_before": partial(recurrent, layers.GRU, reset_after=False),
    "rnn": partial(recurrent, layers.SimpleRNN),
    "unet": unet,
    "text_cnn": text_cnn,
    "mlp": lambda: small(
        layers.Flatten(), layers.Dense(67, activation="elu"), layers.BatchNormalization(),
        layers.Dense(41, activation="selu"), shape=(7, 5),
    ),
    "cnn": lambda: small(
        layers.Conv2D(13, 3, 2, padding="same", activation="relu"), layers.SeparableConv2D(23, 3, activation="swish"),
        layers.DepthwiseConv2D(3, depth_multiplier=2), layers.AveragePooling2D(2), layers.Conv2D(29, 3),
        layers.LeakyReLU(), layers.Flatten(), layers.Dense(31, activation="relu"),
    ),
    "cnn_norms": lambda: small(
        layers.Conv2D(24, 3), layers.GroupNormalization(6), layers.PReLU(shared_axes=[1, 2]), layers.Conv2D(30, 3),
        layers.LayerNormalization(), layers.Conv2D(22, 3, activation="gelu"), layers.UnitNormalization(),
        layers.GlobalAveragePooling2D(), layers.Dense(19),
    ),
    "cnn_grouped": lambda: small(
        layers.Conv2D(24, 3, activation="relu"), layers.Conv2D(36, 3, groups=4, activation="relu"),
        layers.Permute((3, 1, 2)), layers.Reshape((36, -1)), layers.Dense(17), layers.Flatten(),
    ),
    "conv_lstm": lambda: keras.Sequential([
        keras.Input((4, 16, 16, 3)), layers.ConvLSTM2D(13, 3, padding="same"), layers.GlobalMaxPooling2D(),
        layers.Dense(7),
    ]),
    "volume": lambda: small(
        layers.Conv3D(13, 3, activation="relu"), layers.MaxPooling3D(), layers.Conv3DTranspose(17, 2, 2),
        layers.Conv3D(19, 1, activation="relu"), layers.GlobalAveragePooling3D(), shape=(8, 8, 8, 2),
    ),
}  # fmt: skip

if __name__ == "__main__":
    export_all(__doc__, MODELS, {"keras": write})
