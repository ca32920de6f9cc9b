# SPDX-License-Identifier: Apache-2.0
"""n workers' words -> counts -> verdict, all in bit planes; the tie rule; no collectives here.

A small integer per coordinate is kept as *planes*: ``planes[k]`` holds bit ``k`` of 32 integers in
every word. Counting votes is then a carry-save adder, about ``5 n / 32`` word operations a
parameter. Nothing is unpacked. No counter can overflow, since there are always enough planes.

In:  ballots of n workers, stacked: ``uint32[n, groups, 128]``.
Out: a :class:`Count` (votes for +1 and voters), from it a verdict: planes that every worker can
decode into the same update; and the round's :class:`Margins`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distlion_jax._vote import frames, words
from distlion_jax._vote.ballot import Ballot

Planes = tuple[Array, ...]
_UNROLLED = 128  # workers that one adder takes; with more, chunks, so that compiling stays quick
_CHUNK = 32


class Count(NamedTuple):
    """Per coordinate: the weight that voted +1, and the weight that voted at all, in planes."""

    positive: Planes  # each uint32[groups, 128]
    voters: Planes  # each uint32[groups, 1] (binary: the same for a block) or [groups, 128]


class Margins(NamedTuple):
    """How close a round was: sums over coordinates, to be divided by the tree's size."""

    tied: Array  # float32[segments]: coordinates that had voters and a sum of 0
    margin: Array  # float32[segments]: sum over coordinates of |sum of votes|


def _full_add(x: Array, y: Array, z: Array) -> tuple[Array, Array]:
    """Three bits to their sum and carry, 32 coordinates at once: ``x + y + z = sum + 2 carry``."""
    xy = x ^ y
    return xy ^ z, (x & y) | (xy & z)


def _add(columns: list[list[Array]], width: int) -> Planes:
    """Sums columns of bits (``columns[k]`` weighs ``2**k``) with carry-save adders."""
    columns = [list(columns[k]) if k < len(columns) else [] for k in range(width + 1)]
    for k in range(width):
        column = columns[k]
        while len(column) > 2:
            total, carry = _full_add(column.pop(0), column.pop(0), column.pop(0))
            column.append(total)
            columns[k + 1].append(carry)
        if len(column) == 2:
            x, y = column
            columns[k], columns[k + 1] = [x ^ y], [*columns[k + 1], x & y]
    like = next(x for column in columns for x in column)
    return tuple(columns[k][0] if columns[k] else jnp.zeros_like(like) for k in range(width))


def _sum_bits(ballots: Ballot, bits: Callable[[Ballot], Sequence[Array]], width: int) -> Planes:
    """Sums over workers; ``bits(ballots)[b]`` holds bit b of each worker's number."""
    n = len(ballots.weight)

    def add_all(some: Ballot) -> Planes:
        return _add([list(x) for x in bits(some)], width)

    if n <= _UNROLLED:
        return add_all(ballots)

    def split(x: Array) -> Array:
        padded = jnp.pad(x, [(0, -n % _CHUNK)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(-1, _CHUNK, *x.shape[1:])

    def add_two(total: Planes, plus: Planes) -> tuple[Planes, None]:
        return _add([[a, b] for a, b in zip(total, plus, strict=True)], width), None

    # Two loops: as one, XLA would fuse them and add a chunk anew for each plane of the total.
    sums = jax.lax.map(add_all, jax.tree.map(split, ballots))
    first, rest = tuple(x[0] for x in sums), tuple(x[1:] for x in sums)
    return jax.lax.scan(add_two, first, rest)[0]


def _count_blocks(present: Array, weight: Array, width: int) -> Planes:
    """Planes of the voters of each block, by integers: there are 128 times fewer of them.

    The sums are reductions, which XLA does not fuse into what reads them: fused, the count would
    be repeated for every word of a block.
    """
    bits = words.unpack_bits(present).astype(jnp.int32)  # [32, n, groups, 1]
    voters = (bits * weight[:, None, None]).sum(axis=1).astype(jnp.uint32)
    return tuple(words.pack_bits((voters >> np.uint32(k)) & np.uint32(1)) for k in range(width))


def _masks(weight: Array, max_weight: int) -> list[Array]:
    """Per bit of a weight, a mask of the workers whose weight has it: ``uint32[n, 1, 1]``."""
    if max_weight == 1:  # present is already empty for weight 0
        return [jnp.full((len(weight), 1, 1), 0xFFFFFFFF, jnp.uint32)]
    bits = [(weight >> b) & 1 for b in range(max_weight.bit_length())]
    # -1 is all ones in two's complement: a bit of 0 or 1 becomes a mask of a whole word.
    return [(-bit).astype(jnp.uint32).reshape(-1, 1, 1) for bit in bits]


def count(ballots: Ballot, max_weight: int) -> Count:
    """Counts the stacked ballots of n workers (leading axis n on every field)."""
    width = frames.planes_for(len(ballots.weight), max_weight)

    def voters(some: Ballot) -> list[Array]:
        return [some.present & mask for mask in _masks(some.weight, max_weight)]

    def positive(some: Ballot) -> list[Array]:
        return [some.votes & mask for mask in voters(some)]

    if ballots.present.shape[-1] == 1:
        counted = _count_blocks(ballots.present, ballots.weight, width)
    else:
        counted = _sum_bits(ballots, voters, width)
    return Count(_sum_bits(ballots, positive, width), counted)


def _compare(count: Count) -> tuple[Array, Array]:
    """Masks ``uint32[groups, 128]``: where the sum of votes is positive, and where it is 0."""
    # The sum of votes is 2 positive - voters. Its sign is found by comparing the two numbers from
    # the highest plane down: the first plane in which they differ decides.
    twice = (jnp.zeros_like(count.positive[0]), *count.positive)
    voters = (*count.voters, jnp.zeros_like(count.voters[0]))
    above, equal = jnp.zeros_like(twice[0]), ~jnp.zeros_like(twice[0])
    for p, v in zip(reversed(twice), reversed(voters), strict=True):
        above = above | (equal & p & ~v)
        equal = equal & ~(p ^ v)
    return above, equal


def _any(planes: Planes) -> Array:
    out = planes[0]
    for plane in planes[1:]:
        out = out | plane
    return out


def majority(count: Count, ties: str, coin: Array) -> Planes:
    """Verdict of the majority: ``(sign, live)``, one bit of sign and one of "not zero".

    With ``ties="coin"`` a tie takes its sign from ``coin`` and ``live`` only says where anyone
    voted (a bit a block for binary ballots); with ``ties="zero"`` a tie is not live.
    """
    above, equal = _compare(count)
    if ties == "coin":
        return above | (equal & coin), _any(count.voters)
    return above, ~equal


def average(count: Count) -> Planes:
    """Verdict of the average: the planes that travel, enough to decode ``sum_i delta_i``.

    Binary: the votes for +1, and the voters of each block. Ternary: the sum itself in two's
    complement, ``2 * positive - voters``, one plane more than the count has.
    """
    if count.voters[0].shape[-1] == 1:
        return (*count.positive, *count.voters)
    # 2 p - v = 2 p + ~v + 1 in two's complement: the carry starts at 1, and ripples up the planes.
    twice = (jnp.zeros_like(count.positive[0]), *count.positive)
    minus = tuple(~v for v in (*count.voters, jnp.zeros_like(count.voters[0])))
    carry, out = ~jnp.zeros_like(twice[0]), []
    for p, v in zip(twice, minus, strict=True):
        total, carry = _full_add(p, v, carry)
        out.append(total)
    return tuple(out)


def decode_majority(sign: Array, live: Array) -> Array:
    """Value of a coordinate, from its bits: -1, 0 or +1."""
    return (2 * sign - 1) * live


def _number(bits: Sequence[Array]) -> Array:
    total = bits[0]
    for k, bit in enumerate(bits[1:], start=1):
        total = total + (bit << k)
    return total


def decode_average(kind: str, voters: Array) -> Callable[..., Array]:
    """Function of a coordinate's bits: the mean vote over the ``voters`` of the round."""
    whole = jnp.maximum(voters, 1)

    def value(*bits: Array) -> Array:
        if kind == "binary":
            half = len(bits) // 2
            total = 2 * _number(bits[:half]) - _number(bits[half:])
        else:
            total = _number(bits[:-1]) - (bits[-1] << (len(bits) - 1))
        # `divisor` always equals `whole`, as no sum exceeds it, but XLA cannot prove it. In some
        # programs XLA turns division by a scalar into multiplication by the reciprocal, which
        # differs in the last bit.
        divisor = jnp.where(total > whole, 1, whole)
        return total.astype(jnp.float32) / divisor.astype(jnp.float32)

    return value


def margins(count: Count, valid_bits: Array, owner: Array | None, segments: int) -> Margins:
    """Sums ties and margins of these groups.

    Args:
      count: of these groups.
      valid_bits: ``uint32[groups, 128]``, bits that stand for a coordinate (not for padding).
      owner: ``int32[groups, 32]``, the segment (leaf) of each block, or None for one total.
      segments: how many segments; a block whose owner is ``segments`` is dropped.
    """
    above, equal = _compare(count)
    below, above = ~(above | equal) & valid_bits, above & valid_bits

    def weigh(plane: Array) -> Array:
        if owner is None:
            return jax.lax.population_count(plane).astype(jnp.int32)
        return words.unpack_bits(plane).astype(jnp.int32)

    def total(each: Array) -> Array:
        each = each.astype(jnp.float32).sum(axis=-1)  # integers could overflow: 4096 * n * weight
        if owner is None:
            return each.sum(keepdims=True)
        return jax.ops.segment_sum(each.T.reshape(-1), owner.reshape(-1), segments + 1)[:segments]

    # |2p - v|, where p of v votes are +1: as it is above 0, with the sign turned below.
    # One integer a word (or bit) and one sum: XLA then walks the counts once, not once a plane.
    leads = [(weigh(p & above) - weigh(p & below)) << (k + 1) for k, p in enumerate(count.positive)]
    leads += [(weigh(v & below) - weigh(v & above)) << k for k, v in enumerate(count.voters)]
    tied = equal & _any(count.voters) & valid_bits
    return Margins(total(weigh(tied)), total(sum(leads[1:], leads[0])))
