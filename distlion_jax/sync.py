# SPDX-License-Identifier: Apache-2.0
"""Momentum that workers share now and then, where their data differ.

In:  a transformation that votes. Out: the same, whose workers replace their momenta by the mean of
all of them every so many steps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import DTypeLike

from distlion_jax import _checks as checks
from distlion_jax._promotion import default_promotion
from distlion_jax._rules import AxisName, check_static
from distlion_jax._vote import wire
from distlion_jax._vote.turnout import finite_mean
from distlion_jax.exchanges import Roles, with_extra_args
from distlion_jax.lion import ScaleByDistributedLionState

__all__ = ["SynchronizeMomentumState", "synchronize_momentum"]

MOST = 2**31 - 1  # steps, as far as they are counted


class SynchronizeMomentumState(NamedTuple):
    """State of :func:`synchronize_momentum`; one per worker."""

    count: Array  # int32[]; the same on all workers: steps so far
    inner: Any  # of the transformation that is wrapped
    roles = Roles(shared=("count",))


def _is_vote(node: Any) -> bool:
    return isinstance(node, ScaleByDistributedLionState)


def synchronize_momentum(
    tx: optax.GradientTransformation,
    every: int,
    axis_name: AxisName = "data",
    *,
    wire_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the momenta of a vote's workers every so many steps, in full precision.

    A vote of one bit counts workers, not how much each of them wants. Where workers draw from the
    same data that matters little. Where their data differ, each momentum drifts to what the
    worker's own data say. The vote then becomes a median of opinions that no data support. After
    every F-th step

    .. math::

      m_i \leftarrow \tfrac{1}{n} \textstyle\sum_j m_j

    pulls them together again. It costs a full-precision all-reduce every F steps:
    ``full_precision_cost(params, n).bits_per_parameter / F`` bits a step on top. With F = 1 all
    workers hold the momentum of Lion on the mean gradient.

    Args:
      tx: the transformation, with one or more votes in it: :func:`distlion_jax.distributed_lion`,
        :func:`distlion_jax.distributed_lion_by_label`, or a chain.
      every: F, steps from one synchronisation to the next; a static int of at least 1.
      axis_name: the vote's axis, or axes.
      wire_dtype: what momenta are summed and sent in, as ``jnp.bfloat16``; None: float32.

    Returns:
      The transformation. All workers count alike in the mean, whatever their weight. Those that sat
      a round out count too: their momenta are finite. Extra arguments are handed on.

    Raises:
      ValueError: for a bad ``every`` at construction; in ``init`` for a transformation that does
        not vote.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from distlion_jax import distributed_lion
      >>> tx = synchronize_momentum(distributed_lion(0.1), every=1)
      >>> def momentum(g):
      ...     return tx.update(g, tx.init(g), g)[1].inner[0].mu
      >>> g = jnp.array([[1.0], [2.0], [6.0]])  # of 3 workers
      >>> print(jax.vmap(momentum, axis_name="data")(g)[:, 0].round(3))
      [0.03 0.03 0.03]

    References:
      Ishikawa et al, `Lion Cub: Minimizing Communication Overhead in Distributed Lion
      <https://arxiv.org/abs/2411.16462>`_, 2024, synchronises the momenta of selected layers.
    """
    check_static("every", every, "int", MOST)
    checks.check_axis_name(axis_name)
    checks.check_wire_dtype(wire_dtype)
    tx = with_extra_args(tx)

    def init_fn(params: optax.Params) -> Any:
        inner = tx.init(params)
        if not any(map(_is_vote, jax.tree.leaves(inner, is_leaf=_is_vote))):
            raise ValueError(
                "`tx` holds no vote, whose momenta could be averaged: pass distributed_lion(...), "
                "or a chain with it, and an axis_name that is not None."
            )
        return SynchronizeMomentumState(jnp.zeros([], jnp.int32), inner)

    @default_promotion
    def average(mus: Any) -> Any:
        means, health = finite_mean(mus, axis_name, wire_dtype=wire_dtype)
        some = health.workers > 0  # else sums would overflow: each keeps its own
        return jax.tree.map(lambda x, m: jnp.where(some, wire.vary(x, axis_name), m), means, mus)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        updates, inner = tx.update(updates, state.inner, params, **extra_args)
        nodes, treedef = jax.tree.flatten(inner, is_leaf=_is_vote)
        votes = [i for i, node in enumerate(nodes) if _is_vote(node)]
        count = jnp.asarray(optax.safe_increment(state.count))
        # The same branch on every worker: count is the same.
        due = count % jnp.int32(every) == 0
        mus = jax.lax.cond(due, average, lambda mus: mus, [nodes[i].mu for i in votes])
        for i, mu in zip(votes, mus, strict=True):
            nodes[i] = nodes[i]._replace(mu=mu)
        return updates, SynchronizeMomentumState(count, treedef.unflatten(nodes))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
