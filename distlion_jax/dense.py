# SPDX-License-Identifier: Apache-2.0
"""Full-precision averaging of gradients: for warm-up, for a fast inner axis, for chosen leaves.

In:  this worker's own gradients. Out: their mean (or the sign of the blends' mean) over the axis,
     in full precision on the wire.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from distlion_jax import checks, wire
from distlion_jax.rules import AxisName


class AverageGradientsState(NamedTuple):
    """State of :func:`average_gradients`."""

    count: Array  # int32[]; the same on all workers: rounds so far, ends the warm-up


def all_finite(tree: Any) -> Array:
    """``bool[]``: whether every number in the tree is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)] or [True]))


def average_gradients(
    axis_name: AxisName, steps: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Replaces gradients by their mean over the workers that have finite ones.

    Chained before :func:`distlion_jax.distributed_lion` with ``steps=k`` it is a dense warm-up:
    for k steps every worker votes on the same mean gradient, which is full-precision Lion; then
    workers vote on their own. Over a fast inner axis (``steps=None``) it averages inside the node,
    so that nodes vote on their means: ``optax.chain(average_gradients("chip"),
    distributed_lion(lr, axis_name="node"))``. Each dense step costs a 32-bit all-reduce.

    Args:
      axis_name: mapped axis, or axes, to average over.
      steps: average for this many steps, then pass gradients through; None: always.

    Returns:
      A transformation. ``participating`` (bool scalar, extra argument of ``update``) leaves this
      worker out of the mean; when nobody takes part the mean is 0. With ``steps`` the result
      differs by worker (as JAX sees it), without it is replicated.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> tx = average_gradients("data")
      >>> g = jnp.array([1.0, 2.0, jnp.nan])  # of 3 workers
      >>> print(jax.vmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="data")(g))
      [1.5 1.5 1.5]
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 0):
        raise ValueError(f"`steps` must be a static int of at least 0, or None; got {steps!r}.")

    def init_fn(params: optax.Params) -> Any:
        del params
        return AverageGradientsState(jnp.zeros([], jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        participating: ArrayLike = True,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        wire.size(axis_name)

        def mean(g: Any) -> Any:
            take = jnp.asarray(participating) & all_finite(g)
            voters = jnp.maximum(wire.total(take.astype(jnp.int32), axis_name), 1)
            zeroed = jax.tree.map(lambda x: jnp.where(take, x, jnp.zeros_like(x)), g)
            return jax.tree.map(
                lambda x: (wire.total(x, axis_name) / voters.astype(x.dtype)).astype(x.dtype),
                zeroed,
            )

        new_state = AverageGradientsState(jnp.asarray(optax.safe_increment(state.count)))
        if steps is None:
            return mean(updates), new_state
        local = jax.tree.map(lambda x: wire.vary(x, axis_name), updates)
        updates = jax.lax.cond(  # the same branch on every worker: count is the same
            state.count < steps,
            lambda g: jax.tree.map(lambda x: wire.vary(x, axis_name), mean(g)),
            lambda g: g,
            local,
        )
        return updates, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class ScaleByAveragedLionState(NamedTuple):
    """State of :func:`scale_by_averaged_lion`; one per worker."""

    mu: optax.Updates  # the parameters' shapes, `mu_dtype`; differs by worker: never sent


def scale_by_averaged_lion(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: DTypeLike | None = None,
    *,
    axis_name: AxisName = "data",
) -> optax.GradientTransformationExtraArgs:
    """Lion on the workers' full-precision mean, with the vote's state: momentum per worker.

    ``Delta = sign(sum_i (b1 m_i + (1 - b1) g_i))``. The blend is linear, so this is Lion on the
    mean gradient (up to rounding), while workers may sit rounds out as in a vote. It costs one
    32-bit all-reduce. For leaves too small or too delicate to vote on.

    Args:
      b1, b2, mu_dtype: as in ``optax.lion``.
      axis_name: mapped axis, or axes, that the workers lie on.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> tx = scale_by_averaged_lion()
      >>> g = jnp.array([[1.0], [1.0], [-5.0]])  # two workers of three say +, the mean says -
      >>> print(jax.vmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="data")(g)[0])
      [-1.]
    """

    def init_fn(params: optax.Params) -> Any:
        checks.check_params(params, mu_dtype)
        return ScaleByAveragedLionState(optax.tree.zeros_like(params, dtype=mu_dtype))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        participating: ArrayLike = True,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        wire.size(axis_name)
        checks.check_update(updates, state.mu, axis_name)
        blend = jax.tree.map(lambda g, m: (1.0 - b1) * g + b1 * m, updates, state.mu)
        take = jnp.asarray(participating) & all_finite(blend)
        direction = jax.tree.map(
            lambda c, g: jnp.sign(
                wire.total(jnp.where(take, c, jnp.zeros_like(c)), axis_name)
            ).astype(g.dtype),
            blend,
            updates,
        )
        mu = jax.tree.map(
            lambda g, m: jnp.where(take, ((1.0 - b2) * g + b2 * m).astype(m.dtype), m),
            updates,
            state.mu,
        )
        return direction, ScaleByAveragedLionState(mu)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
