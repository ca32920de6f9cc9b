# SPDX-License-Identifier: Apache-2.0
"""A small model that is split over the devices of a replica."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

STEPS, WORDS, WIDTH, HIDDEN = 20, 24, 16, 32
SHAPES = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH), "bias": (WIDTH,),
          "table": (WORDS, WIDTH), "scale": (HIDDEN,)}  # fmt: skip
SPECS = {"up": P("fsdp", "tensor"), "down": P("tensor", "fsdp"), "bias": P(),
         "table": P(None, "fsdp"), "scale": P("tensor")}  # fmt: skip


def mesh_of(replicas, fsdp, tensor):
    return jax.make_mesh(
        (replicas, fsdp, tensor), ("replica", "fsdp", "tensor"), (AxisType.Auto,) * 3
    )


def initial():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape) / 4 for name, shape in SHAPES.items()}


def batches():
    rng = np.random.default_rng(1)
    return [dict(zip("xy", rng.integers(0, WORDS, (2, 8, 5)), strict=True)) for _ in range(STEPS)]


def loss_fn(params, batch):
    x = jax.nn.one_hot(batch["x"], WORDS) @ params["table"]  # a lookup may leak: test_crossings.py
    hidden = jnp.tanh(x @ params["up"]) * (1 + params["scale"])
    logits = (x + hidden @ params["down"] + params["bias"]) @ params["table"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def place(tree, mesh):
    return {k: jax.device_put(x, NamedSharding(mesh, SPECS[k])) for k, x in tree.items()}


def rows(batch, mesh):
    return jax.device_put(batch, NamedSharding(mesh, P(("replica", "fsdp"))))
