# SPDX-License-Identifier: Apache-2.0
"""PowerSGD: matrices as products of two thin ones, which can be all-reduced."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distlion_jax._rules import check_static
from distlion_jax._vote import wire
from distlion_jax._vote.turnout import Round, sum_over_present
from distlion_jax._vote.words import Layout
from distlion_jax.baselines.compress import Averaged, Compressor, Leaves, split_scale
from distlion_jax.ledger import Collective


def _usable(new: Array, old: Array) -> Array:
    """The new Q, but for columns that are all zero or not finite: those stay as they were.

    A column of zeros would stay zero, and the matrix could lose a rank for good. Columns are scaled
    to about 1. This leaves P, which is orthonormal, unchanged. Unscaled, M Q would grow with the
    square of the gradient, and underflow for tiny ones.
    """
    fine = jnp.all(jnp.isfinite(new), axis=0) & jnp.any(new != 0, axis=0)
    return jnp.where(fine, jax.vmap(lambda q: split_scale(q)[1], 1, 1)(new), old)


@dataclasses.dataclass(frozen=True)
class PowerSGD(Compressor):
    r"""Low-rank means by one step of the power method, warm-started, with error feedback.

    A leaf of two or more axes is a matrix M: its last axis against the others. With Q of the step
    before, in two all-reduces, and a third of one number, how many workers take part:

    .. math::

      P = \mathrm{orthogonalise}(\tfrac{1}{n} \textstyle\sum_i M_i Q), \qquad
      Q \leftarrow \tfrac{1}{n} \textstyle\sum_i M_i^T P, \qquad \bar M = P Q^T

    Vectors, and matrices that two factors would not make smaller, are averaged as they are. They
    leave no error. A worker's part, which error feedback takes off, is P P^T M_i.

    Differs from the paper:

    * Momentum is whatever optimizer follows.
    * P is orthogonalised by QR, in the backend's default precision of products. It must come out
      alike on all workers; on devices of one kind that run one program it does.
    * A column of Q that is all zero is kept as it was.

    Args:
      rank: r, columns of P and Q.
      seed: of the first Q.

    References:
      Vogels et al, `PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization
      <https://arxiv.org/abs/1905.13727>`_, 2019

    Examples:
      >>> import jax
      >>> cost = PowerSGD(1).cost({"w": jax.ShapeDtypeStruct((1024, 1024), "float32")}, n=2)
      >>> round(cost.bits_per_parameter, 4)
      0.0625
    """

    rank: int = 2
    seed: int = 0
    feedback = True
    transport = "all_reduce"

    def __post_init__(self) -> None:
        check_static("rank", self.rank, "int", 2**15)

    def _sides(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """Rows and columns of a leaf that is compressed."""
        if len(shape) < 2:
            return None
        rows, columns = int(np.prod(shape[:-1], dtype=np.int64)), shape[-1]
        return (rows, columns) if self.rank * (rows + columns) < rows * columns else None

    def init(self, leaves: Sequence[Any]) -> Any:
        """A random Q for every matrix, the same on all workers."""
        keys = jax.random.split(jax.random.key(self.seed), max(1, len(leaves)))
        sides = [self._sides(jnp.shape(x)) for x in leaves]
        return [
            jax.random.normal(key, (both[1], self.rank), jnp.float32)
            for key, both in zip(keys, sides, strict=True)
            if both
        ]

    def mean(self, leaves: Leaves, memory: Any, context: Round) -> Averaged:
        """Two all-reduces, the first of which carries what is not compressed, too."""
        sides = [self._sides(x.shape) for x in leaves]
        matrices = [x.reshape(both) for x, both in zip(leaves, sides, strict=True) if both]
        rest = [x for x, both in zip(leaves, sides, strict=True) if both is None]
        wanted, found = [(m.shape[1], self.rank) for m in matrices], [q.shape for q in memory]
        if found != wanted:
            raise ValueError(
                f"the state's matrices Q have shapes {found}; PowerSGD(rank={self.rank}) needs "
                f"{wanted}. A state of another rank or other parameters cannot be gone on with: "
                "use that rank, or initialise anew."
            )
        workers = wire.total(context.weight, context.axis)

        def average(arrays: list[Array]) -> list[Array]:
            if not arrays:
                return []
            flat = jnp.concatenate([x.reshape(-1) for x in arrays])
            total = sum_over_present(flat, context.weight, context.axis)
            parts = wire.split(total / workers.astype(jnp.float32), [x.size for x in arrays])
            return [part.reshape(x.shape) for part, x in zip(parts, arrays, strict=True)]

        products = [m @ q for m, q in zip(matrices, memory, strict=True)]
        means = average([*products, *rest])
        ps = [jnp.linalg.qr(p)[0] for p in means[: len(matrices)]]
        qs = average([m.T @ p for m, p in zip(matrices, ps, strict=True)])
        own = [p @ (p.T @ m) for m, p in zip(matrices, ps, strict=True)]

        def assembled(low: list[Array], dense: list[Array]) -> Leaves:
            parts = {True: iter(low), False: iter(dense)}
            pairs = zip(leaves, sides, strict=True)
            return [next(parts[both is not None]).reshape(x.shape) for x, both in pairs]

        mean = assembled([p @ q.T for p, q in zip(ps, qs, strict=True)], means[len(matrices) :])
        memory = [_usable(new, old) for new, old in zip(qs, memory, strict=True)]
        return Averaged(mean, assembled(own, rest), memory, workers)

    def collectives(self, layout: Layout, n: int) -> tuple[Collective, ...]:
        """The number of workers; all P with what is not compressed; all Q."""
        sides = [self._sides(leaf.shape) for leaf in layout.leaves]
        pairs = list(zip(sides, layout.leaves, strict=True))
        first = sum(self.rank * both[0] if both else leaf.size for both, leaf in pairs)
        second = sum(self.rank * both[1] for both in sides if both)
        floats = [Collective("all-reduce", "f32", size, n) for size in (first, second) if size]
        return (Collective("all-reduce", "s32", 1, n), *floats)
