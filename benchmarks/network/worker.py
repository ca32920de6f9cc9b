# SPDX-License-Identifier: Apache-2.0
"""One process of network.run: trains with every method in turn, and notes seconds and bytes.

It is started by network.run with one argument, a JSON object.
torch_worker.py is its twin for the methods of PyTorch; how both measure is rounds.py's.
"""

import json
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from benchmarks.network.methods import COMPRESSED, DENSE, SLICES, VOTES

if __name__ == "__main__":  # before anything of JAX runs
    TASK = json.loads(sys.argv[1])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", math.prod(SLICES.get(TASK["workload"], {}).values()))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")

import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import distlion_jax as dl
from benchmarks.network import rounds
from benchmarks.tasks.models import Transformer, make_loss, spread
from distlion_jax import baselines

LR, WD = 1e-4, 0.1
MATRICES, SIDE = 24, 1024  # 25.2 M parameters, where only update and exchange are timed
CONTEXT, SEQUENCES, CHARACTERS = 64, 4, 84


class Method(NamedTuple):
    """A transformation of each process's own gradients, and what the ledger says it receives."""

    tx: optax.GradientTransformation
    cost: Callable[[Any, int], dl.WireCost | None]


def _vote(**options: Any) -> Method:
    tx = dl.distributed_lion(LR, weight_decay=WD, **options)
    return Method(tx, lambda tree, n: dl.wire_cost(tree, n, **options))


def _dense(name: str) -> Method:
    # gloo has no bfloat16 and sends float32 instead: the counters show it.
    dtype = {"f32": None, "bf16": jnp.bfloat16}[name]
    # Fair to the other side: its quickest form, without the guard that a vote has in any case.
    tx = baselines.full_precision_lion(LR, weight_decay=WD, wire_dtype=dtype, guarded=False)
    return Method(tx, lambda tree, n: dl.full_precision_cost(tree, n, name))


def _compressed(kind: str, options: dict[str, Any]) -> Method:
    compressor = getattr(baselines, kind)(**options)
    lion = dl.replicated(optax.lion(LR, weight_decay=WD))
    tx = optax.chain(baselines.compressed_average(compressor), lion)
    return Method(tx, compressor.cost)


def make_method(name: str) -> Method:
    """The method of that name."""
    if name == "local":
        return Method(optax.lion(LR, weight_decay=WD), lambda tree, n: None)
    if name in COMPRESSED:
        return _compressed(*COMPRESSED[name])
    return _vote(**VOTES[name]) if name in VOTES else _dense(DENSE[name])


def linear_loss(params: Any, x: jax.Array) -> jax.Array:
    """Mean square of what comes out of the layers, as in torch_worker.py."""
    for i in range(MATRICES):
        x = x @ params[f"w{i}"]
    return jnp.mean(x**2)


def make_mesh(name: str, n: int) -> Mesh:
    """The processes along `data`, their own devices along the other axes."""
    sizes = {"data": n, **SLICES.get(name, {})}
    return jax.make_mesh((*sizes.values(),), (*sizes,), (AxisType.Auto,) * len(sizes))


def workload(name: str, mesh: Mesh) -> tuple[Any, Any, Callable[[Any, Any], Any]]:
    """Parameters, a batch, and the worker's gradient of both."""
    n, sharding = mesh.shape["data"], NamedSharding(mesh, P("data"))
    rng = np.random.default_rng(0)
    if name == "exchange":
        params = {f"w{i}": np.zeros((SIDE, SIDE), np.float32) for i in range(MATRICES)}
        mine = {k: rng.standard_normal((1, SIDE, SIDE), np.float32) for k in params}
        shape = (n, SIDE, SIDE)
        batch = {
            k: jax.make_array_from_callback(shape, sharding, lambda _, x=x: x)
            for k, x in mine.items()
        }
        return params, batch, lambda params, batch: jax.tree.map(lambda x: x[0], batch)
    if name in ("linear", "sharded"):
        params = {
            f"w{i}": rng.standard_normal((SIDE, SIDE), np.float32) / 32 for i in range(MATRICES)
        }
        batch = spread(rng.standard_normal((n, SIDE), np.float32), sharding)
        gradient = dl.local_value_and_grad(linear_loss)
        return params, batch, lambda params, batch: gradient(params, batch)[1]
    width, layers = {"small": (128, 2), "large": (512, 8)}[name]
    model = Transformer(CHARACTERS, layers, width)
    text = rng.integers(0, CHARACTERS, (n * SEQUENCES, CONTEXT + 1), np.int32)
    batch = spread({"x": text[:, :-1], "y": text[:, 1:]}, sharding)
    params = jax.jit(model.init)(jax.random.key(0), text[:1, :-1])["params"]
    gradient = dl.local_value_and_grad(make_loss(model))
    return jax.device_get(params), batch, lambda params, batch: gradient(params, batch)[1]


def make_step(method: Method, gradient: Callable[[Any, Any], Any], mesh: Mesh, spec: P) -> Any:
    """The jitted step, buffers donated; the state is stacked. All parameters have this spec."""
    update = optax.with_extra_args_support(method.tx).update

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        grads, known = gradient(params, batch), {}
        if len(spec):  # the same layout for all methods
            grads = jax.lax.with_sharding_constraint(grads, spec)
            known = {"specs": jax.tree.map(lambda _: spec, params)}
        updates, state = update(grads, dl.unstack(state), params, **known)
        return optax.apply_updates(params, updates), dl.stack(state)

    def run(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        by_state = dl.state_specs(state)
        specs = dict(in_specs=(P(), by_state, P("data")), out_specs=(P(), by_state))
        mapped = jax.shard_map(step, mesh=mesh, axis_names={"data"}, check_vma=False, **specs)  # type: ignore[arg-type]
        return mapped(params, state, batch)

    return jax.jit(run, donate_argnums=(0, 1))


class Runner:
    """One method, ready to step, for rounds."""

    warmup = 1  # compiles

    def __init__(self, name: str, params: Any, batch: Any, gradient: Any, mesh: Mesh) -> None:
        method, n = make_method(name), mesh.shape["data"]
        spec = P(*mesh.axis_names[1:])  # of matrices, where a process has more than one device
        sharding = NamedSharding(mesh, spec)
        copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=sharding)
        self.params, self.batch = copy(spread(params, sharding)), batch  # the step gives them away
        self.state = dl.init_state(method.tx, self.params, mesh)
        shards = jax.tree.map(lambda x: x.addressable_shards[0].data, self.params)
        cost = method.cost(shards, n)  # of one of the devices that share the link
        self.facts = {
            "predicted": cost.bytes_received * mesh.size // n if cost else 0,
            "transport": cost.transport if cost else "",
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "versions": {"jax": jax.__version__},
        }
        self.step = make_step(method, gradient, mesh, spec)

    def run(self) -> None:
        """One step, waited for."""
        self.params, self.state = jax.block_until_ready(
            self.step(self.params, self.state, self.batch)
        )


def main() -> int:
    """Joins the others, measures, writes."""
    n, i = TASK["processes"], TASK["process"]
    dl.join(TASK["coordinator"], n, i, program=json.dumps(TASK["methods"]), timeout=60)
    mesh = make_mesh(TASK["workload"], n)
    inputs = workload(TASK["workload"], mesh)
    runners = {name: Runner(name, *inputs, mesh) for name in TASK["methods"]}

    def anyone(late: bool) -> bool:
        return bool(multihost_utils.process_allgather(np.array(late)).any())

    rounds.measure(runners, TASK["interface"], multihost_utils.sync_global_devices, anyone)
    return 0


if __name__ == "__main__":
    sys.exit(main())
