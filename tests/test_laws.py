# SPDX-License-Identifier: Apache-2.0
"""The laws of the vote, against the plain NumPy reference, with ==."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distlion_jax import (
    distributed_lion,
    init_state,
    make_train_step,
    replicas_agree,
    replicate,
    worker_mesh,
)
from tests.helpers import (
    B1,
    B2,
    TREES,
    assert_equal_to_reference,
    gradients,
    map_workers,
    run,
    run_reference,
    shapes_to_params,
    stack_state,
)

RULES = [
    {"aggregation": "majority", "ties": "zero"},
    {"aggregation": "majority", "ties": "coin"},
    {"aggregation": "average"},
]
MAPS = ["vmap", "pmap", "shard_map", "shard_map_unchecked"]


def ids(rules):
    return "-".join(rules.values()) if isinstance(rules, dict) else str(rules)


# Laws 2 and 3: every transport, every n, both aggregations, tie rules and ballots.


SLOW = pytest.mark.slow


@pytest.mark.parametrize("n", [1, 2, 3, 8, *(pytest.param(n, marks=SLOW) for n in (7, 16, 32))])
@pytest.mark.parametrize("ballot", ["binary", "ternary"])
@pytest.mark.parametrize("rules", RULES, ids=ids)
def test_transports_equal_reference(n, ballot, rules):
    tree = TREES["small"] if n < 16 else {"rows": (3, 128), "a": (33,), "scalar": ()}
    want = run_reference(tree, n, 2, ballot=ballot, **rules)
    for transport in ["all_gather", "two_phase"] + ["psum"] * (n in (3, 16)):
        got = run(tree, n, 2, transport=transport, ballot=ballot, **rules)
        assert_equal_to_reference(tree, got, want)


@pytest.mark.parametrize("rules", RULES, ids=ids)
def test_more_workers_than_one_adder_takes(rules):
    tree, n = {"a": (3, 5)}, 130
    want = run_reference(tree, n, 2, **rules)
    assert_equal_to_reference(tree, run(tree, n, 2, transport="two_phase", **rules), want)


@pytest.mark.parametrize("name", ["mixed", "exact", "scalar"])
@pytest.mark.parametrize("transport", ["all_gather", "two_phase"])
def test_any_tree(name, transport):
    tree = TREES[name]
    want = run_reference(tree, 4, 3, ties="coin")
    assert_equal_to_reference(tree, run(tree, 4, 3, transport=transport, ties="coin"), want)


@pytest.mark.parametrize("how", ["vmap", "shard_map"])
@pytest.mark.parametrize("transport", ["all_gather", "two_phase"])
def test_words_may_travel_in_chunks(how, transport):
    """Uneven ones (129 words a group, and headers), and more of them than there are words."""
    tree = {"rows": (16, 128), "a": (33,), "scalar": ()}
    want = run_reference(tree, 8, 2, ties="coin")
    for chunks in (2, 7, 64):
        got = run(tree, 8, 2, how, transport=transport, ties="coin", chunks=chunks)
        assert_equal_to_reference(tree, got, want)


@pytest.mark.parametrize("how", MAPS)
@pytest.mark.parametrize("transport", ["all_gather", "two_phase", pytest.param("psum", marks=SLOW)])
@pytest.mark.parametrize("rules", RULES[1:], ids=ids)
def test_every_map_equals_reference(how, transport, rules):
    tree = {"rows": (16, 128), "a": (33,), "scalar": ()}
    want = run_reference(tree, 8, 2, **rules)
    assert_equal_to_reference(tree, run(tree, 8, 2, how, transport=transport, **rules), want)


@pytest.fixture
def optimized():
    """Compiled as a user's programs are (see conftest)."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.parametrize("how", MAPS)
@pytest.mark.parametrize("size", [33, 4097])
def test_average_divides_alike_in_every_map(how, size, optimized):
    """By 7: XLA multiplies by a rounded reciprocal where it sees one divisor for all."""
    tree = {"a": (size,)}
    want = run_reference(tree, 7, 1, aggregation="average")
    assert_equal_to_reference(tree, run(tree, 7, 1, how, aggregation="average"), want)


@pytest.mark.parametrize("transport", ["all_gather", "two_phase", "psum"])
def test_mixed_dtypes(transport):
    n, tree = 3, {"f": (40, 128), "h": (33,)}
    dtypes = {"f": jnp.float32, "h": jnp.bfloat16}
    grads = {k: v.astype(dtypes[k]) for k, v in gradients(tree, n, 0).items()}
    want = run_reference(tree, n, 1, grads=[grads])
    got = run(tree, n, 1, grads=[grads], transport=transport)
    assert {k: v.dtype for k, v in got[0][0].items()} == dtypes
    for leaf, name in enumerate(sorted(tree)):
        verdict = want[0][0].direction[leaf].astype(np.float32)
        np.testing.assert_array_equal(got[0][0][name][0].astype(np.float32), verdict)


# Law 1: one worker, and workers that agree, are Optax's Lion.


def train(tx, grads, params, n, axis):
    """Parameters and directions of some steps, operation by operation: no fusion, no ulp lost."""

    def worker(grads):
        x, state, signs = params, tx.init(params), []
        for g in grads:
            updates, state = tx.update(g, state, x)
            x = optax.apply_updates(x, updates)
            signs.append(updates)
        return x, signs

    if axis is None:
        return worker(grads)
    stacked = jax.tree.map(lambda g: jnp.stack([g] * n), grads)
    return jax.tree.map(lambda x: x[0], jax.vmap(worker, axis_name=axis)(stacked))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("mu_dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("aggregation", ["majority", "average"])
def test_one_or_equal_workers_are_optax_lion(dtype, mu_dtype, aggregation):
    tree = TREES["small"]
    keys = iter(jax.random.split(jax.random.key(0), 99))
    draw = lambda s: jax.random.normal(next(keys), s, dtype)  # noqa: E731
    params = {k: draw(s) for k, s in tree.items()}
    grads = [{k: draw(s) for k, s in tree.items()} for _ in range(3)]
    grads[2]["rows"] = grads[2]["rows"] * 0  # exact zeros of the gradient, not of the blend
    schedule = optax.linear_schedule(1e-2, 1e-3, 4)
    args = dict(learning_rate=schedule, weight_decay=0.1, mu_dtype=mu_dtype)
    mask = {k: k != "a" for k in tree}
    want = train(optax.lion(mask=mask, **args), grads, params, 1, None)
    cases = [(1, None, "binary"), (1, "w", "binary"), (3, "w", "ternary"), (4, "w", "binary")]
    for n, axis, ballot in cases:
        tx = distributed_lion(
            mask=mask, axis_name=axis, aggregation=aggregation, ballot=ballot, health="off",
            allow_single_worker=True, **args,
        )  # fmt: skip
        got = train(tx, grads, params, n, axis)
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_one_worker_keeps_isolated_zeros():
    g = {"w": np.array([[0.0, 1.0, 0.0, -2.0]], np.float32)}
    direction = run({"w": (4,)}, 1, 1, grads=[g])[0][0]["w"][0]
    assert direction.tolist() == [0, 1, 0, -1]


# Law 4: permuting workers changes nothing; flipping all signs flips the verdict.


@pytest.mark.parametrize("rules", RULES, ids=ids)
def test_permuting_and_flipping(rules):
    tree, n = TREES["small"], 5
    g = gradients(tree, n, 3)
    base = run(tree, n, 1, grads=[g], ballot="ternary", **rules)[0][0]
    order = np.random.default_rng(0).permutation(n)
    shuffled = {k: v[order] for k, v in g.items()}
    for name, got in run(tree, n, 1, grads=[shuffled], ballot="ternary", **rules)[0][0].items():
        np.testing.assert_array_equal(got, base[name])
    flipped = run(tree, n, 1, grads=[{k: -v for k, v in g.items()}], ballot="ternary", **rules)[0][
        0
    ]
    for name, got in flipped.items():
        untied = base[name] * 0 == got * 0
        if rules.get("ties") == "coin":  # the coin of a tied coordinate does not flip
            untied = g[name].copy()
            untied = np.broadcast_to(np.sign(untied).sum(0) != 0, got.shape)
        np.testing.assert_array_equal(got[untied], -base[name][untied])


# Law 5: replicas stay bit-identical.


@pytest.mark.parametrize("steps", [50, pytest.param(2000, marks=pytest.mark.slow)])
def test_replicas_stay_identical(steps):
    mesh = worker_mesh(8)
    tx = distributed_lion(optax.cosine_decay_schedule(1e-2, steps), weight_decay=0.1, ties="coin")
    params = replicate({"w": jnp.zeros((32, 8)), "b": jnp.zeros(8)}, mesh)
    state = init_state(tx, params, mesh)
    target = jax.random.normal(jax.random.key(1), (32, 8))

    def loss(p, x):
        return jnp.mean((jnp.tanh(x @ p["w"] + p["b"]) - jnp.tanh(x @ target)) ** 2)

    step = make_train_step(loss, tx, mesh)
    first = None
    for i in range(steps):
        x = jax.random.normal(jax.random.fold_in(jax.random.key(2), i), (32, 32))
        params, state, metrics = step(params, state, x)
        first = first or float(metrics.loss)
    assert replicas_agree(params, mesh)
    assert float(metrics.loss) < first
    momentum = np.asarray(state[0].mu["w"])
    assert not np.array_equal(momentum[0], momentum[1])


# Law 6: zeros never move.


@pytest.mark.parametrize("ballot", ["binary", "ternary"])
@pytest.mark.parametrize("rules", RULES, ids=ids)
def test_frozen_leaves_and_untouched_rows_never_move(ballot, rules):
    n, rounds = 4, 30
    tree = {"frozen": (77,), "rows": (12, 256), "live": (50,)}
    grads = []
    for r in range(rounds):
        g = gradients(tree, n, r, zero_rows=False)
        g["frozen"][:] = 0
        g["rows"][:, 3:7] = 0
        grads.append(g)
    for direction, state in run(tree, n, rounds, grads=grads, ballot=ballot, **rules):
        assert not direction["frozen"].any()
        assert not direction["rows"][:, 3:7].any()
        assert direction["live"].any()
        assert not state.mu["frozen"].any()


def test_one_worker_that_saw_a_row_decides_it():
    g = {"rows": np.zeros((4, 3, 128), np.float32)}
    g["rows"][2, 1] = -1.0
    direction = run({"rows": (3, 128)}, 4, 1, grads=[g])[0][0]["rows"][0]
    assert (direction[1] == -1).all()
    assert not direction[[0, 2]].any()


def test_isolated_zeros_do_not_drift():
    steps, width = 400, 127
    g = np.zeros((3, 1 + width), np.float32)
    g[:, 0] = 1.0  # one live coordinate keeps the block voting
    history = run({"w": (1 + width,)}, 3, steps, grads=[{"w": g}] * steps)
    walk = sum(direction["w"][0] for direction, _ in history)
    assert walk[0] == steps
    # A fair coin strays by sqrt(steps) = 20; a constant would stray by 400.
    assert np.abs(walk[1:]).max() < 5 * np.sqrt(steps)
    assert abs(walk[1:].mean()) < 5 * np.sqrt(steps / width)


def test_dead_zone_abstains():
    tree, n = TREES["small"], 3
    want = run_reference(tree, n, 2, ballot="ternary", threshold=0.15)
    assert_equal_to_reference(tree, run(tree, n, 2, ballot="ternary", threshold=0.15), want)


# Noise before the sign.


@pytest.mark.parametrize("how", ["vmap", "shard_map"])
@pytest.mark.parametrize("transport", ["all_gather", "two_phase"])
def test_noise_equals_reference(how, transport):
    tree, n = {"rows": (16, 128), "a": (33,), "scalar": (), "empty": (0, 4)}, 4
    grads = [gradients(tree, n, r) for r in range(3)]
    grads[1]["a"][2, 5] = np.inf  # its squares are left out, too
    want = run_reference(tree, n, 3, grads=grads, noise=2.0)
    got = run(tree, n, 3, how, grads=grads, transport=transport, noise=2.0)
    assert_equal_to_reference(tree, got, want)
    quiet = run_reference(tree, n, 3, grads=grads)
    assert any((a != b).any() for a, b in zip(want[0][0].direction, quiet[0][0].direction))  # noqa: B905


SEEDED = dict(ties="coin", noise=2.0, seed=2**31 + 7)


@pytest.mark.parametrize("transport", ["all_gather", "two_phase", "psum"])
def test_a_seed_of_coins_and_noise_equals_reference(transport):
    got = run(TREES["small"], 4, 2, transport=transport, **SEEDED)
    assert_equal_to_reference(TREES["small"], got, run_reference(TREES["small"], 4, 2, **SEEDED))


def test_other_seeds_toss_other_coins_and_zero_is_none():
    """All tied: a coordinate's verdict is its coin."""
    g = [{"w": np.stack([np.ones((32, 256)), -np.ones((32, 256))]).astype(np.float32)}]
    verdicts = [
        run(TREES["exact"], 2, 1, grads=g, ties="coin", **seed)[0][0]["w"][0]
        for seed in ({}, {"seed": 0}, {"seed": 1}, {"seed": 2})
    ]
    np.testing.assert_array_equal(verdicts[0], verdicts[1])
    for one, other in ((0, 2), (2, 3)):
        assert abs(np.mean(verdicts[one] == verdicts[other]) - 0.5) < 0.03
    assert all((np.abs(v) == 1).all() for v in verdicts)


def test_with_noise_votes_count_magnitudes():
    """Two of three workers say + a little, one says - a lot: the mean vote is the mean's sign."""
    g = {"w": np.full((3, 4096), 0.25, np.float32)}
    g["w"][2] = -1.0
    plain = run({"w": (4096,)}, 3, 1, grads=[g], aggregation="average")[0][0]["w"][0]
    noisy = run({"w": (4096,)}, 3, 1, grads=[g], aggregation="average", noise=2.0)[0][0]["w"][0]
    amplitude = 2.0 * np.sqrt((g["w"] ** 2).mean())
    want = (g["w"][:, 0] / amplitude).mean()
    assert plain.mean() > 0.3
    assert want < 0
    assert noisy.mean() == pytest.approx(want, abs=5 / np.sqrt(3 * 4096))


# Law 7: non-finite gradients never vote; sitting out; weights.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("how", ["vmap", "shard_map", "shard_map_unchecked", "pmap"])
def test_non_finite_worker_sits_out(bad, how):
    tree, n = TREES["small"], 4
    grads = [gradients(tree, n, r) for r in range(3)]
    grads[1]["flat"][2, 4000] = bad
    want = run_reference(tree, n, 3, grads=grads)
    assert want[1][0].voted == [True, True, False, True]
    assert_equal_to_reference(tree, run(tree, n, 3, how, grads=grads), want)


@pytest.mark.parametrize("transport", ["all_gather", "two_phase", "psum"])
@pytest.mark.parametrize("rules", RULES, ids=ids)
def test_nobody_votes(transport, rules):
    tree, n = TREES["small"], 4
    grads = [{k: np.full_like(v, np.nan) for k, v in gradients(tree, n, 0).items()}]
    (direction, state), = run(tree, n, 1, grads=grads, transport=transport, **rules)  # fmt: skip
    assert not any(d.any() for d in direction.values())
    assert not any(m.any() for m in state.mu.values())
    assert state.health.voters.tolist() == [0] * n


@pytest.mark.parametrize("transport", ["all_gather", "two_phase", "psum"])
@pytest.mark.parametrize("rules", RULES, ids=ids)
def test_participating_and_weight(transport, rules):
    tree, n = TREES["small"], 5
    extra = [
        {"participating": [True, False, True, True, False], "weight": [1, 2, 3, 7, 5]},
        {"participating": [True] * 5, "weight": [3, 0, 9, 1, 7]},  # 0 and 9 > 7 sit out
    ]
    options = dict(max_weight=7, **rules)
    want = run_reference(tree, n, 2, extra=extra, **options)
    assert want[1][0].voted == [True, False, False, True, True]
    assert_equal_to_reference(
        tree, run(tree, n, 2, extra=extra, transport=transport, **options), want
    )


# Law 10: Phase I of the paper. Both aggregations, any gradients.


@pytest.mark.parametrize("rules", RULES, ids=ids)
def test_phase_one(rules):
    lr, decay, n = 0.05, 0.5, 4
    tx = distributed_lion(lr, B1, B2, weight_decay=decay, **rules)
    rng = np.random.default_rng(0)
    params = {"x": jnp.asarray(rng.normal(0, 5, (64,)), jnp.float32)}
    state = stack_state(tx, params, n)
    params = jax.tree.map(lambda x: jnp.stack([x] * n), params)

    def step(x, state, g):
        updates, state = tx.update(g, state, x)
        return optax.apply_updates(x, updates), state

    step = map_workers(step, "vmap", n)

    def distance(x):
        return np.maximum(np.abs(decay * np.asarray(x["x"][0], np.float64)) - 1, 0)

    before = distance(params)
    assert before.max() > 1
    for r in range(200):
        params, state = step(
            params,
            state,
            {"x": jnp.asarray(rng.normal(size=(n, 64)) * 10.0 ** (r % 5 - 2), jnp.float32)},
        )
        after = distance(params)
        assert (after <= (1 - lr * decay) * before + 1e-6).all()
        before = after
    assert before.max() == pytest.approx(0, abs=1e-6)


# Health, per leaf.


@pytest.mark.parametrize("transport", ["all_gather", "two_phase", "psum"])
def test_health_per_leaf(transport):
    tree, n = TREES["mixed"], 4
    (_, state), = run(tree, n, 1, transport=transport, health="leaf")  # fmt: skip
    (verdict, _), = run_reference(tree, n, 1)  # fmt: skip
    np.testing.assert_allclose([x[0] for x in state.health.tied], verdict.leaf_tied, rtol=1e-6)
    np.testing.assert_allclose([x[0] for x in state.health.margin], verdict.leaf_margin, rtol=1e-6)


def test_health_off_holds_nothing():
    tx = distributed_lion(0.1, health="off")
    assert tx.init(shapes_to_params(TREES["small"]))[0].health is None


# A tuple of axes votes over their product.


@pytest.mark.parametrize("transport", ["all_gather", "two_phase", "psum"])
def test_two_axes_vote_over_their_product(transport):
    from jax.sharding import AxisType
    from jax.sharding import PartitionSpec as P

    tree = TREES["small"]
    tx = distributed_lion(
        1.0, B1, B2, weight_decay=0.0, axis_name=("slice", "chip"), transport=transport
    )
    mesh = jax.make_mesh((2, 4), ("slice", "chip"), (AxisType.Auto,) * 2)

    def worker(g):
        g = jax.tree.map(lambda x: x[0], g)
        params = shapes_to_params(tree)
        return tx.update(g, tx.init(params), params)[0]

    spec = P(("slice", "chip"))
    g = gradients(tree, 8, 0)
    got = jax.jit(jax.shard_map(worker, mesh=mesh, in_specs=spec, out_specs=P()))(g)
    want = run(tree, 8, 1, transport="all_gather")[0][0]
    for name in tree:
        np.testing.assert_array_equal(got[name], -want[name][0])
