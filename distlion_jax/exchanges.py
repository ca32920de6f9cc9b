# SPDX-License-Identifier: Apache-2.0
"""Which state belongs to whom: a state class says so itself, where it is defined.

An *exchange* is a transformation that makes workers agree, such as a vote or an average. Train
steps ask for three things. Does a transformation hold an exchange? Which parts of its state are
each worker's own? Which are the same on all workers? A class answers with an attribute:

    class MyExchangeState(NamedTuple):
        count: Array  # int32[]; the same on all workers
        mu: optax.Updates  # the parameters' shapes; each worker's own
        roles = Roles(exchange=True, shared=("count",), own=("mu",), like_params=("mu",))

A transformation whose state class is somebody else's declares itself with :func:`exchange`. What
follows an exchange, and so is the same on all workers, goes into :func:`replicated`. Optax's own
counters are declared here on its behalf.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax


@dataclasses.dataclass(frozen=True)
class Roles:
    """What a state class declares of its fields, in an attribute named ``roles``.

    A field that is named nowhere is a container: the states in it declare themselves, and arrays
    in it are each worker's own. An exchange that has a field ``health`` (a
    :class:`distlion_jax.VoteHealth` or :class:`distlion_jax.MeanHealth`) has ``count``, its rounds
    so far, too; train steps then report its health.

    Args:
      exchange: whether the transformation makes workers agree.
      own: fields that differ by worker.
      shared: fields that are the same on all workers. Train steps make them known to JAX as such,
        by a small all-reduce, unless ``shares_itself``.
      shares_itself: whether the exchange makes its shared fields known to JAX itself, where it
        needs that. The exchanges of this package do.
      like_params: fields that are trees of the parameters' shapes.
      in_place: fields of ``like_params`` that ``update`` also takes with a worker axis of size 1.
        XLA can then overwrite them; a reshape would cost two passes over memory.
      once: whether the state is stored once for all workers, without a worker axis.

    Examples:
      >>> from distlion_jax import ScaleByDistributedLionState
      >>> ScaleByDistributedLionState.roles.own
      ('mu', 'stamp')
    """

    exchange: bool = False
    own: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    like_params: tuple[str, ...] = ()
    in_place: tuple[str, ...] = ()
    once: bool = False
    shares_itself: bool = False


@functools.cache
def _roles_in_optax() -> dict[type, Roles]:
    """Of Optax's states: counters and hyperparameters do not depend on a worker's gradient."""
    found: dict[type, Roles] = {
        # The class has no public name; tracing calls nothing on a device.
        type(jax.eval_shape(optax.add_decayed_weights(lambda _: 0.0).init, ())): Roles(
            shared=("count",)
        ),
    }
    for name, fields in {
        "AddNoiseState": "count",
        "ApplyEvery": "count",
        "ConditionallyMaskState": "step",
        "ConditionallyTransformState": "step",
        "EmaState": "count",
        "FactoredState": "count",
        "InjectHyperparamsState": "count hyperparams",
        "InjectStatefulHyperparamsState": "count hyperparams hyperparams_states",
        "LookaheadState": "steps_since_sync",
        "MultiStepsState": "mini_step gradient_step",
        "ScaleByAdamState": "count",
        "ScaleByAdanState": "t",
        "ScaleByAmsgradState": "count",
        "ScaleByBeliefState": "count",
        "ScaleByLBFGSState": "count",
        "ScaleByLionState": "count",
        "ScaleByNovogradState": "count",
        "ScaleByScheduleState": "count",
        "contrib.GaLoreState": "count",
        "contrib.MadgradState": "count",
        "contrib.MechanicState": "count",
        "contrib.MomoAdamState": "count",
        "contrib.MomoState": "count",
        "contrib.MuonState": "count",
        "contrib.ProdigyState": "count",
        "contrib.ReduceLROnPlateauState": "scale best_value plateau_count cooldown_count count "
        "avg_value",
        "contrib.SAMState": "steps_since_sync",
        "contrib.ScaleByAdemamixState": "count count_m2",
        "contrib.ScaleBySimplifiedAdEMAMixState": "t",
        "contrib.ScheduleFreeState": "step_count",
        "contrib.SophiaState": "count",
        "contrib.DAdaptAdamWState": "count",
    }.items():
        home = optax.contrib if name.startswith("contrib.") else optax
        kind = getattr(home, name.removeprefix("contrib."), None)  # None: not in this version
        if kind is not None:
            found[kind] = Roles(shared=tuple(f for f in fields.split() if f in kind._fields))
    return found


def roles_of(node: Any) -> Roles | None:
    """What the class of a node of a state declares; None where it declares nothing."""
    declared = getattr(type(node), "roles", None)
    if isinstance(declared, Roles):
        return declared
    if isinstance(getattr(node, "roles", None), Roles):
        raise ValueError(
            f"`roles` is a field of {type(node).__name__}, and must be an attribute of the class: "
            "write `roles = Roles(...)`, without an annotation."
        )
    return _roles_in_optax().get(type(node))


def declares(node: Any) -> bool:
    """Whether the class of a node of a state declares anything."""
    return roles_of(node) is not None


def is_exchange(node: Any) -> bool:
    """Whether a node of a state is that of an exchange."""
    roles = roles_of(node)
    return roles is not None and roles.exchange


def is_once(node: Any) -> bool:
    """Whether a node of a state is stored once for all workers."""
    roles = roles_of(node)
    return roles is not None and roles.once


def exchanges(state: Any) -> list[Any]:
    """The state of every exchange in a transformation's state, in order; the innermost ones."""
    outer = [x for x in jax.tree.leaves(state, is_leaf=is_exchange) if is_exchange(x)]
    wrapped = [(x, exchanges(x.inner) if isinstance(x, ExchangeState) else []) for x in outer]
    return [one for x, inner in wrapped for one in inner or [x]]


def map_fields(f: Callable[[Any, str, Any], Any], node: Any, roles: Roles) -> Any:
    """The node with ``f(role, name, field)`` for each field.

    The role is ``"own"``, ``"shared"`` or ``""`` for a container.
    """
    named = dict.fromkeys(roles.own, "own") | dict.fromkeys(roles.shared, "shared")
    names = getattr(node, "_fields", None) or [
        field.name
        for field in dataclasses.fields(node)  # less what is static, as Flax and JAX mark it
        if field.metadata.get("pytree_node", True) and not field.metadata.get("static", False)
    ]
    if unknown := {*named, *roles.like_params, *roles.in_place} - set(names):
        raise ValueError(
            f"`roles` of {type(node).__name__} names the fields {sorted(unknown)}, which it lacks; "
            f"it has {list(names)}."
        )
    new = {name: f(named.get(name, ""), name, getattr(node, name)) for name in names}
    return node._replace(**new) if hasattr(node, "_replace") else dataclasses.replace(node, **new)


def with_extra_args(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The transformation as one that takes extra arguments, and is handed all that it can take.

    Optax asks the type alone. It would drop them before an ``optax.MultiSteps``, whose ``update``
    hands them on.
    """
    if not isinstance(tx, optax.GradientTransformationExtraArgs):
        try:
            kinds = [p.kind for p in inspect.signature(tx.update).parameters.values()]
        except (TypeError, ValueError):  # no Python function
            kinds = []
        if inspect.Parameter.VAR_KEYWORD in kinds:
            return optax.GradientTransformationExtraArgs(tx.init, tx.update)
    return optax.with_extra_args_support(tx)


def _wrap(
    tx: optax.GradientTransformation,
    kind: Callable[[Any], Any],
    check: Callable[[Any], None] = lambda inner: None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation with its state in a container that declares something."""
    wrapped = with_extra_args(tx)

    def init(params: Any) -> Any:
        inner = wrapped.init(params)
        check(inner)
        return kind(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        updates, inner = wrapped.update(updates, state.inner, params, **extra_args)
        return updates, kind(inner)

    return optax.GradientTransformationExtraArgs(init, update)


class ExchangeState(NamedTuple):
    """State of :func:`exchange`."""

    inner: Any  # of the transformation that is wrapped
    roles = Roles(exchange=True)


def exchange(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Declares that a transformation of your own makes the workers agree.

    Train steps then take it for what it is, as they do votes and averages. It must return the same
    updates on all workers. Steps in which JAX does not check that (``pmap``, ``check_vma=False``)
    compare the parameters' bits after calls 1, 2, 4, 8, ...; inside another ``jit`` nobody does.

    Args:
      tx: the transformation, such as ``optax.stateless`` around ``jax.lax.pmean``. Extra arguments
        of ``update`` are handed on.

    Examples:
      >>> import jax
      >>> def mean(updates, params):
      ...     return jax.lax.pmean(updates, "data")
      >>> tx = optax.chain(exchange(optax.stateless(mean)), replicated(optax.adam(1e-3)))
      >>> is_exchange(tx.init({"w": jax.numpy.zeros(3)})[0])
      True
    """
    return _wrap(tx, ExchangeState)


class ReplicatedState(NamedTuple):
    """State of :func:`replicated`: the same on all workers, kept once, without a worker axis."""

    inner: Any  # of the transformation that is wrapped
    roles = Roles(shared=("inner",), once=True)


def replicated(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A transformation that *follows* a vote or an average, with state that all workers share.

    What comes out of a vote is the same on all workers, and so is all that is computed from it. Its
    state needs no worker axis, and JAX's check can then see that the parameters stay replicated.
    Before a vote, on local gradients, it is wrong: JAX says so, unless its check is off.

    Args:
      tx: the transformation, such as ``optax.adamw(1e-3)`` after
        :func:`distlion_jax.average_gradients`. Extra arguments of ``update`` are handed on.

    Raises:
      ValueError: in ``init``, where ``tx`` holds an exchange, whose state is each worker's own.

    Examples:
      >>> import jax.numpy as jnp
      >>> from distlion_jax import average_gradients, init_state, worker_mesh
      >>> tx = optax.chain(average_gradients(), replicated(optax.adam(1e-3)))
      >>> state = init_state(tx, {"w": jnp.zeros(3)}, worker_mesh(8))
      >>> state[0].count.shape, state[1].inner[0].mu["w"].shape
      ((8,), (3,))
    """

    def check(inner: Any) -> None:
        if exchanges(inner):
            raise ValueError(
                "`tx` holds a vote or an average over the workers, whose state is each worker's "
                "own. replicated(...) is for what follows it: optax.chain(average_gradients(...), "
                "replicated(optax.adamw(...)))."
            )

    return _wrap(tx, ReplicatedState, check)
