# SPDX-License-Identifier: Apache-2.0
"""One process of a multi-process training run, and the same run in a single process.

    python -m tests.process_worker FILE WORKERS PROCESS PORT

trains with every entry of RUNS and writes parameters, momenta and metrics to FILE (npz). PROCESS
is 0, 1, ...: one of WORKERS processes with a CPU device each, that meet on 127.0.0.1:PORT; or
"all": one process with WORKERS virtual devices.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distlion_jax as dl

STEPS = 20
ROWS = 4  # of each worker's batch
RUNS = {
    "two_phase": dict(aggregation="majority", transport="two_phase", ties="zero"),
    "all_gather": dict(aggregation="majority", transport="all_gather", ties="coin"),
    "average": dict(aggregation="average", transport="two_phase"),
}
SICK = (7, 1)  # step and worker of a NaN
ABSENT = (11, 0)  # step and worker that sits out, in the run named "average"


def start(workers, process, port):
    """Sets up the devices, and the other processes' if there are any; returns the mesh."""
    jax.config.update("jax_platforms", "cpu")
    if process == "all":
        jax.config.update("jax_num_cpu_devices", workers)
    else:
        jax.config.update("jax_num_cpu_devices", 1)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", workers, int(process))
    assert jax.device_count() == workers
    assert jax.local_device_count() == (workers if process == "all" else 1)
    return dl.worker_mesh()


def initial_params():
    rng = np.random.default_rng(0)
    shapes = {"w": (40, 300), "b": (300,), "u": (300, 5)}
    return {k: rng.normal(size=s, scale=0.1).astype(np.float32) for k, s in shapes.items()}


def rows_of(step, worker):
    """The batch of one worker at one step; worker 0's inputs are mostly exact zeros."""
    rng = np.random.default_rng([step, worker])
    x = rng.normal(size=(ROWS, 40)) * (rng.random(40) < (0.1 if worker == 0 else 0.9))
    if (step, worker) == SICK:
        x[0, 0] = np.nan
    return x.astype(np.float32)


def global_batch(step, mesh):
    """A global array of which every process brings the rows of its own workers."""
    mine = [i for i, d in enumerate(mesh.devices.flat) if d.process_index == jax.process_index()]
    local = np.concatenate([rows_of(step, worker) for worker in mine])
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), local)


def loss(params, x):
    y = jnp.tanh(x @ params["w"] + params["b"]) @ params["u"]
    return jnp.mean((y - x[:, :5] ** 2) ** 2)


def local_rows(x):
    """The rows of a sharded (or replicated) array that this process holds, by their index."""
    shards = sorted(x.addressable_shards, key=lambda s: s.index[0].start or 0)
    if x.is_fully_replicated:
        return np.asarray(shards[0].data)
    return np.concatenate([np.asarray(s.data) for s in shards])


def train(name, mesh):
    """Trains; returns named arrays."""
    n = mesh.size
    tx = dl.distributed_lion(0.01, weight_decay=0.1, **RUNS[name])
    checked = name != "all_gather"  # where JAX does not check, the step compares replicas
    step = dl.make_train_step(loss, tx, mesh, check_vma=checked)
    params = dl.replicate(jax.tree.map(jnp.asarray, initial_params()), mesh)
    state = dl.init_state(tx, params, mesh)
    losses, voters, voted = [], [], []
    for i in range(STEPS):
        extra = {}
        if name == "average":
            extra["participating"] = np.array([(i, worker) != ABSENT for worker in range(n)])
        params, state, metrics = step(params, state, global_batch(i, mesh), **extra)
        losses.append(np.asarray(metrics.loss))
        voters.append(np.asarray(metrics.health[0].voters))
        voted.append(np.asarray(metrics.health[0].voted))
    out = {"loss": losses, "voters": voters, "voted": np.stack(voted, axis=1)}
    out |= {f"params/{k}": local_rows(x) for k, x in params.items()}
    out |= {f"mu/{k}": local_rows(x) for k, x in state[0].mu.items()}
    return {f"{name}/{k}": np.asarray(x) for k, x in out.items()}


def main(file, workers, process, port):
    mesh = start(int(workers), process, port)
    results = {}
    for name in RUNS:
        results |= train(name, mesh)
    np.savez(file, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
