# SPDX-License-Identifier: Apache-2.0
"""From a loss function, a transformation and a mesh to a train step; the same for pmap.

In:  ``loss_fn(params, batch)``, an Optax transformation, a mesh (or devices, for pmap).
Out: a jitted, buffer-donating ``step(params, state, batch) -> (params, state, metrics)``.

The pieces are :mod:`distlion_jax.mesh`'s, and can be put together otherwise in a few lines.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distlion_jax import audit, wire
from distlion_jax.dense import finite_mean
from distlion_jax.health import VoteHealth
from distlion_jax.mesh import (
    local_value_and_grad,
    per_worker,
    stack,
    state_specs,
    unstack,
    workers,
)
from distlion_jax.metrics import Metrics, average, vote_health, votes_of
from distlion_jax.rules import AxisName, check_choice
from distlion_jax.step_checks import check_averaged, check_exchange, check_shapes, check_step

Step = Callable[..., tuple[Any, Any, Metrics]]


def _worker_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    axis: AxisName,
    has_aux: bool,
    mean_axis: AxisName | None,
    gradients: str,
) -> Callable[..., tuple[Any, Any, Metrics]]:
    """The step of one worker; the state without its worker axis."""
    tx = optax.with_extra_args_support(tx)
    every = wire.axes(axis) + (wire.axes(mean_axis) if mean_axis else ())
    value_and_grad = local_value_and_grad(loss_fn, every, has_aux)
    inner = (lambda g: finite_mean(g, mean_axis)) if mean_axis else (lambda g: g)
    reduce = (lambda g: jax.lax.pmean(g, every)) if gradients == "mean" else inner

    def step(params: Any, state: Any, batch: Any, rng: Any, extra: dict[str, Any]) -> Any:
        key = () if rng is None else (jax.random.fold_in(rng, jax.lax.axis_index(every)),)
        value, grads = value_and_grad(params, batch, *key)
        loss, aux = value if has_aux else (value, ())
        rounds = [vote.count for vote in votes_of(state)]
        old_params, old_state = params, state
        updates, state = tx.update(reduce(grads), state, params, **extra)
        params = optax.apply_updates(params, updates)
        check_shapes("params", old_params, params)
        check_shapes("state", old_state, state)
        entered = jnp.bool_(True)
        for before, vote in zip(rounds, votes_of(state), strict=True):
            if vote.health is not None:  # of this step, where a round was held in it
                entered &= vote.health.voted | (vote.count == before)
        return params, state, average(loss, aux, vote_health(state), entered, every)

    return step


def _settler(devices: Iterable[Any]) -> Callable[[Any], Any]:
    """Waits for a step on virtual CPU devices, elsewhere does nothing.

    They share the threads of one pool: steps that queue up starve one another's collectives, until
    XLA gives up and aborts the process.
    """
    here = jax.process_index()
    virtual = sum(d.platform == "cpu" and d.process_index == here for d in devices) > 1
    return jax.block_until_ready if virtual else lambda metrics: metrics


def make_train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    axis_name: AxisName = "data",
    *,
    has_aux: bool = False,
    mean_axis_name: AxisName | None = None,
    gradients: Literal["local", "mean"] = "local",
    check_vma: bool = True,
    donate: bool = True,
) -> Step:
    """A jitted data-parallel train step under ``jax.shard_map``.

    Args:
      loss_fn: ``loss_fn(params, batch)``, or ``(params, batch, rng)`` when steps are given a key,
        to the mean loss over this worker's batch (or ``(loss, aux)`` with ``has_aux``).
      tx: a transformation built for the same ``axis_name``.
      mesh: the mesh, of Auto or Explicit axes; those beside ``axis_name``, if any, must be
        ``mean_axis_name``.
      axis_name: the axis, or axes, that vote.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``; aux is a tree of numbers to average.
      mean_axis_name: fast inner axis, or axes, over which gradients are averaged in full precision
        before the vote, as :func:`distlion_jax.average_gradients` does.
      gradients: ``"local"``, for a vote; ``"mean"`` averages gradients over all axes first, for an
        ordinary optimizer (as ``optax.lion``), whose state is then replicated: plain
        ``tx.init(params)``, through :func:`replicate`.
      check_vma: JAX's check that what claims to be replicated is. Transformations after the vote
        that keep arrays (as ``optax.ema``) pass it inside :func:`distlion_jax.replicated`. Without
        it, calls 1, 2, 4, 8, ... of the step compare the parameters of all devices.
      donate: reuse the buffers of params and state; the ones passed in cannot be used again.

    Returns:
      ``step(params, state, batch, *, rng=None, **extra) -> (params, state, metrics)``. The batch's
      leading axis is split over the workers; ``rng`` is a key, folded with the worker's index;
      each ``extra`` argument (``participating``, ``weight``) is an array of shape [n], one entry a
      worker. ``step.lower(...)`` takes the same, as a jitted function's. ``metrics`` is
      :class:`Metrics`. On virtual CPU devices, and only there, the step is waited for.

    Raises:
      ValueError: for a batch or state that does not fit the mesh, or an axis it does not have; from
        the step, where ``check_vma`` is off and the workers' parameters are found to differ.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from distlion_jax import distributed_lion
      >>> from distlion_jax.mesh import init_state, replicate, worker_mesh
      >>> mesh, tx = worker_mesh(8), distributed_lion(0.01)
      >>> params = {"w": jnp.zeros(3)}
      >>> step = make_train_step(lambda p, x: jnp.mean((x @ p["w"] - 1.0) ** 2), tx, mesh)
      >>> params, state = replicate(params, mesh), init_state(tx, params, mesh)
      >>> params, state, metrics = step(params, state, jnp.ones((16, 3)))
      >>> float(metrics.loss), int(metrics.health[0].voters)
      (1.0, 8)
    """
    check_choice("gradients", gradients, ("local", "mean"))
    n = workers(mesh, axis_name)
    every = wire.axes(axis_name) + (wire.axes(mean_axis_name) if mean_axis_name else ())
    shards = workers(mesh, every)
    if idle := set(mesh.axis_names) - set(every):
        raise ValueError(
            f"`mesh` has axes {sorted(idle)} beside `axis_name` {axis_name!r} and `mean_axis_name` "
            f"{mean_axis_name!r}: the step would repeat the same work along them."
        )
    worker = _worker_step(loss_fn, tx, axis_name, has_aux, mean_axis_name, gradients)
    stacked = gradients == "local"
    by_worker = P(wire.axes(axis_name))

    def mapped(params: Any, state: Any, batch: Any, rng: Any, extra: dict[str, Any]) -> Any:
        if stacked and n > 1 and not check_vma:
            check_exchange(state)
        if not stacked:
            check_averaged(state)
        state = unstack(state, axis_name) if stacked else state
        extra = jax.tree.map(lambda x: x[0], extra)
        params, state, metrics = worker(params, state, batch, rng, extra)
        return params, stack(state) if stacked else state, metrics

    health = VoteHealth(by_worker, P(), P(), P())  # type: ignore[arg-type]

    def run(params: Any, state: Any, batch: Any, rng: Any, extra: dict[str, Any]) -> Any:
        state_spec = state_specs(state, axis_name) if stacked else P()
        specs = (P(), state_spec, Metrics(P(), P(), (health,) * len(vote_health(state))))  # type: ignore[arg-type]
        given = params, state, batch, rng, extra
        in_specs = P(), state_spec, P(every), P(), by_worker
        if AxisType.Explicit in mesh.axis_types:  # there, shard_map moves nothing by itself
            places = jax.tree.map(functools.partial(NamedSharding, mesh), in_specs)
            given = jax.sharding.reshard(given, places)
        sharded = jax.shard_map(
            mapped, mesh=mesh, in_specs=in_specs, out_specs=specs, check_vma=check_vma
        )
        return sharded(*given)

    jitted = jax.jit(run, donate_argnums=(0, 1) if donate else ())
    settle = _settler(mesh.devices.flat)
    watch = audit.watch(lambda params: audit.replicas_agree(params, mesh))

    def step(params: Any, state: Any, batch: Any, *, rng: Any = None, **extra: Any) -> Any:
        check_step(batch, per_worker(state) if stacked else (), extra, n, shards)
        if extra and not stacked:
            raise ValueError(f"`{next(iter(extra))}` is for a vote; gradients='mean' takes all.")
        params, state, metrics = jitted(params, state, batch, rng, extra)
        settle(metrics)
        if not check_vma:
            watch(params)
        return params, state, metrics

    def lower(params: Any, state: Any, batch: Any, *, rng: Any = None, **extra: Any) -> Any:
        return jitted.lower(params, state, batch, rng, extra)

    step.lower = lower  # type: ignore[attr-defined]
    return step


def make_pmap_train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    axis_name: str = "data",
    *,
    has_aux: bool = False,
    devices: Sequence[Any] | None = None,
    donate: bool = True,
) -> Step:
    """The same step under ``jax.pmap``, for scripts that are built on it.

    Parameters and state carry a leading worker axis (:func:`pmap_replicate`; the state is of the
    same form as :func:`distlion_jax.init_state`'s, but that what is replicated is stacked too). The
    batch does not: the step splits it. pmap does not check that workers stay alike; calls 1, 2, 4,
    8, ... of the step do.

    Args:
      loss_fn, tx, axis_name, has_aux, donate: as in :func:`make_train_step`.
      devices: one per worker; None: ``jax.local_devices()``.

    Raises:
      ValueError: from the step: for a batch or state that does not fit the workers, and where their
        parameters are found to differ.

    Examples:
      >>> from distlion_jax import distributed_lion
      >>> tx, params = distributed_lion(0.01), {"w": jnp.zeros(3)}
      >>> step = make_pmap_train_step(lambda p, x: jnp.mean((x @ p["w"] - 1.0) ** 2), tx)
      >>> params, state = pmap_replicate(params), pmap_replicate(tx.init(params))
      >>> params, state, metrics = step(params, state, jnp.ones((16, 3)))
      >>> float(metrics.loss), params["w"].shape
      (1.0, (8, 3))
    """
    devices = jax.local_devices() if devices is None else devices
    n = len(devices)
    worker = _worker_step(loss_fn, tx, axis_name, has_aux, None, "local")

    def one(params: Any, state: Any, batch: Any, rng: Any, extra: dict[str, Any]) -> Any:
        if n > 1:
            check_exchange(state)
        params, state, metrics = worker(params, state, batch, rng, extra)
        health = tuple(h._replace(voted=h.voted[0]) for h in metrics.health)
        return params, state, metrics._replace(health=health)

    # One argument: pmap takes a tuple of axes for the arrays' own where there are as many arrays as
    # arguments, whatever they belong to.
    mapped = jax.pmap(
        lambda kept, given: one(*kept, *given),
        axis_name,
        in_axes=((0, 0), (0, None, 0)),
        devices=devices,
        donate_argnums=(0,) if donate else (),
    )

    same = jax.pmap(lambda tree: audit.all_same(tree, axis_name), axis_name, devices=devices)
    settle = _settler(devices)
    watch = audit.watch(lambda params: audit.everywhere(same(params)))

    def step(params: Any, state: Any, batch: Any, *, rng: Any = None, **extra: Any) -> Any:
        check_step(batch, (params, state), extra, n, n)
        batch = jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), batch)
        params, state, metrics = mapped((params, state), (batch, rng, extra))
        settle(metrics)
        watch(params)
        first = jax.tree.map(lambda x: x[0], metrics)
        pairs = zip(first.health, metrics.health, strict=True)
        health = tuple(f._replace(voted=h.voted) for f, h in pairs)
        return params, state, first._replace(health=health)

    return step


def pmap_replicate(tree: Any, devices: Sequence[Any] | None = None) -> Any:
    """A copy of the tree for each device, stacked: parameters, or ``tx.init(params)``, for pmap.

    Examples:
      >>> pmap_replicate({"w": jnp.zeros(3)})["w"].shape == (jax.local_device_count(), 3)
      True
    """
    devices = jax.local_devices() if devices is None else devices
    stacked = jax.tree.map(lambda x: np.broadcast_to(x, (len(devices), *np.shape(x))), tree)
    return jax.pmap(lambda t: t, devices=devices)(stacked)
