# SPDX-License-Identifier: Apache-2.0
"""How a round went: who voted, what was tied, how close it was.

In:  a verdict's sums. Out: the figures that the optimizer's state holds.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from distlion_jax import vote
from distlion_jax.rules import Rules
from distlion_jax.words import Layout


class VoteHealth(NamedTuple):
    """The last round's health. Scalars; ``tied`` and ``margin`` are a list with ``"leaf"``."""

    voted: Array  # bool[]; differs by worker: whether this worker took part
    voters: Array  # int32[]; the same on all workers: how many took part
    tied: Any  # float32[] (or a list, a scalar per leaf); same: share of coordinates tied
    margin: Any  # float32[] (or a list, a scalar per leaf); same: mean |sum of votes| / weight


def no_health(rules: Rules, leaves: int) -> VoteHealth | None:
    """Before the first round."""
    if rules.health == "off":
        return None
    zero = jnp.zeros([], jnp.float32)
    figures = zero if rules.health == "total" else [zero] * leaves
    return VoteHealth(jnp.ones([], jnp.bool_), jnp.zeros([], jnp.int32), figures, figures)


def health_of(
    rules: Rules, layout: Layout, voted: Array, verdict: vote.Verdict
) -> VoteHealth | None:
    """Of a round: sums as shares of the coordinates, and of the voters' weight."""
    if rules.health == "off":
        return None
    sizes = [leaf.size for leaf in layout.leaves] if rules.health == "leaf" else [layout.size]
    size = jnp.asarray([max(s, 1) for s in sizes], jnp.float32)
    tied = verdict.tied / size
    margin = verdict.margin / (size * jnp.maximum(verdict.weight, 1).astype(jnp.float32))
    if rules.health == "leaf":
        return VoteHealth(voted, verdict.voters, list(tied), list(margin))
    return VoteHealth(voted, verdict.voters, tied[0], margin[0])
