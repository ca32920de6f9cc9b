# SPDX-License-Identifier: Apache-2.0
"""One of several processes that train replicas of a sharded model, and the same in one process.

    python -m tests.sharded_worker FILE PROCESSES DEVICES PROCESS PORT

trains with every entry of RUNS on every mesh and writes what this process holds to FILE (npz).
Process PROCESS of PROCESSES has DEVICES virtual CPU devices. All numbers are multiples of a power
of two, and few bits long: in float64 sums are exact, whatever order a network takes them in.
"""

import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers as Numbers

import distlion_jax as dl
from tests.company_worker import said

STEPS, ROWS = 5, 16  # rows of all replicas
MESHES = {  # axes and sizes; axes of the batch
    "slices": ({"replica": 2, "fsdp": 2, "tensor": 2}, ("replica", "fsdp")),
    # Where a process has two devices, `tensor` lies over processes, which have rows of their own.
    "crossed": ({"replica": 2, "tensor": 2, "fsdp": 2}, ("replica", "tensor", "fsdp")),
    "4x2": ({"replica": 4, "fsdp": 2, "tensor": 1}, ("replica", "fsdp")),
}
SHAPES = {"up": (16, 32), "down": (32, 8), "bias": (32,), "gain": (8,), "shared": (256, 128)}
SPECS = {
    "up": P("fsdp", "tensor"),
    "down": P("tensor", "fsdp"),
    "bias": P("tensor"),
    "gain": P("fsdp"),
    "shared": P(),  # large: the devices of a replica share its vote
}
SICK = {2: 1, 3: 0}  # step: the replica that has a NaN; in step 3 in one shard of its gradient
ABSENT = 4  # the step that replica 0 sits out
MUON = {name: Numbers() if name in ("up", "down") else None for name in SHAPES}
RUNS = {  # a mesh, a transformation, and its options
    "muon": ("crossed", dl.distributed_muon, {"muon_weight_dimension_numbers": MUON}),
    "weights": ("4x2", dl.distributed_lion, {"transport": "two_phase", "max_weight": 3}),
    "votes": ("slices", dl.distributed_lion, {"transport": "two_phase"}),
}


def begin(processes, devices, process, port):
    """Sets up the devices, and the other processes' if there are any."""
    warnings.simplefilter("error", UserWarning)  # of leaks, idle devices, processes that are alone
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # most of the time is compilation
    jax.config.update("jax_num_cpu_devices", devices)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        dl.join(f"127.0.0.1:{port}", processes, process)
    assert (jax.process_count(), jax.local_device_count()) == (processes, devices)


def initial_params():
    rng = np.random.default_rng(0)
    return {name: rng.integers(-8, 9, shape) / 16 for name, shape in SHAPES.items()}


def place(tree, mesh):
    """Of arrays that every process has whole, each device its shard."""
    return {
        name: jax.make_array_from_callback(
            x.shape, NamedSharding(mesh, SPECS[name]), lambda index, x=x: x[index]
        )
        for name, x in tree.items()
    }


def rows_of(step, workers):
    """The rows of all replicas at one step, quarters."""
    rng = np.random.default_rng([1, step])
    widths = {"x": 16, "wide": 256, "apart": 8}
    batch = {name: rng.integers(-4, 5, (ROWS, width)) / 4 for name, width in widths.items()}
    if step in SICK:
        row = SICK[step] * ROWS // workers
        batch["x" if step == 2 else "apart"][row, 5] = np.nan
    return batch


def my_rows(step, workers):
    """This process's share of them: its devices are neighbours in the mesh."""
    split = lambda x: np.split(x, jax.process_count())[jax.process_index()]  # noqa: E731
    return jax.tree.map(split, rows_of(step, workers))


def loss(params, batch):
    hidden = jax.nn.relu(batch["x"] @ params["up"] + params["bias"])
    mean = lambda x: jnp.mean(x**2)  # noqa: E731
    apart = mean(batch["wide"] @ params["shared"]) + jnp.mean(batch["apart"] @ params["gain"])
    return mean(hidden @ params["down"]) + apart


def by_device(tree, mesh):
    """What this process holds, by the places of its devices in the mesh."""
    places = {device: place for place, device in enumerate(mesh.devices.flat)}
    return {
        f"{name}/{places[shard.device]}": np.asarray(shard.data)
        for name, x in tree.items()
        for shard in x.addressable_shards
    }


def mesh_of(name):
    sizes, _ = MESHES[name]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))


def train(name):
    """Trains; returns named arrays, and what a step takes."""
    on, make, options = RUNS[name]
    mesh, n, options = mesh_of(on), MESHES[on][0]["replica"], options | {"ballot": "ternary"}
    tx = make(2**-4, 0.75, 0.5, weight_decay=0.0, axis_name="replica", ties="zero", **options)
    step, params = dl.make_train_step(loss, tx, mesh, "replica"), place(initial_params(), mesh)
    state = dl.init_state(tx, params, mesh, "replica")
    figures = []
    for i in range(STEPS):
        batch = dl.make_global_batch(my_rows(i, n), mesh, MESHES[on][1])
        extra = {"participating": (np.arange(n) != 0) | (i != ABSENT)}
        extra |= {"weight": 1 + np.arange(n) % 3} if "max_weight" in options else {}
        params, state, metrics = step(params, state, batch, **extra)
        (health,) = metrics.health
        figures.append((metrics.loss, health.voters, health.voted, health.tied))
    names = "loss", "voters", "voted", "tied"
    out = {k: np.stack([np.asarray(x) for x in one])
           for k, one in zip(names, zip(*figures, strict=True), strict=True)}  # fmt: skip
    for kind, tree in (("params", params), ("mu", state[0].mu)):
        out |= {f"{kind}/{k}": x for k, x in by_device(tree, mesh).items()}
    return out, (mesh, step, params, state, batch, extra)


def amiss(mesh, step, params, state, batch, extra):
    """What is said where a process, the last one, has other numbers, or rows of its own."""
    last = jax.process_index() == jax.process_count() - 1
    twice = lambda x: 2 * x if last else x  # noqa: E731
    bad = params | {
        "up": jax.make_array_from_single_device_arrays(
            params["up"].shape,
            params["up"].sharding,
            [twice(shard.data) for shard in params["up"].addressable_shards],
        )
    }
    rows = my_rows(0, 2)
    share = lambda rows, name: dl.make_global_batch(rows, mesh_of(name), ("replica", "fsdp"))  # noqa: E731
    out = {
        "agree": str(dl.replicas_agree(params, mesh)),
        "differ": str(dl.replicas_agree(bad, mesh)),
        "bad parameters": said(lambda: step(bad, state, batch, **extra)),
        "shared rows": said(lambda: share(rows, "crossed")),
        "odd rows": said(lambda: share(rows["x"][:3], "slices")),
    }
    if jax.process_count() == 2:  # they wait for 10 s, and can go on with nothing afterwards
        out["own rows"] = said(lambda: step(params, state, rows if last else batch, **extra))
    return {name: np.asarray(x) for name, x in out.items()}


def main(file, *numbers):
    begin(*map(int, numbers))
    results = {}
    for name in RUNS:
        arrays, given = train(name)
        results |= {f"{name}/{key}": x for key, x in arrays.items()}
    if jax.process_count() > 1:
        results |= {f"amiss/{key}": x for key, x in amiss(*given).items()}
    np.savez(file, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
