# SPDX-License-Identifier: Apache-2.0
"""Noise before the sign, so that a vote counts how much is wanted and not only by how many.

In:  this worker's gradients and momenta. Out: a random number to add to every blend.
A worker whose blend is c votes +1 with probability 1/2 + c / 2a, for noise that is uniform in
[-a, a]. The expected sum of votes is then the sum of the blends (cut off at a), over a. All workers
share one amplitude, or those with small gradients would count too much: one small all-reduce.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distlion_jax._vote import coins, wire
from distlion_jax._vote.turnout import Round, all_finite, blend

_NOT_THE_COINS = np.uint32(0x80000000)  # bit 31 of a stream: numbers independent of the coins


def _amplitudes(
    context: Round, gradients: Sequence[Array], mu: Sequence[Array], b1: ArrayLike
) -> Array:
    """``float32[leaves]``: noise times the root mean square of a leaf's blends over all workers."""
    blends = [blend(g, m, b1).astype(jnp.float32) for g, m in zip(gradients, mu, strict=True)]
    squares = jnp.stack([jnp.sum(c * c) for c in blends])
    context = context.only_if(all_finite(squares))
    if context.shards is not None:
        squares = context.shards.total_of_leaves(squares)
    mine = jnp.where(context.takes_part, jnp.append(squares, 1.0), 0.0)
    *totals, workers = wire.total(mine, context.axis)
    sizes = jnp.asarray([max(size, 1) for size in context.sizes], jnp.float32)
    scale = jnp.sqrt(jnp.stack(totals) / (sizes * jnp.maximum(workers, 1.0)))
    return jnp.asarray(context.rules.noise) * scale


def draw(
    context: Round, gradients: Sequence[Array], mu: Sequence[Array], b1: ArrayLike
) -> list[Array]:
    """A number to add to every blend: float32, and of the gradients' shapes.

    Args:
      context: the round. Its rules say the largest number, in units of the root mean square of the
        leaf's blends over the workers that take part. (Squares are of float32: blends below 1e-19
        or so have none, and get no noise.)
      gradients: this worker's own gradients.
      mu: this worker's own momentum, same shapes.
      b1: weight of the momentum in the blend.
    """
    amplitudes = _amplitudes(context, gradients, mu, b1)
    stream = jnp.asarray(context.worker + 1).astype(jnp.uint32) | _NOT_THE_COINS
    salts = None if context.shards is None else context.shards.salts()
    uniforms = coins.uniforms(context.number, stream, [g.shape for g in gradients], salts)
    return [(2.0 * u - 1.0) * a for u, a in zip(uniforms, amplitudes, strict=True)]
