# SPDX-License-Identifier: Apache-2.0
"""Trains with a rule for each kind of parameter: some vote, some are averaged, one may stay put.

    python examples/by_layer.py
    python examples/by_layer.py --embedding frozen

Eight workers train a small model that guesses the next character of Shakespeare from the last 16.
The matrices take the majority of the workers' votes. The norms and biases, which are small, take
the mean of the gradients in full precision. The embedding takes the mean of the votes, or never
moves. A worker abstains where its blend of momentum and gradient is nearly zero. The embedding of a
rare character is such a place. The table lists the rules, and every message of a step.

It takes about 20 s on 2 cores. Expect a loss near 2.06 nats a character on text that was held out,
and near 2.11 with a frozen embedding. Needs ``pip install distlion_jax[examples]``.
"""

import argparse
import gzip
import os
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from tqdm import tqdm

import distlion_jax as dl

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 8)  # a CPU acts as eight devices

CORPUS = Path(__file__).resolve().parent / "data" / "shakespeare.txt.gz"
WORKERS, ROWS, CONTEXT = 8, 64, 16  # rows of each worker and step, characters of each row
VOTE: Any = {"ballot": "ternary", "threshold": 1e-5}  # up to this, a worker abstains


class Model(nn.Module):
    """An embedding and two dense layers, each after a norm."""

    characters: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """int32 [rows, CONTEXT] to float32 [rows, characters]."""
        x = nn.Embed(self.characters, 32)(x).reshape(len(x), -1)
        x = nn.relu(nn.Dense(256)(nn.LayerNorm()(x)))
        return nn.Dense(self.characters)(nn.LayerNorm()(x))


def make_labels(params: Any, embedding: str) -> Any:
    """The rule of each parameter: a tree like the parameters, with a word for each."""
    rules = {"embedding": embedding, "kernel": "majority", "bias": "full", "scale": "full"}
    return jax.tree_util.tree_map_with_path(lambda path, _: rules[path[-1].key], params)


def load_text() -> tuple[np.ndarray, int]:
    """The characters as numbers from 0, and how many distinct ones there are."""
    text = gzip.decompress(CORPUS.read_bytes()).decode()[:1_000_000]
    characters, numbers = np.unique(list(text), return_inverse=True)
    return numbers.astype(np.int32), len(characters)


def windows(text: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The characters that the model sees, and in the last column the one to guess."""
    return text[starts[:, None] + np.arange(CONTEXT + 1)]


def report_rules(params: Any, labels: Any) -> None:
    """Prints the rules, and what each worker receives in a step: message by message, and in all."""
    named = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), rule in zip(named, jax.tree.leaves(labels), strict=True):
        print(f"{jax.tree_util.keystr(path):<30}{leaf.size:9,}  {rule}")
    cost = dl.wire_cost_by_label(params, labels, WORKERS, **VOTE)
    print("\nreceived in each step" + 13 * " " + "bytes")
    for message in cost.collectives:
        name = f"{message.op} of {message.elements:,} {message.dtype}"
        print(f"{name:<30}{message.bytes_received:9,}")
    full = dl.full_precision_cost(params, WORKERS)
    for name, one in (("in all", cost), ("all in full precision", full)):
        print(f"{name:<30}{one.bytes_received:9,}  {one.bits_per_parameter:.2f} bits a parameter")


def train(steps: int, embedding: str) -> None:
    """Trains, and prints the loss before and after."""
    text, characters = load_text()
    model, training = Model(characters), int(0.9 * len(text))  # the rest is held out

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        scores: Any = model.apply({"params": params}, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(scores, batch[:, -1]).mean()

    params = model.init(jax.random.key(0), text[None, :CONTEXT])["params"]
    labels = make_labels(params, embedding)
    report_rules(params, labels)
    own_devices = jax.device_count() >= WORKERS
    mesh = dl.worker_mesh(WORKERS, devices=jax.devices() if own_devices else jax.devices("cpu"))
    tx = dl.distributed_lion_by_label(1e-3, labels, **VOTE)
    step = dl.make_train_step(loss_fn, tx, mesh)
    params, state = dl.replicate(params, mesh), dl.init_state(tx, params, mesh)
    rng, evaluate = np.random.default_rng(1), jax.jit(loss_fn)
    held_out = windows(text, np.arange(training, len(text) - CONTEXT, 20))
    before = float(evaluate(params, held_out))
    for _ in tqdm(range(steps), unit="step", delay=10, disable=None):
        batch = windows(text, rng.integers(0, training - CONTEXT, WORKERS * ROWS))
        params, state, _ = step(params, state, batch)
    print(f"\nheld-out loss: {before:.3f} before, {float(evaluate(params, held_out)):.3f} after")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="training steps (600)")
    parser.add_argument("--embedding", choices=("average", "frozen"), default="average")
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
