# SPDX-License-Identifier: Apache-2.0
"""State before a vote that one bad gradient cannot spoil for good.

In:  a transformation. Out: the same, whose own numbers stay finite.

Votes and averages keep their state when a worker's gradient is not finite. What stands before them
(``optax.trace``, ``optax.ema``, Adam's moments) takes a NaN in and never lets it go. The worker
would then sit out every round that follows.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from distlion_jax.exchanges import declares, map_fields, roles_of, with_extra_args

__all__ = ["keep_finite"]


def keep_finite(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A transformation whose per-worker state forgets numbers that are not finite.

    A number of its state that was finite, and would not be any more, keeps its last value. So a
    worker with a bad gradient sits one round out, and votes again in the next. The states of votes
    and averages, what is :func:`distlion_jax.replicated`, and counters are left as they are. The
    sums of an ``optax.MultiSteps`` are cleared after each update.

    :func:`distlion_jax.make_train_step` and :func:`distlion_jax.make_pmap_train_step` do this with
    every transformation. In a step of your own, wrap the whole chain.

    Args:
      tx: the transformation. Its state is that of ``tx``; extra arguments are handed on.

    Examples:
      >>> tx = keep_finite(optax.trace(0.9))
      >>> _, state = tx.update(jnp.array([1.0, jnp.nan]), tx.init(jnp.zeros(2)))
      >>> print(state.trace)
      [1. 0.]
    """
    inner = with_extra_args(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        updates, new = inner.update(updates, state, params, **extra_args)
        return updates, _kept(state, new)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _kept(old: Any, new: Any) -> Any:
    """The new state, with the old one's numbers where they were finite and are not any more."""

    def leaf(x: Array, y: Array) -> Array:
        if not jnp.issubdtype(jnp.result_type(y), jnp.inexact) or jnp.shape(x) != jnp.shape(y):
            return y
        return jnp.where(jnp.isfinite(y) | ~jnp.isfinite(x), y, x)

    def node(before: Any, after: Any) -> Any:
        if (roles := roles_of(after)) is None:
            return leaf(before, after)
        if roles.exchange or roles.once:
            return after
        if isinstance(after, optax.MultiStepsState):
            after = after._replace(
                acc_grads=jax.tree.map(
                    lambda x: jnp.where(after.mini_step == 0, jnp.zeros_like(x), x), after.acc_grads
                )
            )
            inner = _kept(before.inner_opt_state, after.inner_opt_state)
            return after._replace(inner_opt_state=inner)

        def field(role: str, name: str, value: Any) -> Any:
            return value if role == "shared" else _kept(getattr(before, name), value)

        return map_fields(field, after, roles)

    if jax.tree.structure(old) != jax.tree.structure(new):
        return new  # as where a transformation changes its state's form; JAX has the say
    return jax.tree.map(node, old, new, is_leaf=declares)
