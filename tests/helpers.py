# SPDX-License-Identifier: Apache-2.0
"""Trees, gradients and ways to run n workers, shared by the tests."""

import collections
import functools
import importlib
import os
import socket
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from distlion_jax import reference, scale_by_distributed_lion, worker_mesh

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

# Small numbers with few bits: every blend and momentum is exact for a few steps, so that results
# can be compared with ==, and exact zeros and ties are common.
B1, B2 = 0.75, 0.5

TREES = {
    "mixed": {
        "a": (3, 5),
        "scalar": (),
        "empty": (0, 4),
        "rows": (40, 128),
        "even": (64, 128),
        "flat": (4097,),
        "conv": (3, 3, 8, 16),
    },
    "small": {"a": (3, 5), "scalar": (), "empty": (0, 4), "rows": (16, 128), "flat": (4097,)},
    "scalar": {"s": ()},
    "exact": {"w": (32, 256)},
}


def free_port():
    """A TCP port of loopback that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def shapes_to_params(tree, dtype=jnp.float32):
    return {k: jnp.zeros(s, dtype) for k, s in tree.items()}


def gradients(tree, n, seed, dtype=np.float32, zero_rows=True):
    """``{name: [n, *shape]}``: quarters in [-1, 1], a third of them 0, and whole zero blocks."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in tree.items():
        g = rng.integers(-4, 5, size=(n, *shape)) / 4
        g = g * (rng.random((n, *shape)) < 0.8)
        if zero_rows and len(shape) >= 2 and shape[0] > 8:
            g[:, 4:8] = 0  # untouched rows on all workers
            g[0, 10:20] = 0  # and on one
        out[name] = g.astype(dtype)
    return out


def map_workers(f, how, n, axis="data"):
    """Maps ``f`` (of arrays with a leading worker axis) over n workers, each way JAX has."""
    if how == "vmap":
        return jax.jit(jax.vmap(f, axis_name=axis))
    if how == "pmap":
        return jax.pmap(f, axis_name=axis, devices=jax.devices()[:n])

    def one(*args):
        out = f(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: x[None], out)

    check = {"shard_map": True, "shard_map_unchecked": False}[how]
    return jax.jit(
        jax.shard_map(
            one, mesh=worker_mesh(n, axis), in_specs=P(axis), out_specs=P(axis), check_vma=check
        )
    )


def stack_state(tx, params, n):
    """The state as it lies outside the mapped function: a leading worker axis on every leaf."""
    return jax.tree.map(lambda x: jnp.stack([x] * n), tx.init(params))


@functools.cache
def _runner(how, n, options, factory):
    tx = factory(B1, B2, allow_single_worker=True, **dict(options))

    def step(g, state, extra):
        return tx.update(g, state, **extra)

    return tx, map_workers(step, how, n)


def run(tree, n, rounds, how="vmap", dtype=np.float32, extra=None, first=0, grads=None,
        factory=scale_by_distributed_lion, **options):  # fmt: skip
    """Runs some rounds; returns per round (direction, state), as NumPy with a worker axis."""
    tx, step = _runner(how, n, tuple(sorted(options.items())), factory)
    state = stack_state(tx, shapes_to_params(tree, dtype), n)
    history = []
    for r in range(rounds):
        g = grads[r] if grads else gradients(tree, n, first + r, dtype)
        given = {} if extra is None else {k: jnp.asarray(v) for k, v in extra[r].items()}
        direction, state = step(g, state, given)
        history.append(jax.tree.map(np.asarray, (direction, state)))
    return history


def run_reference(tree, n, rounds, dtype=np.float32, extra=None, first=0, grads=None, **options):
    """The same by the plain NumPy reference; rounds and states of the reference."""
    names = sorted(tree)  # jax sorts the keys of a dict
    state = reference.init([np.zeros(tree[k], dtype) for k in names], n)
    history = []
    for r in range(rounds):
        g = grads[r] if grads else gradients(tree, n, first + r, dtype)
        workers = [[np.asarray(g[k][i]) for k in names] for i in range(n)]
        given = {} if extra is None else {k: list(v) for k, v in extra[r].items()}
        verdict, state = reference.vote(state, workers, b1=B1, b2=B2, **options, **given)
        history.append((verdict, state))
    return history


def assert_equal_to_reference(tree, got, want):
    """Every worker's direction, momentum and health equal the reference's, with ==."""
    names = sorted(tree)
    size = sum(int(np.prod(s)) for s in tree.values())
    for (direction, state), (verdict, ref) in zip(got, want, strict=True):
        n = len(ref.mu)
        for leaf, name in enumerate(names):
            for i in range(n):
                np.testing.assert_array_equal(direction[name][i], verdict.direction[leaf])
                np.testing.assert_array_equal(state.mu[name][i], ref.mu[i][leaf])
        assert list(state.count) == [ref.count] * n
        assert list(state.health.voted) == verdict.voted
        assert list(state.health.voters) == [verdict.voters] * n
        np.testing.assert_array_equal(
            np.round(state.health.tied * size), round(verdict.tied * size)
        )
        np.testing.assert_allclose(state.health.margin, verdict.margin, rtol=1e-6)


def benchmark(name):
    """A module of the package of benchmarks: ``benchmark("report.tables")``."""
    return importlib.import_module(f"benchmarks.{name}")


def benchmark_command(name, *flags):
    """The command of one, and the arguments of ``subprocess.run`` that it needs from anywhere."""
    path = os.pathsep.join(filter(None, [str(BENCHMARKS.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, flags)]
    return command, {"env": os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}, "text": True}


def beside(found, expected):
    """What was found and not expected, after checking that all that was expected was found."""
    rest = collections.Counter(found)
    rest.subtract(expected)
    assert min(rest.values(), default=0) >= 0, f"{expected} predicted, {found} in the program"
    return list(rest.elements())
