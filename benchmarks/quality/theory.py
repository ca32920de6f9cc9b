# SPDX-License-Identifier: Apache-2.0
"""The paper's second phase, measured: how the KKT score falls with the number of workers.

    python -m benchmarks.quality.theory          # minutes on 2 cores

Inside the box |x| <= 1 / weight_decay the paper bounds the mean of S(x) = <grad f(x), sign(grad
f(x)) + weight_decay * x>, which is 0 just where f is least in the box: by terms that vanish with
time and the learning rate, plus one of 1 / sqrt(n) for the majority (Theorem 3.6), and one that
does not fall with n for the average (Theorem 3.8). Here f is a quadratic of many curvatures whose
least point lies outside the box in part, every worker's gradient has Gaussian noise of its own, and
S is known. Writes theory.json, theory.md and theory.png.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import distlion_jax as dl
from benchmarks.cli import command_line, guarded, progress
from benchmarks.quality.runs import versions
from benchmarks.report import theory as report
from benchmarks.rows import listed
from distlion_jax.baselines import full_precision_lion

DECAY = 1.0
vote = functools.partial(
    dl.distributed_lion, weight_decay=DECAY, transport="all_gather", health="off"
)
METHODS: dict[str, Callable[[float], Any]] = {
    "D-Lion majority": vote,
    "D-Lion average": functools.partial(vote, aggregation="average"),
    "Lion": functools.partial(full_precision_lion, weight_decay=DECAY),
}


def kkt_score(gradient: Any, x: Any) -> Any:
    """The paper's S(x), a coordinate; at least 0 inside the box."""
    return jnp.mean(gradient * (jnp.sign(gradient) + DECAY * x))


def score(method: str, n: int, seed: int, args: argparse.Namespace) -> float:
    """Mean S over the last quarter of the steps."""
    tx = METHODS[method](args.learning_rate)
    curvature_key, centre_key, noise_key = jax.random.split(jax.random.key(seed), 3)
    curvature = 10.0 ** jax.random.uniform(curvature_key, (args.size,), minval=-1.0, maxval=1.0)
    centre = 1.5 * jax.random.normal(centre_key, (args.size,))

    def worker(index: Any) -> Any:
        def step(carry: Any, t: Any) -> Any:
            x, state = carry
            gradient = curvature * (x - centre)
            key = jax.random.fold_in(jax.random.fold_in(noise_key, t), index)
            noisy = gradient + args.noise * jax.random.normal(key, x.shape)
            updates, state = tx.update(noisy, state, x)
            return (optax.apply_updates(x, updates), state), kkt_score(gradient, x)

        x = jnp.zeros(args.size)
        _, scores = jax.lax.scan(step, (x, tx.init(x)), jnp.arange(args.steps))
        return scores[-(args.steps // 4 or 1) :].mean()

    return float(jax.jit(jax.vmap(worker, axis_name="data"))(jnp.arange(n))[0])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = command_line(__doc__)
    p.add_argument("--workers", nargs="+", type=int, default=[2, 4, 8, 16, 32, 64])
    p.add_argument("--seeds", nargs="+", type=int, default=[42, 52, 62])
    p.add_argument("--size", type=int, default=1024, help="coordinates")
    p.add_argument("--noise", type=float, default=10.0, help="standard deviation, a worker's")
    p.add_argument("--learning-rate", type=float, default=1e-3)
    p.add_argument("--steps", type=int, default=16_000)
    p.add_argument("--out", type=Path, default=Path("runs/theory"))
    args = p.parse_args(argv)
    if min(args.workers) < 2 or len(set(args.workers)) < 2:
        p.error("--workers: at least two numbers, each at least 2")
    if min(args.size, args.steps) < 1:
        p.error("--size and --steps must be at least 1")
    return args


def run(args: argparse.Namespace) -> str:
    """All methods, numbers of workers and seeds; the table."""
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with progress(len(METHODS) * sum(args.workers) * len(args.seeds) * args.steps) as bar:
        for name in METHODS:
            for n in args.workers:
                for seed in args.seeds:
                    value = score(name, n, seed, args)
                    rows.append({"method": name, "workers": n, "seed": seed, "score": value})
                    bar.update(n * args.steps)
    setting = (
        f"{args.size:,} coordinates, noise {args.noise:g}, learning rate {args.learning_rate:g}, "
        f"{args.steps:,} steps, seeds {', '.join(map(str, args.seeds))}: mean ± standard "
        f"deviation. {listed(versions())}."
    )
    figures = {"setting": setting, "rows": rows}
    (args.out / "theory.json").write_text(json.dumps(figures, indent=1) + "\n")
    return report.write(rows, setting, args.out)


if __name__ == "__main__":
    sys.exit(guarded(run, parse(None)))
