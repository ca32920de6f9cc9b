# SPDX-License-Identifier: Apache-2.0
"""Small models in Flax: a transformer of tokens, a convolutional and a transformer classifier.

All map a row to logits, so that they share one loss and one evaluation.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import distlion_jax as dl
from benchmarks.tasks.data import CONTEXT, Batch, Data
from distlion_jax import matrices

# A small head starts the loss at log(classes); at the usual scale it starts higher.
SMALL = nn.initializers.normal(0.02)


class Block(nn.Module):
    """Attention and a two-layer perceptron, each normalised before and added after.

    Rows lie one under the other: the gradients of products with two axes take XLA on a CPU half as
    long as with three, which it transposes.
    """

    heads: int
    causal: bool = True

    @nn.compact
    def __call__(self, x: Array, length: int) -> Array:
        """float32 [rows * length, width] to the same; rows of so many places each."""
        width = x.shape[-1]
        qkv = nn.Dense(3 * width, use_bias=False)(nn.LayerNorm()(x))
        q, k, v = jnp.split(
            qkv.reshape(-1, length, self.heads, 3 * width // self.heads), 3, axis=-1
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        if self.causal:
            scores = jnp.where(np.tril(np.ones((length, length), bool)), scores, -1e9)
        weights = jax.nn.softmax(scores)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = x + nn.Dense(width, use_bias=False)(mixed)
        hidden = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(hidden)


class Transformer(nn.Module):
    """Predicts the next token at every place of a window; the head is not the embedding."""

    characters: int
    layers: int = 2
    width: int = 128
    heads: int = 4

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """int32 [rows, context] to logits [rows, context, characters]."""
        places = self.param("places", SMALL, (CONTEXT, self.width))
        rows = (nn.Embed(self.characters, self.width)(x) + places).reshape(-1, self.width)
        for _ in range(self.layers):
            rows = Block(self.heads)(rows, CONTEXT)
        logits = nn.Dense(self.characters, kernel_init=SMALL)(nn.LayerNorm()(rows))
        return logits.reshape(*x.shape, self.characters)


class VisionTransformer(nn.Module):
    """Classifies the mean of its places, a patch of the image each."""

    classes: int
    patch: int = 4
    layers: int = 2
    width: int = 64
    heads: int = 4

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """uint8 [rows, height, width, channels] to logits [rows, classes]."""
        x = x.astype(jnp.float32) / 255.0
        side = (self.patch, self.patch)
        x = nn.Conv(self.width, side, strides=side)(x).reshape(len(x), -1, self.width)
        x = x + self.param("places", SMALL, x.shape[1:])
        rows, length = x.reshape(-1, self.width), x.shape[1]
        for _ in range(self.layers):
            rows = Block(self.heads, causal=False)(rows, length)
        means = nn.LayerNorm()(rows).reshape(x.shape).mean(1)
        return nn.Dense(self.classes, kernel_init=SMALL)(means)


class ConvNet(nn.Module):
    """Two convolutions and two dense layers.

    The convolutions step by two pixels instead of pooling: a quarter of the arithmetic, which is
    what takes the time on a CPU.
    """

    classes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """uint8 [rows, height, width, 1] to logits [rows, classes]."""
        x = x.astype(jnp.float32) / 255.0
        x = nn.relu(nn.Conv(16, (5, 5), strides=2)(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        return nn.Dense(self.classes, kernel_init=SMALL)(x)


def hidden(params: Any) -> Any:
    """The hidden matrices of these models, for Muon and for votes like Muon.

    Flax has named the head: it is the last dense layer outside of a block.
    """
    head = max(name for name in params if name.startswith("Dense_"))
    return dl.hidden_matrices(params, rf"{matrices.NOT_HIDDEN}|^{head}/|^places$")


def make_model(task: str, data: Data) -> nn.Module:
    """The task's model."""
    return Transformer(data.classes) if task == "text" else ConvNet(data.classes)


def initial_params(model: nn.Module, data: Data, seed: int) -> Any:
    """Initial weights; the same for the same seed."""
    return jax.jit(model.init)(jax.random.key(seed), data.held_out["x"][:1])["params"]


def make_loss(model: nn.Module) -> Callable[[Any, Any], Array]:
    """``loss(params, batch)``: mean cross-entropy in nats per token or image."""

    def loss(params: Any, batch: Any) -> Array:
        logits: Any = model.apply({"params": params}, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    return loss


def spread(batch: Any, sharding: NamedSharding) -> Any:
    """A batch that every process holds whole, as one array over the devices of all."""
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), batch
    )


def make_evaluation(
    model: nn.Module, held_out: Batch, mesh: Mesh, rows: int
) -> Callable[[Any], tuple[float, float]]:
    """``evaluate(params)`` to (loss, accuracy) on all held-out rows, so many at a time.

    Args:
      model: the model.
      held_out: rows to evaluate on; the last piece is filled up with rows of weight 0.
      mesh: the workers, who share the rows; the parameters must lie on it, or on no device.
      rows: rows at a time on each worker.
    """
    pieces, by_worker = [], NamedSharding(mesh, P("data"))
    rows *= mesh.size
    for begin in range(0, len(held_out["y"]), rows):
        index = np.arange(begin, begin + rows)
        weight = (index < len(held_out["y"])).astype(np.float32)
        index = np.minimum(index, len(held_out["y"]) - 1)
        piece = {k: v[index] for k, v in held_out.items()} | {"weight": weight}
        pieces.append(spread(piece, by_worker))

    @jax.jit
    def totals(params: Any, batch: Any) -> Array:
        logits: Any = model.apply({"params": params}, batch["x"])
        y = batch["y"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        right = (logits.argmax(-1) == y).astype(jnp.float32)
        per_row = jnp.stack([x.reshape(len(y), -1).mean(1) for x in (loss, right)])
        return jnp.append(per_row @ batch["weight"], batch["weight"].sum())

    def evaluate(params: Any) -> tuple[float, float]:
        # np.asarray waits for each piece: many queued at once starve virtual devices.
        sums = [np.asarray(totals(params, piece), np.float64) for piece in pieces]
        loss, right, count = np.sum(sums, axis=0)
        return float(loss / count), float(right / count)

    return evaluate
