# SPDX-License-Identifier: Apache-2.0
"""One of several processes that try situations, and the same in a single process.

    python -m tests.company_worker FILE SITUATION PROCESSES DEVICES PROCESS PORT

writes what the situation returned to FILE (npz). Process PROCESS of PROCESSES has DEVICES virtual
CPU devices; with PROCESSES = 1 nobody else is there.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distlion_jax as dl
from distlion_jax.cluster import coordinator

STEPS = 4
PARAMS = {"w": np.ones((4, 3), np.float32), "b": np.zeros(3, np.float32)}
EVERY_ROW = np.random.default_rng(0).normal(size=(STEPS, 32, 4)).astype(np.float32)


def loss(params, x):
    return jnp.mean((x @ params["w"] + params["b"] - 1.0) ** 2)


def my_rows(step):
    """This process's share of a global batch: its devices are neighbours in the mesh."""
    n = jax.process_count()
    return np.split(EVERY_ROW[step], n)[jax.process_index()]


def mine(tree):
    """What this process holds of replicated or stacked arrays: one copy of the first row."""
    return {
        jax.tree_util.keystr(path): np.asarray(x.addressable_shards[0].data)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def said(f):
    """The text of the error that a call raises."""
    try:
        f()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def trained(how, tx, steps=STEPS, loss=loss, model_state=None, params=PARAMS, **options):
    """Parameters and metrics of a run in which every process brings its own rows."""
    mesh = dl.worker_mesh()
    options |= {} if model_state is None else {"has_model_state": True}
    if how == "pmap":
        step, copy = dl.make_pmap_train_step(loss, tx, **options), dl.pmap_replicate
        state = dl.pmap_replicate(tx.init(PARAMS))
    else:
        step = dl.make_train_step(loss, tx, mesh, check_vma=how == "shard_map", **options)
        copy, state = lambda x: dl.replicate(x, mesh), dl.init_state(tx, PARAMS, mesh)
    kept = [copy(params), *([] if model_state is None else [copy(model_state)]), state]
    for i in range(steps):
        batch = my_rows(i)
        batch = batch if how == "pmap" else dl.make_global_batch(batch, mesh)
        *kept, metrics = step(*kept, batch)
    return kept, metrics


def same_as_one_process():
    """Each kind of step, bit for bit."""
    out = {}

    def moving(params, stats, x):
        return loss(params, x), 0.5 * stats + x.mean(0)

    for how in ("shard_map", "unchecked", "pmap"):
        accumulated = optax.MultiSteps(dl.distributed_lion(0.1, ties="coin"), 2)
        stats = {"loss": moving, "model_state": jnp.zeros(4), "microbatches": 2}
        for name, tx, options in (("vote", accumulated, {}), ("stats", accumulated, stats)):
            kept, metrics = trained(how, tx, **options)
            kept = kept[:-1] if how != "pmap" else jax.tree.map(_first_row, kept[:-1])
            for path, x in mine(kept).items():
                out[f"{how}/{name}{path}"] = x
            out[f"{how}/{name}/loss"] = np.asarray(metrics.loss)
            out[f"{how}/{name}/voted"] = np.asarray(metrics.health[0].voted)
    return out


def _first_row(x):
    return jax.device_put(x.addressable_shards[0].data[0])


def differs():
    """What differs by process from the start is made one, or found and named."""
    me, mesh, out = jax.process_index(), dl.worker_mesh(), {}
    own = {"w": PARAMS["w"] + me, "b": PARAMS["b"] - 0.0 * (-1) ** me}
    for how in ("shard_map", "pmap"):
        kept, _ = trained(how, dl.distributed_lion(0.1), 1, params=own)
        whole = kept[0] if how == "shard_map" else jax.tree.map(_first_row, kept[0])
        out |= {f"made one/{how}{path}": x for path, x in mine(whole).items()}
    everywhere = NamedSharding(mesh, P())
    tx = dl.distributed_lion(0.1)
    state, step = dl.init_state(tx, PARAMS, mesh), dl.make_train_step(loss, tx, mesh)
    held = {
        k: jax.make_array_from_callback(v.shape, everywhere, lambda _, v=v: v)
        for k, v in own.items()
    }
    batch = dl.make_global_batch(my_rows(0), mesh)
    out["own parameters"] = said(lambda: step(held, state, batch))
    out["own rate"] = said(lambda: trained("shard_map", dl.distributed_lion(0.1 * (1 + me)), 1))
    out["own rate, pmap"] = said(lambda: trained("pmap", dl.distributed_lion(0.1 * (1 + me)), 1))
    params, step = dl.replicate(PARAMS, mesh), dl.make_train_step(loss, tx, mesh)
    out["own rows"] = said(lambda: step(params, state, my_rows(0)))
    same = jax.make_array_from_process_local_data(everywhere, my_rows(0))
    out["replicated rows"] = said(lambda: step(params, state, same))
    grid = jax.make_mesh((jax.process_count(), jax.local_device_count()), ("chip", "data"))
    out["left out axis"] = said(lambda: dl.make_global_batch(my_rows(0), grid))
    others = [d for d in jax.devices() if d.process_index != me]
    out["no device"] = said(lambda: dl.make_train_step(loss, tx, dl.worker_mesh(devices=others)))
    uneven = jax.devices()[:-1]
    out["uneven pmap"] = said(lambda: dl.make_pmap_train_step(loss, tx, devices=uneven))
    out["odd rows"] = said(lambda: dl.make_global_batch(my_rows(0)[:7], mesh))
    return {k: np.asarray(v) for k, v in out.items()}


def resumed():
    """A state of all processes as one of fewer workers, and as Lion's."""
    tx = dl.distributed_lion(0.1)
    kept, _ = trained("shard_map", tx, 2)
    lion = dl.to_lion_state(kept[-1])
    resized = dl.resize_state(kept[-1], dl.worker_mesh())
    return mine(lion) | {f"resized{k}": v for k, v in mine(resized).items()}


def bad_batch():
    """The last process passes a batch that its step refuses."""
    mesh, tx = dl.worker_mesh(), dl.distributed_lion(0.1)
    step = dl.make_train_step(loss, tx, mesh)
    params, state = dl.replicate(PARAMS, mesh), dl.init_state(tx, PARAMS, mesh)
    params, state, _ = step(params, state, dl.make_global_batch(my_rows(0), mesh))
    last = jax.process_index() == jax.process_count() - 1
    batch = my_rows(1)[:5] if last else dl.make_global_batch(my_rows(1), mesh)
    return {"said": np.asarray(said(lambda: step(params, state, batch)))}


def tries_again():
    """The last process is given a bad batch, and then a good one; process 0 lowers alone."""
    mesh, tx = dl.worker_mesh(), dl.distributed_lion(0.1)
    step, last = dl.make_train_step(loss, tx, mesh), jax.process_index() == jax.process_count() - 1
    params, state = dl.replicate(PARAMS, mesh), dl.init_state(tx, PARAMS, mesh)
    params, state, _ = step(params, state, dl.make_global_batch(my_rows(0), mesh))
    if last:
        error = said(lambda: step(params, state, my_rows(1)[:5]))
    batch = dl.make_global_batch(my_rows(1), mesh)
    if jax.process_index() == 0:
        step.lower(params, state, batch)
    # Other rates, and every other batch with half the rows: each call begins anew.
    for call in range(1, 9):
        rows = my_rows(call % STEPS)[:: 1 + call % 2]
        params, state, metrics = step(params, state, dl.make_global_batch(rows, mesh))
        params = jax.tree.map(jnp.copy, params)
    keys = [key for key, _ in coordinator().key_value_dir_get("distlion_jax/step0/")]
    return {
        "said": np.asarray(error if last else "nothing"),
        "cards": np.asarray(sum("/new" in key for key in keys)),
        "voters": np.asarray(metrics.health[0].voters),
    } | mine(params)


def no_batch():
    """The last process ends before its first call, because it has no data."""
    mesh, tx = dl.worker_mesh(), dl.distributed_lion(0.1)
    step = dl.make_train_step(loss, tx, mesh)
    params, state = dl.replicate(PARAMS, mesh), dl.init_state(tx, PARAMS, mesh)
    if jax.process_index() == jax.process_count() - 1:
        return {"said": np.asarray("nothing")}
    batch = dl.make_global_batch(my_rows(0), mesh)
    return {"said": np.asarray(said(lambda: step(params, state, batch)))}


def fewer_batches():
    """The last process has one batch fewer, and its program ends."""
    last = jax.process_index() == jax.process_count() - 1
    return {
        "said": np.asarray(said(lambda: trained("shard_map", dl.distributed_lion(0.1), 2 - last)))
    }


def main(file, situation, processes, devices, process, port):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))
    if int(processes) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    np.savez(file, **globals()[situation]())


if __name__ == "__main__":
    main(*sys.argv[1:])
