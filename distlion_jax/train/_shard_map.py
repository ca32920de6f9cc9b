# SPDX-License-Identifier: Apache-2.0
"""From a loss function, a transformation and a mesh to a train step under ``jax.shard_map``.

In:  ``loss_fn(params, batch)``, an Optax transformation, a mesh.
Out: a jitted, buffer-donating ``step(params, state, batch) -> (params, state, metrics)``.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from distlion_jax._rules import AxisName, check_choice
from distlion_jax._vote import wire
from distlion_jax.exchanges import exchanges
from distlion_jax.train import _audit as audit
from distlion_jax.train import _metrics
from distlion_jax.train._checks import check_averaged, check_declared, check_step, is_traced
from distlion_jax.train._placement import Placement
from distlion_jax.train._state import per_worker, stack, unstack
from distlion_jax.train._worker import Step, block_on_cpu, worker_step

NOT_REPLICATED = (
    "distlion_jax: if `tx` makes the workers agree, what follows that must be known to be the same "
    "on all of them. Wrap a transformation that keeps arrays in distlion_jax.replicated(...); let "
    "the state class of a counter declare roles = distlion_jax.Roles(shared=(...,)); or pass "
    "check_vma=False, with which the step compares the replicas' bits instead."
)


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
      loss_fn: ``loss_fn(params, batch)`` to the mean loss over this worker's batch, or to
        ``(loss, aux)`` with ``has_aux``. Where steps are given a key, it is the third argument.
      tx: a transformation built for the same ``axis_name``.
      mesh: the mesh, of Auto or Explicit axes; those beside ``axis_name``, if any, must be
        ``mean_axis_name``.
      axis_name: the axis, or axes, that vote.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``; aux is a tree of numbers to average.
      mean_axis_name: fast inner axis, or axes, over which gradients are averaged in full precision
        before the vote, as :func:`distlion_jax.average_gradients` does. Every device then votes
        with its twins: a node's link carries the vote once for each of its devices.
      gradients: ``"local"`` is for a vote. ``"mean"`` averages gradients over all axes first, for
        an ordinary optimizer such as ``optax.lion``. Its state is then replicated: plain
        ``tx.init(params)``, through :func:`distlion_jax.replicate`. A worker with a gradient that
        is not finite is left out of either mean, and ``metrics.means`` shows it.
      check_vma: JAX's check that what claims to be replicated is. Transformations after the vote
        that keep arrays (as ``optax.ema``) pass it inside :func:`distlion_jax.replicated`. Without
        it, calls 1, 2, 4, 8, ... of the step compare the parameters of all devices; every call does
        for a ``tx`` that declares no exchange.
      donate: whether the buffers of params and state are reused. Those passed in cannot be used
        again.

    Returns:
      ``step(params, state, batch, *, rng=None, **extra) -> (params, state, metrics)``. The batch's
      leading axis is split over the workers. ``rng`` is a key, folded with the worker's index. Each
      ``extra`` argument (``participating``, ``weight``) is an array of shape [n], one entry a
      worker. ``metrics`` is :class:`distlion_jax.Metrics`. ``step.lower(...)`` takes the same
      arguments, as a jitted function's. On virtual CPU devices, and only there, the step is waited
      for.

    Raises:
      ValueError: for a batch or state that does not fit the mesh, or an axis it does not have; from
        the step, where ``check_vma`` is off and the workers' parameters are found to differ.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from distlion_jax import distributed_lion, init_state, replicate, worker_mesh
      >>> mesh, tx = worker_mesh(8), distributed_lion(0.01)
      >>> params = {"w": jnp.zeros(3)}
      >>> step = make_train_step(lambda p, x: jnp.mean((x @ p["w"] - 1.0) ** 2), tx, mesh)
      >>> params, state = replicate(params, mesh), init_state(tx, params, mesh)
      >>> params, state, metrics = step(params, state, jnp.ones((16, 3)))
      >>> float(metrics.loss), int(metrics.health[0].voters)
      (1.0, 8)
    """
    check_choice("gradients", gradients, ("local", "mean"))
    inner = wire.axes(mean_axis_name) if mean_axis_name else ()
    place = Placement(mesh, axis_name, inner)
    if idle := set(mesh.axis_names) - set(place.axes):
        raise ValueError(
            f"`mesh` has axes {sorted(idle)} beside `axis_name` {axis_name!r} and `mean_axis_name` "
            f"{mean_axis_name!r}: the step would repeat the same work along them."
        )
    stacked = gradients == "local"
    mean_axes = inner if stacked else place.axes
    worker = worker_step(loss_fn, tx, place.axes, has_aux, mean_axes)

    def mapped(params: Any, state: Any, batch: Any, rng: Any, extra: dict[str, Any]) -> Any:
        if not stacked:
            check_averaged(state)
        state = unstack(state, axis_name) if stacked else state
        extra = jax.tree.map(lambda x: x[0], extra)
        params, state, metrics = worker(params, state, batch, rng, extra)
        return params, stack(state) if stacked else state, metrics

    def run(params: Any, state: Any, batch: Any, rng: Any, extra: dict[str, Any]) -> Any:
        by_state = place.state(state) if stacked else P()
        in_specs = place.params, by_state, place.batch, P(), place.by_worker
        given = params, state, batch, rng, extra
        if AxisType.Explicit in mesh.axis_types:  # there, shard_map moves nothing by itself
            given = jax.sharding.reshard(given, place.shardings(in_specs))
        sharded = jax.shard_map(
            mapped,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=(place.params, by_state, _metrics.specs(state, place, bool(mean_axes))),
            check_vma=check_vma,
        )
        try:
            return sharded(*given)
        except (TypeError, ValueError) as error:
            if check_vma and "out_specs" in str(error):
                error.add_note(NOT_REPLICATED)
            raise

    watched = not check_vma and place.shards > 1
    jitted = jax.jit(run, donate_argnums=(0, 1) if donate else ())
    wait = block_on_cpu(mesh.devices.flat)
    look = audit.check_on_schedule(lambda params: audit.replicas_agree(params, mesh))

    def step(params: Any, state: Any, batch: Any, *, rng: Any = None, **extra: Any) -> Any:
        checked = per_worker(state) if stacked else ()
        check_step(batch, checked, extra, place.workers, place.shards)
        if extra and not stacked:
            raise ValueError(f"`{next(iter(extra))}` is for a vote; gradients='mean' takes all.")
        if watched and stacked and is_traced((params, state, batch, rng, extra)):
            check_declared(state)
        declared = not stacked or bool(exchanges(state))
        params, state, metrics = jitted(params, state, batch, rng, extra)
        wait(metrics)
        if watched:
            look(params, declared)
        return params, state, metrics

    def lower(params: Any, state: Any, batch: Any, *, rng: Any = None, **extra: Any) -> Any:
        if watched and stacked:
            check_declared(state)
        return jitted.lower(params, state, batch, rng, extra)

    step.lower = lower  # type: ignore[attr-defined]
    return step
