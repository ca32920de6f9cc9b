# SPDX-License-Identifier: Apache-2.0
"""Counts -> verdict and its health -> directions.

In:  the counted ballots of some groups.
Out: a :class:`Verdict`, the same on every worker, bit for bit; from it the leaves' directions.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from distlion_jax._rules import Rules
from distlion_jax._vote import tally, words
from distlion_jax._vote.turnout import Round
from distlion_jax._vote.words import PLANES
from distlion_jax.exchanges import Roles


class Verdict(NamedTuple):
    """What a round decided; the same on every worker."""

    planes: tuple[Array, ...]  # uint32[groups, 128 or 1] each; `decode` knows what they mean
    voters: Array  # int32[]: workers that took part
    weight: Array  # int32[]: sum of their weights (= voters without weights)
    tied: Array  # float32[segments]: coordinates whose vote was tied
    margin: Array  # float32[segments]: sum over coordinates of |sum of votes|


class VoteHealth(NamedTuple):
    """The last round's health. Scalars; ``tied`` and ``margin`` are a list with ``"leaf"``."""

    voted: Array  # bool[]; differs by worker: whether this worker took part
    voters: Array  # int32[]; the same on all workers: how many took part
    # float32[] (or a list, a scalar per leaf); same: share of coordinates that had votes and a sum
    # of 0. Coordinates without a vote are in the denominator only.
    tied: Any
    margin: Any  # float32[] (or a list, a scalar per leaf); same: mean |sum of votes| / weight
    roles = Roles(own=("voted",), shared=("voters", "tied", "margin"))


def judge(
    count: tally.Count, context: Round, number: Array, first: Array | int
) -> tuple[tuple[Array, ...], Array, Array]:
    """Planes, ties and margins of the groups ``first, first + 1, ...`` that were counted.

    ``number`` is the round's, as all workers have it.
    """
    layout, rules = context.layout, context.rules
    groups = count.positive[0].shape[0]
    if rules.aggregation == "majority":
        coin = context.coins(number, 0, first, groups) if rules.ties == "coin" else jnp.uint32(0)
        planes = tally.majority(count, rules.ties, coin)
    else:
        planes = tally.average(count)
    if rules.health == "off":
        return planes, jnp.zeros((0,), jnp.float32), jnp.zeros((0,), jnp.float32)
    owner, segments = None, 1
    if rules.health == "leaf":
        segments = len(layout.leaves)
        rows = np.concatenate([layout.block_leaf, np.full((1, PLANES), segments, np.int32)])
        owner = jnp.asarray(rows)[jnp.minimum(first + jnp.arange(groups), layout.groups)]
    margins = tally.margins(count, context.counted(first, groups), owner, segments)
    return planes, margins.tied, margins.margin


def decode(verdict: Verdict, context: Round, dtypes: list[Any]) -> list[Array]:
    """The verdict as leaves: -1, 0 or +1 (majority), or the mean vote in [-1, 1] (average)."""
    rules = context.rules
    if rules.aggregation == "majority":
        return words.unpack(context.layout, tally.decode_majority, verdict.planes, dtypes)
    value = tally.decode_average(rules.ballot, verdict.weight)
    return words.unpack(context.layout, value, verdict.planes, dtypes)


def no_health(rules: Rules, leaves: int) -> VoteHealth | None:
    """Before the first round; None with ``health="off"``."""
    if rules.health == "off":
        return None
    zero = jnp.zeros([], jnp.float32)
    # Optax's placeholder for parameters has no leaves: one scalar then stands for the whole list.
    figures = [zero] * leaves if rules.health == "leaf" and leaves else zero
    return VoteHealth(jnp.ones([], jnp.bool_), jnp.zeros([], jnp.int32), figures, figures)


def health_of(verdict: Verdict, context: Round, voted: Array) -> VoteHealth | None:
    """Of a round: sums as shares of the coordinates, and of the voters' weight."""
    rules = context.rules
    if rules.health == "off":
        return None
    sizes = context.sizes if rules.health == "leaf" else [sum(context.sizes)]
    size = jnp.asarray([max(s, 1) for s in sizes], jnp.float32)
    tied, margin = verdict.tied, verdict.margin
    if context.shards is not None:
        tied, margin = context.shards.total(jnp.stack([tied, margin]))
    tied = tied / size
    margin = margin / (size * jnp.maximum(verdict.weight, 1).astype(jnp.float32))
    if rules.health == "leaf":
        return VoteHealth(voted, verdict.voters, list(tied), list(margin))
    return VoteHealth(voted, verdict.voters, tied[0], margin[0])
