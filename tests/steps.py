# SPDX-License-Identifier: Apache-2.0
"""Ready-made steps under every map, with what they begin with."""

import jax

import distlion_jax as dl

MAPS = ("shard_map", "unchecked", "pmap")


def start(loss, tx, params, how, model_state=None, n=8, **options):
    """``(step, params, [model_state], state)`` of n workers.

    ``how`` is one of MAPS, or "mean": an ordinary optimizer on averaged gradients.
    """
    options |= {"has_model_state": True} if model_state is not None else {}
    if how == "pmap":
        devices = jax.devices()[:n]
        step = dl.make_pmap_train_step(loss, tx, devices=devices, **options)
        copies = [params, *([] if model_state is None else [model_state]), tx.init(params)]
        return step, *(dl.pmap_replicate(x, devices) for x in copies)
    mesh = dl.worker_mesh(n)
    if how == "mean":
        step = dl.make_train_step(loss, tx, mesh, gradients="mean", **options)
        state = dl.replicate(tx.init(params), mesh)
    else:
        step = dl.make_train_step(loss, tx, mesh, check_vma=how == "shard_map", **options)
        state = dl.init_state(tx, params, mesh)
    model = [] if model_state is None else [dl.replicate(model_state, mesh)]
    return step, dl.replicate(params, mesh), *model, state


def one(tree, how):
    """One copy of what is the same on all workers."""
    return jax.tree.map(lambda x: x[0], tree) if how == "pmap" else tree
