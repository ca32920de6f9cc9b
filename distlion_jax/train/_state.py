# SPDX-License-Identifier: Apache-2.0
"""State, a worker each: what differs by worker is kept apart from what does not.

Outside the mapped function the optimizer's state carries a leading worker axis of size n, sharded
over the mesh axis. This is the layout of pmap's stacked state, so checkpoints can be exchanged.
Exception: state under :func:`distlion_jax.replicated` is stored once here, and stacked by pmap.
Inside, each worker sees its own state.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from distlion_jax._rules import AxisName
from distlion_jax._vote import wire
from distlion_jax.exchanges import declares, is_once, map_fields, roles_of
from distlion_jax.train._placement import Placement


def per_worker(state: Any) -> Any:
    """The part of a state that has a worker axis: all but what is stored once."""
    return jax.tree.map(lambda x: () if is_once(x) else x, state, is_leaf=is_once)


def _map_stacked(f: Callable[[Any], Any], state: Any) -> Any:
    """Maps every leaf that has a worker axis, but for fields that keep it (``Roles.in_place``)."""

    def one(node: Any) -> Any:
        if (roles := roles_of(node)) is None:
            return f(node)
        if roles.once:
            return node
        return map_fields(
            lambda _, name, x: x if name in roles.in_place else _map_stacked(f, x), node, roles
        )

    return jax.tree.map(one, state, is_leaf=declares)


def _map_shared(f: Callable[[Any], Any], state: Any) -> Any:
    """Maps every field that is declared to be shared, but what is stored once.

    A state that shares itself is left alone: it asks for worker 0's values, where it needs them.
    """

    def one(node: Any) -> Any:
        roles = roles_of(node)
        if roles is None or roles.once or roles.shares_itself:
            return node

        def field(role: str, name: str, x: Any) -> Any:
            del name
            return {"shared": f, "": lambda x: _map_shared(f, x), "own": lambda x: x}[role](x)

        return map_fields(field, node, roles)

    return jax.tree.map(one, state, is_leaf=declares)


def unstack(state: Any, axis_name: AxisName = "data") -> Any:
    """Inside the mapped function: takes the worker axis (of size 1 here) off the state.

    Step counts and injected hyperparameters are equal on all workers, but JAX cannot prove it. With
    its replication check on, fields that a state declares to be shared
    (:class:`distlion_jax.Roles`) are replaced by worker 0's, in one small all-reduce. Everything
    else stays this worker's own.

    Examples:
      >>> from jax.sharding import PartitionSpec as P
      >>> from distlion_jax import worker_mesh
      >>> def worker(count):
      ...     return stack(unstack({"count": count})["count"] + 1)
      >>> by_worker = P("data")
      >>> mesh = worker_mesh(8)
      >>> mapped = jax.shard_map(worker, mesh=mesh, in_specs=by_worker, out_specs=by_worker)
      >>> print(jax.jit(mapped)(jnp.zeros(8)))
      [1. 1. 1. 1. 1. 1. 1. 1.]
    """
    for path, x in jax.tree_util.tree_leaves_with_path(per_worker(state)):
        if x.shape[:1] != (1,):
            raise ValueError(
                f"`state{jax.tree_util.keystr(path)}` has shape {x.shape} on a worker; a leading "
                "axis of 1 was expected. The state must be made for as many workers as the mesh "
                "has (init_state), and mapped with PartitionSpec(axis_name)."
            )
    state = _map_stacked(lambda x: x[0], state)
    found: list[Any] = []
    _map_shared(found.append, state)
    known = iter(wire.from_first(found, axis_name))
    return _map_shared(lambda _: next(known), state)


def stack(state: Any) -> Any:
    """Inside the mapped function: puts the worker axis back on.

    Examples:
      >>> stack({"count": jnp.zeros(())})["count"].shape
      (1,)
    """
    return _map_stacked(lambda x: x[None], state)


def spread(state: Any, workers: int) -> Any:
    """The state of one worker for all: with a leading axis, but for what is stored once."""

    def one(node: Any) -> Any:
        return node if is_once(node) else jnp.broadcast_to(node, (workers, *jnp.shape(node)))

    return jax.tree.map(one, state, is_leaf=is_once)


def init_state(
    tx: optax.GradientTransformation, params: Any, mesh: Mesh, axis_name: AxisName = "data"
) -> Any:
    """The transformation's initial state for every worker: leading axis n, sharded over the axis.

    What is :func:`replicated` has no such axis. Where the mesh has other axes, over which the
    parameters are split, momenta are split as they are; the rest lies whole on every device.

    Args:
      tx: the transformation.
      params: parameters, without a worker axis, as they lie on the mesh.
      mesh: the mesh.
      axis_name: its axis, or axes, that the workers lie on.

    Examples:
      >>> from distlion_jax import scale_by_distributed_lion, worker_mesh
      >>> state = init_state(scale_by_distributed_lion(), {"w": jnp.zeros(3)}, worker_mesh(8))
      >>> state.mu["w"].shape
      (8, 3)
    """
    place = Placement(mesh, axis_name)

    def make(params: Any) -> Any:
        return spread(tx.init(params), place.workers)

    specs = place.state(jax.eval_shape(make, params), params)
    return jax.jit(make, out_shardings=place.shardings(specs))(params)
