# SPDX-License-Identifier: Apache-2.0
"""Noise before the sign, so that a vote counts how much is wanted and not only by how many.

In:  this worker's gradients and momenta. Out: a random number to add to every blend.
A worker whose blend is c votes +1 with probability 1/2 + c / 2a, for noise that is uniform in
[-a, a]: the expected sum of votes is the sum of the blends (cut off at a), over a. One amplitude
for all workers, or those with small gradients would count too much: one small all-reduce.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distlion_jax import wire, words
from distlion_jax.rules import AxisName


def _amplitudes(
    noise: ArrayLike,
    gradients: Sequence[Array],
    mu: Sequence[Array],
    b1: ArrayLike,
    weight: Array,
    axis_name: AxisName,
) -> Array:
    """``float32[leaves]``: noise times the root mean square of a leaf's blends over all workers."""
    blends = [
        ((1.0 - b1) * g + b1 * m).astype(jnp.float32) for g, m in zip(gradients, mu, strict=True)
    ]
    squares = jnp.stack([jnp.sum(c * c) for c in blends])
    enters = (weight > 0) & jnp.all(jnp.isfinite(squares))
    mine = jnp.where(enters, jnp.append(squares, 1.0), 0.0)
    *totals, workers = wire.total(mine, axis_name)
    sizes = jnp.asarray([max(c.size, 1) for c in blends], jnp.float32)
    return jnp.asarray(noise) * jnp.sqrt(jnp.stack(totals) / (sizes * jnp.maximum(workers, 1.0)))


def draw(
    noise: ArrayLike,
    gradients: Sequence[Array],
    mu: Sequence[Array],
    b1: ArrayLike,
    weight: Array,
    step: Array,
    worker: Array,
    axis_name: AxisName,
) -> list[Array]:
    """A number to add to every blend, float32 and of the gradients' shapes.

    Args:
      noise: largest number, in units of the root mean square of the leaf's blends. (Its squares
        are of float32: of blends below 1e-19 or so they are 0, and there is no noise.)
      gradients: this worker's own gradients.
      mu: this worker's own momentum, same shapes.
      b1: weight of the momentum in the blend.
      weight: ``int32[]``, this worker's say; 0 leaves it out of the root mean square, as numbers
        that are not finite do.
      step: ``int32[]``, the round.
      worker: ``int32[]``, this worker's index.
      axis_name: mapped axis, or axes, that the workers lie on.
    """
    amplitudes = _amplitudes(noise, gradients, mu, b1, weight, axis_name)
    stream = jnp.asarray(worker + 1).astype(jnp.uint32) | np.uint32(0x80000000)  # not the coins'
    uniforms = words.uniforms(step, stream, [g.shape for g in gradients])
    return [(2.0 * u - 1.0) * a for u, a in zip(uniforms, amplitudes, strict=True)]
