# SPDX-License-Identifier: Apache-2.0
"""Votes of a pytree <-> packed uint32 words: the static layout, and nothing else.

In:  leaves of any shape, with one two-bit code per coordinate (made on the fly by a caller).
Out: ``uint32[groups, 128]`` bit planes, one bit per coordinate, and back to leaves.

The format. 128 consecutive coordinates of a leaf are a *block*, 32 blocks are a *group*: 128
words. A leaf's first ``4096 * q`` coordinates (its body) fill ``q`` groups: bit ``k`` of word
``j`` is coordinate ``k * 128 * q + j``. What is left of every leaf (fewer than 4096 coordinates,
zero-padded to whole blocks) is collected, in leaf order, into one last virtual leaf that is
packed the same way. So only whole blocks travel, and no block mixes two leaves. A row whose
length is a multiple of 128 is a whole number of blocks.

Why planes, and not 32 neighbours in a word? Splitting the *leading* axis by 32 leaves the minor
axis untouched. Packing is then 32 contiguous loads and elementwise operations, with no relayout on
any backend. Words are concatenated, floats never are.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

BLOCK = 128  # coordinates that share a presence bit; also the words of a group
PLANES = 32  # bits of a word
GROUP = BLOCK * PLANES  # coordinates of a group

_SHARE = 8  # planes that share a uint16 while they are made: short loops, which LLVM vectorises
_PARTS = PLANES // _SHARE


class Leaf(NamedTuple):
    """Where one leaf's coordinates lie: ``groups`` of its own from ``first``, and a tail."""

    shape: tuple[int, ...]
    size: int
    first: int  # first group of the body
    groups: int  # groups of the body: size // 4096
    tail: int  # coordinates left over: size % 4096
    tail_block: int  # first of the tail's blocks among all tails' blocks


class Layout:
    """The static layout of a list of leaves (shapes only); see the module's docstring."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.leaves: list[Leaf] = []
        first = block = 0
        for shape in shapes:
            size = int(np.prod(shape, dtype=np.int64))
            q, tail = divmod(size, GROUP)
            self.leaves.append(Leaf(tuple(shape), size, first, q, tail, block))
            first, block = first + q, block + -(-tail // BLOCK)
        self.size = sum(leaf.size for leaf in self.leaves)
        self.body_groups = first
        self.tail_groups = -(-block // PLANES)
        self.groups = self.body_groups + self.tail_groups

    @cached_property
    def block_leaf(self) -> np.ndarray:
        """``int32[groups, 32]``: the leaf that owns each block; ``len(leaves)`` for padding."""
        owner = np.full((self.groups, PLANES), len(self.leaves), np.int32)
        tails = np.full(self.tail_groups * PLANES, len(self.leaves), np.int32)
        for i, leaf in enumerate(self.leaves):
            owner[leaf.first : leaf.first + leaf.groups] = i
            tails[leaf.tail_block : leaf.tail_block + -(-leaf.tail // BLOCK)] = i
        owner[self.body_groups :] = tails.reshape(PLANES, self.tail_groups).T
        return owner

    def bits_of(self, chosen: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
        """Bits that stand for a coordinate of the chosen leaves.

        Returns:
          ``uint32[body_groups]``, all bits or none of each; ``uint32[tail_groups, 128]``.
        """
        body = np.zeros(self.body_groups, np.uint32)
        valid = np.zeros((self.tail_groups * PLANES, BLOCK), np.uint32)
        for leaf, wanted in zip(self.leaves, chosen, strict=True):
            if wanted:
                body[leaf.first : leaf.first + leaf.groups] = 0xFFFFFFFF
                start = leaf.tail_block * BLOCK
                valid.reshape(-1)[start : start + leaf.tail] = 1
        return body, _pack_tails(valid, self.tail_groups)

    def window(self, chosen: Sequence[bool], first: Array | int, groups: int) -> Array:
        """``uint32[groups, 128]``: :meth:`bits_of` the groups ``first, first + 1, ...``.

        Groups past the last one are padding, and have none.
        """
        index = first + jnp.arange(groups)
        body, tails = self.bits_of(chosen)
        # Padding reads the row of zeros at the end of the table.
        table = np.concatenate([tails, np.zeros((1, BLOCK), np.uint32)])
        tail = jnp.asarray(table)[jnp.clip(index - self.body_groups, 0, self.tail_groups)]
        in_body = (index < self.body_groups)[:, None]
        if all(chosen):
            return jnp.where(in_body, np.uint32(0xFFFFFFFF), tail)
        rows = jnp.asarray(np.append(body, np.uint32(0)))[jnp.minimum(index, self.body_groups)]
        return jnp.where(in_body, rows[:, None], tail)


def _pack_tails(valid: np.ndarray, groups: int) -> np.ndarray:
    """Blocks of 0 and 1, ``[32 * groups, 128]``, as the words of the tail groups."""
    shifts = np.arange(PLANES, dtype=np.uint32)[:, None, None]
    planes = valid.reshape(PLANES, groups, BLOCK) << shifts
    return np.bitwise_or.reduce(planes, axis=0, dtype=np.uint32)


def _keeps_axes(leaf: Leaf) -> bool:
    """Whether the leading axis splits by 32 with nothing left, so that no reshape moves data."""
    return leaf.tail == 0 and leaf.shape[0] % PLANES == 0


def _body_shape(leaf: Leaf) -> tuple[int, ...]:
    if _keeps_axes(leaf):
        return (leaf.shape[0] // PLANES, *leaf.shape[1:])
    return (leaf.groups * BLOCK,)


def _body(x: Array, leaf: Leaf) -> Array:
    """The body of a leaf as ``[4, 8, ...]``: bit ``k`` of the words is plane ``divmod(k, 8)``."""
    if not _keeps_axes(leaf):
        x = x.reshape(-1)[: leaf.groups * GROUP]
    return x.reshape(_PARTS, _SHARE, *_body_shape(leaf))


def _or_planes(planes: Sequence[Array], stride: int = 1) -> Array:
    """Combine planes: ``planes[0] | planes[1] << stride | ...``."""
    words = planes[0]
    for k, plane in enumerate(planes[1:], start=1):
        words = words | (plane << np.array(stride * k, plane.dtype))
    return words


def pack(layout: Layout, code: Callable[..., Array], *trees: Sequence[Array]) -> tuple[Array, ...]:
    """Packs a two-bit code per coordinate into two bit planes.

    ``code`` maps slices of the leaves (one of each tree) to ``uint16`` with bit 0 and bit 8 in
    use. Eight planes share a word while they are made, so that both planes come out of *one* pass
    over the floats (XLA fuses it into one loop); a second pass, over words, sorts the bits.

    Returns:
      Two ``uint32[groups, 128]`` arrays: all bits 0, and all bits 8. Padding codes to 0.
    """
    parts, tails = [], []
    for leaf, xs in zip(layout.leaves, zip(*trees, strict=True), strict=True):
        if leaf.groups:
            bodies = [_body(x, leaf) for x in xs]
            words = _or_planes([code(*(b[:, k] for b in bodies)) for k in range(_SHARE)])
            parts.append(words.reshape(_PARTS, leaf.groups, BLOCK))
        if leaf.tail:
            codes = code(*(x.reshape(-1)[leaf.groups * GROUP :] for x in xs))
            tails.append(jnp.pad(codes, (0, -leaf.tail % BLOCK)))
    if tails:
        codes = jnp.concatenate(tails)
        codes = jnp.pad(codes, (0, layout.tail_groups * GROUP - codes.size))
        codes = codes.reshape(_PARTS, _SHARE, layout.tail_groups, BLOCK)
        parts.append(_or_planes([codes[:, k] for k in range(_SHARE)]))
    # The low byte of a uint16 holds eight votes, the high byte their eight opinions. Four bytes
    # side by side are a word of either plane.
    both = jnp.concatenate(parts, axis=1).astype(jnp.uint32)
    low, high = both & np.uint32(0xFF), both >> np.uint32(8)
    return _or_planes(list(low), _SHARE), _or_planes(list(high), _SHARE)


def unpack(
    layout: Layout, value: Callable[..., Array], planes: Sequence[Array], dtypes: Sequence[Any]
) -> list[Array]:
    """Bit planes back to leaves: ``value(bit of plane 0, bit of plane 1, ...)`` per coordinate.

    Args:
      layout: where each leaf lies.
      value: maps ``int32`` arrays of 0 and 1, one per plane, to the coordinates' values.
      planes: ``uint32[groups, 128]``, or ``uint32[groups, 1]`` for a plane with one bit a block.
      dtypes: the dtype of each leaf that is returned.

    Returns:
      The leaves, shaped as in the layout. XLA fuses this into whatever consumes them.
    """

    def spread(first: int, groups: int, shape: tuple[int, ...], dtype: Any) -> Array:
        shifts = jnp.arange(PLANES, dtype=jnp.uint32).reshape(PLANES, *(1 for _ in shape))
        bits = []
        for plane in planes:
            words = jnp.broadcast_to(plane[first : first + groups], (groups, BLOCK)).reshape(shape)
            bits.append(((words[None] >> shifts) & np.uint32(1)).astype(jnp.int32))
        return value(*bits).astype(dtype)

    tail_shape = (layout.tail_groups * BLOCK,)
    out = []
    for leaf, dtype in zip(layout.leaves, dtypes, strict=True):
        parts = []
        if leaf.groups:
            parts.append(spread(leaf.first, leaf.groups, _body_shape(leaf), dtype).reshape(-1))
        if leaf.tail:
            tails = spread(layout.body_groups, layout.tail_groups, tail_shape, dtype).reshape(-1)
            start = leaf.tail_block * BLOCK
            parts.append(tails[start : start + leaf.tail])
        if not parts:
            parts.append(jnp.zeros((0,), dtype))
        flat = jnp.concatenate(parts) if len(parts) > 1 else parts[0]
        out.append(flat.reshape(leaf.shape))
    return out


def pack_bits(bits: Array) -> Array:
    """Packs ``[32, ...]`` of 0 and 1 (plane first) to words ``uint32[...]``, by a reduction."""
    shifts = jnp.arange(PLANES, dtype=jnp.uint32).reshape(PLANES, *(1 for _ in bits.shape[1:]))
    return (bits.astype(jnp.uint32) << shifts).sum(axis=0, dtype=jnp.uint32)


def unpack_bits(words: Array) -> Array:
    """Words ``uint32[...]`` to ``uint32[32, ...]`` of 0 and 1, plane first."""
    shifts = jnp.arange(PLANES, dtype=jnp.uint32).reshape(PLANES, *(1 for _ in words.shape))
    return (words[None] >> shifts) & np.uint32(1)


def any_in_block(plane: Array) -> Array:
    """``uint32[groups, 1]``: for every block, whether any of its 128 bits is set."""
    return jax.lax.reduce(plane, np.uint32(0), jax.lax.bitwise_or, (plane.ndim - 1,))[..., None]
