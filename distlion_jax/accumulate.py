# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation that exchanges once an update, and forgets a bad micro-batch.

In:  a transformation that votes or averages, and how many calls make one update.
Out: the same transformation, called once every k calls, with the state of ``optax.MultiSteps``.

``optax.MultiSteps`` calls what it wraps in every micro-step and throws most results away. For a
vote that is k exchanges an update. And it clears its sums by multiplying them with 0, which leaves
a NaN a NaN: a worker with one bad micro-batch would sit out for ever.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from distlion_jax._promotion import default_promotion
from distlion_jax._vote import wire
from distlion_jax._vote.turnout import all_finite
from distlion_jax.exchanges import Roles, exchanges, with_extra_args

__all__ = ["AccumulateState", "accumulate_gradients"]


class AccumulateState(optax.MultiStepsState):
    """State of :func:`accumulate_gradients`: that of ``optax.MultiSteps``, known as ours."""

    roles = Roles(shared=("mini_step", "gradient_step"))


def accumulate_gradients(
    tx: optax.GradientTransformation,
    every_k_schedule: int | Callable[[ArrayLike], ArrayLike],
    use_grad_mean: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """``optax.MultiSteps`` for transformations that make workers agree.

    Every k-th ``update`` hands the accumulated gradients to ``tx``, in one exchange. The others
    only add to this worker's own sums, send nothing and return zeros. A worker with a number that
    is not finite in one of the k gradients sits that update out, and begins the next one anew.

    The ready-made steps do this with an ``optax.MultiSteps`` that they are given. Their option
    ``microbatches`` does the same within one call, and needs no memory for sums between calls.

    Args:
      tx: the transformation. Extra arguments (``participating``, ``weight``) are those of the
        call that makes the update.
      every_k_schedule: k; or a function of the number of updates so far, as in
        ``optax.MultiSteps``.
      use_grad_mean: whether gradients are averaged over the k calls, or summed.

    Returns:
      A transformation with an ``optax.MultiStepsState``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from distlion_jax import scale_by_distributed_lion
      >>> tx = accumulate_gradients(scale_by_distributed_lion(), 2)
      >>> def train(g):
      ...     first, state = tx.update(g, tx.init(g))
      ...     return first, tx.update(g, state)[0]
      >>> first, second = jax.vmap(train, axis_name="data")(jnp.array([[1.0], [2.0], [-3.0]]))
      >>> print(first[0], second[0])
      [0.] [1.]
    """
    multi = optax.MultiSteps(tx, every_k_schedule, use_grad_mean)
    made = _once_a_round(multi)

    def init(params: Any) -> Any:
        return AccumulateState(*multi.init(params))

    return made._replace(init=init)


def sends_too_often(state: Any) -> bool:
    """Whether an ``optax.MultiSteps`` inside a state exchanges in every micro-step."""

    def is_multi(node: Any) -> bool:
        return type(node) is optax.MultiStepsState

    nodes = jax.tree.leaves(state, is_leaf=lambda x: x is not state and is_multi(x))
    return any(is_multi(node) and bool(exchanges(node.inner_opt_state)) for node in nodes)


def adopt(tx: Any) -> optax.GradientTransformationExtraArgs:
    """A transformation as a step runs it: an ``optax.MultiSteps`` calls its inner one in time."""
    owner = getattr(getattr(tx, "init", None), "__self__", None)  # of gradient_transformation()
    whole = getattr(getattr(tx, "update", None), "__self__", None) is owner
    if type(owner) is optax.MultiSteps and whole:  # one with an update of its own has the say
        return _once_a_round(owner)
    return with_extra_args(tx)


def _once_a_round(multi: optax.MultiSteps) -> optax.GradientTransformationExtraArgs:
    """The same accumulation, with the inner transformation in a branch that is rarely taken."""
    skips = multi._should_skip_update_fn  # type: ignore[attr-defined]
    if not getattr(skips, "__qualname__", "").startswith("MultiSteps.__init__."):
        raise ValueError(
            f"`should_skip_update_fn` {skips!r} of optax.MultiSteps decides by one worker's "
            "numbers, and workers that skip by themselves lose step with the others. Leave it out: "
            "a worker with numbers that are not finite sits the update out by itself."
        )
    inner = with_extra_args(multi.inner_opt)

    @default_promotion
    def add(updates: Any, state: Any) -> Any:
        """``acc + (g - acc) / (number + 1)``, or their sum, in the accumulator's dtype."""
        mean, number = multi._use_grad_mean, state.mini_step  # type: ignore[attr-defined]

        def one(g: Array, total: Array) -> Array:
            new = total + (g - total) / (number + 1) if mean else g + total
            return new.astype(total.dtype)

        return jax.tree.map(one, updates, state.acc_grads)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        total = add(updates, state)
        k = multi._every_k_schedule(state.gradient_step)  # type: ignore[attr-defined]
        due = state.mini_step >= jnp.asarray(k - 1, state.mini_step.dtype)

        def exchange() -> tuple[Any, Any]:
            means = optax.tree.cast_like(total, updates)
            given = dict(extra_args)
            if (healthy := given.get("healthy")) is not None:  # of all micro-batches
                given["healthy"] = healthy._replace(fine=all_finite(total))
            return inner.update(means, state.inner_opt_state, params, **given)

        shapes = jax.eval_shape(exchange)

        def wait() -> tuple[Any, Any]:
            zeros = jax.tree.map(wire.zeros_as, shapes[0])
            kept = jax.tree.map(wire.vary_as, state.inner_opt_state, shapes[1])
            return zeros, kept

        # The same branch on every worker: the counters are the same.
        out, inner_state = jax.lax.cond(due, exchange, wait)
        one_more = optax.safe_increment(state.mini_step)
        done = optax.safe_increment(state.gradient_step)
        return out, state._replace(
            mini_step=jnp.where(due, 0, one_more),
            gradient_step=jnp.where(due, done, state.gradient_step),
            inner_opt_state=inner_state,
            acc_grads=jax.tree.map(lambda x: jnp.where(due, 0, x).astype(x.dtype), total),
        )

    return optax.GradientTransformationExtraArgs(multi.init, update)
