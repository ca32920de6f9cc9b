# SPDX-License-Identifier: Apache-2.0
"""The wire format: what a ballot and a verdict look like as one array of words.

In:  a ballot (votes, presence, a header of weight and round) or a verdict (planes, a header of
     voters and their weight, health figures). Out: ``uint32[rows, words]``, and back.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from distlion_jax._rules import Rules
from distlion_jax._vote import wire
from distlion_jax._vote.words import BLOCK

HEADER = 2  # words of a ballot's header: weight, round
VERDICT_HEADER = 2  # words of a verdict's header: voters, weight of the voters


def present_columns(rules: Rules) -> int:
    """Presence words of a group: 1 (a bit a block) or 128 (a bit a coordinate)."""
    return 1 if rules.ballot == "binary" else BLOCK


def planes_for(n: int, max_weight: int) -> int:
    """Planes that hold any count of n workers: ``ceil(log2(n * max_weight + 1))``."""
    return (n * max_weight).bit_length()


def verdict_columns(rules: Rules, n: int) -> tuple[int, ...]:
    """Words a group of each plane of the verdict of n workers, as it travels."""
    planes = planes_for(n, rules.top_weight)
    if rules.aggregation == "majority":
        by_block = rules.ties == "coin" and rules.ballot == "binary"
        return (BLOCK, 1) if by_block else (BLOCK, BLOCK)
    if rules.ballot == "binary":
        return (BLOCK,) * planes + (1,) * planes
    return (BLOCK,) * (planes + 1)


def health_words(rules: Rules, leaves: int) -> int:
    """Words that the health figures add to each slice's verdict."""
    return {"off": 0, "total": 2, "leaf": 2 * leaves}[rules.health]


def pieces(rules: Rules, words: int) -> tuple[int, ...]:
    """How many of a phase's words each of its collectives carries: nearly equal shares."""
    chunks = min(rules.chunks or 1, words)
    return tuple(words // chunks + (i < words % chunks) for i in range(chunks))


def frame(arrays: Sequence[Array], rows: int) -> Array:
    """Arrays side by side as ``[rows, words]``, each split over the rows: what one phase sends.

    The concatenation has two axes on purpose. A vector that was concatenated along its only axis is
    gathered in TPU programs by an all-reduce of n times as many words.
    """
    return jnp.concatenate([x.reshape(rows, -1) for x in arrays], axis=1)


def unframe(frame: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """The inverse: ``[rows, words]`` to arrays ``[rows, *shape]``."""
    parts = wire.split(frame, [int(np.prod(shape)) for shape in shapes], 1)
    return [x.reshape(x.shape[0], *shape) for x, shape in zip(parts, shapes, strict=True)]


def to_words(x: Array) -> Array:
    """``float32[...]`` as ``uint32[...]``, bit for bit."""
    return lax.bitcast_convert_type(x, jnp.uint32)


def to_floats(words: Array) -> Array:
    """``uint32[...]`` as ``float32[...]``, bit for bit."""
    return lax.bitcast_convert_type(words, jnp.float32)
