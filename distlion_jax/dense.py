# SPDX-License-Identifier: Apache-2.0
"""Full-precision averaging of gradients: for warm-up, for a fast inner axis, for chosen leaves.

In:  this worker's own gradients. Out: their mean (or the sign of the blends' mean) over the axis,
     summed in float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from distlion_jax import checks, wire
from distlion_jax.rules import AxisName, Rules, check_fraction


def _sum(
    x: Array, keep: Array, weight: Array, axis_name: AxisName, wire_dtype: DTypeLike | None = None
) -> Array:
    """Sum over the axis of ``weight * x`` of those who take part, in float32 at least."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    mine = jnp.where(keep, x.astype(wide) * weight, 0)
    return wire.total(mine.astype(wire_dtype or wide), axis_name).astype(wide)


def finite_mean(
    tree: Any, axis_name: AxisName, weight: ArrayLike = 1, wire_dtype: DTypeLike | None = None
) -> Any:
    """Mean over the axis, of those whose numbers are all finite; NaN where nobody's are.

    Args:
      tree: this worker's own arrays.
      axis_name: mapped axis, or axes.
      weight: ``int32[]``, this worker's; 0 leaves it out.
      wire_dtype: of the sum; None: float32.
    """
    weight = jnp.asarray(weight, jnp.int32)
    take = (weight > 0) & all_finite(tree)
    whole = wire.total(jnp.where(take, weight, 0), axis_name)

    def mean(x: Array) -> Array:
        total = _sum(x, take, weight, axis_name, wire_dtype)
        return (total / whole.astype(total.dtype)).astype(x.dtype)  # 0 / 0 is NaN

    return jax.tree.map(mean, tree)


class AverageGradientsState(NamedTuple):
    """State of :func:`average_gradients`."""

    count: Array  # int32[]; the same on all workers: rounds so far, ends the warm-up


def all_finite(tree: Any) -> Array:
    """``bool[]``: whether every number in the tree is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)] or [True]))


def average_gradients(
    axis_name: AxisName = "data",
    steps: int | None = None,
    *,
    max_weight: int | None = None,
    wire_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces gradients by their mean over the workers that have finite ones.

    Chained before :func:`distlion_jax.distributed_lion` with ``steps=k`` it is a dense warm-up:
    for k steps every worker votes on the same mean gradient, which is full-precision Lion (but for
    the coins of isolated zeros); then workers vote on their own. Over a fast inner axis
    (``steps=None``) it averages inside the node, so that nodes vote on their means:
    ``optax.chain(average_gradients("chip"), distributed_lion(lr, axis_name="node"))``. Before an
    ordinary optimizer it is plain data parallelism: ``optax.chain(average_gradients(),
    replicated(optax.adamw(1e-3)))``. Each dense step costs a 32-bit all-reduce (or 16-bit).

    Args:
      axis_name: mapped axis, or axes, to average over.
      steps: average for this many steps, then pass gradients through; None: always.
      max_weight: largest ``weight`` of a worker, as the vote's; None: weights are not in use.
      wire_dtype: what the sum is made and sent in, as ``jnp.bfloat16``; None: float32. (Backends
        without a bfloat16 all-reduce, as XLA's on CPU, send float32.)

    Returns:
      A transformation. The extra arguments of ``update`` are the vote's: ``participating`` (bool
      scalar) leaves this worker out of the mean, ``weight`` (integer scalar) weighs it. When nobody
      takes part the mean is NaN, so that a vote on it is not held. With ``steps`` the result
      differs by worker: one whose own gradient is not finite keeps that, and sits out of the vote
      too. Without ``steps`` the result is replicated.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> tx = average_gradients("data")
      >>> g = jnp.array([1.0, 2.0, jnp.nan])  # of 3 workers
      >>> print(jax.vmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="data")(g))
      [1.5 1.5 1.5]
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 0):
        raise ValueError(f"`steps` must be a static int of at least 0, or None; got {steps!r}.")
    checks.check_wire_dtype(wire_dtype)
    checks.check_axis_name(axis_name)
    rules = Rules(max_weight=max_weight)

    def init_fn(params: optax.Params) -> Any:
        del params
        return AverageGradientsState(jnp.zeros([], jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        participating: ArrayLike = True,
        weight: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        checks.check_weights(rules, wire.size(axis_name))
        checks.check_local(updates, axis_name)
        mine = checks.effective_weight(rules, participating, weight)

        new_state = AverageGradientsState(jnp.asarray(optax.safe_increment(state.count)))
        if steps is None:
            return finite_mean(updates, axis_name, mine, wire_dtype), new_state

        def mean(g: Any) -> Any:
            mean, healthy = finite_mean(g, axis_name, mine, wire_dtype), all_finite(g)
            return jax.tree.map(lambda x, y: jnp.where(healthy, x, y), mean, g)

        # The same branch on every worker: count is the same.
        return jax.lax.cond(state.count < steps, mean, lambda g: g, updates), new_state

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
    max_weight: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lion on the workers' full-precision mean, with the vote's state: momentum per worker.

    ``Delta = sign(sum_i weight_i (b1 m_i + (1 - b1) g_i))``. The blend is linear, so this is Lion
    on the mean gradient (up to rounding), while workers may sit rounds out as in a vote. It costs
    one 32-bit all-reduce. For leaves too small or too delicate to vote on.

    Args:
      b1, b2, mu_dtype: as in ``optax.lion``.
      axis_name: mapped axis, or axes, that the workers lie on.
      max_weight: largest ``weight`` of a worker, as the vote's; None: weights are not in use.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> tx = scale_by_averaged_lion()
      >>> g = jnp.array([[1.0], [1.0], [-5.0]])  # two workers of three say +, the mean says -
      >>> print(jax.vmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="data")(g)[0])
      [-1.]
    """

    check_fraction("b1", b1)
    check_fraction("b2", b2)
    checks.check_axis_name(axis_name)
    rules = Rules(max_weight=max_weight)

    def init_fn(params: optax.Params) -> Any:
        checks.check_params(params, mu_dtype, b2)
        return ScaleByAveragedLionState(optax.tree.zeros_like(params, dtype=mu_dtype))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        participating: ArrayLike = True,
        weight: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        checks.check_weights(rules, wire.size(axis_name))
        checks.check_update(updates, state.mu, axis_name)
        mine = checks.effective_weight(rules, participating, weight)
        blend = jax.tree.map(lambda g, m: (1.0 - b1) * g + b1 * m, updates, state.mu)
        take = (mine > 0) & all_finite(blend) & checks.in_range(b1, b2)
        direction = jax.tree.map(
            lambda c, g: jnp.sign(_sum(c, take, mine, axis_name)).astype(g.dtype), blend, updates
        )
        mu = jax.tree.map(
            lambda g, m: jnp.where(take, ((1.0 - b2) * g + b2 * m).astype(m.dtype), m),
            updates,
            state.mu,
        )
        return direction, ScaleByAveragedLionState(mu)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
