# SPDX-License-Identifier: Apache-2.0
"""The figures of a step: loss, what the loss function adds, and the health of its votes.

In:  this worker's figures, and its state after the step. Out: the same figures on every worker.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distlion_jax import wire
from distlion_jax.health import VoteHealth
from distlion_jax.lion import ScaleByDistributedLionState, is_vote


class Metrics(NamedTuple):
    """Figures of one step."""

    loss: Array  # float32[]: mean over the workers that took part (NaN if none did); over all
    # workers in a step without a vote (optax.MultiSteps) and with health="off"
    aux: Any  # tree of float32: the loss function's auxiliary output, averaged likewise
    health: tuple[VoteHealth, ...]  # of every vote in the transformation; `voted` is bool[n]


def votes_of(state: Any) -> list[ScaleByDistributedLionState]:
    """The state of every vote in a transformation's state, in order."""
    return [x for x in jax.tree.leaves(state, is_leaf=is_vote) if is_vote(x)]


def vote_health(state: Any) -> tuple[VoteHealth, ...]:
    """The :class:`VoteHealth` of every vote in a transformation's state, in order.

    Examples:
      >>> from distlion_jax.lion import scale_by_distributed_lion
      >>> (health,) = vote_health(scale_by_distributed_lion().init({"w": jnp.zeros(3)}))
      >>> int(health.voters)  # no round was held yet
      0
    """
    return tuple(vote.health for vote in votes_of(state) if vote.health is not None)


def average(
    loss: Array, aux: Any, health: Sequence[VoteHealth], entered: Array, every: tuple[str, ...]
) -> Metrics:
    """Averages loss and aux over those who entered, in one all-reduce.

    The same all-reduce carries worker 0's health figures, which are everybody's: JAX's check must
    see that they are replicated.
    """
    zeroed = lambda keep, tree: jax.tree.map(  # noqa: E731
        lambda x: jnp.where(keep, jnp.asarray(x, jnp.float32), 0.0), tree
    )
    first = jax.lax.axis_index(every) == 0
    figures = zeroed(entered, (loss, aux, 1.0)), zeroed(first, [h[1:] for h in health])
    flat, treedef = jax.tree.flatten(figures)
    sizes = np.cumsum([x.size for x in flat])[:-1]
    total = jax.lax.psum(wire.vary(jnp.concatenate([x.reshape(-1) for x in flat]), every), every)
    parts = [y.reshape(x.shape) for x, y in zip(flat, jnp.split(total, sizes), strict=True)]
    (loss, aux, count), same = treedef.unflatten(parts)
    loss, aux = jax.tree.map(lambda x: x / count, (loss, aux))
    out = [
        VoteHealth(h.voted[None], voters.astype(jnp.int32), tied, margin)
        for h, (voters, tied, margin) in zip(health, same, strict=True)
    ]
    return Metrics(loss, aux, tuple(out))
