# SPDX-License-Identifier: Apache-2.0
"""The update without a collective, packing included, against optax.lion; buffers donated.

    python -m benchmarks.compute.update
    python -m benchmarks.compute.update --muon --millions 25 --rounds 3  # slow on a CPU
    python -m benchmarks.compute.update --muon --width 128 --millions 0.4

Prints time, ratio to the jitted ``optax.lion`` step (and to ``optax.apply_if_finite`` of it), and
the passes over parameter-sized memory that each compiled step makes, read from its HLO.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from benchmarks.compute import timing
from distlion_jax import (
    distributed_lion,
    distributed_muon,
    init_state,
    newton_schulz_flops,
    stack,
    unstack,
    worker_mesh,
)
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
    tx: optax.GradientTransformation,
) -> tuple[Callable[..., tuple[Any, Any]], Callable[[Any], Any]]:
    """The whole step of a mesh of one worker: all but the exchange. Returns step and init."""

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


def votes(muon: bool) -> dict[str, optax.GradientTransformation]:
    """What is timed beside Optax; with muon also ballots that are orthogonalised."""
    rest: Any = {"weight_decay": WD, "allow_single_worker": True}
    out: dict[str, optax.GradientTransformation] = {
        "distributed_lion": distributed_lion(LR, **rest),
        "distributed_lion, coin": distributed_lion(LR, ties="coin", **rest),
    }
    if muon:
        out["distributed_muon"] = distributed_muon(LR, **rest)
        out["distributed_muon, 3 steps"] = distributed_muon(LR, ns_steps=3, **rest)
        out["distributed_muon, bfloat16"] = distributed_muon(LR, ns_dtype=jnp.bfloat16, **rest)
    return out


def measure(args: argparse.Namespace, dtype: Any) -> dict[str, Any]:
    """Times all candidates on one tree; returns figures by candidate."""
    make_tree = functools.partial(timing.make_tree, args.millions, dtype, side=args.width)
    grads = make_tree(1)
    parameters = sum(x.size for x in grads.values())
    lion = optax.lion(LR, weight_decay=WD)
    guarded = optax.apply_if_finite(lion, 5)
    steps = {
        "optax.lion": (optax_step(lion), lion.init),
        "apply_if_finite(optax.lion)": (optax_step(guarded), guarded.init),
        **{name: one_worker_step(tx) for name, tx in votes(args.muon).items()},
    }
    runs, count = {}, {}
    for name, (step, init) in steps.items():
        params = make_tree(2)
        state = init(params)
        count[name] = passes(step.lower(params, state, grads).compile(), parameters, dtype.itemsize)
        runs[name] = timing.donating(step, (params, state), grads)
    times = timing.paired(runs, args.rounds)
    out: dict[str, Any] = {"parameters": parameters, "width": args.width, "dtype": str(dtype)}
    print(f"\n{parameters / 1e6:.1f} M parameters, {dtype}, {args.rounds} rounds")
    if args.muon:
        flops = newton_schulz_flops(grads) / parameters
        print(f"Matrices of {args.width} x {args.width}: NS takes {flops:,.0f} FLOP a parameter")
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
    p.add_argument("--width", type=int, default=1024, help="side of the matrices")
    p.add_argument("--muon", action="store_true", help="time orthogonalised ballots too")
    args = p.parse_args()
    results = [measure(args, jnp.dtype(d)) for d in (jnp.float32, jnp.bfloat16)]
    timing.write(args.out, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
