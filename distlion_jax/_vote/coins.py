# SPDX-License-Identifier: Apache-2.0
"""Random bits and numbers that need no key and no state: a hash of (round, coordinate, stream).

In:  a round's number and a stream (a worker, or 0 for all of them together).
Out: fair coins, 32 to a word, or uniform numbers. A replayed round draws the same.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from distlion_jax._vote.words import BLOCK


def mix(x: Array) -> Array:
    """A 32-bit integer hash (two multiply-xorshift rounds, bias below 0.2 %): bits of a coin."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _seed(round: Array, stream: Array | int) -> Array:
    return mix(jnp.asarray(round).astype(jnp.uint32) ^ mix(jnp.asarray(stream).astype(jnp.uint32)))


def salted(stream: Array | int, salt: Array) -> Array:
    """A stream for each salt; that of salt 0 is the stream itself."""
    return jnp.asarray(stream).astype(jnp.uint32) ^ mix(salt.astype(jnp.uint32))


def coins(round: Array, stream: Array | int, first_group: Array | int, groups: int) -> Array:
    """Fair coins of (round, coordinate, stream), 32 to a word; no state, no key, same on replay.

    Args:
      round: ``int32[]``, its number.
      stream: worker index + 1 for the coins of one worker, 0 for the coins that all share.
      first_group: index of the first group wanted.
      groups: how many groups.

    Returns:
      ``uint32[groups, 128]``.
    """
    word = jnp.arange(groups * BLOCK, dtype=jnp.uint32).reshape(groups, BLOCK)
    first = jnp.asarray(first_group).astype(jnp.uint32) * np.uint32(BLOCK)
    return mix((word + first) ^ _seed(round, stream))


def uniforms(
    round: Array,
    stream: Array | int,
    shapes: Sequence[tuple[int, ...]],
    salts: Sequence[Array] | None = None,
) -> list[Array]:
    """Numbers in [0, 1) of (round, coordinate, stream), as the coins: float32, an array a leaf.

    With ``salts``, one for each leaf, of (round, coordinate, stream, salt).
    """
    streams = [stream] * len(shapes)
    if salts is not None:
        streams = [salted(stream, salt) for salt in salts]
    out, first = [], 0
    for stream, shape in zip(streams, shapes, strict=True):
        size = int(np.prod(shape, dtype=np.int64))
        index = jnp.arange(size, dtype=jnp.uint32) + np.uint32(first & 0xFFFFFFFF)
        bits = mix(index ^ _seed(round, stream)) >> np.uint32(8)
        out.append((bits.astype(jnp.float32) * 2.0**-24).reshape(shape))
        first += size
    return out
