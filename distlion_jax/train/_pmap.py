# SPDX-License-Identifier: Apache-2.0
"""The same train step under ``jax.pmap``, for scripts that are built on it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from distlion_jax._rules import check_static
from distlion_jax._vote import wire
from distlion_jax._vote.wire import is_key
from distlion_jax.train import _audit as audit
from distlion_jax.train import _checks as checks
from distlion_jax.train._checks import check_by_worker
from distlion_jax.train._drive import MOST_PARTS, Driver, Place
from distlion_jax.train._processes import spans_processes
from distlion_jax.train._worker import worker_step


def make_pmap_train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    axis_name: str = "data",
    *,
    has_aux: bool = False,
    has_model_state: bool = False,
    microbatches: int = 1,
    devices: Sequence[Any] | None = None,
    donate: bool = True,
) -> Callable[..., tuple[Any, ...]]:
    """The same step under ``jax.pmap``, for scripts that are built on it.

    Parameters and state carry a leading worker axis (:func:`pmap_replicate`; the state is of the
    same form as :func:`distlion_jax.init_state`'s, but that what is replicated is stacked too). The
    batch does not: the step splits it. pmap does not check that workers stay alike; calls 1, 2, 4,
    8, ... of the step do, and every call for a ``tx`` that declares no exchange.

    In several processes the workers of all of them vote, as under ``jax.pmap``. Each process passes
    its own rows, and the entries of its own workers.

    Args:
      loss_fn, tx, axis_name, has_aux, has_model_state, microbatches, donate: as in
        :func:`make_train_step`. The model's state carries a leading worker axis.
      devices: one per worker; None: ``jax.devices()``, those of all processes.

    Raises:
      ValueError: from the step: for a batch or state that does not fit the workers, and where their
        parameters are found to differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from distlion_jax import distributed_lion, pmap_replicate
      >>> tx, params = distributed_lion(0.01), {"w": jnp.zeros(3)}
      >>> step = make_pmap_train_step(lambda p, x: jnp.mean((x @ p["w"] - 1.0) ** 2), tx)
      >>> params, state = pmap_replicate(params), pmap_replicate(tx.init(params))
      >>> params, state, metrics = step(params, state, jnp.ones((16, 3)))
      >>> float(metrics.loss), params["w"].shape
      (1.0, (8, 3))
    """
    check_static("microbatches", microbatches, "int", MOST_PARTS)
    devices = all_devices(devices)
    place = _place(devices)
    here = place.entries
    worker = worker_step(
        loss_fn,
        tx,
        (axis_name,),
        (axis_name,),
        has_aux=has_aux,
        has_model_state=has_model_state,
        microbatches=microbatches,
    )

    # Two nested arguments: pmap took `in_axes` for the arrays' own where their numbers agreed.
    mapped = jax.pmap(
        lambda unseen, kept, given: worker(*kept, *given, compare=unseen),
        axis_name,
        in_axes=(None, (0, 0, 0), (0, None, 0)),
        static_broadcasted_argnums=0,
        devices=devices,
        donate_argnums=(1,) if donate else (),
    )
    first = jax.pmap(lambda tree: audit.all_same(tree, axis_name), axis_name, devices=devices)
    driver = Driver(
        tx,
        place,
        lambda tree: not jax.tree.leaves(tree) or audit.everywhere(first(tree)),
        lambda args, rng, extra: mapped.lower(False, *arranged(args, rng, extra)),
        has_model_state=has_model_state,
        microbatches=microbatches,
        donate=donate,
        one=lambda params: jax.tree.map(lambda x: x[0], params),
    )

    def arranged(args: tuple[Any, ...], rng: Any, extra: dict[str, Any]) -> tuple[Any, Any]:
        params, model_state, state, batch = driver.split(args)
        for name, tree in (("params", params), ("model_state", model_state)):
            check_by_worker(name, tree, here, "Make it with pmap_replicate.")
        rows = jax.tree.map(lambda x: x.reshape(here, x.shape[0] // here, *x.shape[1:]), batch)
        return (params, model_state, state), (rows, rng, extra)

    def program(unseen: bool, args: Any, rng: Any, extra: dict[str, Any]) -> tuple[Any, ...]:
        *kept, metrics = mapped(unseen, *arranged(args, rng, extra))
        # All figures are the same on all workers: one copy of each is enough.
        return driver.join((*kept, jax.tree.map(one_of, metrics)))

    def step(*args: Any, rng: Any = None, **extra: Any) -> tuple[Any, ...]:
        return driver.run(program, args, rng, extra)

    return step


def _place(devices: Sequence[Any]) -> Place:
    processes = [d.process_index for d in devices]
    mine = tuple(i for i, p in enumerate(processes) if p == jax.process_index())
    if len({processes.count(process) for process in processes}) > 1:
        raise ValueError(
            f"`devices` are of processes {processes}: pmap takes as many of each process. A mesh "
            "and make_train_step take others."
        )
    return Place(
        tuple(devices),
        workers=len(devices),
        shards=len(mine),
        vote_sizes=(len(devices),),
        stacked=True,
        watched=True,
        mine=mine,
    )


def one_of(x: Any) -> Any:
    """The first worker's of equal entries, from the device that holds it: nothing is computed."""
    if checks.is_traced(x) or not hasattr(x, "addressable_shards"):
        return x[0]
    return x.addressable_shards[0].data.reshape(x.shape[1:])


def all_devices(devices: Sequence[Any] | None) -> Sequence[Any]:
    """The devices, one a worker; None: those of all processes."""
    return jax.devices() if devices is None else devices


def pmap_replicate(tree: Any, devices: Sequence[Any] | None = None) -> Any:
    """A copy of the tree for each device, stacked: parameters, or ``tx.init(params)``, for pmap.

    In several processes all of them call it. Each receives copies of process 0's numbers, for its
    own devices.

    Args:
      tree: arrays, NumPy arrays or numbers, without a worker axis.
      devices: as in :func:`make_pmap_train_step`.

    Examples:
      >>> import jax.numpy as jnp
      >>> pmap_replicate({"w": jnp.zeros(3)})["w"].shape == (jax.local_device_count(), 3)
      True
    """
    devices = all_devices(devices)
    here = sum(d.process_index == jax.process_index() for d in devices)
    leaves, treedef = jax.tree.flatten(tree)
    if not leaves:
        return tree
    kinds = [jax.random.key_impl(x) if is_key(x) else None for x in leaves]
    host = [np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in leaves]
    stacked = [np.broadcast_to(x, (here, *x.shape)) for x in host]

    def copy(arrays: list[Any]) -> list[Any]:
        if spans_processes(devices):
            arrays = wire.copies_of_first(arrays, "workers")
        pairs = zip(arrays, kinds, strict=True)
        return [x if kind is None else jax.random.wrap_key_data(x, impl=kind) for x, kind in pairs]

    return treedef.unflatten(jax.pmap(copy, "workers", devices=devices)(stacked))
