# SPDX-License-Identifier: Apache-2.0
"""Trains a transformer that is split over devices: FSDP and tensor parallel inside, a vote across.

    python examples/sharded.py

Two replicas of the model learn the source code of Python's own library, character by character.
Each replica lies on 2 x 2 devices: every matrix is split in four, and so is its momentum. Once a
step the two replicas vote with one bit a parameter. At the end stand the bytes that cross between
them, as the compiled program moves them, and what a device holds. It
takes about a minute on 2 cores. Downloads nothing.
"""

import argparse
import inspect
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import distlion_jax as dl

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 8)  # a CPU acts as eight devices

LAYERS, WIDTH, HEADS, CONTEXT, LETTERS = 2, 128, 4, 64, 128
ROWS = 32  # of all replicas, in a step
MATRICES = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "up": (WIDTH, 4 * WIDTH),
            "down": (4 * WIDTH, WIDTH)}  # fmt: skip
# How the model is split. No rule names "replica": that axis is the vote's.
SPECS = {"table": P("tensor", "fsdp"), "layers": {"scale": P(), "qkv": P(None, "fsdp", "tensor"),
         "out": P(None, "tensor", "fsdp"), "up": P(None, "fsdp", "tensor"),
         "down": P(None, "tensor", "fsdp")}}  # fmt: skip


def init(mesh: jax.sharding.Mesh) -> Any:
    """Parameters, made where they are to lie; layers are stacked."""

    def make() -> Any:
        keys = iter(jax.random.split(jax.random.key(0), 8))
        normal = lambda *shape: jax.random.normal(next(keys), shape) / shape[-2] ** 0.5  # noqa: E731
        layers = {name: normal(LAYERS, *shape) for name, shape in MATRICES.items()}
        layers["scale"] = jnp.ones((LAYERS, WIDTH))
        return {"table": normal(LETTERS, WIDTH), "layers": layers}

    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    return jax.jit(make, out_shardings=shardings)()


def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
    """Attention and a hidden layer: float32 [rows, letters, width] to the same."""
    norm = lambda y: y * w["scale"] * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-6)  # noqa: E731
    heads = (norm(x) @ w["qkv"]).reshape(*x.shape[:2], 3, HEADS, -1)
    seen = jax.nn.dot_product_attention(*(heads[:, :, i] for i in range(3)), is_causal=True)
    x = x + seen.reshape(x.shape) @ w["out"]
    return x + jax.nn.gelu(norm(x) @ w["up"]) @ w["down"], None


def loss_fn(params: Any, text: jax.Array) -> jax.Array:
    """Nats a character, of int32 [rows, letters + 1]."""
    # A lookup in a table that is split along both axes would move activations between replicas.
    table = jax.lax.with_sharding_constraint(params["table"], P("tensor", None))
    x, _ = jax.lax.scan(layer, table[text[:, :-1]], params["layers"])
    return optax.softmax_cross_entropy_with_integer_labels(x @ table.T, text[:, 1:]).mean()


def batches(steps: int, mesh: jax.sharding.Mesh) -> Any:
    """Windows of the text, split over replicas, and inside a replica over "fsdp"."""
    source = "".join(map(inspect.getsource, (argparse, inspect)))
    text = np.frombuffer(source.encode("ascii", "replace"), np.uint8).astype(np.int32)
    sharding = NamedSharding(mesh, P(("replica", "fsdp")))
    for t in tqdm(range(steps), unit="step", delay=10, disable=None):
        at = np.random.default_rng(t).integers(0, len(text) - CONTEXT, (ROWS, 1))
        yield jax.device_put(text[at + np.arange(CONTEXT + 1)], sharding)


def report(params: Any, state: Any, moved: int, mesh: jax.sharding.Mesh) -> None:
    """Prints what crosses between the replicas, and what a device holds."""
    size = sum(x.size for x in jax.tree.leaves(params))
    print(f"{size:,} parameters; all copies agree: {dl.replicas_agree(params, mesh)}")
    print(f"bytes that reach a device in each step:\n  from the other replica: {moved:,}")
    for name, cost in {
        "of these the vote": dl.wire_cost(params, 2, axis_name="replica"),
        "instead of full precision": dl.full_precision_cost(params, 2, axis_name="replica"),
        "inside the replica, to orthogonalise": dl.newton_schulz_cost(params, "replica"),
    }.items():
        print(f"  {name}: {cost.bytes_received:,}")
    print("bytes that a device holds:")
    for name, tree in (("parameters", params), ("momentum", state[0].mu)):
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
        print(f"  {name}: {held:,}, unsplit {4 * size:,}")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="training steps (100)")
    devices = jax.devices() if jax.device_count() >= 8 else jax.devices("cpu")
    axes = ("replica", "fsdp", "tensor"), (AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), *axes, devices=devices[:8])
    with jax.set_mesh(mesh):
        params, tx = init(mesh), dl.distributed_muon(3e-3, axis_name="replica", weight_decay=0.1)
        state = dl.init_state(tx, params, mesh, "replica")
        step, losses = dl.make_train_step(loss_fn, tx, mesh, "replica"), []
        for batch in batches(max(1, parser.parse_args().steps), mesh):
            params, state, metrics = step(params, state, batch)
            losses.append(float(metrics.loss))
        print(f"loss {losses[0]:.3f} in the first step, {np.mean(losses[-10:]):.3f} in the last 10")
        crossing = dl.crossings(step.lower(params, state, next(batches(1, mesh))).compile(), mesh)
        moved = sum(one.collective.bytes_received for one in crossing)
        report(params, state, moved, mesh)


if __name__ == "__main__":
    main()
