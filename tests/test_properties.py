# SPDX-License-Identifier: Apache-2.0
"""Properties of the parts, for any tree, any number of workers and any weights."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distlion_jax import distributed_lion, reference, wire_cost
from distlion_jax._vote import coins, tally, words
from distlion_jax._vote.ballot import Ballot

BLOCK, PLANES, GROUP = 128, 32, 4096
few = settings(max_examples=12, deadline=None, derandomize=True, database=None)
some = settings(few, max_examples=40)

SHAPES = [(), (0,), (0, 4), (1,), (31,), (3, 5), (127,), (128,), (129,), (33, 128), (4095,)]
SHAPES += [(4096,), (32, 128), (2, 64, 32), (4097,), (64, 130), (3, 3, 8, 128)]
trees = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5).filter(
    lambda shapes: any(math.prod(shape) for shape in shapes)
)


def bits(plane):
    """Words to ``[32, ...]`` of 0 and 1."""
    return np.stack([(np.asarray(plane) >> k) & 1 for k in range(PLANES)]).astype(np.int64)


def number(planes):
    """Planes to the integers that they hold, ``[32, ...]``."""
    return sum(bits(plane) << k for k, plane in enumerate(planes))


@few
@given(shapes=trees, seed=st.integers(0, 2**16))
def test_unpack_inverts_pack(shapes, seed):
    """And every bit lies where the format says, with nothing in the padding."""
    rng = np.random.default_rng(seed)
    leaves = [rng.integers(0, 2, (2, *shape)).astype(np.uint16) for shape in shapes]
    layout = words.Layout(shapes)

    @jax.jit
    def both(codes):
        planes = words.pack(layout, lambda x: x, codes)
        value = lambda low, high: low + 2 * high  # noqa: E731
        return planes, words.unpack(layout, value, planes, [jnp.float32] * len(shapes))

    planes, back = both([low | (high << 8) for low, high in leaves])
    for (low, high), got in zip(leaves, back, strict=True):
        assert got.shape == low.shape
        np.testing.assert_array_equal(got, low + 2 * high)

    where = reference.addresses([leaf[0] for leaf in leaves])
    for which, plane in enumerate(planes):
        want = np.zeros((PLANES, layout.groups * BLOCK), np.int64)
        for leaf, (word, bit, _) in zip(leaves, where, strict=True):
            want[bit, word] = leaf[which]
        np.testing.assert_array_equal(bits(plane).reshape(PLANES, -1), want)


@some
@given(shapes=trees)
def test_layout_tables_agree_with_the_tree(shapes):
    layout = words.Layout(shapes)
    leaves = [np.zeros(shape) for shape in shapes]
    assert layout.size == sum(leaf.size for leaf in leaves)
    blocks = sum(-(-leaf.size // BLOCK) for leaf in leaves)
    assert layout.groups * PLANES >= blocks > layout.groups * PLANES - PLANES

    owner = np.full(layout.groups * PLANES, len(shapes))
    real = np.zeros((PLANES, layout.groups * BLOCK), np.int64)
    for i, (word, bit, block) in enumerate(reference.addresses(leaves)):
        assert (owner[block] == len(shapes)).all(), "a block belongs to one leaf"
        owner[block] = i
        assert not real[bit, word].any(), "a bit belongs to one coordinate"
        real[bit, word] = 1
    assert owner.tolist() == layout.block_leaf.reshape(-1).tolist()
    mask = real.reshape(PLANES, layout.groups, BLOCK)
    assert mask[:, : layout.body_groups].all()
    np.testing.assert_array_equal(
        bits(layout.bits_of([True] * len(shapes))[1]), mask[:, layout.body_groups :]
    )


elections = given(
    n=st.integers(1, 70),
    top=st.integers(1, 5),
    columns=st.sampled_from([1, BLOCK]),
    seed=st.integers(0, 2**16),
)


def ballots_of(n, top, columns, rng):
    """What n workers cast on two groups, as NumPy arrays; some blocks have no voter."""
    weight = rng.integers(0, top + 1, n, dtype=np.int32)
    votes = rng.integers(0, 2**32, (n, 2, BLOCK), dtype=np.uint32)
    present = rng.integers(0, 2**32, (n, 2, columns), dtype=np.uint32)
    present &= rng.integers(0, 2**32, (1, 2, columns), dtype=np.uint32)
    present[weight == 0] = 0
    return Ballot(votes, present, weight)


def counts(ballots):
    """By integers: the weight for +1, and the weight that votes, ``[32, 2, 128]`` each."""
    weight = ballots.weight.reshape(-1, 1, 1, 1).astype(np.int64)
    present = np.stack([bits(x) for x in ballots.present])
    votes = np.stack([bits(x) for x in ballots.votes])
    positive = (weight * votes * present).sum(axis=0)
    return positive, np.broadcast_to((weight * present).sum(axis=0), positive.shape)


@few
@elections
def test_tally_equals_integer_counts(n, top, columns, seed):
    rng = np.random.default_rng(seed)
    ballots = ballots_of(n, top, columns, rng)
    count = tally.count(jax.tree.map(jnp.asarray, ballots), top)
    positive, voters = counts(ballots)
    np.testing.assert_array_equal(number(count.positive), positive)
    np.testing.assert_array_equal(np.broadcast_to(number(count.voters), voters.shape), voters)

    real = rng.integers(0, 2**32, (2, BLOCK), dtype=np.uint32)
    margins = tally.margins(count, jnp.asarray(real), None, 1)
    total = 2 * positive - voters
    assert margins.tied.tolist() == [np.sum(bits(real) * (total == 0) * (voters > 0))]
    assert margins.margin.tolist() == [np.sum(bits(real) * np.abs(total))]


@few
@elections
def test_majority_equals_the_integer_formula(n, top, columns, seed):
    rng = np.random.default_rng(seed)
    ballots = ballots_of(n, top, columns, rng)
    count = tally.count(jax.tree.map(jnp.asarray, ballots), top)
    positive, voters = counts(ballots)
    total = 2 * positive - voters

    coin = rng.integers(0, 2**32, (2, BLOCK), dtype=np.uint32)
    broken = np.where((total == 0) & (voters > 0), 2 * bits(coin) - 1, np.sign(total))
    for ties, want in (("zero", np.sign(total)), ("coin", broken)):
        sign, live = tally.majority(count, ties, jnp.asarray(coin))
        np.testing.assert_array_equal(tally.decode_majority(bits(sign), bits(live)), want)


@few
@elections
def test_average_equals_the_integer_formula(n, top, columns, seed):
    ballots = ballots_of(n, top, columns, np.random.default_rng(seed))
    count = tally.count(jax.tree.map(jnp.asarray, ballots), top)
    positive, voters = counts(ballots)
    entered = ballots.weight.sum()
    mean = tally.decode_average("binary" if columns == 1 else "ternary", jnp.int32(entered))
    planes = [jnp.asarray(bits(plane), jnp.int32) for plane in tally.average(count)]
    want = (2 * positive - voters).astype(np.float32) / np.float32(max(entered, 1))
    np.testing.assert_array_equal(mean(*planes), want)


ROUNDS = 4096


@functools.cache
def tosses(stream):
    """``int8[step, coordinate]`` of 0 and 1: the coins of a group in each of 4096 rounds."""
    flips = jax.vmap(lambda step: coins.coins(step, stream, 0, 1)[0])
    plane = np.asarray(jax.jit(flips)(jnp.arange(ROUNDS)))
    return np.unpackbits(plane.view(np.uint8), axis=1).view(np.int8)


def assert_fair(flips):
    """All of them, and each row and each column of them, as coins would fall.

    In standard deviations: 5 for one figure; 6 for the largest of the rows and columns, since 5
    is exceeded by one of the 10^5 looked at here in one of 15 sets of true coins.
    """
    assert abs(flips.mean(dtype=np.float64) - 0.5) < 5 * 0.5 / math.sqrt(flips.size)
    for axis, tosses in enumerate(flips.shape):
        z = (flips.sum(axis=axis, dtype=np.int64) - tosses / 2) / (math.sqrt(tosses) / 2)
        assert np.abs(z).max() < 6
        assert abs(np.mean(z**2) - 1) < 5 * math.sqrt(2 / z.size)


@pytest.mark.parametrize("stream", [0, 1, 2, 8, 70])
def test_coins_are_fair(stream):
    """Of a coordinate over rounds, and of a round over coordinates."""
    assert tosses(stream).shape == (ROUNDS, GROUP)
    assert_fair(tosses(stream))


@pytest.mark.parametrize(("one", "other"), [(0, 1), (1, 2), (1, 8), (2, 70)])
def test_streams_of_coins_are_not_correlated(one, other):
    assert_fair(tosses(one) ^ tosses(other))


@pytest.mark.parametrize("lag", [1, 2, 1024])
def test_rounds_and_coordinates_are_not_correlated(lag):
    flips = tosses(1)
    assert_fair(flips[lag:] ^ flips[:-lag])
    assert_fair(flips[:, lag:] ^ flips[:, :-lag])


def test_coins_of_groups_continue_each_other():
    whole = coins.coins(jnp.int32(7), 3, 0, 5)
    np.testing.assert_array_equal(coins.coins(jnp.int32(7), 3, 2, 3), whole[2:])


rules = st.fixed_dictionaries(
    {
        "aggregation": st.sampled_from(["majority", "average"]),
        "ties": st.sampled_from(["zero", "coin"]),
        "ballot": st.sampled_from(["binary", "ternary"]),
        "max_weight": st.sampled_from([None, 1, 5]),
    }
)


def verdict_words(n, aggregation, ties, ballot, max_weight):
    """Words of a group's verdict, by the README's table."""
    planes = math.ceil(math.log2(n * (max_weight or 1) + 1))
    by_block = 1 if ballot == "binary" else BLOCK
    if aggregation == "majority":
        return BLOCK + (by_block if ties == "coin" else BLOCK)
    return planes * (BLOCK + 1) if ballot == "binary" else (planes + 1) * BLOCK


@some
@given(n=st.integers(2, 300), share=st.integers(1, 40), rules=rules)
def test_two_phase_is_flat_in_the_number_of_workers(n, share, rules):
    """Each worker tallies ``share`` groups: bytes by hand, and 2 to 3 bits for a majority."""
    params = jax.ShapeDtypeStruct((n * share * GROUP,), jnp.float32)
    cost = wire_cost(params, n, transport="two_phase", **rules)
    ballot = BLOCK + (1 if rules["ballot"] == "binary" else BLOCK)
    up = share * ballot + 2  # weight and step
    down = share * verdict_words(n, **rules) + 2 + 2  # voters and their weight; ties and margin
    assert cost.bytes_received == 4 * (n - 1) * (up + down)
    if rules["aggregation"] == "majority":
        each = (ballot + verdict_words(n, **rules)) / BLOCK + 6 / (share * BLOCK)
        assert cost.bits_per_parameter == pytest.approx((n - 1) / n * each)


@some
@given(n=st.integers(2, 300), shapes=trees, rules=rules)
def test_all_gather_grows_with_the_number_of_workers(n, shapes, rules):
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    pair = wire_cost(params, 2, transport="all_gather", **rules)
    cost = wire_cost(params, n, transport="all_gather", **rules)
    assert cost.bytes_received == (n - 1) * pair.bytes_received


@some
@given(n=st.integers(2, 300), shapes=trees, rules=rules)
def test_auto_is_the_cheaper_transport(n, shapes, rules):
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    costs = [wire_cost(params, n, transport=t, **rules) for t in ("all_gather", "two_phase")]
    assert wire_cost(params, n, **rules) == min(costs, key=lambda cost: cost.bytes_received)


@functools.partial(jax.jit, static_argnames="aggregation")
@functools.partial(jax.vmap, axis_name="data", in_axes=(1, None, None, None, None))
def path(gradients, start, rate, decay, aggregation):
    """Where one worker's parameters were after each step."""
    tx = distributed_lion(rate, weight_decay=decay, aggregation=aggregation, health="off")

    def step(carry, g):
        x, state = carry
        updates, state = tx.update(g, state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    return jax.lax.scan(step, (start, tx.init(start)), gradients)[1]


@pytest.mark.parametrize("aggregation", ["majority", "average"])
@some
@given(
    n=st.sampled_from([2, 3, 6]),
    seed=st.integers(0, 2**16),
    rate=st.floats(1e-4, 0.5),
    decay=st.floats(0.05, 2.0),
    spread=st.floats(0, 12),
)
def test_the_box_draws_in_whatever_the_gradients(aggregation, n, seed, rate, decay, spread):
    """Phase I of the paper's analysis, over any gradients at all.

    ``dist(x_t, box) <= (1 - lr * wd)^(t - s) dist(x_s, box)``, where the box is ``|x| <= 1 / wd``;
    inside it stays inside. Up to the rounding of one float32 step.
    """
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-spread, spread, (8, n, 1))
    gradients = (scale * rng.standard_normal((8, n, 40))).astype(np.float32)
    start = (rng.standard_normal(40) * 3 / decay).astype(np.float32)
    after = np.asarray(path(gradients, start, rate, decay, aggregation))[0]
    points = np.vstack([start, after]).astype(np.float64)
    distance = np.maximum(np.abs(points) - 1 / decay, 0)
    rounding = 4 * np.finfo(np.float32).eps * (np.abs(points[:-1]) + 1 / decay)
    assert (distance[1:] <= (1 - rate * decay) * distance[:-1] + rounding).all()
    assert (points[1:] != points[:-1]).any()
