# SPDX-License-Identifier: Apache-2.0
"""The transports: how n ballots become one verdict, each beside the collectives that it costs.

In:  this worker's :class:`~distlion_jax._vote.ballot.Ballot` (differs by worker).
Out: a :class:`~distlion_jax._vote.verdict.Verdict`: the same on every worker, bit for bit, and
     known to JAX as replicated (the result of an all-gather or all-reduce of ``wire``). Its planes,
     voters and weight are also the same whatever the transport. The health figures are, up to the
     order of a float sum.

A new transport is a class here, with its name in ``BY_NAME`` and in ``_rules`` (``Transport``,
``OPTIONS``). If it moves words by another collective, ``wire`` gets that, and
``distlion_jax.forecast`` its price in hops.
"""

import abc

import jax
import jax.numpy as jnp
from jax import Array, lax

from distlion_jax._rules import Rules
from distlion_jax._vote import frames, tally, wire, words
from distlion_jax._vote.ballot import Ballot
from distlion_jax._vote.costs import Collective, WireCost
from distlion_jax._vote.turnout import Round
from distlion_jax._vote.verdict import Verdict, judge
from distlion_jax._vote.words import BLOCK, PLANES, Layout


class Transport(abc.ABC):
    """A way to hold a round, and what that costs."""

    @abc.abstractmethod
    def run(self, ballot: Ballot, context: Round) -> Verdict:
        """Holds the round over its axis."""

    @abc.abstractmethod
    def collectives(self, layout: Layout, n: int, rules: Rules) -> tuple[Collective, ...]:
        """What one round of n workers sends, for leaves of this layout."""


def _header(ballot: Ballot, context: Round) -> Array:
    return jnp.stack([ballot.weight, context.number]).astype(jnp.uint32)


def _read_ballots(frame: Array, rules: Rules, groups: int) -> tuple[Ballot, Array]:
    """The ballots of all workers, and the round's number as worker 0 has it."""
    columns = frames.present_columns(rules)
    shapes = [(groups, BLOCK), (groups, columns), (frames.HEADER,)]
    votes, present, header = frames.unframe(frame, shapes)
    return Ballot(votes, present, header[:, 0].astype(jnp.int32)), header[0, 1]


def _entrants(weight: Array) -> tuple[Array, Array]:
    """Voters and the sum of their weights."""
    return (weight > 0).sum(dtype=jnp.int32), weight.sum(dtype=jnp.int32)


def _phase(op: str, words: int, n: int, rules: Rules, rows: int = 1) -> tuple[Collective, ...]:
    pieces = frames.pieces(rules, words)
    return tuple(Collective(op, "u32", rows * piece, n) for piece in pieces)


class AllGather(Transport):
    """Every worker receives all ballots and tallies them all: the paper's server, at every worker.

    n-1 bits a parameter: for few workers, or where latency rules.
    """

    def run(self, ballot: Ballot, context: Round) -> Verdict:
        """One all-gather; the tally is repeated on all workers."""
        layout, rules, axis = context.layout, context.rules, context.axis
        frame = frames.frame([ballot.votes, ballot.present, _header(ballot, context)], 1)[0]
        gathered = wire.gather(frame, axis, frames.pieces(rules, frame.size))
        ballots, number = _read_ballots(gathered, rules, layout.groups)

        def count_and_judge() -> tuple[tuple[Array, ...], Array, Array]:
            return judge(tally.count(ballots, rules.top_weight), context, number, 0)

        def nobody() -> tuple[tuple[Array, ...], Array, Array]:
            shapes = jax.eval_shape(count_and_judge)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        # As a branch, the tally is done once per word. XLA would fuse it into what decodes the
        # verdict and do it once per parameter. (Older versions drop an optimization barrier before
        # they fuse.)
        voters, weight = _entrants(ballots.weight)
        planes, tied, margin = lax.cond(weight > 0, count_and_judge, nobody)
        return Verdict(planes, voters, weight, tied, margin)

    def collectives(self, layout: Layout, n: int, rules: Rules) -> tuple[Collective, ...]:
        """The ballots of all groups."""
        columns = BLOCK + frames.present_columns(rules)
        return _phase("all-gather", layout.groups * columns + frames.HEADER, n, rules)


def slice_groups(layout: Layout, n: int) -> int:
    """Groups of the slice that each of n workers tallies under two_phase; the last are padding."""
    return -(-layout.groups // n)


class TwoPhase(Transport):
    """Every worker tallies one n-th of the coordinates, and spreads its verdict.

    2 to 3 bits a parameter for a majority, at any n. It scales like a ring all-reduce, being one: a
    reduce-scatter and an all-gather, of words.
    """

    def run(self, ballot: Ballot, context: Round) -> Verdict:
        """Scatters slices of the ballots, tallies the own slice, gathers the verdicts."""
        layout, rules, axis, n = context.layout, context.rules, context.axis, context.workers
        groups = slice_groups(layout, n)
        pad = ((0, groups * n - layout.groups), (0, 0))
        header = jnp.broadcast_to(_header(ballot, context), (n, frames.HEADER))
        padded = [jnp.pad(ballot.votes, pad), jnp.pad(ballot.present, pad), header]
        frame = frames.frame(padded, n)
        scattered = wire.scatter(frame, axis, frames.pieces(rules, frame.shape[1]))
        ballots, number = _read_ballots(scattered, rules, groups)
        count = tally.count(ballots, rules.top_weight)
        first = context.worker * groups
        planes, tied, margin = judge(count, context, number, first)
        header = jnp.stack(_entrants(ballots.weight)).astype(jnp.uint32)
        figures = [frames.to_words(x) for x in (tied, margin)]
        frame = frames.frame([*planes, header, *figures], 1)[0]
        shapes = [(groups, columns) for columns in frames.verdict_columns(rules, n)]
        shapes += [(frames.VERDICT_HEADER,), tied.shape, margin.shape]
        gathered = wire.gather(frame, axis, frames.pieces(rules, frame.size))
        *slices, header, tied, margin = frames.unframe(gathered, shapes)
        whole = tuple(x.reshape(-1, x.shape[-1])[: layout.groups] for x in slices)
        voters, weight = header[0].astype(jnp.int32)
        sums = [frames.to_floats(x).sum(axis=0) for x in (tied, margin)]
        return Verdict(whole, voters, weight, *sums)

    def collectives(self, layout: Layout, n: int, rules: Rules) -> tuple[Collective, ...]:
        """The ballots of a slice to each worker; the verdict of the own slice to all."""
        groups = slice_groups(layout, n)
        columns = BLOCK + frames.present_columns(rules)
        up = groups * columns + frames.HEADER
        down = groups * sum(frames.verdict_columns(rules, n)) + frames.VERDICT_HEADER
        down += frames.health_words(rules, len(layout.leaves))
        return _phase("all-to-all", up, n, rules, rows=n) + _phase("all-gather", down, n, rules)


class Psum(Transport):
    """An uncompressed all-reduce of counts, 8 bits or more a vote: what the others must equal."""

    def _dtype(self, n: int, rules: Rules) -> str:
        """Narrowest integer that holds any count of n workers and is summed natively."""
        return "s8" if n * rules.top_weight < 128 else "s32"

    def run(self, ballot: Ballot, context: Round) -> Verdict:
        """Sums unpacked votes."""
        rules, axis, n = context.rules, context.axis, context.workers
        dtype = {"s8": jnp.int8, "s32": jnp.int32}[self._dtype(n, rules)]
        sides = (ballot.votes & ballot.present, ballot.present)
        flat = jnp.concatenate([words.unpack_bits(x).reshape(-1) for x in sides])
        sums = wire.total((flat.astype(jnp.int32) * ballot.weight).astype(dtype), axis)
        sums = jnp.split(sums.astype(jnp.uint32), [PLANES * ballot.votes.size])
        width = range(frames.planes_for(n, rules.top_weight))
        positive, voters = (
            tuple(
                words.pack_bits((x.reshape(PLANES, *side.shape) >> jnp.uint32(k)) & 1)
                for k in width
            )
            for x, side in zip(sums, sides, strict=True)
        )
        mine = jnp.where(context.worker == 0, context.number, 0)  # the sum is worker 0's number
        figures = jnp.stack([(ballot.weight > 0).astype(jnp.int32), ballot.weight, mine])
        entered, weight, number = wire.total(figures, axis)
        count = tally.Count(positive, voters)
        planes, tied, margin = judge(count, context, number, 0)
        return Verdict(planes, entered, weight, tied, margin)

    def collectives(self, layout: Layout, n: int, rules: Rules) -> tuple[Collective, ...]:
        """The sums; and voters, weight and number where somebody reads them."""
        elements = layout.groups * PLANES * (BLOCK + frames.present_columns(rules))
        votes = Collective("all-reduce", self._dtype(n, rules), elements, n)
        if (rules.aggregation, rules.ties, rules.health) == ("majority", "zero", "off"):
            return (votes,)  # nobody reads the voters, their weight or the number: XLA drops them
        return (votes, Collective("all-reduce", "s32", 3, n))


BY_NAME: dict[str, Transport] = {
    "all_gather": AllGather(),
    "two_phase": TwoPhase(),
    "psum": Psum(),
}


def cost(layout: Layout, n: int, rules: Rules) -> WireCost:
    """Cost of one round of n workers; ``auto`` is resolved to the transport with fewest bytes."""
    rules = rules.for_workers(n)
    if not layout.size:
        return WireCost("none", 0, ())
    names = ("all_gather", "two_phase") if rules.transport == "auto" else (rules.transport,)
    # The root mean squares that noise is measured by, and of how many workers they are.
    scales = Collective("all-reduce", "f32", len(layout.leaves) + 1, n)
    before = (scales,) if rules.noise is not None else ()
    costs = [
        WireCost(name, layout.size, before + BY_NAME[name].collectives(layout, n, rules))
        for name in names
    ]
    return min(costs, key=lambda c: c.bytes_received)


def run_round(ballot: Ballot, context: Round) -> Verdict:
    """Holds the round with the transport that its rules name (``auto``: cheapest)."""
    name = cost(context.layout, context.workers, context.rules).transport
    return BY_NAME[name].run(ballot, context)
