# SPDX-License-Identifier: Apache-2.0
"""EF-signSGD: a sign per coordinate, a scale per leaf, and error feedback."""

import dataclasses

import jax.numpy as jnp
from jax import Array

from distlion_jax._rules import Rules
from distlion_jax._vote import ballot, wire, words
from distlion_jax._vote.frames import to_floats, to_words
from distlion_jax._vote.turnout import Round
from distlion_jax._vote.words import BLOCK, Layout
from distlion_jax.baselines.compress import Gathered, Leaves


@dataclasses.dataclass(frozen=True)
class EFSign(Gathered):
    r"""Scaled signs with error feedback.

    For each leaf p of d coordinates:

    .. math::

      C(p) = \frac{\|p\|_1}{d} \, \mathrm{sign}(p)

    Sent as this package's binary ballot (one bit, and a presence bit a block of 128) and a float32
    a leaf. Signs of different scales cannot be summed in transit: messages are gathered.

    Differs from the paper:

    * The paper has one worker. Here the mean of the workers' messages is applied.
    * The error is kept in gradient units, not in steps. This is the same where the learning rate is
      constant.
    * A block of 128 exact zeros stays zero, and is left out of d.
    * An isolated zero votes by a fair coin.

    References:
      Karimireddy et al, `Error Feedback Fixes SignSGD and other Gradient Compression Schemes
      <https://arxiv.org/abs/1901.09847>`_, 2019

    Examples:
      >>> import jax
      >>> cost = EFSign().cost({"w": jax.ShapeDtypeStruct((4096, 4096), "float32")}, n=8)
      >>> round(cost.bits_per_parameter, 2)
      7.05
    """

    feedback = True

    def words(self, layout: Layout) -> int:
        """Votes, presence of blocks, a scale a leaf."""
        return layout.groups * (BLOCK + 1) + len(layout.leaves)

    def encode(self, leaves: Leaves, context: Round) -> list[Array]:
        """Casts a binary ballot on the leaves, and scales it."""
        binary = dataclasses.replace(context, rules=Rules())  # also where there is one worker
        cast = ballot.cast(binary, leaves, leaves, 0.0)
        live = words.unpack(
            context.layout, lambda bit: bit, [cast.present], [jnp.float32] * len(leaves)
        )
        pairs = zip(leaves, live, strict=True)
        scales = [jnp.abs(x).sum() / jnp.maximum(y.sum(), 1) for x, y in pairs]
        return [cast.votes, cast.present, to_words(jnp.stack(scales))]

    def decode(self, message: Array, layout: Layout) -> Leaves:
        """Signs times scales."""
        sizes = [layout.groups * BLOCK, layout.groups, len(layout.leaves)]
        votes, present, scales = wire.split(message, sizes)
        planes = [votes.reshape(-1, BLOCK), present.reshape(-1, 1)]
        signs = words.unpack(
            layout, lambda up, live: (2 * up - 1) * live, planes, [jnp.float32] * len(layout.leaves)
        )
        return [sign * scale for sign, scale in zip(signs, to_floats(scales), strict=True)]
