# SPDX-License-Identifier: Apache-2.0
"""Going on elsewhere: with other workers, from Lion's state or back to it, with other rates.

In:  a state as it lies outside the mapped function, with a leading worker axis, on devices or as
     NumPy. Out: another one, whole, and stamped as such.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distlion_jax._rules import AxisName, check_choice, check_static
from distlion_jax._vote.stamp import marks
from distlion_jax._vote.wire import is_key
from distlion_jax.exchanges import declares, exchanges, is_once, map_fields, roles_of
from distlion_jax.lion import ScaleByDistributedLionState
from distlion_jax.train._placement import Placement
from distlion_jax.train._whole import CURE, is_injected, stamps_of

How = Literal["mean", "rows"]
MOST = 2**24  # workers, as of a vote


def resize_state(
    state: Any,
    mesh: Mesh,
    axis_name: AxisName = "data",
    *,
    how: How = "mean",
    params: Any = None,
) -> Any:
    r"""A state of some workers as one of other workers: a run goes on with fewer or more.

    Momenta are each worker's own, and there is no right number of them for other workers. With
    ``"mean"`` every new worker begins with :math:`\frac{1}{n} \sum_i m_i`. That keeps what all of
    them knew, and the mean of the momenta over the workers, on which the votes centre; it is what
    full-precision Lion would hold. The same holds for what a compressor has not sent yet.

    Args:
      state: of any number of workers, in the form of :func:`distlion_jax.init_state` or of pmap; on
        devices, or as NumPy. In several processes all of them call this.
      mesh: the mesh to go on with.
      axis_name: its axis, or axes, that the workers lie on.
      how: ``"mean"``; or ``"rows"``: worker i takes the momentum of worker ``i mod n``. That loses
        momenta where there are fewer workers, and repeats them where there are more.
      params: of a model that is split over other axes of the mesh: the parameters as they lie on
        it, or their shapes. Momenta are split as they are. None: each worker's part of the state
        lies whole on its devices.

    Returns:
      The state in the form of :func:`distlion_jax.init_state`, placed on the mesh. Step counts,
      hyperparameters and what is :func:`distlion_jax.replicated` are carried over.

    Raises:
      ValueError: for a state without a worker axis.

    Examples:
      >>> import jax.numpy as jnp
      >>> from distlion_jax import init_state, scale_by_distributed_lion, worker_mesh
      >>> state = init_state(scale_by_distributed_lion(), {"w": jnp.zeros(3)}, worker_mesh(8))
      >>> resize_state(state, worker_mesh(4)).mu["w"].shape
      (4, 3)
    """
    check_choice("how", how, ("mean", "rows"))
    place = Placement(mesh, axis_name)
    old, new = workers_of(state), place.workers
    check_rows(state, old)

    @_of_keys_too  # steps fold a worker's index in
    def spread(x: Any) -> Any:
        x = _on_host(x)
        if x.shape[:1] != (old,):
            raise ValueError(
                f"`state` has a leaf of shape {x.shape}; a leading axis of {old}, one entry a "
                "worker, was expected."
            )
        if how == "rows" or not jnp.issubdtype(x.dtype, jnp.inexact):
            return x[np.arange(new) % old]
        return np.broadcast_to(_mean(x), (new, *x.shape[1:]))

    @_of_keys_too
    def shared(x: Any) -> Any:
        x = _on_host(x)
        return np.broadcast_to(x[:1], (new, *x.shape[1:]))

    made = _map(spread, shared, _one_copy(state, old), state)
    made = _stamped(made, place.workers)
    return _placed(made, place.state(made, params), mesh)


def workers_of(state: Any) -> int:
    """How many workers a state is of."""
    counts = [getattr(node, "count", None) for node in exchanges(state)]
    shapes = [np.shape(x) for x in counts if x is not None and not callable(x)]  # tuple.count
    if not shapes:
        nodes = jax.tree.leaves(state, is_leaf=is_once)
        shapes = [np.shape(x) for x in nodes if not is_once(x)]
    sizes = [shape for shape in shapes if shape]
    if not sizes:
        raise ValueError(
            "`state` has no worker axis: it is one worker's, as tx.init makes it. init_state and "
            "pmap_replicate make it for all; unreplicate takes one worker's copy, and loses the "
            "others' momenta."
        )
    return sizes[0][0]


def check_rows(state: Any, n: int) -> None:
    """Raises for a state that lacks the rows of some workers, or has them twice."""
    for stamp in stamps_of(state):
        rows = _on_host(stamp)
        used = rows[:, 1] > 0
        if used.any() and not (rows[:, 1] == n).all():
            raise ValueError(
                f"`state` holds {n} rows of a state that {rows[:, 1].max()} workers made, or rows "
                "of some workers only. Restore the rows of all, onto state_like(tx, params, "
                f"{rows[:, 1].max()}). In several processes, gather those of all processes: "
                "jax.experimental.multihost_utils.process_allgather(state, tiled=True)."
            )
        if (rows[:, 1] == n).all() and len({*rows[:, 0].tolist()}) < n:
            raise ValueError(f"`state` was torn: some of its {n} rows are there twice. {CURE}")


def _on_host(x: Any) -> np.ndarray:
    if not getattr(x, "is_fully_addressable", True):
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _mean(x: np.ndarray) -> np.ndarray:
    """Over the workers, in float32 at least."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return np.mean(x.astype(wide), axis=0).astype(x.dtype)


def _of_keys_too(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function of an array, on the data of typed random keys too."""

    def on(x: Any) -> Any:
        if not is_key(x):
            return f(x)
        return jax.random.wrap_key_data(f(jax.random.key_data(x)), impl=jax.random.key_impl(x))

    return on


def _one_copy(state: Any, old: int) -> Callable[[Any], Any]:
    """Takes what is stored once: as it is, or the first of the equal copies that pmap stacks."""
    stacked = _is_stacked(state, old)
    take = _of_keys_too(lambda x: _on_host(x)[0] if stacked else _on_host(x))
    return lambda node: jax.tree.map(take, node)


def _is_stacked(state: Any, old: int) -> bool:
    """Whether what is stored once has a worker axis too, as under pmap."""
    once = [x for x in jax.tree.leaves(state, is_leaf=is_once) if is_once(x)]
    leaves = jax.tree.leaves(once)
    if not leaves or any(np.shape(x)[:1] != (old,) for x in leaves):
        return False
    for x in leaves:
        if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1:
            return not x.is_fully_replicated
    if any(np.ndim(x) == 1 and jnp.issubdtype(x.dtype, jnp.integer) for x in leaves):
        return True  # a counter of each worker
    data = [_on_host(jax.random.key_data(x) if is_key(x) else x) for x in leaves]
    if any((x != x[:1]).any() for x in data):
        return False
    raise ValueError(
        f"`state` has a replicated part of shape {np.shape(leaves[0])}, all rows alike: one copy, "
        f"or the {old} that pmap stacks. Pass the state on its devices, as the step returned it, "
        "which tells them apart."
    )


def _map(
    own: Callable[[Any], Any], shared: Callable[[Any], Any], once: Callable[[Any], Any], state: Any
) -> Any:
    """Maps every array of a state by what its class declares of it."""

    def one(node: Any) -> Any:
        if (roles := roles_of(node)) is None:
            return own(node)
        if roles.once:
            return once(node)

        def field(role: str, name: str, x: Any) -> Any:
            del name
            if role == "shared":
                return jax.tree.map(shared, x)
            return jax.tree.map(own, x) if role == "own" else _map(own, shared, once, x)

        return map_fields(field, node, roles)

    return jax.tree.map(one, state, is_leaf=declares)


def _stamped(state: Any, n: int) -> Any:
    """The state with stamps of n whole workers, where its own say that it was used."""

    def one(node: Any) -> Any:
        if (roles := roles_of(node)) is None:
            return node
        node = map_fields(lambda role, _, x: x if role else _stamped(x, n), node, roles)
        if getattr(node, "stamp", None) is None:
            return node
        used = np.asarray(node.stamp)[:, 1].any()
        return node._replace(stamp=marks(n) if used else np.zeros_like(marks(n)))

    return jax.tree.map(one, state, is_leaf=declares)


def _placed(state: Any, specs: Any, mesh: Mesh) -> Any:
    def put(spec: P, part: Any) -> Any:
        sharding = NamedSharding(mesh, spec)

        @_of_keys_too
        def place(x: Any) -> jax.Array:
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])

        return jax.tree.map(place, part)

    return jax.tree.map(put, specs, state, is_leaf=lambda x: isinstance(x, P))


def _is_lion(node: Any) -> bool:
    return isinstance(node, optax.ScaleByLionState | ScaleByDistributedLionState)


def from_lion_state(
    state: Any, mesh: Mesh, axis_name: AxisName = "data", params: Any = None
) -> Any:
    """The state of ``optax.lion`` as that of :func:`distlion_jax.distributed_lion`.

    Every worker begins with a copy of Lion's momentum.

    Args:
      state: of ``optax.lion``, or of a chain with ``optax.scale_by_lion``; without a worker axis.
      mesh: the mesh to go on with.
      axis_name: its axis, or axes, that the workers lie on.
      params: of a model that is split over other axes of the mesh: see :func:`resize_state`.

    Raises:
      ValueError: for a state in which there is no Lion.

    Examples:
      >>> import jax.numpy as jnp
      >>> from distlion_jax import worker_mesh
      >>> state = optax.lion(1e-3).init({"w": jnp.zeros(3)})
      >>> from_lion_state(state, worker_mesh(8))[0].mu["w"].shape
      (8, 3)
    """
    nodes = jax.tree.leaves(state, is_leaf=_is_lion)
    if not any(isinstance(node, optax.ScaleByLionState) for node in nodes):
        raise ValueError(
            "`state` holds no state of optax.scale_by_lion: pass that of optax.lion(...), or of a "
            "chain with it."
        )
    place = Placement(mesh, axis_name)

    def convert(node: Any) -> Any:
        if not isinstance(node, optax.ScaleByLionState):
            return node
        return ScaleByDistributedLionState.from_momentum(node.count, node.mu)

    whole = jax.tree.map(convert, state, is_leaf=_is_lion)
    made = _rows(whole, place.workers)
    return _placed(made, place.state(made, params), mesh)


def state_like(tx: optax.GradientTransformation, params: Any, n: int) -> Any:
    """An initial state of n workers in NumPy: what a checkpoint of other workers is restored onto.

    The form is that of :func:`distlion_jax.init_state`, and there need not be n devices. The rows
    are views of one row: they take no memory, and cannot be written to.

    Args:
      tx: the transformation that the checkpoint was made with.
      params: parameters, without a worker axis.
      n: workers of the checkpoint.

    Examples:
      >>> import jax.numpy as jnp
      >>> from distlion_jax import distributed_lion
      >>> state_like(distributed_lion(1e-3), {"w": jnp.zeros(3)}, 64)[0].mu["w"].shape
      (64, 3)
    """
    check_static("n", n, "int", MOST)
    return _rows(tx.init(params), n)


def _rows(state: Any, n: int) -> Any:
    """One worker's state as that of n, in NumPy."""
    row = _of_keys_too(lambda x: np.broadcast_to(_on_host(x), (n, *np.shape(x))))
    return jax.tree.map(
        lambda x: jax.tree.map(_of_keys_too(_on_host), x) if is_once(x) else row(x),
        state,
        is_leaf=is_once,
    )


def to_lion_state(state: Any) -> Any:
    """The state of :func:`distlion_jax.distributed_lion` as that of ``optax.lion``.

    Lion's momentum is the mean of the workers'. The result has no worker axis.

    Args:
      state: with a leading worker axis.

    Raises:
      ValueError: for a state in which there is no vote.

    Examples:
      >>> import jax.numpy as jnp
      >>> from distlion_jax import distributed_lion, init_state, worker_mesh
      >>> state = init_state(distributed_lion(1e-3), {"w": jnp.zeros(3)}, worker_mesh(8))
      >>> to_lion_state(state)[0].mu["w"].shape
      (3,)
    """
    nodes = jax.tree.leaves(state, is_leaf=_is_lion)
    if not any(isinstance(node, ScaleByDistributedLionState) for node in nodes):
        raise ValueError(
            "`state` holds no state of a vote: pass that of distributed_lion(...), with its "
            "worker axis."
        )
    old = workers_of(state)
    check_rows(state, old)

    @_of_keys_too
    def mean(x: Any) -> Any:
        x = _on_host(x)
        return jnp.asarray(_mean(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x[0])

    first = _of_keys_too(lambda x: jnp.asarray(_on_host(x)[0]))
    take = _one_copy(state, old)
    one = _map(mean, first, lambda x: jax.tree.map(jnp.asarray, take(x)), state)

    def convert(node: Any) -> Any:
        if isinstance(node, ScaleByDistributedLionState):
            return optax.ScaleByLionState(node.count, node.mu)
        return node

    return jax.tree.map(convert, one, is_leaf=_is_lion)


def set_hyperparams(state: Any, **values: Any) -> Any:
    """The state with other values of injected hyperparameters, for all workers.

    Args:
      state: of a transformation made with ``optax.inject_hyperparams``; with or without a worker
        axis.
      **values: numbers, by the names of the hyperparameters.

    Raises:
      ValueError: for a name that no part of the state has.

    Examples:
      >>> import jax.numpy as jnp
      >>> from distlion_jax import distributed_lion, init_state, worker_mesh
      >>> tx = optax.inject_hyperparams(distributed_lion)(1e-3)
      >>> state = init_state(tx, {"w": jnp.zeros(3)}, worker_mesh(8))
      >>> set_hyperparams(state, learning_rate=0.5).hyperparams["learning_rate"].shape
      (8,)
    """
    known: set[str] = set()
    for name, value in values.items():
        if np.shape(value):
            raise ValueError(
                f"`{name}` has shape {np.shape(value)}; one number, the same for all workers, was "
                "expected."
            )

    def filled(x: Any, value: Any) -> Any:
        """A whole number may become a fraction, such as a decay that began at 0."""
        dtype = jnp.result_type(x)
        whole = not jnp.issubdtype(dtype, jnp.inexact)
        return jnp.full_like(x, value, dtype=jnp.result_type(float) if whole else dtype)

    def one(node: Any) -> Any:
        if not is_injected(node):
            return node
        known.update(node.hyperparams)
        for name in values:
            if name in getattr(node, "hyperparams_states", {}):
                raise ValueError(
                    f"`{name}` follows a schedule, which sets it anew in every step. Inject a "
                    f"number, optax.inject_hyperparams(...)({name}=0.1), to set it by hand."
                )
        new = {
            name: jax.tree.map(lambda x, name=name: filled(x, values[name]), old)
            if name in values
            else old
            for name, old in node.hyperparams.items()
        }
        inner = jax.tree.map(one, node.inner_state, is_leaf=is_injected)
        return node._replace(hyperparams=new, inner_state=inner)

    made = jax.tree.map(one, state, is_leaf=is_injected)
    if missing := sorted(set(values) - known):
        raise ValueError(
            f"`{missing[0]}` is no injected hyperparameter of this state, which has "
            f"{sorted(known)}. Make the transformation with optax.inject_hyperparams(...)."
        )
    return made
