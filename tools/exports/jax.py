"""python -m exports.jax FOLDER [NAME...], in tools/: networks of Flax and Equinox, by jax2onnx."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax2onnx import to_onnx

from exports import export_all


@dataclass(frozen=True)
class Network:
    """A function of arrays, and the shapes of its inputs with names for dynamic axes; token ids are integers."""

    function: Callable[..., Any]
    inputs: Sequence[Any]


def randomise(tree: Any) -> Any:
    """Random numbers for every vector of a tree that is all zero or one: a proof must not pass by accident."""
    rng = np.random.default_rng(0)

    def fresh(leaf: Any) -> Any:
        alike = isinstance(leaf, jax.Array) and leaf.dtype.kind == "f" and leaf.size and leaf.min() == leaf.max()
        return leaf + rng.uniform(-0.3, 0.3, leaf.shape).astype(leaf.dtype) if alike else leaf

    return jax.tree.map(fresh, tree)


def write(network: Network, path: Path, opset: int = 23) -> None:
    """Batch dynamic."""
    path.write_bytes(to_onnx(network.function, list(network.inputs), opset=opset).SerializeToString())


def flax(build: Callable[[nnx.Rngs], nnx.Module], *inputs: Any) -> Network:
    """A network of flax.nnx, in inference."""
    graph, state = nnx.split(build(nnx.Rngs(0)))
    model = nnx.merge(graph, randomise(state))
    model.eval()
    return Network(model, inputs)


def old_flax(module: linen.Module, *inputs: Any) -> Network:
    """A network of flax.linen, its parameters closed over."""
    example = [jnp.zeros([2 if isinstance(n, str) else n for n in shape]) for shape in inputs]
    variables = randomise(module.init(jax.random.key(0), *example))
    return Network(lambda *x: module.apply(variables, *x), inputs)


def equinox(build: Callable[[Any], eqx.Module], *inputs: Any) -> Network:
    """A network of Equinox, mapped over the batch."""
    return Network(jax.vmap(randomise(build(jax.random.key(0)))), inputs)


class Mlp(nnx.Module):
    """Dense layers with BatchNorm."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.a = nnx.Linear(23, 67, rngs=rngs)
        self.norm = nnx.BatchNorm(67, rngs=rngs)
        self.b = nnx.Linear(67, 41, rngs=rngs)
        self.c = nnx.Linear(41, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float32[n, 23] -> float32[n, 10]."""
        return self.c(nnx.gelu(self.b(nnx.relu(self.norm(self.a(x))))))


class Residual(nnx.Module):
    """Two convolutions and what they are added to."""

    def __init__(self, inner: int, outer: int, stride: int, rngs: nnx.Rngs) -> None:
        self.a = nnx.Conv(inner, outer, (3, 3), strides=stride, use_bias=False, rngs=rngs)
        self.norm_a = nnx.BatchNorm(outer, rngs=rngs)
        self.b = nnx.Conv(outer, outer, (3, 3), use_bias=False, rngs=rngs)
        self.norm_b = nnx.BatchNorm(outer, rngs=rngs)
        self.short = nnx.Conv(inner, outer, (1, 1), strides=stride, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float32[n, h, w, inner] -> float32[n, h / stride, w / stride, outer]."""
        return nnx.relu(self.norm_b(self.b(nnx.relu(self.norm_a(self.a(x))))) + self.short(x))


class ResNet(nnx.Module):
    """Three residual blocks and a classifier."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 13, (3, 3), rngs=rngs)
        widths = ((13, 17, 1), (17, 29, 2), (29, 37, 2))
        self.blocks = nnx.List([Residual(*block, rngs=rngs) for block in widths])
        self.head = nnx.Linear(37, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float32[n, 32, 32, 3] -> float32[n, 10]."""
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class Cnn(nnx.Module):
    """Pooling, a depthwise convolution, GroupNorm, and a flattened map before the classifier."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.a = nnx.Conv(3, 24, (3, 3), padding="VALID", rngs=rngs)
        self.norm = nnx.GroupNorm(24, num_groups=6, rngs=rngs)
        self.deep = nnx.Conv(24, 24, (3, 3), feature_group_count=24, rngs=rngs)
        self.b = nnx.Conv(24, 19, (1, 1), rngs=rngs)
        self.up = nnx.ConvTranspose(19, 23, (2, 2), strides=(2, 2), rngs=rngs)
        self.c = nnx.Linear(14 * 14 * 23, 31, rngs=rngs)
        self.d = nnx.Linear(31, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float32[n, 30, 30, 3] -> float32[n, 10]."""
        x = nnx.max_pool(nnx.silu(self.norm(self.a(x))), window_shape=(2, 2), strides=(2, 2))
        x = nnx.avg_pool(nnx.relu(self.b(nnx.relu(self.deep(x)))), window_shape=(2, 2), strides=(2, 2))
        x = nnx.leaky_relu(self.up(x)).reshape(x.shape[0], -1)
        return self.d(nnx.relu(self.c(x)))


class Block(nnx.Module):
    """A transformer block."""

    def __init__(self, norm: Any, causal: bool, rngs: nnx.Rngs) -> None:
        self.norm_a, self.norm_b = norm(40, rngs=rngs), norm(40, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(5, 40, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(40, 67, rngs=rngs), nnx.Linear(67, 40, rngs=rngs)
        self.causal = causal

    def __call__(self, x: jax.Array) -> jax.Array:
        """float32[n, s, 40] -> float32[n, s, 40]."""
        mask = jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1]), bool)) if self.causal else None
        x = x + self.attention(self.norm_a(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm_b(x))))


class Vit(nnx.Module):
    """Patches, a class token, positions, blocks."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.patches = nnx.Conv(3, 40, (8, 8), strides=(8, 8), padding="VALID", rngs=rngs)
        self.token = nnx.Param(jax.random.normal(jax.random.key(3), (1, 1, 40)))
        self.places = nnx.Param(jax.random.normal(jax.random.key(4), (1, 17, 40)))
        self.blocks = nnx.List([Block(nnx.LayerNorm, False, rngs) for _ in range(2)])
        self.norm, self.head = nnx.LayerNorm(40, rngs=rngs), nnx.Linear(40, 11, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        """float32[n, 32, 32, 3] -> float32[n, 11]."""
        x = self.patches(image).reshape(image.shape[0], 16, 40)
        x = jnp.concatenate([jnp.broadcast_to(self.token[...], (x.shape[0], 1, 40)), x], 1) + self.places[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Decoder(nnx.Module):
    """Token ids through causal blocks with RMSNorm, logits by the embedding itself."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(101, 40, rngs=rngs)
        self.blocks = nnx.List([Block(nnx.RMSNorm, True, rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(40, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """int32[n, 12] -> float32[n, 12, 101]."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


class Gated(nnx.Module):
    """Gated halves and a low-rank layer, with einsums."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.wide = nnx.Linear(23, 2 * 37, rngs=rngs)
        self.heads = nnx.Einsum("ni,ihd->nhd", (37, 5, 7), (5, 7), rngs=rngs)
        self.join = nnx.LinearGeneral((5, 7), 29, axis=(-2, -1), rngs=rngs)
        self.out = nnx.Linear(29, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float32[n, 23] -> float32[n, 10]."""
        left, right = jnp.split(self.wide(x), 2, axis=-1)
        return self.out(nnx.tanh(self.join(nnx.relu(self.heads(left * nnx.sigmoid(right))))))


class Old(linen.Module):
    """Convolutions and dense layers of linen."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float32[n, 28, 28, 1] -> float32[n, 10]."""
        x = linen.avg_pool(linen.relu(linen.Conv(13, (3, 3))(x)), window_shape=(2, 2), strides=(2, 2))
        x = linen.avg_pool(linen.relu(linen.Conv(23, (3, 3))(x)), window_shape=(2, 2), strides=(2, 2))
        x = linen.relu(linen.Dense(41)(x.reshape(x.shape[0], -1)))
        return linen.Dense(10)(linen.LayerNorm()(x))


class OldRecurrent(linen.Module):
    """A recurrent cell of linen over a sequence."""

    cell: Any

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float32[n, 9, 13] -> float32[n, 7]."""
        return linen.Dense(7)(linen.RNN(self.cell(29))(x)[:, -1])


class OldAttention(linen.Module):
    """Attention of linen with an MLP behind it."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float32[n, 12, 23] -> float32[n, 12, 11]."""
        x = linen.Dense(40)(x)
        x = x + linen.MultiHeadDotProductAttention(5, qkv_features=45)(linen.LayerNorm()(x))
        return linen.Dense(11)(linen.gelu(linen.Dense(67)(linen.LayerNorm()(x))))


class Attending(eqx.Module):
    """Attention of Equinox over one sequence."""

    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key: Any) -> None:
        a, b = jax.random.split(key)
        self.norm = eqx.nn.LayerNorm(40)
        self.attention = eqx.nn.MultiheadAttention(5, 40, use_query_bias=True, use_output_bias=True, key=a)
        self.mlp = eqx.nn.MLP(40, 11, 67, 1, activation=jax.nn.gelu, key=b)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float32[s, 40] -> float32[s, 11]."""
        y = jax.vmap(self.norm)(x)
        return jax.vmap(self.mlp)(x + self.attention(y, y, y))


IDS = jax.ShapeDtypeStruct((2, 12), jnp.int32)
MODELS: dict[str, Callable[[], Network]] = {
    "mlp": partial(flax, Mlp, ("B", 23)),
    "resnet": partial(flax, ResNet, ("B", 32, 32, 3)),
    "cnn": partial(flax, Cnn, ("B", 30, 30, 3)),
    "vit": partial(flax, Vit, ("B", 32, 32, 3)),
    "vit_fixed": partial(flax, Vit, (2, 32, 32, 3)),
    "decoder": partial(flax, Decoder, IDS),
    "gated": partial(flax, Gated, ("B", 23)),
    "linen_cnn": lambda: old_flax(Old(), ("B", 28, 28, 1)),
    "linen_lstm": lambda: old_flax(OldRecurrent(linen.OptimizedLSTMCell), ("B", 9, 13)),
    "linen_gru": lambda: old_flax(OldRecurrent(linen.GRUCell), ("B", 9, 13)),
    "linen_attention": lambda: old_flax(OldAttention(), ("B", 12, 23)),
    "equinox_mlp": partial(equinox, lambda key: eqx.nn.MLP(23, 10, 67, 2, key=key), ("B", 23)),
    "equinox_attention": partial(equinox, Attending, ("B", 12, 40)),
}

if __name__ == "__main__":
    export_all(__doc__, MODELS, {"jax": write, "jax_opset21": partial(write, opset=21)})
