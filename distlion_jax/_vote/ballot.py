# SPDX-License-Identifier: Apache-2.0
"""Gradient and local momentum -> this worker's ballot; the rule for zeros and non-finite values.

In:  the worker's own gradient and momentum leaves (they differ by worker).
Out: a :class:`Ballot`: packed votes, where they count, and the worker's weight.

One bit cannot say "no opinion", and a coordinate whose blend ``b1*m + (1-b1)*g`` is exactly 0 has
none. Sent as a constant +1 or -1 it would drag frozen layers, padded rows and never-seen
embeddings by the learning rate every step. So a ballot has a second, smaller plane:

* ``binary``: one presence bit per block of 128 coordinates. A block that is all zero abstains; an
  isolated zero in a live block votes by a fair coin of (round, coordinate, worker).
* ``ternary``: a presence bit per coordinate. Zeros abstain exactly, and so do blends within
  ``threshold`` of 0.

A worker with any non-finite blend abstains everywhere: it sits the round out.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distlion_jax._vote import noise, turnout, words
from distlion_jax._vote.turnout import Round


class Ballot(NamedTuple):
    """What one worker sends. It differs by worker; every field has the same shape on all."""

    votes: Array  # uint32[groups, 128]: 1 for +1, 0 for -1
    present: Array  # uint32[groups, 1] (binary) or [groups, 128] (ternary): where votes count
    weight: Array  # int32[]: the worker's say; 0: it sits the round out


def _code(b1: ArrayLike, threshold: ArrayLike) -> Callable[..., Array]:
    """Two-bit code of a blend: bit 0 positive, bit 8 an opinion; bit 0 alone: not finite.

    The bits lie 8 apart because :func:`words.pack` puts eight coordinates into one uint16.
    """

    def code(g: Array, m: Array, noise: Array | None = None) -> Array:
        blend = turnout.blend(g, m, b1)
        positive = blend > threshold
        opinion = positive | (blend < jnp.negative(threshold))  # a NaN has none
        if noise is not None:
            positive = opinion & (blend + noise > 0)
        bits = positive.astype(jnp.uint16) | (opinion.astype(jnp.uint16) << np.uint16(8))
        return jnp.where(jnp.abs(blend) < jnp.inf, bits, np.uint16(1))

    return code


def cast(context: Round, gradients: Sequence[Array], mu: Sequence[Array], b1: ArrayLike) -> Ballot:
    """Casts this worker's ballot in one pass over gradient and momentum.

    Args:
      context: the round; its rules name the kind of presence, the dead zone and the noise.
      gradients: this worker's own gradients.
      mu: this worker's own momentum, same shapes.
      b1: weight of the momentum in the blend.

    Returns:
      The ballot; ``weight`` is 0 and nothing is present where the worker sits out.
    """
    rules, layout = context.rules, context.layout
    added = () if rules.noise is None else (noise.draw(context, gradients, mu, b1),)
    code = _code(b1, rules.dead_zone)
    positive, opinion = words.pack(layout, code, gradients, mu, *added)
    # Positive without an opinion is the code of a number that is not finite. Found in the words, it
    # costs no pass over the floats.
    context = context.only_if(jnp.all((positive & ~opinion) == 0))
    if rules.ballot == "binary":
        coin = context.coins(context.number, context.worker + 1, 0, layout.groups)
        votes, present = positive | (coin & ~opinion), words.any_in_block(opinion)
    else:
        votes, present = positive, opinion
    present = jnp.where(context.takes_part, present, np.uint32(0))
    return Ballot(votes, present, context.weight)
