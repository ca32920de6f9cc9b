# SPDX-License-Identifier: Apache-2.0
"""The update without a collective, packing included, against optax.lion; buffers donated.

    python -m benchmarks.compute.update

Prints time, ratio to the jitted ``optax.lion`` step (and to ``optax.apply_if_finite`` of it), and
the passes over parameter-sized memory that each compiled step makes, read from its HLO.
"""

import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from benchmarks.compute import timing
from distlion_jax import distributed_lion, init_state, stack, unstack, worker_mesh
from distlion_jax._rules import Rules
from distlion_jax._vote import wire

LR, WD = 1e-4, 0.1
MESH = worker_mesh(1)


def optax_step(tx: optax.GradientTransformation) -> Callable[..., tuple[Any, Any]]:
    """The ordinary step: update and apply."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


# One worker alone follows the ternary rules; measured is what each of many does, but the exchange.
Rules.for_workers = lambda self, n: self  # type: ignore[method-assign]


def one_worker_step(
    ties: Literal["zero", "coin"],
) -> tuple[Callable[..., tuple[Any, Any]], Callable[[Any], Any]]:
    """The whole step of a mesh of one worker: all but the exchange. Returns step and init."""
    tx = distributed_lion(LR, weight_decay=WD, ties=ties, allow_single_worker=True)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        grads = jax.tree.map(lambda x: wire.vary(x, "data"), grads)
        updates, state = tx.update(grads, unstack(state), params)
        return optax.apply_updates(params, updates), stack(state)

    mapped = jax.shard_map(
        step, mesh=MESH, in_specs=(P(), P("data"), P()), out_specs=(P(), P("data"))
    )
    return jax.jit(mapped, donate_argnums=(0, 1)), lambda p: init_state(tx, p, MESH)


def passes(compiled: Any, parameters: int, item: int) -> float:
    """Passes over parameter-sized memory, by XLA's own count of the bytes the step accesses."""
    return compiled.cost_analysis()["bytes accessed"] / (parameters * item)


def measure(millions: float, dtype: Any, rounds: int) -> dict[str, Any]:
    """Times all candidates on one tree; returns figures by candidate."""
    grads = timing.make_tree(millions, dtype, 1)
    parameters = sum(x.size for x in grads.values())
    lion = optax.lion(LR, weight_decay=WD)
    guarded = optax.apply_if_finite(lion, 5)
    steps = {
        "optax.lion": (optax_step(lion), lion.init),
        "apply_if_finite(optax.lion)": (optax_step(guarded), guarded.init),
        "distributed_lion": one_worker_step("zero"),
        "distributed_lion, coin": one_worker_step("coin"),
    }
    runs, count = {}, {}
    for name, (step, init) in steps.items():
        params = timing.make_tree(millions, dtype, 2)
        state = init(params)
        count[name] = passes(step.lower(params, state, grads).compile(), parameters, dtype.itemsize)
        runs[name] = timing.donating(step, (params, state), grads)
    times = timing.paired(runs, rounds)
    out: dict[str, Any] = {"parameters": parameters, "dtype": str(dtype)}
    print(f"\n{parameters / 1e6:.1f} M parameters, {dtype}, {rounds} rounds")
    print(f"| {'step':28} | ms (median) | / optax.lion      | / apply_if_finite | passes |")
    print(f"|{'-' * 30}|{'-' * 13}|{'-' * 19}|{'-' * 19}|{'-' * 8}|")
    for name in steps:
        ms = 1e3 * timing.quartiles(times[name])[1]
        a = timing.ratios(times, name, "optax.lion")
        b = timing.ratios(times, name, "apply_if_finite(optax.lion)")
        cells = [f"{m:.2f} ({lo:.2f}-{hi:.2f})" for lo, m, hi in (a, b)]
        print(f"| {name:28} | {ms:11.1f} | {cells[0]:17} | {cells[1]:17} | {count[name]:6.2f} |")
        out[name] = {"ms": ms, "vs_lion": a, "vs_guarded": b, "passes": count[name]}
    return out


def main() -> int:
    """Runs the benchmark."""
    p = timing.parser(__doc__.splitlines()[0])  # type: ignore[union-attr]
    p.add_argument("--millions", type=float, default=50.0, help="millions of parameters")
    args = p.parse_args()
    results = [
        measure(args.millions, jnp.dtype(d), args.rounds) for d in (jnp.float32, jnp.bfloat16)
    ]
    timing.write(args.out, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
