# SPDX-License-Identifier: Apache-2.0
"""QSGD: stochastic rounding to a few levels, bucket by bucket."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from distlion_jax._rules import check_choice, check_static
from distlion_jax._vote import coins, wire, words
from distlion_jax._vote.frames import to_floats, to_words
from distlion_jax._vote.turnout import Round
from distlion_jax._vote.words import BLOCK, Layout
from distlion_jax.baselines.compress import Gathered, Leaves


@dataclasses.dataclass(frozen=True)
class QSGD(Gathered):
    r"""Quantised SGD: a sign and a stochastic level per coordinate, a norm per bucket.

    A leaf is cut into buckets v of ``bucket`` consecutive coordinates. With s = ``levels`` and u
    uniform in [0, 1):

    .. math::

      Q(v_j) = \|v\| \, \mathrm{sign}(v_j) \, \frac{1}{s} \lfloor s |v_j| / \|v\| + u_j \rfloor

    which is v_j on average. A message holds bit planes (a sign, and as many bits as ``levels``
    takes) and a float32 a bucket. A sum of messages is not a message, so they are gathered: a
    worker receives n - 1 of them. Of what can be all-reduced it receives 2 (n-1)/n.

    Differs from the paper:

    * Levels have a fixed width; the paper offers Elias codes.
    * The random numbers are a hash of (round, coordinate, worker).

    Args:
      levels: s, from 1 up to 2**15 - 1; 2**(bits-1) - 1 fill the bits. 7: the paper's 4 bits.
      bucket: coordinates that share a norm; the paper's experiments with 4 bits use 512.
      norm: ``"l2"``, the paper's definition; or ``"max"``, what its experiments use, of which less
        is lost.

    References:
      Alistarh et al, `QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding
      <https://arxiv.org/abs/1610.02132>`_, 2017

    Examples:
      >>> import jax
      >>> cost = QSGD(levels=7).cost({"w": jax.ShapeDtypeStruct((4096, 4096), "float32")}, n=2)
      >>> round(cost.bits_per_parameter, 2)
      4.06
    """

    levels: int = 7
    bucket: int = 512
    norm: str = "max"
    feedback = False

    def __post_init__(self) -> None:
        check_static("levels", self.levels, "int", 2**15 - 1)
        check_static("bucket", self.bucket, "int", 2**30)
        check_choice("norm", self.norm, ("l2", "max"))

    @property
    def planes(self) -> int:
        """Bits a coordinate."""
        return 1 + int(self.levels).bit_length()

    def _bucket(self, size: int) -> int:
        """Coordinates a bucket of a leaf of this size."""
        return min(self.bucket, max(size, 1))

    def _buckets(self, layout: Layout) -> list[int]:
        return [-(-leaf.size // self._bucket(leaf.size)) for leaf in layout.leaves]

    def words(self, layout: Layout) -> int:
        """Planes, then a norm a bucket."""
        return self.planes * layout.groups * BLOCK + sum(self._buckets(layout))

    def _norms(self, x: Array) -> Array:
        """``float32[buckets]`` of one leaf."""
        bucket = self._bucket(x.size)
        rows = jnp.pad(jnp.abs(x.reshape(-1)), (0, -x.size % bucket)).reshape(-1, bucket)
        largest = rows.max(axis=1)
        if self.norm == "max":
            return largest
        rows = rows / jnp.where(largest > 0, largest, 1)[:, None]  # squares of tiny numbers are 0
        return largest * jnp.sqrt((rows * rows).sum(axis=1))

    def _spread(self, norms: Array, shape: tuple[int, ...]) -> Array:
        """The norm of every coordinate's bucket."""
        size = int(np.prod(shape, dtype=np.int64))
        bucket = self._bucket(size)
        each = jnp.repeat(norms, bucket, total_repeat_length=len(norms) * bucket)
        return each[:size].reshape(shape)

    def _code(self, x: Array, norms: Array, uniform: Array) -> Array:
        """Level, and the sign in the bit above it, as uint16."""
        norm = self._spread(norms, x.shape)
        share = jnp.where(norm > 0, jnp.abs(x) / jnp.where(norm > 0, norm, 1), 0)
        level = jnp.floor(share * self.levels + uniform)
        level = jnp.minimum(level, self.levels).astype(jnp.uint16)
        return level | ((x < 0).astype(jnp.uint16) << np.uint16(self.planes - 1))

    def encode(self, leaves: Leaves, context: Round) -> list[Array]:
        """Quantises and packs."""
        norms = [self._norms(x) for x in leaves]
        uniforms = coins.uniforms(context.number, context.worker + 1, [x.shape for x in leaves])
        codes = [self._code(*three) for three in zip(leaves, norms, uniforms, strict=True)]
        planes: list[Array] = []
        for k in range(0, self.planes, 2):
            shift = np.uint16(k)

            def two(code: Array, shift: Any = shift) -> Array:
                bits = code >> shift
                return (bits & np.uint16(1)) | ((bits & np.uint16(2)) << np.uint16(7))

            planes += words.pack(context.layout, two, codes)
        return [*planes[: self.planes], *(to_words(norm) for norm in norms)]

    def decode(self, message: Array, layout: Layout) -> Leaves:
        """Unpacks and scales."""
        plane = layout.groups * BLOCK
        *planes, norms = wire.split(message, [plane] * self.planes + [sum(self._buckets(layout))])
        bits = [x.reshape(layout.groups, BLOCK) for x in planes]

        def value(*bits: Array) -> Array:
            level = sum((bit << k for k, bit in enumerate(bits[:-1])), jnp.int32(0))
            return level * (1 - 2 * bits[-1])

        levels = words.unpack(layout, value, bits, [jnp.float32] * len(layout.leaves))
        scales = wire.split(to_floats(norms) / self.levels, self._buckets(layout))
        pairs = zip(levels, scales, strict=True)
        return [level * self._spread(scale, level.shape) for level, scale in pairs]
