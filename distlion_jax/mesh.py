# SPDX-License-Identifier: Apache-2.0
"""Where things live: the mesh, state per worker, replicated parameters, local gradients.

What differs by worker is kept apart from what does not. Outside the mapped function the whole
optimizer state carries a leading worker axis of size n, sharded over the mesh axis (the form of
pmap's stacked state, so that checkpoints are interchangeable; but for what is :func:`replicated`,
which pmap stacks too), and parameters are replicated.
Inside, each worker sees its own state, and a gradient that is truly its own.
:mod:`distlion_jax.train` makes a whole train step of these pieces.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distlion_jax import wire
from distlion_jax.lion import is_vote
from distlion_jax.rules import AxisName
from distlion_jax.step_checks import check_replicated


def worker_mesh(
    n: int | None = None, axis_name: str = "data", devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of one axis, a device per worker.

    Args:
      n: number of workers; None: all devices, of which there must be at least two.
      axis_name: the axis.
      devices: None: ``jax.devices()``, of all processes.

    Raises:
      ValueError: for fewer devices than workers, or a single one that was not asked for by n=1.

    Examples:
      >>> dict(worker_mesh(8).shape)
      {'data': 8}
    """
    devices = jax.devices() if devices is None else devices
    wanted = max(2, len(devices)) if n is None else n
    if not 1 <= wanted <= len(devices):
        raise ValueError(
            f"`n` must lie in [1, {len(devices)}] (the devices there are); got {wanted}. On CPU, "
            f"jax.config.update('jax_num_cpu_devices', {max(wanted, 2)}) before anything else runs "
            "makes that many; n=1 asks for one worker."
        )
    return jax.make_mesh((wanted,), (axis_name,), (AxisType.Auto,), devices=devices[:wanted])


def local_value_and_grad(
    fun: Callable[..., Any], axis_name: AxisName = "data", has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """``jax.value_and_grad`` of this worker alone, also where autodiff would sum over workers.

    Under ``jax.shard_map`` with its replication check, differentiating by replicated parameters
    makes JAX add an all-reduce of the gradients, in full precision. This marks the parameters as
    varying over the axis first. Under pmap, vmap and ``check_vma=False`` it changes nothing.

    Args:
      fun: function of (params, ...) to a scalar, or (scalar, aux) with ``has_aux``.
      axis_name: the axis, or axes, that gradients must not be summed over.
      has_aux: as in ``jax.value_and_grad``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> grad = local_value_and_grad(lambda x, a: a * x)
      >>> def worker(a):
      ...     return grad(jnp.float32(1.0), a)[1]
      >>> print(jax.vmap(worker, axis_name="data")(jnp.array([1.0, 2.0])))
      [1. 2.]
    """
    value_and_grad = jax.value_and_grad(fun, has_aux=has_aux)

    def local(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        params = jax.tree.map(lambda x: wire.vary(x, axis_name), params)
        return value_and_grad(params, *args, **kwargs)

    return local


class ReplicatedState(NamedTuple):
    """State of :func:`replicated`: the same on all workers, kept once, without a worker axis."""

    inner: Any  # of the transformation that is wrapped


def replicated(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A transformation that *follows* a vote or an average, with state that all workers share.

    What comes out of a vote is the same on all workers, and so is all that is computed from it; its
    state needs no worker axis, and JAX's check can then see that the parameters stay replicated.
    Before a vote, on local gradients, it is wrong: JAX says so, unless its check is off.

    Args:
      tx: the transformation, such as ``optax.adamw(1e-3)`` after
        :func:`distlion_jax.average_gradients`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from distlion_jax.dense import average_gradients
      >>> tx = optax.chain(average_gradients(), replicated(optax.adam(1e-3)))
      >>> state = init_state(tx, {"w": jnp.zeros(3)}, worker_mesh(8))
      >>> state[0].count.shape, state[1].inner[0].mu["w"].shape
      ((8,), (3,))
    """
    tx = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        updates, inner = tx.update(updates, state.inner, params, **extra_args)
        return updates, ReplicatedState(inner)

    def init(params: Any) -> ReplicatedState:
        inner = tx.init(params)
        check_replicated(inner)
        return ReplicatedState(inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_replicated(node: Any) -> bool:
    return isinstance(node, ReplicatedState)


def _is_whole(node: Any) -> bool:
    return is_vote(node) or _is_replicated(node)


def _map_state(f: Callable[[Any], Any], state: Any) -> Any:
    """Maps every leaf but what is replicated, and a vote's momentum: it keeps its worker axis.

    A reshape between the old momentum and the new would keep XLA from overwriting it in place (two
    more passes over memory); ``update`` takes either shape.
    """

    def one(node: Any) -> Any:
        if _is_replicated(node):
            return node
        if not is_vote(node):
            return f(node)
        return jax.tree.map(f, node._replace(mu=()))._replace(mu=node.mu)

    return jax.tree.map(one, state, is_leaf=_is_whole)


def per_worker(state: Any) -> Any:
    """The part of a state that has a worker axis: all but what is :func:`replicated`."""
    return jax.tree.map(lambda x: () if _is_replicated(x) else x, state, is_leaf=_is_replicated)


def state_specs(state: Any, axis_name: AxisName = "data") -> Any:
    """``PartitionSpec`` of every part of a state, for ``in_specs`` and ``out_specs``.

    Examples:
      >>> state_specs({"count": 0, "same": ReplicatedState({"mu": 0})})["same"] == P()
      True
    """
    by_worker = P(wire.axes(axis_name))
    return jax.tree.map(
        lambda x: P() if _is_replicated(x) else by_worker, state, is_leaf=_is_replicated
    )


def _hyperparams(state: Any) -> list[Any]:
    """The leaves that ``optax.inject_hyperparams`` keeps its hyperparameters in."""
    kinds = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
    injects = lambda node: isinstance(node, kinds)  # noqa: E731
    nodes = [x for x in jax.tree.leaves(state, is_leaf=injects) if injects(x)]
    found = [leaf for node in nodes for leaf in jax.tree.leaves(node.hyperparams)]
    return found + [leaf for node in nodes for leaf in _hyperparams(node.inner_state)]


def _is_shared(node: Any, injected: bool) -> bool:
    """Whether all workers hold the same: not so the momentum of a scalar parameter."""
    if _is_whole(node) or node.ndim:
        return False
    counts = jnp.issubdtype(node.dtype, jnp.integer) or node.dtype == jnp.bool_
    return injected or counts  # a random key is neither


def unstack(state: Any, axis_name: AxisName = "data") -> Any:
    """Inside the mapped function: takes the worker axis (of size 1 here) off the state.

    Counts, flags and injected hyperparameters of other transformations are the same on all workers
    but JAX cannot know; where it checks, they are replaced by worker 0's, in one small all-reduce,
    so that what depends on them comes out replicated. Everything else stays this worker's own.

    Examples:
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
    state = _map_state(lambda x: x[0], state)
    if not wire.is_checked(axis_name):
        return state
    injected = set(map(id, _hyperparams(state)))
    nodes, treedef = jax.tree.flatten(state, is_leaf=_is_whole)
    shared = [i for i, node in enumerate(nodes) if _is_shared(node, id(node) in injected)]
    if shared:
        first = jax.lax.axis_index(axis_name) == 0
        mine = [jnp.where(first, nodes[i], jnp.zeros_like(nodes[i])) for i in shared]
        for i, x in zip(shared, jax.lax.psum(mine, axis_name), strict=True):
            nodes[i] = x.astype(nodes[i].dtype)
    return treedef.unflatten(nodes)


def stack(state: Any) -> Any:
    """Inside the mapped function: puts the worker axis back on.

    Examples:
      >>> stack({"count": jnp.zeros(())})["count"].shape
      (1,)
    """
    return _map_state(lambda x: x[None], state)


def workers(mesh: Mesh, axis_name: AxisName) -> int:
    """Number of workers on the axis, or axes, of the mesh."""
    missing = [name for name in wire.axes(axis_name) if name not in mesh.shape]
    if missing:
        raise ValueError(
            f"`axis_name` {axis_name!r} is not an axis of the mesh, which has {mesh.axis_names}."
        )
    return int(np.prod([mesh.shape[name] for name in wire.axes(axis_name)]))


def init_state(
    tx: optax.GradientTransformation, params: Any, mesh: Mesh, axis_name: AxisName = "data"
) -> Any:
    """The transformation's initial state for every worker: leading axis n, sharded over the axis.

    What is :func:`replicated` has no such axis, and lies whole on every device.

    Args:
      tx: the transformation.
      params: parameters, without a worker axis.
      mesh: the mesh.
      axis_name: its axis, or axes, that the workers lie on.

    Examples:
      >>> from distlion_jax.lion import scale_by_distributed_lion
      >>> state = init_state(scale_by_distributed_lion(), {"w": jnp.zeros(3)}, worker_mesh(8))
      >>> state.mu["w"].shape
      (8, 3)
    """
    n = workers(mesh, axis_name)

    def spread(node: Any) -> Any:
        return node if _is_replicated(node) else jnp.broadcast_to(node, (n, *node.shape))

    def make(params: Any) -> Any:
        return jax.tree.map(spread, tx.init(params), is_leaf=_is_replicated)

    specs = state_specs(jax.eval_shape(make, params), axis_name)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.jit(make, out_shardings=shardings)(params)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of the tree on every device of the mesh (parameters; safe to donate).

    Examples:
      >>> replicate({"w": jnp.zeros(3)}, worker_mesh(8))["w"].is_fully_replicated
      True
    """
    copy = jax.jit(lambda t: jax.tree.map(jnp.copy, t), out_shardings=NamedSharding(mesh, P()))
    return copy(tree)
