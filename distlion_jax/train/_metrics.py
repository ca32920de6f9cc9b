# SPDX-License-Identifier: Apache-2.0
"""The figures of a step: loss, what the loss function adds, and the health of its exchanges.

In:  this worker's figures, and its state before and after the step. Out: the same figures on every
     worker.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distlion_jax._promotion import default_promotion
from distlion_jax._vote import wire
from distlion_jax._vote.turnout import MeanHealth
from distlion_jax._vote.verdict import VoteHealth
from distlion_jax.exchanges import exchanges


class Metrics(NamedTuple):
    """Figures of one step."""

    # float32[]: mean over the workers that took part (NaN if none did); over all workers in a step
    # that holds no round (an accumulating optax.MultiSteps), and with health="off"
    loss: Array
    aux: Any  # tree of float32: the loss function's auxiliary output, averaged likewise
    # Of every vote in the transformation. `voted` is bool[n], which every process can read.
    health: tuple[VoteHealth, ...]
    # Of every average, and the step's own; `counted` is bool[n]. Of an average over an inner axis
    # in `tx`, `workers` is the first node's.
    means: tuple[MeanHealth, ...] = ()
    # float32[]: share of the coordinates in 16 bits or fewer whose update was lost to rounding;
    # None where all parameters are wider
    unmoved: Array | None = None


def _healths(state: Any, kind: type) -> list[Any]:
    found = [getattr(node, "health", None) for node in exchanges(state)]
    return [health for health in found if isinstance(health, kind)]


def vote_health(state: Any) -> tuple[VoteHealth, ...]:
    """The :class:`VoteHealth` of every vote in a transformation's state, in order.

    Examples:
      >>> from distlion_jax import scale_by_distributed_lion
      >>> (health,) = vote_health(scale_by_distributed_lion().init({"w": jnp.zeros(3)}))
      >>> int(health.voters)  # no round was held yet
      0
    """
    return tuple(_healths(state, VoteHealth))


def mean_health(state: Any) -> tuple[MeanHealth, ...]:
    """The :class:`MeanHealth` of every average and compressor in a state, in order.

    Examples:
      >>> from distlion_jax import average_gradients
      >>> (health,) = mean_health(average_gradients().init({"w": jnp.zeros(3)}))
      >>> int(health.workers)  # nothing was averaged yet
      0
    """
    return tuple(_healths(state, MeanHealth))


def took_part(before: Any, after: Any) -> Array:
    """``bool[]``: whether this worker took part in every round that this step held.

    An exchange whose count stands still held none, as inside ``optax.MultiSteps``.
    """
    entered = jnp.bool_(True)
    for old, new in zip(exchanges(before), exchanges(after), strict=True):
        health = getattr(new, "health", None)
        if isinstance(health, VoteHealth | MeanHealth):
            mine = health.voted if isinstance(health, VoteHealth) else health.counted
            entered &= mine | (new.count == old.count)
    return entered


@default_promotion
def average(
    loss: Array,
    aux: Any,
    state: Any,
    own: MeanHealth | None,
    entered: Array,
    axes: tuple[str, ...],
    vote_axes: tuple[str, ...],
) -> Metrics:
    """Averages loss and aux over those who entered, in one all-reduce.

    The same all-reduce carries worker 0's health figures, which are everybody's: JAX's check must
    see that they are replicated. It carries a flag of each worker too, so that every process can
    read who took part. ``own`` is the health of the step's own mean, if it makes one.
    """
    zeroed = lambda keep, tree: jax.tree.map(  # noqa: E731
        lambda x: jnp.where(keep, jnp.asarray(x, jnp.float32), 0.0), tree
    )
    votes, means = vote_health(state), mean_health(state)
    first = wire.worker(axes) == 0
    shared = [h[1:] for h in (*votes, *means)]
    counted = [zeroed(own.counted, 1.0)] if own else []  # of all axes, the step's mean is of some

    def flag(mine: Array, over: tuple[str, ...]) -> Array:
        """``float32[n]``: this worker's flag at its index."""
        at = jnp.arange(wire.size(over)) == wire.worker(over)
        return zeroed(at & mine, jnp.ones(at.shape))

    flags = [flag(h[0], vote_axes) for h in (*votes, *means)]
    flags += [flag(own.counted, axes)] if own else []
    figures = zeroed(entered, (loss, aux, 1.0)), zeroed(first, shared), counted, flags
    flat, treedef = jax.tree.flatten(figures)
    sizes = np.cumsum([x.size for x in flat])[:-1]
    total = wire.total(jnp.concatenate([x.reshape(-1) for x in flat]), axes)
    parts = [y.reshape(x.shape) for x, y in zip(flat, jnp.split(total, sizes), strict=True)]
    (loss, aux, count), shared, counted, flags = treedef.unflatten(parts)
    took = iter([x > 0 for x in flags])
    loss, aux = jax.tree.map(lambda x: x / count, (loss, aux))
    return Metrics(
        loss,
        aux,
        tuple(
            VoteHealth(next(took), voters.astype(jnp.int32), tied, margin)
            for voters, tied, margin in shared[: len(votes)]
        ),
        tuple(
            MeanHealth(next(took), workers.astype(jnp.int32))
            for workers in (*(workers for (workers,) in shared[len(votes) :]), *counted)
        ),
    )
