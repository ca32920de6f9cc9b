# SPDX-License-Identifier: Apache-2.0
"""Who takes part in a round, and the one mean over those who do.

In:  what a worker was told (``participating``, ``weight``), hyperparameters, its own numbers.
Out: a :class:`Round`, which all that follows is handed; sums and means over the axis.

A worker sits a round out in four cases: it was told to; its weight is 0 or out of range; a traced
hyperparameter is out of range; one of its numbers is not finite. A :class:`Round` says so by its
weight, 0, and by nothing else.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from distlion_jax._promotion import default_promotion
from distlion_jax._rules import MAX_WEIGHT, AxisName, Rules, concrete_value
from distlion_jax._vote import coins, wire
from distlion_jax._vote.shards import Shards
from distlion_jax._vote.words import BLOCK, Layout
from distlion_jax.exchanges import Roles

FIGURES = 2  # that a mean sends beside its numbers: sum of the weights, workers


@dataclasses.dataclass(frozen=True)
class Round:
    """One round, as one worker sees it."""

    count: Array  # int32[]; the same on all workers: rounds so far
    number: Array  # int32[]; the same on all workers: rounds so far, mixed with the seed
    worker: Array  # int32[]: this worker's index
    weight: Array  # int32[]: this worker's say; 0: it sits the round out
    axis: AxisName
    layout: Layout  # of the leaves
    rules: Rules  # those that the axis's number of workers follows
    shards: Shards | None = None  # how a worker's devices share the leaves; None: it is one device

    @property
    def workers(self) -> int:
        """How many workers the axis has."""
        return wire.size(self.axis)

    @property
    def takes_part(self) -> Array:
        """``bool[]``: whether this worker does."""
        return self.weight > 0

    @property
    def sizes(self) -> list[int]:
        """Coordinates of each whole leaf."""
        whole = self.layout if self.shards is None else self.shards.whole
        return [leaf.size for leaf in whole.leaves]

    def only_if(self, fine: Array) -> "Round":
        """The same round, which this worker sits out unless all is fine on all of its devices."""
        if self.shards is not None:
            fine = self.shards.all(fine)
        return dataclasses.replace(self, weight=jnp.where(fine, self.weight, 0))

    def coins(self, number: Array, stream: Array | int, first: Array | int, groups: int) -> Array:
        """``uint32[groups, 128]``: coins of the groups ``first, ...``, alike on copies of a shard.

        Args:
          number: the round's.
          stream: as of :func:`distlion_jax._vote.coins.coins`.
          first: index of the first group wanted.
          groups: how many groups.
        """
        if self.shards is None:
            return coins.coins(number, stream, first, groups)
        words = jnp.zeros((groups, BLOCK), jnp.uint32)
        for kind, chosen in self.shards.kinds():
            salted = coins.salted(stream, self.shards.salt(kind))
            mask = self.layout.window(chosen, first, groups)
            words |= mask & coins.coins(number, salted, first, groups)
        return words

    def counted(self, first: Array | int, groups: int) -> Array:
        """``uint32[groups, 128]``: bits that stand for a coordinate, in one copy of each shard."""
        if self.shards is None:
            return self.layout.window([True] * len(self.layout.leaves), first, groups)
        words = jnp.zeros((groups, BLOCK), jnp.uint32)
        for kind, chosen in self.shards.kinds():
            mask = self.layout.window(chosen, first, groups)
            words |= jnp.where(self.shards.is_first(kind), mask, np.uint32(0))
        return words


def begin(
    number: Array,
    leaves: Sequence[Array],
    axis: AxisName,
    rules: Rules | None = None,
    participating: ArrayLike = True,
    weight: ArrayLike | None = None,
) -> Round:
    """The round that a worker enters with these leaves; numbers that are not finite come later.

    Args:
      number: ``int32[]``, rounds before this one.
      leaves: this worker's own gradients; their shapes matter.
      axis: mapped axis, or axes.
      rules: what the workers follow; None: the defaults.
      participating: ``bool[]``, this worker's own; False sits the round out.
      weight: ``int[]`` in [0, max_weight], this worker's own; None: 1.

    Raises:
      ValueError: for an axis that is not bound, or arguments of another kind.
    """
    rules = Rules() if rules is None else rules
    n, count = wire.size(axis), number
    if rules.seed:  # without one, or with 0, coins and noise are of the round alone
        seed = jax.lax.bitcast_convert_type(coins.mix(jnp.uint32(rules.seed)), jnp.int32)
        number = number ^ seed
    return Round(
        count,
        number,
        wire.worker(axis),
        say(rules, participating, weight),
        axis,
        Layout([x.shape for x in leaves]),
        rules.for_workers(n),
    )


def say(rules: Rules, participating: ArrayLike, weight: ArrayLike | None) -> Array:
    """``int32[]``: this worker's weight, 0 if it was told to sit out."""
    if jnp.shape(participating) or not jnp.issubdtype(jnp.result_type(participating), jnp.bool_):
        raise ValueError(
            "`participating` must be a bool scalar, this worker's own; got "
            f"{jnp.result_type(participating)}{list(jnp.shape(participating))}."
        )
    if weight is None:
        return jnp.where(participating, 1, 0).astype(jnp.int32)
    if jnp.shape(weight) or not jnp.issubdtype(jnp.result_type(weight), jnp.integer):
        raise ValueError(
            "`weight` must be an integer scalar, this worker's own; got "
            f"{jnp.result_type(weight)}{list(jnp.shape(weight))}."
        )
    if rules.max_weight is None:
        raise ValueError(
            "`weight` was passed but `max_weight` is None: pass max_weight=<the largest weight> to "
            "the optimizer, which decides how many bits the counters need."
        )
    value = concrete_value(weight)
    if value is not None and not 0 <= value <= rules.top_weight:
        raise ValueError(
            f"`weight` must lie in [0, max_weight={rules.top_weight}]; got {weight}. Raise "
            "max_weight, or divide all weights by a common factor."
        )
    weight = jnp.asarray(weight)
    top = min(rules.top_weight, jnp.iinfo(weight.dtype).max)  # in a narrow dtype it could wrap
    valid = (weight > 0) & (weight <= top)  # a traced one out of range sits out
    return jnp.where(jnp.asarray(participating) & valid, weight, 0).astype(jnp.int32)


def sane(b1: ArrayLike, b2: ArrayLike, mu: Any, *from_zero: ArrayLike) -> Array:
    """``bool[]``: whether numbers that were traced when they were checked are in range.

    ``b2`` must be below 1 in the dtypes of the momentum ``mu`` too, or it would never decay.
    """
    b1, b2 = jnp.asarray(b1), jnp.asarray(b2)
    inside = (b1 >= 0) & (b1 < 1) & (b2 >= 0) & (b2 < 1)
    for dtype in dict.fromkeys(m.dtype for m in jax.tree.leaves(mu)):  # as all processes order it
        inside &= b2.astype(dtype) < 1
    for x in map(jnp.asarray, from_zero):
        inside &= (x >= 0) & (x < jnp.inf)
    return inside


def remember(g: Array, m: Array, b2: Any) -> Array:
    """``b2 m + (1 - b2) g`` in the momentum's dtype, in Optax's order of operations.

    The momentum is multiplied in its own dtype, by ``b2`` rounded to it. Multiplied in float32 by
    a b2 of 0.998, a bfloat16 number would round back to itself, and never decay.
    """
    return ((1.0 - b2) * g + jnp.asarray(b2).astype(m.dtype) * m).astype(m.dtype)


def blend(g: Array, m: Array, b1: Any) -> Array:
    """``b1 m + (1 - b1) g``: what a worker's sign is of, in Optax's order of operations."""
    return (1.0 - b1) * g + b1 * m


def all_finite(tree: Any) -> Array:
    """``bool[]``: whether every number in the tree is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)] or [True]))


def summable(tree: Any, most: int) -> Array:
    """``bool[]``: whether so many times any number of the tree is finite, in float32 at least."""

    def fits(x: Any) -> Array:
        wide = jnp.promote_types(jnp.result_type(x), jnp.float32)
        limit = jnp.finfo(wide).max / most
        return jnp.all(jnp.abs(x).astype(limit.dtype) <= limit)  # a NaN is not

    return jnp.all(jnp.stack([fits(x) for x in jax.tree.leaves(tree)] or [True]))


def finite_norm(tree: Any) -> Array:
    """``bool[]``: whether the tree has a finite norm in float32.

    One number of 1e20 has none, and would end in scales and errors that are not finite.
    """
    return jnp.isfinite(sum(jnp.sum(x * x) for x in jax.tree.leaves(tree)))


def nothing(updates: Any) -> Any:
    """Updates of leaves without coordinates, known to JAX as the same on all workers."""
    return jax.tree.map(lambda g: jnp.zeros(g.shape, g.dtype), updates)


class MeanHealth(NamedTuple):
    """How a full-precision mean went: who was counted."""

    counted: Array  # bool[]; differs by worker: whether this worker was
    workers: Array  # int32[]; the same on all workers: how many were
    roles = Roles(own=("counted",), shared=("workers",))


def no_mean(like: MeanHealth | None = None) -> MeanHealth:
    """Before the first round, or where none was held: in the types of a state's health."""
    if like is None:
        return MeanHealth(jnp.ones([], jnp.bool_), jnp.zeros([], jnp.int32))
    return MeanHealth(jnp.ones_like(like.counted), jnp.zeros_like(like.workers))


def as_held(health: MeanHealth, old: MeanHealth, axis: AxisName) -> MeanHealth:
    """The health in the types of the state that holds it.

    A state that the workers of the axis share, as chips share that of their node, cannot hold each
    one's own flag: it holds whether all were counted. (Only where JAX tracks it; else one's own.)
    """
    if not wire.varying_axes(health.counted) <= wire.varying_axes(old.counted):
        health = health._replace(counted=health.workers == wire.size(axis))
    return MeanHealth(*(wire.vary_as(x, y) for x, y in zip(health, old, strict=True)))


def sum_over_present(
    x: Array, weight: Array, axis: AxisName, wire_dtype: DTypeLike | None = None
) -> Array:
    """``sum_i weight_i x_i`` over the workers with a weight, in float32 at least; replicated."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    mine = jnp.where(weight > 0, x.astype(wide) * weight, 0)
    if wire_dtype is not None and jnp.iscomplexobj(mine):
        parts = [wire.total(part.astype(wire_dtype), axis) for part in (mine.real, mine.imag)]
        return jax.lax.complex(*(part.astype(jnp.finfo(wide).dtype) for part in parts))
    return wire.total(mine.astype(wire_dtype or wide), axis).astype(wide)


def weighted_sum(
    tree: Any, weight: Array, axis: AxisName, wire_dtype: DTypeLike | None = None
) -> tuple[Any, Array, MeanHealth]:
    """Sums over the workers with a weight, in float32 at least.

    Args:
      tree: this worker's own arrays; finite unless its weight is 0.
      weight: ``int32[]``, this worker's; 0 leaves it out.
      axis: mapped axis, or axes.
      wire_dtype: of the sum; None: float32, or what is wider.

    Returns:
      ``sum_i weight_i x_i`` of every leaf; ``float32[]``, the sum of the weights; who was counted.
      The sums and their count are the same on all workers.
    """
    sums = jax.tree.map(lambda x: sum_over_present(x, weight, axis, wire_dtype), tree)
    # One small all-reduce of FIGURES. Sums of weights up to 2**24 are exact in float32.
    figures = jnp.stack([weight, weight > 0]).astype(jnp.float32)
    whole, workers = wire.total(figures, axis)
    return sums, whole, MeanHealth(weight > 0, workers.astype(jnp.int32))


@default_promotion
def finite_mean(
    tree: Any,
    axis: AxisName,
    weight: ArrayLike = 1,
    wire_dtype: DTypeLike | None = None,
) -> tuple[Any, MeanHealth]:
    """The full-precision mean over the workers, less those with a number that is not finite.

    Every full-precision mean of gradients or momenta is this one. It is NaN where nobody is
    counted.

    Args:
      tree: this worker's own arrays.
      axis: mapped axis, or axes.
      weight: ``int32[]``, this worker's; 0 leaves it out.
      wire_dtype: of the sum; None: float32.

    Returns:
      The mean, in the arrays' dtypes and the same on all workers; who was counted.
    """
    most = wire.size(axis) * (1 if isinstance(weight, int) else MAX_WEIGHT)
    weight = jnp.where(summable(tree, most), jnp.asarray(weight, jnp.int32), 0)
    sums, whole, health = weighted_sum(tree, weight, axis, wire_dtype)
    mean = lambda s, x: (s / whole.astype(s.dtype)).astype(x.dtype)  # noqa: E731 (0 / 0 is NaN)
    return jax.tree.map(mean, sums, tree), health
