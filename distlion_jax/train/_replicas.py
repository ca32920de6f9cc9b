# SPDX-License-Identifier: Apache-2.0
"""Workers that are replicas of a sharded model, each on several devices: gradients and updates.

In:  a mesh with the vote's axis and others, over which the compiler splits a model.
Out: gradients of each replica; an Optax transformation for plain ``jax.jit`` whose vote moves
     shards.

The gradient runs under ``jax.vmap`` over replicas, whose ``spmd_axis_name`` says where they lie, or
under a ``jax.shard_map`` that is manual over the vote's axis alone. The update runs in such a
``shard_map``: there Optax sees whole leaves of one replica, which are split over its devices.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distlion_jax._rules import AxisName, check_choice
from distlion_jax._vote import wire
from distlion_jax._vote.shards import explicit_axes
from distlion_jax.exchanges import exchanges, with_extra_args
from distlion_jax.hlo import UPDATE
from distlion_jax.train._mesh import local_value_and_grad
from distlion_jax.train._notes import warn
from distlion_jax.train._placement import Placement, specs_like, state_specs
from distlion_jax.train._specs import is_spec, specs_of
from distlion_jax.train._state import spread, stack, unstack

How = Literal["vmap", "shard_map"]
FREE = P.UNCONSTRAINED


def constrain(tree: Any, specs: Any, mesh: Mesh) -> Any:
    """The tree, each leaf laid out as its spec says."""
    leaves, treedef = jax.tree.flatten(tree)
    each = jax.tree.leaves(specs, is_leaf=is_spec)
    pairs = zip(leaves, each, strict=True)
    return treedef.unflatten(
        [jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec)) for x, spec in pairs]
    )


def constrain_each(tree: Any, specs: Any, place: Placement) -> Any:
    """Arrays with an entry for each worker, each of which is laid out as the specs say."""
    behind = jax.tree.map(lambda spec: P(*place.by_worker, *spec), specs, is_leaf=is_spec)
    return constrain(tree, behind, place.mesh)


def own(tree: Any) -> Any:
    """Of arrays with an entry for each worker, inside a mapped function: this worker's."""
    return jax.tree.map(lambda x: x[0], tree)


def by_replica(tree: Any, place: Placement) -> Any:
    """Rows ``[B, ...]`` as ``[workers, B / workers, ...]``, each worker's on its own devices.

    How they are split inside a worker is left to the compiler, and so to how they came.
    """

    def one(path: Any, x: Any) -> Any:
        x = jnp.asarray(x)
        if not x.ndim or x.shape[0] % place.workers:
            raise ValueError(
                f"`batch{jax.tree_util.keystr(path)}` has shape {x.shape}: its leading axis is "
                f"split over {place.workers} replicas, and is no multiple of that."
            )
        x = x.reshape(place.workers, x.shape[0] // place.workers, *x.shape[1:])
        spec = P(*place.by_worker, *(FREE for _ in x.shape[1:]))
        return jax.lax.with_sharding_constraint(x, NamedSharding(place.mesh, spec))

    return jax.tree_util.tree_map_with_path(one, tree)


def check_automatic(mesh: Mesh, axis_name: AxisName) -> None:
    """Raises for Explicit axes: types that say how each array is split."""
    if explicit := explicit_axes(mesh):
        raise ValueError(
            f"`mesh` has Explicit axes {explicit}, and a model that is split over axes beside the "
            f"vote's {axis_name!r} needs Auto ones: the compiler splits what is inside a worker. "
            "Make it with axis_types=(jax.sharding.AxisType.Auto,) * len(axes)."
        )


def replica_value_and_grad(
    fun: Callable[..., Any],
    mesh: Mesh,
    axis_name: AxisName = "replica",
    has_aux: bool = False,
    how: How = "vmap",
) -> Callable[..., tuple[Any, Any]]:
    """``jax.value_and_grad`` of every replica of a sharded model, each on its own rows.

    For plain ``jax.jit``, before the update of :func:`distlion_jax.sharded`. Nothing is summed over
    ``axis_name``. Inside a replica the compiler splits the work as the model says, and averages
    over rows that are split there.

    Args:
      fun: function of (params, batch, ...) to a scalar, or (scalar, aux) with ``has_aux``. It sees
        one replica: whole parameters, and that replica's rows. Close over what has no rows, such as
        a key or a configuration.
      mesh: the mesh, of Auto axes.
      axis_name: the vote's axis, or axes. The model's own rules must not name them.
      has_aux: as in ``jax.value_and_grad``.
      how: ``"vmap"`` compiles any model. Where the compiler cannot split an operation, such as the
        lookup in an embedding that is split along two axes, it may move activations between
        replicas: :func:`distlion_jax.crossings` finds them. ``"shard_map"`` cannot move any, but
        XLA aborts the process for some models with two or more inner axes: those that index a
        table that is split, or sort along an axis that is. Inside, constrain by a bare
        ``PartitionSpec``: JAX refuses a ``NamedSharding`` there.

    Returns:
      A function of (params, batch, ...) to values and gradients with a leading axis [n], one entry
      a replica. ``params`` are whole; the leading axis of all other arguments is split over
      replicas, as a batch's is.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import AxisType
      >>> mesh = jax.make_mesh((2, 4), ("replica", "fsdp"), axis_types=(AxisType.Auto,) * 2)
      >>> gradients = replica_value_and_grad(lambda w, x: jnp.mean(w * x), mesh)
      >>> print(jax.jit(gradients)(jnp.float32(3.0), jnp.array([1.0, 1.0, 2.0, 2.0]))[1])
      [1. 2.]
    """
    check_choice("how", how, ("vmap", "shard_map"))
    check_automatic(mesh, axis_name)
    place = Placement(mesh, axis_name)
    axes = wire.axes(axis_name)

    def by_vmap(params: Any, rows: Any) -> Any:
        gradient = jax.value_and_grad(fun, has_aux=has_aux)
        mapped = jax.vmap(
            lambda p, some: gradient(p, *some), in_axes=(None, 0), spmd_axis_name=axes
        )
        return mapped(params, rows)

    def by_shard_map(params: Any, rows: Any) -> Any:
        gradient = local_value_and_grad(fun, axes, has_aux)

        def mine(params: Any, rows: Any) -> Any:
            out = wire.vary_tree(gradient(params, *own(rows)), axes)
            return jax.tree.map(lambda x: x[None], out)

        by_worker = place.by_worker
        mapped = jax.shard_map(
            mine, mesh=mesh, in_specs=(P(), by_worker), out_specs=by_worker, axis_names=set(axes)
        )
        return mapped(params, rows)

    def gradients(params: Any, *batch: Any) -> tuple[Any, Any]:
        rows = by_replica(batch, place)
        return (by_vmap if how == "vmap" else by_shard_map)(params, rows)

    return gradients


def _check_declared(state: Any) -> None:
    """Raises for a transformation that does not make replicas agree."""
    if not exchanges(state):
        raise ValueError(
            "`tx` declares no vote and no average over the workers: each replica would go its own "
            "way. Use distributed_lion; or put average_gradients(axis_name) before it and what "
            "follows into replicated(...); or declare it, distlion_jax.exchange(tx)."
        )


def _check_stacked(grads: Any, params: Any, n: int) -> None:
    """Raises unless gradients have an entry for each replica."""
    shapes = map(np.shape, jax.tree.leaves(grads if params is None else params))
    for (path, g), shape in zip(jax.tree_util.tree_leaves_with_path(grads), shapes, strict=False):
        wanted = (n, *np.shape(g)[1:]) if params is None else (n, *shape)
        if np.shape(g) != wanted:
            raise ValueError(
                f"`updates{jax.tree_util.keystr(path)}` has shape {np.shape(g)}, and the gradients "
                f"of {n} replicas, {wanted}, were expected: distlion_jax.replica_value_and_grad "
                "makes them."
            )


def _warn_of_boxes(params: Any) -> None:
    """A word where Flax's containers would name the axes of a state, less its worker axis."""
    is_box = lambda x: hasattr(x, "replace_boxed")  # noqa: E731
    if any(map(is_box, jax.tree.leaves(params, is_leaf=is_box))):
        warn(
            "`params` keep the names of their axes in Flax's boxes, and so does the state, whose "
            "arrays have a worker axis before them. Shardings made of the boxes, as by "
            "nn.get_sharding, would move momenta between workers in every step. Unbox first: "
            "sharded(...).init(nn.meta.unbox(params)); or make the state's shardings by "
            "distlion_jax.state_specs(state, axis_name, params)."
        )


def sharded(
    tx: optax.GradientTransformation,
    mesh: Mesh,
    specs: Any,
    axis_name: AxisName = "replica",
) -> optax.GradientTransformationExtraArgs:
    """A transformation for plain ``jax.jit``, whose workers are replicas of a sharded model.

    For training loops of one's own, Flax's ``TrainState`` and ``nnx.Optimizer``. ``update`` takes
    the gradients of all replicas, as :func:`distlion_jax.replica_value_and_grad` returns them, and
    returns the updates of one, which are the same for all.

    Args:
      tx: a transformation built for the same ``axis_name``.
      mesh: the mesh, of Auto axes. The model is split over those beside ``axis_name``.
      specs: how the parameters are split, in the order of their leaves: a tree of
        ``PartitionSpec``, of ``NamedSharding``, or of placed arrays.
      axis_name: the vote's axis, or axes.

    Returns:
      A transformation. ``init(params)`` makes a state with a leading worker axis [n] that is
      split over ``axis_name``, and momenta that are split as the parameters are. In
      ``update(grads, state, params)`` gradients have that axis too; parameters and updates do not.
      Extra arguments have an entry for each worker. Take shardings of a state from
      ``jax.jit(tx.init)(params)`` or :func:`distlion_jax.state_specs`: those that a framework
      derives from the names of parameters lack the worker axis, and momenta would travel.

    Raises:
      ValueError: for a ``tx`` that declares no exchange; for gradients without their leading axis;
        for specs that are not of the mesh.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
      >>> from distlion_jax import distributed_lion, replica_value_and_grad
      >>> mesh = jax.make_mesh((2, 4), ("replica", "fsdp"), axis_types=(AxisType.Auto,) * 2)
      >>> params = jax.device_put(jnp.zeros(8), NamedSharding(mesh, P("fsdp")))
      >>> tx = sharded(distributed_lion(0.1, axis_name="replica"), mesh, params)
      >>> gradients = replica_value_and_grad(lambda w, x: jnp.sum((w - x.mean()) ** 2), mesh)
      >>> @jax.jit
      ... def step(params, state, batch):
      ...     loss, grads = gradients(params, batch)
      ...     updates, state = tx.update(grads, state, params)
      ...     return optax.apply_updates(params, updates), state, loss.mean()
      >>> params, state, loss = step(params, tx.init(params), jnp.array([1.0, 2.0, 3.0, 4.0]))
      >>> print(params.sharding.spec[0], params[0])
      fsdp 0.1
    """
    check_automatic(mesh, axis_name)
    place = Placement(mesh, axis_name)
    known = specs_of(specs, mesh, axis_name, "specs")
    wrapped = with_extra_args(tx)

    def init(params: Any) -> Any:
        _warn_of_boxes(params)
        state = spread(wrapped.init(params), place.workers)
        _check_declared(state)
        return constrain(state, specs_like(state, axis_name, params, known), mesh)

    def mine(grads: Any, state: Any, params: Any, extra: Any) -> tuple[Any, Any]:
        state = unstack(state, axis_name)
        updates, state = wrapped.update(own(grads), state, params, specs=known, **own(extra))
        return updates, stack(state)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        _check_declared(state)
        _check_stacked(updates, params, place.workers)
        by_state = state_specs(state, axis_name)
        grads = constrain_each(updates, known, place)
        mapped = jax.shard_map(
            mine,
            mesh=mesh,
            in_specs=(place.by_worker, by_state, P(), place.by_worker),
            out_specs=(P(), by_state),
            axis_names=set(wire.axes(axis_name)),
        )
        with jax.named_scope(UPDATE):
            updates, new = mapped(grads, state, params, extra)
        updates = constrain(updates, known, mesh)
        return updates, constrain(new, specs_like(new, axis_name, updates, known), mesh)

    return optax.GradientTransformationExtraArgs(init, update)
