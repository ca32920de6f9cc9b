# SPDX-License-Identifier: Apache-2.0
"""Full-precision averages: for warm-up, for a fast inner axis, for chosen leaves.

In:  this worker's own gradients. Out: their mean (or the sign of the blends' mean) over the axis,
     summed in float32 at least. A worker with a number that is not finite is left out, and counted.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from distlion_jax import _checks as checks
from distlion_jax._rounds import in_rounds
from distlion_jax._rules import AxisName, Rules, check_fraction
from distlion_jax._vote import wire
from distlion_jax._vote.stamp import blank
from distlion_jax._vote.turnout import (
    MeanHealth,
    Round,
    all_finite,
    as_held,
    blend,
    finite_mean,
    no_mean,
    remember,
    sane,
    summable,
    weighted_sum,
)
from distlion_jax.exchanges import Roles

__all__ = [
    "AverageGradientsState",
    "ScaleByAveragedLionState",
    "average_gradients",
    "scale_by_averaged_lion",
]


class AverageGradientsState(NamedTuple):
    """State of :func:`average_gradients`."""

    count: Array  # int32[]; the same on all workers: rounds so far, ends the warm-up
    health: MeanHealth  # the last round's; as at the start once a warm-up is over
    roles = Roles(exchange=True, shared=("count",), shares_itself=True)


def average_gradients(
    axis_name: AxisName = "data",
    steps: int | None = None,
    *,
    max_weight: int | None = None,
    wire_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces gradients by their mean over the workers that have finite ones.

    It has three uses. A step that averages costs a 32-bit all-reduce (or 16-bit).

    * A dense warm-up: before :func:`distlion_jax.distributed_lion`, with ``steps=k``. For k steps
      every worker votes on the same mean gradient, which is full-precision Lion (but for the coins
      of isolated zeros). Then workers vote on their own.
    * A fast inner axis: nodes average inside and vote across,
      ``optax.chain(average_gradients("chip"), distributed_lion(lr, axis_name="node"))``.
    * Plain data parallelism, before an ordinary optimizer:
      ``optax.chain(average_gradients(), replicated(optax.adamw(1e-3)))``.

    Args:
      axis_name: mapped axis, or axes, to average over.
      steps: average for this many steps, then pass gradients through; None: always.
      max_weight: largest ``weight`` of a worker, as the vote's; None: weights are not in use.
      wire_dtype: what the sum is made and sent in, such as ``jnp.bfloat16``; None: float32.
        Backends without a bfloat16 all-reduce, such as XLA's on CPU, send float32.

    Returns:
      A transformation. The extra arguments of ``update`` are the vote's: ``participating=False``
      leaves this worker out of the mean, ``weight`` (integer scalar) weighs it. When nobody takes
      part the mean is NaN, and a vote on it is not held. The state's
      :class:`distlion_jax.MeanHealth` shows who was counted. Without ``steps`` the result is
      replicated. With ``steps`` it differs by worker: one whose own gradient is not finite keeps
      it, and so sits out of the vote that follows.

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

    def init(params: optax.Params) -> Any:
        del params
        return AverageGradientsState(jnp.zeros([], jnp.int32), no_mean())

    def update(
        context: Round, updates: optax.Updates, state: Any, params: optax.Params | None
    ) -> tuple[optax.Updates, Any]:
        del params

        def mean(g: Any) -> Any:
            mean, health = finite_mean(g, axis_name, context.weight, wire_dtype)
            return mean, as_held(health, state.health, axis_name)

        def warm_up(g: Any) -> Any:
            (means, health), healthy = mean(g), all_finite(g)
            out = jax.tree.map(lambda x, y: jnp.where(healthy, x, y), means, g)
            return wire.vary_tree(out, axis_name), health

        def voting(g: Any) -> Any:
            return wire.vary_tree(g, axis_name), no_mean(state.health)

        if steps is None:
            out, health = mean(updates)
        else:  # the same branch on every worker: the count is the same
            now = wire.from_first(state.count, axis_name)
            out, health = jax.lax.cond(now < steps, warm_up, voting, updates)
        return out, state._replace(health=health)

    return in_rounds(init, update, axis_name, Rules(max_weight=max_weight))


class ScaleByAveragedLionState(NamedTuple):
    """State of :func:`scale_by_averaged_lion`; one per worker."""

    count: Array  # int32[]; the same on all workers: rounds so far
    mu: optax.Updates  # the parameters' shapes, `mu_dtype`; differs by worker: never sent
    health: MeanHealth  # the last round's
    stamp: Array  # int32[2]; differs by worker: index and number of workers, since its first round
    roles = Roles(
        exchange=True,
        own=("mu", "stamp"),
        shared=("count",),
        like_params=("mu",),
        shares_itself=True,
    )


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
    on the mean gradient, up to rounding. Workers may sit rounds out as in a vote. It costs one
    32-bit all-reduce. It is for leaves too small or too delicate to vote on.

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

    def init(params: optax.Params) -> Any:
        checks.check_params(params, mu_dtype, b2)
        mu = optax.tree.zeros_like(params, dtype=mu_dtype)
        return ScaleByAveragedLionState(jnp.zeros([], jnp.int32), mu, no_mean(), blank())

    def update(
        context: Round, updates: optax.Updates, state: Any, params: optax.Params | None
    ) -> tuple[optax.Updates, Any]:
        del params
        checks.check_momentum(updates, state.mu)
        blends = jax.tree.map(lambda g, m: blend(g, m, b1), updates, state.mu)
        context = context.only_if(summable(blends, context.workers * context.rules.top_weight))
        context = context.only_if(sane(b1, b2, state.mu))
        sums, _, health = weighted_sum(blends, context.weight, axis_name)
        direction = jax.tree.map(lambda s, g: jnp.sign(s).astype(g.dtype), sums, updates)

        def keep(g: Array, m: Array) -> Array:
            return jnp.where(context.takes_part, remember(g, m, b2), m)

        return direction, state._replace(
            mu=jax.tree.map(keep, updates, state.mu),
            health=as_held(health, state.health, axis_name),
        )

    return in_rounds(init, update, axis_name, Rules(max_weight=max_weight))
