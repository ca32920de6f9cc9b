# SPDX-License-Identifier: Apache-2.0
"""Orthogonalised ballots: the vote against the reference, on every transport and map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers as Numbers

import distlion_jax as dl
from distlion_jax import reference
from distlion_jax.baselines import sign_muon
from tests.helpers import (
    B1,
    B2,
    assert_equal_to_reference,
    map_workers,
    run,
    run_reference,
    shapes_to_params,
    stack_state,
)
from tests.test_wire_bytes import QUICK, assert_as_predicted, lowered_update

TREE = {"rows": (16, 128), "tall": (40, 12), "bias": (33,), "scalar": ()}
HIDDEN = [1, 3]  # "rows" and "tall", among the sorted names
CLEAR = 3e-6  # a number of an orthogonalised matrix above it has a sign that rounding leaves alone
SLOW = pytest.mark.slow


def choose(params):
    return {name: Numbers() if x.ndim == 2 else None for name, x in params.items()}


def draws(tree, n, rounds, seed=0):
    """Random sixty-fourths, exact in a blend and a momentum of a few rounds; some rows are 0."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(rounds):
        one = {k: rng.integers(-64, 65, (n, *s)).astype(np.float32) / 64 for k, s in tree.items()}
        if "rows" in one:
            one["rows"][:, 4:8] = 0  # untouched rows on all workers
            one["rows"][0, 9:12] = 0  # and on one
        out.append(one)
    return out


def clear(tree, grads, hidden, ns_steps):
    """Whether rounding can turn no sign: what the comparisons below, with ==, rest on."""
    names = sorted(tree)
    mu = {k: np.zeros_like(grads[0][k]) for k in tree}
    for g in grads:
        for k in (names[j] for j in hidden):
            for c in (1 - B1) * g[k] + B1 * mu[k]:
                values = np.abs(reference.newton_schulz(c, ns_steps))
                if values[values > 0].min() < CLEAR:
                    return False
            mu[k] = B2 * mu[k] + (1 - B2) * g[k]
    return True


@functools.cache
def _clear_seed(tree, n, rounds, hidden, ns_steps):
    tree = dict(tree)
    return next(s for s in range(1000) if clear(tree, draws(tree, n, rounds, s), hidden, ns_steps))


def clear_draws(tree, n, rounds, hidden=HIDDEN, ns_steps=5):
    """The first draws that are clear."""
    seed = _clear_seed(tuple(tree.items()), n, rounds, tuple(hidden), ns_steps)
    return draws(tree, n, rounds, seed)


def both(tree, n, rounds, how="vmap", hidden=HIDDEN, chosen=choose, extra=None, **options):
    """The package and the reference, on the same gradients; compared."""
    grads = clear_draws(tree, n, rounds, hidden, options.get("ns_steps", 5))
    shared = {k: v for k, v in options.items() if k != "transport"}
    want = run_reference(tree, n, rounds, grads=grads, extra=extra, hidden=hidden, **shared)
    got = run(tree, n, rounds, how, grads=grads, extra=extra, factory=dl.scale_by_distributed_muon,
              muon_weight_dimension_numbers=chosen, **options)  # fmt: skip
    assert_equal_to_reference(tree, got, want)
    return got


RULES = [
    {"aggregation": "majority", "ties": "zero"},
    {"aggregation": "majority", "ties": "coin"},
    {"aggregation": "average"},
]


@pytest.mark.parametrize("n", [1, 2, 3, pytest.param(8, marks=SLOW)])
@pytest.mark.parametrize("ballot", ["binary", "ternary"])
@pytest.mark.parametrize("rules", RULES, ids=lambda r: "-".join(r.values()))
def test_transports_equal_reference(n, ballot, rules):
    for transport in ("all_gather", "two_phase", "psum"):
        both(TREE, n, 2, transport=transport, ballot=ballot, **rules)


@pytest.mark.parametrize("how", ["vmap", "pmap", "shard_map", "shard_map_unchecked"])
@pytest.mark.parametrize("transport", ["all_gather", "two_phase"])
def test_every_map_equals_reference(how, transport):
    both(TREE, 8, 2, how, transport=transport, ties="coin")


def test_votes_differ_from_plain_ones():
    got = both(TREE, 3, 1)
    plain = run(TREE, 3, 1, grads=clear_draws(TREE, 3, 1))
    assert (got[0][0]["tall"] != plain[0][0]["tall"]).mean() > 0.05
    np.testing.assert_array_equal(got[0][0]["bias"], plain[0][0]["bias"])


@pytest.mark.parametrize("ns_steps", [1, 3, 7])
def test_other_numbers_of_steps(ns_steps):
    both(TREE, 3, 2, ns_steps=ns_steps)


@pytest.mark.parametrize("how", ["vmap", "shard_map"])
def test_a_period_takes_turns(how):
    got = both(TREE, 3, 4, how, period=3)
    plain = run(TREE, 3, 4, grads=clear_draws(TREE, 3, 4))
    same = [np.array_equal(a["tall"], b["tall"]) for (a, _), (b, _) in zip(got, plain, strict=True)]
    assert same == [False, True, True, False]


def test_noise_and_dead_zone_are_of_what_is_signed():
    both(TREE, 3, 2, noise=0.5)
    both(TREE, 3, 2, ballot="ternary", threshold=0.0625)


def test_a_worker_may_sit_out_and_weigh_more():
    extra = [dict(participating=[True, False, True]), dict(weight=[3, 1, 0])]
    extra = [{"participating": [True] * 3, "weight": [1] * 3} | one for one in extra]
    both(TREE, 3, 2, extra=extra, max_weight=4)


@pytest.mark.parametrize("how", ["vmap", "shard_map", "pmap"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_a_worker_with_a_bad_matrix_sits_out_whole(how, bad):
    """A gradient of 3e38 is finite, and so is its vote: only what is not finite sits out."""
    n, tree = 4, TREE
    grads = draws(tree, n, 2)
    grads[0]["tall"][2, 3, 3] = bad
    options = dict(factory=dl.scale_by_distributed_muon, muon_weight_dimension_numbers=choose)
    got = run(tree, n, 2, how, grads=grads, **options)
    fine = bool(np.isfinite(np.float32(bad)))
    assert list(got[0][1].health.voted) == [True, True, fine, True]
    for direction, state in got:
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((direction, state.mu)))
    if not fine:
        assert not any(got[0][1].mu[name][2].any() for name in tree)
        others = [{k: np.delete(g[k], 2, axis=0) for k in tree} for g in grads]
        want = run(tree, n - 1, 1, how, grads=others, **options)
        for name in tree:
            np.testing.assert_array_equal(got[0][0][name][0], want[0][0][name][0])


@pytest.mark.parametrize("ballot", ["binary", "ternary"])
def test_frozen_matrices_and_untouched_rows_never_move(ballot):
    tree = {"frozen": (8, 128), "rows": (16, 128)}
    grads = draws(tree, 4, 3)
    for g in grads:
        g["frozen"][:] = 0
    options = dict(factory=dl.scale_by_distributed_muon, muon_weight_dimension_numbers=choose)
    for direction, _ in run(tree, 4, 3, grads=grads, ballot=ballot, **options):
        assert not direction["frozen"].any()
        assert not direction["rows"][:, 4:8].any()
        assert direction["rows"][:, 8:].any()


def test_without_hidden_matrices_it_is_distributed_lion():
    """Bit for bit, the state too: one reads the other's checkpoints."""
    grads = draws(TREE, 4, 3)
    got = run(TREE, 4, 3, grads=grads, factory=dl.scale_by_distributed_muon,
              muon_weight_dimension_numbers=none)  # fmt: skip
    want = run(TREE, 4, 3, grads=grads)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def none(params):
    return None


def test_one_worker_needs_no_axis():
    """With b1, b2 exact, and operation by operation as the vote's is not."""
    grads = draws(TREE, 1, 3)
    params = shapes_to_params(TREE)
    alone = dl.scale_by_distributed_muon(
        B1, B2, axis_name=None, muon_weight_dimension_numbers=choose
    )
    want = run(TREE, 1, 3, grads=grads, factory=dl.scale_by_distributed_muon,
               muon_weight_dimension_numbers=choose)  # fmt: skip
    state = alone.init(params)
    assert isinstance(state, optax.ScaleByLionState)
    for g, (direction, after) in zip(grads, want, strict=True):
        updates, state = alone.update({k: v[0] for k, v in g.items()}, state)
        for name in TREE:
            np.testing.assert_array_equal(updates[name], direction[name][0])
            np.testing.assert_array_equal(state.mu[name], after.mu[name][0])


def test_rest_factor_is_a_learning_rate_of_the_other_leaves():
    grads, params = draws(TREE, 3, 1)[0], jax.tree.map(jnp.ones_like, shapes_to_params(TREE))

    def updates(**options):
        tx = dl.distributed_muon(
            0.125, B1, B2, weight_decay=0.5, muon_weight_dimension_numbers=choose, **options
        )
        return jax.vmap(lambda g: tx.update(g, tx.init(params), params)[0], axis_name="data")(grads)

    one, other = updates(), updates(rest_factor=0.25)
    for name in TREE:
        factor = 0.25 if name in ("bias", "scalar") else 1.0
        np.testing.assert_array_equal(other[name], factor * one[name])


def test_sign_muon_signs_the_momentum():
    grads = draws(TREE, 3, 2)
    params = shapes_to_params(TREE)
    options = dict(weight_decay=0.0, muon_weight_dimension_numbers=choose)
    txs = sign_muon(1.0, 0.5, **options), dl.distributed_muon(1.0, 0.5, 0.5, **options)
    steps = [map_workers(lambda g, s, tx=tx: tx.update(g, s, params), "vmap", 3) for tx in txs]
    states = [stack_state(tx, params, 3) for tx in txs]
    for g in grads:
        (one, states[0]), (two, states[1]) = (f(g, s) for f, s in zip(steps, states, strict=True))
        jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("transport", ["all_gather", "two_phase"])
@pytest.mark.parametrize("options", [{}, {"period": 2}, {"ns_dtype": jnp.bfloat16}], ids=str)
def test_moves_what_distributed_lion_moves(transport, options):
    """In the compiled program, with the ledger that knows nothing of matrices."""
    tree = {"w": (64, 40), "stack": (3, 16, 24), "bias": (40,)}
    numbers = {"w": Numbers(), "stack": Numbers(1, 2), "bias": None}
    tx = dl.scale_by_distributed_muon(
        transport=transport, muon_weight_dimension_numbers=numbers, **options
    )
    lowered = lowered_update("shard_map", 8, tree, tx)
    cost = dl.wire_cost(shapes_to_params(tree), 8, transport=transport)
    assert_as_predicted(lowered.compile(compiler_options=QUICK), cost, 8)


def test_trains_on_a_mesh_and_replicas_agree():
    mesh = dl.worker_mesh(8)
    tx = dl.distributed_muon(0.02, weight_decay=0.1)
    rng = np.random.default_rng(0)
    params = dl.replicate({"w": jnp.asarray(rng.normal(size=(6, 9)), jnp.float32)}, mesh)
    state = dl.init_state(tx, params, mesh)
    target = rng.normal(size=(6, 9)).astype(np.float32)

    def loss(params, x):
        return jnp.mean((x @ (params["w"] - target)) ** 2)

    step = dl.make_train_step(loss, tx, mesh)
    losses = []
    for _ in range(60):
        params, state, metrics = step(params, state, rng.normal(size=(32, 6)).astype(np.float32))
        losses.append(float(metrics.loss))
    assert np.mean(losses[-5:]) < 0.2 * losses[0]
    assert dl.replicas_agree(params, mesh)


def test_an_injected_function_is_named_static():
    """Else Optax calls it with the step, and the default choice would follow in silence."""
    mine = functools.partial(dl.hidden_matrices, exclude=".")
    options = dict(learning_rate=0.1, muon_weight_dimension_numbers=mine)
    params = shapes_to_params(TREE)
    with pytest.raises(ValueError, match=r"static_args=..muon_weight_dimension_numbers"):
        optax.inject_hyperparams(dl.distributed_muon)(**options).init(params)
    injected = optax.inject_hyperparams(
        dl.distributed_muon, static_args=("muon_weight_dimension_numbers",)
    )
    grads = draws(TREE, 3, 1)[0]

    def updates(tx):
        one = lambda g: tx.update(g, tx.init(params), params)[0]  # noqa: E731
        return jax.vmap(one, axis_name="data")(grads)

    want = updates(dl.distributed_muon(0.1, muon_weight_dimension_numbers={k: None for k in TREE}))
    jax.tree.map(np.testing.assert_array_equal, updates(injected(**options)), want)


def test_state_is_distributed_lion_s():
    """Of the whole optimizers: one reads the other's checkpoints."""
    params = shapes_to_params(TREE)
    states = [make(0.1).init(params) for make in (dl.distributed_muon, dl.distributed_lion)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_a_factor_out_of_range_moves_nothing():
    params, grads = shapes_to_params(TREE), draws(TREE, 3, 1)[0]

    def updates(factor):
        tx = dl.distributed_muon(0.1, rest_factor=factor)
        return jax.vmap(lambda g: tx.update(g, tx.init(params), params)[0], axis_name="data")(grads)

    for bad in (-1.0, float("nan"), float("inf")):
        got = jax.jit(updates)(jnp.float32(bad))
        assert not got["bias"].any()
        assert got["tall"].any()
