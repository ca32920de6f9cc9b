# SPDX-License-Identifier: Apache-2.0
"""The transports: compositions of wire and tally that turn n ballots into one verdict.

In:  this worker's :class:`~distlion_jax.ballot.Ballot` (differs by worker).
Out: a :class:`Verdict`: the same on every worker, bit for bit; its planes, voters and weight are
     also the same whatever the transport (the health figures are, up to the order of a float sum).

* ``all_gather``: every worker receives all ballots and tallies them all (the paper's server,
  at every worker): n-1 bits a parameter; for few workers or where latency rules.
* ``two_phase``: every worker tallies one n-th of the coordinates and spreads its verdict:
  2 to 3 bits a parameter for a majority, at any n. It scales like a ring all-reduce, being one:
  a reduce-scatter and an all-gather, of words.
* ``psum``: an uncompressed all-reduce of counts: the oracle that the others must equal.
* ``auto``: the fewest bytes by the ledger.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from distlion_jax import ledger, tally, wire, words
from distlion_jax.ballot import Ballot
from distlion_jax.rules import AxisName, Rules
from distlion_jax.words import BLOCK, PLANES, Layout


class Verdict(NamedTuple):
    """What a round decided; the same on every worker."""

    planes: tuple[Array, ...]  # uint32[groups, 128 or 1] each; `decode` knows what they mean
    voters: Array  # int32[]: workers that took part
    weight: Array  # int32[]: sum of their weights (= voters without weights)
    tied: Array  # float32[segments]: coordinates whose vote was tied
    margin: Array  # float32[segments]: sum over coordinates of |sum of votes|


def _judge(
    rules: Rules, layout: Layout, count: tally.Count, step: Array, first: Array | int
) -> tuple[tuple[Array, ...], Array, Array]:
    """Verdict and margins of the groups ``first, first + 1, ...`` that were counted."""
    groups = count.positive[0].shape[0]
    if rules.aggregation == "majority":
        coin = words.coins(step, 0, first, groups) if rules.ties == "coin" else jnp.uint32(0)
        planes = tally.majority(count, rules.ties, coin)
    else:
        planes = tally.average(count)
    if rules.health == "off":
        return planes, jnp.zeros((0,), jnp.float32), jnp.zeros((0,), jnp.float32)
    index = first + jnp.arange(groups)
    table = np.concatenate([layout.tail_mask, np.zeros((1, BLOCK), np.uint32)])
    tail = jnp.asarray(table)[jnp.clip(index - layout.body_groups, 0, layout.tail_groups)]
    real = jnp.where((index < layout.body_groups)[:, None], np.uint32(0xFFFFFFFF), tail)
    owner, segments = None, 1
    if rules.health == "leaf":
        segments = len(layout.leaves)
        rows = np.concatenate([layout.block_leaf, np.full((1, PLANES), segments, np.int32)])
        owner = jnp.asarray(rows)[jnp.minimum(index, layout.groups)]
    margins = tally.margins(count, real, owner, segments)
    return planes, margins.tied, margins.margin


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.uint32)


def _ballot_header(ballot: Ballot, step: Array) -> Array:
    return jnp.stack([ballot.weight, step]).astype(jnp.uint32)


def _read_ballots(frame: Array, rules: Rules, groups: int) -> tuple[Ballot, Array]:
    shapes = [(groups, BLOCK), (groups, rules.present_columns), (ledger.HEADER,)]
    votes, present, header = wire.unframe(frame, shapes)
    return Ballot(votes, present, header[:, 0].astype(jnp.int32)), header[0, 1]


def _turnout(weight: Array) -> tuple[Array, Array]:
    return (weight > 0).sum(dtype=jnp.int32), weight.sum(dtype=jnp.int32)


def all_gather(
    ballot: Ballot, step: Array, layout: Layout, rules: Rules, axis: AxisName
) -> Verdict:
    """Gathers all ballots to all workers; each tallies everything."""
    frame = wire.frame([ballot.votes, ballot.present, _ballot_header(ballot, step)], 1)[0]
    frames = wire.gather(frame, axis, rules.pieces(frame.size))
    ballots, step = _read_ballots(frames, rules, layout.groups)

    def judge() -> tuple[tuple[Array, ...], Array, Array]:
        return _judge(rules, layout, tally.count(ballots, rules.top_weight), step, 0)

    def nobody() -> tuple[tuple[Array, ...], Array, Array]:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(judge))

    # As a branch, the tally is done once per word; XLA would fuse it into what decodes the verdict
    # and do it once per parameter. (Older versions drop an optimization barrier before they fuse.)
    voters, weight = _turnout(ballots.weight)
    planes, tied, margin = lax.cond(weight > 0, judge, nobody)
    return Verdict(planes, voters, weight, tied, margin)


def two_phase(ballot: Ballot, step: Array, layout: Layout, rules: Rules, axis: AxisName) -> Verdict:
    """Scatters slices of the ballots, tallies the own slice, gathers the verdicts."""
    n = wire.size(axis)
    groups = ledger.slice_groups(layout, n)
    pad = ((0, groups * n - layout.groups), (0, 0))
    header = jnp.broadcast_to(_ballot_header(ballot, step), (n, ledger.HEADER))
    frame = wire.frame([jnp.pad(ballot.votes, pad), jnp.pad(ballot.present, pad), header], n)
    frames = wire.scatter(frame, axis, rules.pieces(frame.shape[1]))
    ballots, step = _read_ballots(frames, rules, groups)
    count = tally.count(ballots, rules.top_weight)
    first = lax.axis_index(axis) * groups
    planes, tied, margin = _judge(rules, layout, count, step, first)
    header = jnp.stack(_turnout(ballots.weight)).astype(jnp.uint32)
    frame = wire.frame([*planes, header, _bits(tied), _bits(margin)], 1)[0]
    shapes = [(groups, columns) for columns in rules.verdict_columns(n)]
    shapes += [(ledger.VERDICT_HEADER,), tied.shape, margin.shape]
    frames = wire.gather(frame, axis, rules.pieces(frame.size))
    *slices, header, tied, margin = wire.unframe(frames, shapes)
    whole = tuple(x.reshape(-1, x.shape[-1])[: layout.groups] for x in slices)
    voters, weight = header[0].astype(jnp.int32)
    sums = [lax.bitcast_convert_type(x, jnp.float32).sum(axis=0) for x in (tied, margin)]
    return Verdict(whole, voters, weight, *sums)


def psum(ballot: Ballot, step: Array, layout: Layout, rules: Rules, axis: AxisName) -> Verdict:
    """Sums unpacked votes with an integer all-reduce: 8 bits or more a vote; the oracle."""
    n = wire.size(axis)
    dtype = {"s8": jnp.int8, "s32": jnp.int32}[ledger.psum_dtype(n, rules)]
    sides = (ballot.votes & ballot.present, ballot.present)
    flat = jnp.concatenate([words.unpack_bits(x).reshape(-1) for x in sides])
    sums = wire.total((flat.astype(jnp.int32) * ballot.weight).astype(dtype), axis)
    sums = jnp.split(sums.astype(jnp.uint32), [PLANES * ballot.votes.size])
    width = range(tally.planes_for(n, rules.top_weight))
    positive, voters = (
        tuple(words.pack_bits((x.reshape(PLANES, *side.shape) >> np.uint32(k)) & 1) for k in width)
        for x, side in zip(sums, sides, strict=True)
    )
    mine = jnp.where(lax.axis_index(axis) == 0, step, 0)  # the sum is worker 0's step
    figures = jnp.stack([(ballot.weight > 0).astype(jnp.int32), ballot.weight, mine])
    entered, weight, step = wire.total(figures, axis)
    planes, tied, margin = _judge(rules, layout, tally.Count(positive, voters), step, 0)
    return Verdict(planes, entered, weight, tied, margin)


_TRANSPORTS: dict[str, Callable[..., Verdict]] = {
    "all_gather": all_gather,
    "two_phase": two_phase,
    "psum": psum,
}


def hold(ballot: Ballot, step: Array, layout: Layout, rules: Rules, axis: AxisName) -> Verdict:
    """Holds a round over the axis with the transport that the rules name (``auto``: cheapest)."""
    n = wire.size(axis)
    return _TRANSPORTS[ledger.cost(layout, n, rules).transport](ballot, step, layout, rules, axis)


def decode(
    verdict: Verdict, layout: Layout, rules: Rules, dtypes: Sequence[jnp.dtype]
) -> list[Array]:
    """The verdict as leaves: -1, 0 or +1 (majority), or the mean vote in [-1, 1] (average)."""
    if rules.aggregation == "majority":
        return words.unpack(layout, tally.decode_majority, verdict.planes, dtypes)
    value = tally.decode_average(rules.ballot, verdict.weight)
    return words.unpack(layout, value, verdict.planes, dtypes)
