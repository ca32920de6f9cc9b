# SPDX-License-Identifier: Apache-2.0
"""From a loss function, a transformation and a mesh to a train step under ``jax.shard_map``.

In:  ``loss_fn(params, batch)``, an Optax transformation, a mesh.
Out: a jitted, buffer-donating ``step(params, state, batch) -> (params, state, metrics)``.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, cast

import jax
import optax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from distlion_jax._rules import AxisName, check_choice, check_static
from distlion_jax._vote import wire
from distlion_jax.train import _audit as audit
from distlion_jax.train._checks import check_averaged, check_declared, check_differ
from distlion_jax.train._drive import MOST_PARTS, Driver, Place, Step, given
from distlion_jax.train._notes import leading_on
from distlion_jax.train._placement import Placement
from distlion_jax.train._replica_step import replica_step
from distlion_jax.train._state import stack, unstack
from distlion_jax.train._worker import worker_step


def make_train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    axis_name: AxisName = "data",
    *,
    has_aux: bool = False,
    has_model_state: bool = False,
    microbatches: int = 1,
    mean_axis_name: AxisName | None = None,
    gradients: Literal["local", "mean"] = "local",
    check_vma: bool = True,
    donate: bool = True,
) -> Step:
    """A jitted data-parallel train step under ``jax.shard_map``.

    Args:
      loss_fn: ``loss_fn(params, batch)`` to the mean loss over this worker's batch, or to
        ``(loss, aux)`` with ``has_aux``. Where steps are given a key, it is the last argument.
      tx: a transformation built for the same ``axis_name``.
      mesh: the mesh, of Auto or Explicit axes. Where it has axes beside ``axis_name`` and
        ``mean_axis_name``, each worker is a replica of a model that is split over them, as its
        parameters lie. They must be Auto. The batch is placed over ``axis_name`` and the axes that
        share a replica's rows.
      axis_name: the axis, or axes, that vote.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``; aux is a tree of numbers to average.
      has_model_state: whether the model has state beside its parameters, such as the statistics of
        BatchNorm. It is then the second argument of ``loss_fn``, which returns
        ``(loss, model_state)``, or ``(loss, (model_state, aux))`` with ``has_aux``. All workers go
        on with the mean over those that took part (of integers, the largest).
      microbatches: k, parts of a worker's batch whose gradients are taken one after the other and
        averaged, in float32 at least. It saves memory: there is one vote a step, whatever k is.
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
        for a ``tx`` that declares no exchange. Inside another ``jit``, or lowered, where nobody
        can look, the loss becomes NaN once they differ.
      donate: whether the buffers of params and state are reused. Those passed in cannot be used
        again.

    Returns:
      ``step(params, state, batch, *, rng=None, **extra) -> (params, state, metrics)``. With
      ``has_model_state`` it is ``step(params, model_state, state, batch)``, and returns the model's
      state in second place. The batch's leading axis is split over the workers; in several
      processes, make it with :func:`distlion_jax.make_global_batch`. ``rng`` is a key, folded with
      the worker's index. ``participating`` and ``weight`` are arrays of shape [n], one entry a
      worker. Other ``extra`` arguments may also be one number for all. ``value``, the workers' mean
      loss, is handed to ``tx`` in every step; one that you pass takes its place, averaged.
      ``metrics`` is :class:`distlion_jax.Metrics`.
      ``step.lower(...)`` takes the same arguments, as a jitted function's. On virtual CPU devices
      the step is waited for. In several processes too; on accelerators, the call before it.

    Raises:
      ValueError: for an axis that the mesh lacks. From the step: for arguments that do not fit; for
        a state that was torn, or is of another transformation; where ``check_vma`` is off, or there
        are several processes, and the workers' parameters are found to differ.
      TypeError: from the step, for an extra argument that nothing reads.
      RuntimeError: from the step, where another process has said that it will not come.

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
    check_static("microbatches", microbatches, "int", MOST_PARTS)
    place = Placement(mesh, axis_name, wire.axes(mean_axis_name) if mean_axis_name else ())
    of_loss: dict[str, Any] = dict(
        has_aux=has_aux, has_model_state=has_model_state, microbatches=microbatches
    )
    if place.replica_axes:
        _check_replicas(place, mean_axis_name, gradients)
        return replica_step(loss_fn, tx, place, **of_loss, check_vma=check_vma, donate=donate)
    stacked = gradients == "local"
    averaged = place.inner_axes if stacked else place.axes
    worker = worker_step(loss_fn, tx, place.axes, wire.axes(axis_name), averaged, **of_loss)

    def mapped(
        unseen: bool, params: Any, model_state: Any, state: Any, batch: Any, rng: Any, extra: Any
    ) -> tuple[Any, ...]:
        if not stacked:
            check_averaged(state)
        state = unstack(state, axis_name) if stacked else state
        extra = jax.tree.map(lambda x: x[0], extra)
        params, model_state, state, metrics = worker(
            params, model_state, state, batch, rng, extra, compare=unseen and not check_vma
        )
        check_differ(place.axes, state, params)
        return params, model_state, stack(state) if stacked else state, metrics

    def run(unseen: bool, *args: Any, rng: Any = None, **extra: Any) -> tuple[Any, ...]:
        params, model_state, state, batch = driver.split(args)
        by_state = place.state(state) if stacked else P()
        in_specs = P(), P(), by_state, place.batch, P(), place.by_worker
        whole = params, model_state, state, batch, rng, extra
        if AxisType.Explicit in mesh.axis_types:  # there, shard_map moves nothing by itself
            whole = jax.sharding.reshard(whole, place.shardings(in_specs))
        sharded = jax.shard_map(
            functools.partial(mapped, unseen),
            mesh=mesh,
            in_specs=in_specs,
            out_specs=(P(), P(), by_state, P()),
            check_vma=check_vma,
        )
        return driver.join(sharded(*whole))

    kept = tuple(range(1, 3 + has_model_state)) if donate else ()
    jitted = jax.jit(run, static_argnums=0, donate_argnums=kept)
    driver = Driver(
        tx,
        Place(
            tuple(mesh.devices.flat),
            workers=place.workers,
            shards=place.shards,
            vote_sizes=tuple(mesh.shape[name] for name in wire.axes(axis_name)),
            stacked=stacked,
            watched=not check_vma and place.shards > 1,
        ),
        lambda tree: audit.agree(tree, mesh),
        lambda args, rng, extra: jitted.lower(False, *args, **given(rng, extra)),
        has_model_state=has_model_state,
        microbatches=microbatches,
        donate=donate,
    )

    def step(*args: Any, rng: Any = None, **extra: Any) -> tuple[Any, ...]:
        program = lambda unseen, a, key, more: jitted(unseen, *a, **given(key, more))  # noqa: E731
        return driver.run(program, args, rng, extra)

    def lower(*args: Any, rng: Any = None, **extra: Any) -> jax.stages.Lowered:
        _, _, state, _ = driver.split(args)
        if driver.place.watched and stacked:
            check_declared(state)
        with leading_on():
            args, rng, extra = driver.check(args, rng, extra)
            return jitted.lower(True, *args, **given(rng, extra))

    step.lower = lower  # type: ignore[attr-defined]
    return cast(Step, step)


def _check_replicas(place: Placement, mean_axis_name: AxisName | None, gradients: str) -> None:
    """Raises for options that a model which is split over the mesh's other axes has no use for."""
    beside = f"`mesh` has axes {list(place.replica_axes)} beside `axis_name` {place.vote_axes!r}"
    if mean_axis_name is not None:
        raise ValueError(
            f"{beside} and `mean_axis_name` {mean_axis_name!r}. Where the compiler splits a worker "
            "over devices it averages over their rows, too: leave mean_axis_name out, and place "
            "the batch over all axes that share its rows."
        )
    if gradients == "mean":
        raise ValueError(
            f"{beside}, and gradients='mean' is for workers of one device: an ordinary optimizer "
            "of a sharded model needs jax.jit alone."
        )
