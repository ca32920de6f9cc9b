# SPDX-License-Identifier: Apache-2.0
"""Compiled memory of a step: temporaries and the widest of them, for n workers and 50 M parameters.

    python -m benchmarks.compute.memory

Nothing is run: the step of n = 8 workers is compiled for 8 virtual CPU devices, and XLA's own
accounting is read. What is listed is per worker.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

from benchmarks.compute import timing  # noqa: E402
from distlion_jax import distributed_lion, stack, unstack, worker_mesh  # noqa: E402
from distlion_jax._vote import wire  # noqa: E402


def shapes(millions: float) -> dict[str, jax.ShapeDtypeStruct]:
    """Matrices of 1024 x 1024, about the size asked for."""
    count = max(1, round(millions * 1e6 / 1024**2))
    return {f"w{i}": jax.ShapeDtypeStruct((1024, 1024), jnp.float32) for i in range(count)}


def compile_step(params: Any, **options: Any) -> Any:
    """Compiles update and apply for 8 workers; buffers donated."""
    mesh = worker_mesh(8)
    tx = distributed_lion(1e-4, weight_decay=0.1, **options)
    state = jax.eval_shape(lambda p: jax.tree.map(lambda x: jnp.stack([x] * 8), tx.init(p)), params)

    def step(params: Any, state: Any, grads: Any) -> Any:
        grads = jax.tree.map(lambda x: wire.vary(x[0], "data"), grads)
        updates, state = tx.update(grads, unstack(state), params)
        return optax.apply_updates(params, updates), stack(state)

    def place(tree: Any, spec: P, lead: tuple[int, ...] = ()) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=sharding), tree
        )

    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=(P(), P("data"))
    )
    args = (place(params, P()), place(state, P("data")), place(params, P("data"), (8,)))
    return jax.jit(mapped, donate_argnums=(0, 1)).lower(*args).compile()


def main() -> int:
    """Prints the table."""
    p = timing.parser(__doc__.splitlines()[0])  # type: ignore[union-attr]
    p.add_argument("--millions", type=float, default=50.0, help="millions of parameters")
    args = p.parse_args()
    params = shapes(args.millions)
    d = sum(x.size for x in params.values())
    print(f"{d / 1e6:.1f} M parameters, 8 workers, bytes of temporaries per parameter and worker")
    print("(packed words of one ballot: 0.125; of all 8: 1; one float32: 4)\n")
    print("| transport  | aggregation | ties | temporaries | MB    |")
    print("|------------|-------------|------|-------------|-------|")
    rows = []
    for transport in ("two_phase", "all_gather"):
        for aggregation, ties in (("majority", "zero"), ("majority", "coin"), ("average", "zero")):
            compiled = compile_step(params, transport=transport, aggregation=aggregation, ties=ties)
            temp = compiled.memory_analysis().temp_size_in_bytes
            names = f"| {transport:10} | {aggregation:11} | {ties:4} |"
            print(f"{names} {temp / d:11.3f} | {temp / 1e6:5.1f} |")
            rows.append({"transport": transport, "aggregation": aggregation, "ties": ties,
                         "temp_bytes": temp, "parameters": d})  # fmt: skip
    timing.write(args.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
