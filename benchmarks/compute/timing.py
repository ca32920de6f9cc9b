# SPDX-License-Identifier: Apache-2.0
"""Paired timing: candidates run in turn, A B C A B C ..., and are compared within each turn.

Shared machines drift; a ratio of two calls made next to each other does not. Medians are reported
with their quartiles, never single times.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


def machine() -> dict[str, Any]:
    """What a figure depends on: versions, device, cores."""
    import jaxlib
    import optax

    import distlion_jax

    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "optax": optax.__version__,
        "distlion_jax": distlion_jax.__version__,
        "device": f"{device.platform} {device.device_kind}",
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    }


def make_tree(millions: float, dtype: Any, key: int, side: int = 1024) -> dict[str, jax.Array]:
    """Square matrices and a bias each, about the size asked for."""
    count = max(1, round(millions * 1e6 / (side * (side + 1))))
    keys = jax.random.split(jax.random.key(key), count)
    tree = {f"w{i}": jax.random.normal(k, (side, side), dtype) for i, k in enumerate(keys)}
    return tree | {f"b{i}": jnp.ones((side,), dtype) for i in range(count)}


def paired(
    runs: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each candidate, one entry a round; candidates alternate within a round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + warmup):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if i >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(times: dict[str, list[float]], name: str, base: str) -> tuple[float, float, float]:
    """Quartiles of ``name / base``, pair by pair."""
    return quartiles([a / b for a, b in zip(times[name], times[base], strict=True)])


def donating(step: Callable[..., tuple[Any, ...]], state: tuple[Any, ...], *rest: Any) -> Callable:
    """A call that feeds a donating step its own results, so that no buffer is allocated anew."""
    box = [state]

    def run() -> Any:
        box[0] = step(*box[0], *rest)
        return box[0]

    return run


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--rounds", type=int, default=20, help="timed rounds")
    p.add_argument("--out", type=Path, default=None, help="write the figures as JSON to this file")
    return p


def write(out: Path | None, results: Any) -> None:
    """Prints the machine, and writes results with it where asked."""
    info = machine()
    print("\n" + ", ".join(f"{k} {v}" for k, v in info.items()))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": info, "results": results}, indent=1) + "\n")
        print(f"wrote {out}")
