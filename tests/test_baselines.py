# SPDX-License-Identifier: Apache-2.0
"""The baselines: against their NumPy references, their laws, and the bytes that they send."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distlion_jax as dl
from distlion_jax import reference
from distlion_jax.baselines import (
    QSGD,
    EFSign,
    PowerSGD,
    TernGrad,
    TopK,
    compressed_average,
    deep_gradient_compression,
    distributed_signum,
    sign_sgd,
)
from tests import baseline_reference as plain
from tests.helpers import gradients, map_workers, shapes_to_params, stack_state
from tests.test_wire_bytes import assert_as_predicted, lowered_update

N = 4
TREE = {"a": (7, 5), "b": (3, 128), "c": (40, 128), "s": (), "v": (130,)}
NAMES = sorted(TREE)
SLOW = pytest.mark.slow
MAPS = [
    "vmap",
    "shard_map",
    pytest.param("pmap", marks=SLOW),
    pytest.param("shard_map_unchecked", marks=SLOW),
]
COMPRESSORS = [QSGD(), TernGrad(), EFSign(), TopK(0.1), PowerSGD(2)]
OPTIONS = [
    pytest.param(compressor, marks=SLOW, id=repr(compressor))
    for compressor in (
        QSGD(levels=1, bucket=64, norm="l2"),
        QSGD(levels=100, bucket=100),
        TernGrad(clip=None, transport="two_phase"),
    )
]


def draw(rounds, n=N, tree=TREE):
    """Real-valued gradients, in a list of ``{name: [n, *shape]}``."""
    rng = np.random.default_rng(0)
    return [
        {k: rng.standard_normal((n, *s), np.float32) for k, s in tree.items()}
        for _ in range(rounds)
    ]


def as_arrays(x):
    """A list of numbers as an array; a tree of arrays as it is."""
    return jnp.asarray(x) if isinstance(x, list) else x


def rounds_of(tx, grads, n=N, how="vmap", tree=TREE, extra=None):
    """Runs some rounds: per round (mean, state), as NumPy with a worker axis."""

    def step(g, state, extra):
        return tx.update(g, state, **extra)

    mapped = map_workers(step, how, n)
    state = stack_state(tx, shapes_to_params(tree), n)
    history = []
    for r, g in enumerate(grads):
        given = {} if extra is None else {k: as_arrays(v) for k, v in extra[r].items()}
        mean, state = mapped(g, state, given)
        history.append(jax.tree.map(np.asarray, (mean, state)))
    return history


def plain_message(c, leaves, step, worker):
    """What a worker's message stands for."""
    if isinstance(c, QSGD):
        return plain.qsgd(leaves, step, worker, c.levels, c.bucket, c.norm)
    if isinstance(c, EFSign):
        return plain.ef_sign(leaves, step, worker)
    return plain.top_k(leaves, c.density)


def plain_average(compressor, grads, entered, q0):
    """The same by the reference: per round (mean leaves, errors [worker][leaf])."""
    n = len(entered[0])
    errors = [[np.zeros(TREE[k], np.float32) for k in NAMES] for _ in range(n)]
    out, qs = [], q0
    for step, (g, enters) in enumerate(zip(grads, entered, strict=True)):
        wanted = [[g[k][i] for k in NAMES] for i in range(n)]
        if compressor.feedback:
            wanted = [
                [x + e for x, e in zip(xs, es, strict=True)]
                for xs, es in zip(wanted, errors, strict=True)
            ]
        if isinstance(compressor, TernGrad):
            mean, parts = plain.terngrad(wanted, step, compressor.clip, enters), wanted
        elif isinstance(compressor, PowerSGD):
            mean, parts, qs = plain.power_sgd(wanted, qs, enters)
        else:
            parts = [plain_message(compressor, x, step, i) for i, x in enumerate(wanted)]
            mean = plain.mean(parts, enters)
        for i in range(n):
            if compressor.feedback and enters[i]:
                errors[i] = [x - y for x, y in zip(wanted[i], parts[i], strict=True)]
        out.append((mean, [list(e) for e in errors]))
    return out


def first_q(compressor):
    """The compressor's first Q by leaf, None where a leaf is not split."""
    if not isinstance(compressor, PowerSGD):
        return None
    found = iter(compressor.init(jax.tree.leaves(shapes_to_params(TREE))))
    return [np.asarray(next(found)) if compressor._sides(TREE[k]) else None for k in NAMES]


@pytest.mark.parametrize("compressor", COMPRESSORS + OPTIONS, ids=repr)
@pytest.mark.parametrize("how", MAPS[:2])
def test_equals_the_reference(compressor, how):
    grads = draw(3)
    grads[1]["a"][2, 0, 0] = np.nan  # worker 2 sits round 1 out
    extra = [{"participating": [i != r - 1 for i in range(N)]} for r in range(3)]
    entered = [[True] * N, [False, True, False, True], [True, False, True, True]]
    got = rounds_of(compressed_average(compressor), grads, how=how, extra=extra)
    want = plain_average(compressor, grads, entered, first_q(compressor))
    for (mean, state), (wanted, errors) in zip(got, want, strict=True):
        for leaf, name in enumerate(NAMES):
            for i in range(N):
                np.testing.assert_allclose(mean[name][i], wanted[leaf], rtol=1e-4, atol=1e-5)
                assert np.array_equal(mean[name][i], mean[name][0])  # replicas: bit for bit
                if compressor.feedback:
                    error = state.error[name][i]
                    np.testing.assert_allclose(error, errors[i][leaf], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize("how", MAPS[2:])
def test_every_map_gives_the_same(compressor, how):
    grads = draw(2)
    want = rounds_of(compressed_average(compressor), grads)
    got = rounds_of(compressed_average(compressor), grads, how=how)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_nobody_takes_part(compressor):
    tx = compressed_average(compressor)
    bad, good = draw(2)
    bad = {k: np.full_like(v, np.nan) for k, v in bad.items()}
    (mean, state), (again, _) = rounds_of(tx, [bad, good])
    assert all(np.isnan(x).all() for x in mean.values())
    assert not any(x.any() for x in jax.tree.leaves(state.error))
    assert all(np.isfinite(x).all() for x in again.values())


# Laws.


@pytest.mark.parametrize("compressor", [EFSign(), TopK(0.05), PowerSGD(1)], ids=repr)
def test_what_was_not_sent_is_kept(compressor):
    """Over any number of rounds: all that was applied, and the mean error, are all gradients."""
    grads = draw(6)
    history = rounds_of(compressed_average(compressor), grads)
    for name in NAMES:
        applied = sum(mean[name][0] for mean, _ in history)
        given = sum(g[name].mean(0) for g in grads)
        left = history[-1][1].error[name].mean(0)
        np.testing.assert_allclose(applied + left, given, atol=1e-4)


@pytest.mark.parametrize("compressor", [QSGD(levels=1), TernGrad(clip=None)], ids=repr)
def test_rounding_is_fair(compressor):
    """The mean of many rounds is the gradient: 5 standard errors of the worst coordinate."""
    tree, rounds = {"w": (300,)}, 400
    (g,) = draw(1, tree=tree)
    history = rounds_of(compressed_average(compressor), [g] * rounds, tree=tree)
    found = np.mean([mean["w"][0] for mean, _ in history], axis=0)
    scale = np.abs(g["w"]).max(axis=1)
    worst = 5 * np.sqrt((scale**2).sum()) / 2 / N / np.sqrt(rounds)
    np.testing.assert_allclose(found, g["w"].mean(0), atol=worst)
    assert np.abs(history[0][0]["w"][0] - g["w"].mean(0)).max() > worst  # one round is not it


@pytest.mark.parametrize(
    ("compressor", "tolerance"),
    [(TopK(1.0), 1e-6), (QSGD(levels=2**15 - 1, bucket=16), 1e-3), (PowerSGD(128), 1e-6)],
    ids=repr,
)
def test_without_compression_it_is_the_mean(compressor, tolerance):
    (g,) = draw(1)
    ((mean, _),) = rounds_of(compressed_average(compressor), [g])
    for name in NAMES:
        np.testing.assert_allclose(mean[name][0], g[name].mean(0), atol=tolerance)


def test_equal_magnitudes_need_one_bit():
    tree = {"w": (4, 64)}
    (g,) = draw(1, tree=tree)
    g = {"w": np.sign(g["w"]) * np.float32(0.5)}
    ((mean, state),) = rounds_of(compressed_average(EFSign()), [g], tree=tree)
    np.testing.assert_array_equal(mean["w"][0], g["w"].mean(0))
    assert not state.error["w"].any()


def test_zeros_stay_zero():
    """Rows that no worker has touched, under every method that rounds or signs."""
    g = {"rows": np.zeros((N, 8, 128), np.float32)}
    g["rows"][:, 5] = 1.0
    for compressor in (QSGD(), TernGrad(), EFSign(), TopK(0.5), PowerSGD(1)):
        history = rounds_of(compressed_average(compressor), [g] * 3, tree={"rows": (8, 128)})
        for mean, _ in history:
            assert not mean["rows"][0][[0, 1, 2, 3, 4, 6, 7]].any()
            assert mean["rows"][0][5].any()


def test_low_rank_means_are_exact():
    rng = np.random.default_rng(1)
    rows, columns = rng.standard_normal((N, 32, 2)), rng.standard_normal((2, 24))
    g = {"w": (rows @ columns).astype(np.float32)}  # of rank 2, and so is their mean
    ((mean, _),) = rounds_of(compressed_average(PowerSGD(2)), [g], tree={"w": (32, 24)})
    np.testing.assert_allclose(mean["w"][0], g["w"].mean(0), atol=1e-4)


def test_a_worker_that_sits_out_leaves_no_debt():
    """What workers differ by is not piled up, to be let loose when one is away."""
    tree = {"v": (12,), "w": (16, 12)}
    (g,) = draw(1, tree=tree)
    away = [{"participating": [True] * N}] * 50 + [{"participating": [False] + [True] * 3}]
    tx = compressed_average(PowerSGD(1))
    mean, _ = rounds_of(tx, [g] * 51, tree=tree, extra=away)[-1]
    np.testing.assert_allclose(mean["v"][0], g["v"][1:].mean(0), atol=1e-5)
    assert np.abs(mean["w"][0]).max() < 30


def test_a_matrix_without_gradient_is_not_lost():
    """A first gradient of zeros, and rows that stay zero: Q must not become zero for good."""
    g = {"w": np.zeros((N, 16, 12), np.float32)}
    live = {"w": g["w"].copy()}
    live["w"][:, 4:] = np.random.default_rng(0).standard_normal((N, 12, 12))
    history = rounds_of(compressed_average(PowerSGD(2)), [g] + [live] * 3, tree={"w": (16, 12)})
    assert history[-1][0]["w"][0][4:].any()


@pytest.mark.parametrize("compressor", [*COMPRESSORS, PowerSGD(1)], ids=repr)
def test_tiny_gradients_are_sent_as_large_ones_are(compressor):
    """Squares of numbers below 1e-19 are 0 in float32; a power of two changes no digit."""
    grads, small = draw(3), 2.0**-70
    tiny = [{k: x * np.float32(small) for k, x in g.items()} for g in grads]
    tx = compressed_average(compressor)
    pairs = zip(rounds_of(tx, grads), rounds_of(tx, tiny), strict=True)
    for (mean, _), (of_tiny, _) in pairs:
        for k, x in mean.items():
            np.testing.assert_allclose(of_tiny[k] / small, x, rtol=1e-4, atol=1e-6)


def test_states_stay_float32_where_float64_is_the_default():
    g = {"w": np.random.default_rng(0).standard_normal((N, 24, 16)).astype(np.float32)}
    with jax.enable_x64(True):
        for compressor in COMPRESSORS:
            tx = compressed_average(compressor)
            state = tx.init({"w": g["w"][0]})
            update = lambda g, tx=tx, state=state: tx.update({"w": g}, state)  # noqa: E731
            mean, new = jax.eval_shape(jax.vmap(update, axis_name="data"), jnp.asarray(g["w"]))
            assert mean["w"].dtype == jnp.float32
            assert [x.dtype for x in jax.tree.leaves(new)] == [
                x.dtype for x in jax.tree.leaves(state)
            ]


def test_scalars_move_under_every_method():
    g = {"s": np.full((N,), 2.0, np.float32)}
    for compressor in (QSGD(), TernGrad(), EFSign(), TopK(0.5), PowerSGD(1)):
        ((mean, _),) = rounds_of(compressed_average(compressor), [g], tree={"s": ()})
        assert mean["s"][0] == 2.0, compressor


def test_leaves_of_nearly_equal_numbers_are_not_clipped_away():
    g = {"v": np.full((N, 300), 0.3, np.float32)}
    ((mean, _),) = rounds_of(compressed_average(TernGrad()), [g], tree={"v": (300,)})
    np.testing.assert_allclose(mean["v"][0], 0.3, rtol=1e-6)


@pytest.mark.parametrize("compressor", COMPRESSORS + OPTIONS, ids=repr)
@pytest.mark.parametrize("size", [pytest.param(1e19, marks=SLOW), 1e37])
def test_a_huge_gradient_is_not_remembered(compressor, size):
    """Finite, but its square may not be, nor its sum: later rounds must not suffer."""
    first, *rest = draw(4)
    first["b"][1, 0, 0] = size
    *_, (mean, state) = rounds_of(compressed_average(compressor), [first, *rest])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((mean, state)))


# Deep Gradient Compression.


def plain_dgc(grads, density, momentum, clip):
    leaves = [np.zeros(TREE[k], np.float32) for k in NAMES]
    us, vs, out = [list(leaves) for _ in range(N)], [list(leaves) for _ in range(N)], []
    for g in grads:
        parts = []
        for i in range(N):
            mine = [g[k][i] for k in NAMES]
            norm = np.sqrt(sum((x**2).sum() for x in mine))
            mine = [x * np.float32(min(1.0, clip * N**0.5 / norm)) for x in mine]
            us[i] = [np.float32(momentum) * u + x for u, x in zip(us[i], mine, strict=True)]
            vs[i] = [v + u for v, u in zip(vs[i], us[i], strict=True)]
            parts.append(plain.top_k(vs[i], density))
            us[i] = [np.where(s == 0, u, 0) for u, s in zip(us[i], parts[i], strict=True)]
            vs[i] = [np.where(s == 0, v, 0) for v, s in zip(vs[i], parts[i], strict=True)]
        out.append(plain.mean(parts, [True] * N))
    return out


@pytest.mark.parametrize("how", MAPS)
def test_dgc_equals_the_reference(how):
    grads = draw(4)
    tx = deep_gradient_compression(0.1, 0.5, clip_norm=30.0)  # a norm of 60 a worker, of 75
    got = rounds_of(tx, grads, how=how)
    for (mean, _), want in zip(got, plain_dgc(grads, 0.1, 0.5, 30.0), strict=True):
        for leaf, name in enumerate(NAMES):
            np.testing.assert_allclose(mean[name][0], want[leaf], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["vmap", "shard_map"])
def test_dgc_warms_up(how):
    tree = {"w": (64,)}
    tx = deep_gradient_compression(1 / 64, 0.0, warmup=(0.5, 0.25), warmup_steps=2)
    (g,) = draw(1, n=2, tree=tree)
    g = {"w": np.abs(g["w"][:1]) + np.zeros((2, 1), np.float32)}  # both workers choose alike
    history = rounds_of(tx, [g] * 6, n=2, how=how, tree=tree)
    assert [np.count_nonzero(mean["w"][0]) for mean, _ in history] == [32, 32, 16, 16, 1, 1]


def test_dgc_that_sends_everything_has_no_momentum_left():
    """What is sent is masked in the momentum, too."""
    grads = draw(5)
    history = rounds_of(deep_gradient_compression(1.0, 0.9), grads)
    for (mean, _), g in zip(history, grads, strict=True):
        for name in NAMES:
            np.testing.assert_allclose(mean[name][0], g[name].mean(0), atol=1e-5)


def test_dgc_leaves_out_a_gradient_without_a_norm():
    """An infinite norm would clip it to zeros, and zeros would be averaged in."""
    first, *rest = draw(3)
    first["b"][1] = 1e30
    got = rounds_of(deep_gradient_compression(1.0, 0.9, clip_norm=1.0), [first, *rest])
    voters = {k: np.delete(x, 1, axis=0) for k, x in first.items()}
    norms = np.sqrt(sum((x**2).reshape(N - 1, -1).sum(1) for x in voters.values()))
    scale = np.minimum(1.0, N**0.5 / norms)
    for name in NAMES:
        want = np.einsum("i,i...->...", scale, voters[name]) / (N - 1)
        np.testing.assert_allclose(got[0][0][name][0], want, rtol=1e-4, atol=1e-6)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


def test_top_k_sends_at_least_one_of_a_leaf():
    g = {"a": np.array([[1.0, -3.0, 2.0, 0.5]] * N, np.float32)}
    ((mean, _),) = rounds_of(compressed_average(TopK(1e-9)), [g], tree={"a": (4,)})
    assert mean["a"][0].tolist() == [0, -3, 0, 0]


# SignSGD and SIGNUM are votes.


def params(tree, rounds):
    """Parameters of three workers, as an argument of every round's update."""
    return [{"params": shapes_to_params({k: (3, *s) for k, s in tree.items()})}] * rounds


def test_signum_votes_with_its_momentum():
    tree, beta = {"a": (3, 5), "rows": (16, 128)}, 0.5
    grads = [gradients(tree, 3, r) for r in range(3)]
    history = rounds_of(distributed_signum(1.0, beta), grads, 3, tree=tree, extra=params(tree, 3))
    momentum = {k: np.zeros((3, *s), np.float32) for k, s in tree.items()}
    for (update, _), g in zip(history, grads, strict=True):
        momentum = {k: beta * m + (1 - beta) * g[k] for k, m in momentum.items()}
        for name in tree:
            live = (momentum[name] != 0).all(0)  # elsewhere coins may vote
            want = -np.sign(np.sign(momentum[name]).sum(0))
            np.testing.assert_array_equal(update[name][0][live], want[live])


def test_sign_sgd_has_no_momentum():
    tree = {"a": (3, 5), "rows": (16, 128)}
    grads = [gradients(tree, 3, r) for r in range(2)]
    history = rounds_of(sign_sgd(1.0), grads, 3, tree=tree, extra=params(tree, 2))
    state = reference.init([np.zeros(tree[k], np.float32) for k in sorted(tree)], 3)
    for (update, _), g in zip(history, grads, strict=True):
        workers = [[g[k][i] for k in sorted(tree)] for i in range(3)]
        verdict, state = reference.vote(state, workers, b1=0.0, b2=0.0)
        for leaf, name in enumerate(sorted(tree)):
            np.testing.assert_array_equal(update[name][0], -verdict.direction[leaf])


# Bytes.


@pytest.mark.parametrize("compressor", COMPRESSORS + OPTIONS, ids=repr)
def test_bytes_are_those_of_the_compiled_program(compressor):
    lowered = lowered_update("shard_map", 8, TREE, compressed_average(compressor))
    assert_as_predicted(lowered.compile(), compressor.cost(shapes_to_params(TREE), 8), 8)


def test_bytes_of_dgc_are_those_of_its_density():
    lowered = lowered_update("shard_map", 8, TREE, deep_gradient_compression(0.1))
    assert_as_predicted(lowered.compile(), TopK(0.1).cost(shapes_to_params(TREE), 8), 8)


# A whole train step, with an optimizer whose state all workers share.


@pytest.mark.parametrize("check", [True, pytest.param(False, marks=SLOW)])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_trains_and_replicas_agree(compressor, check):
    mesh = dl.worker_mesh(8)
    tx = optax.chain(compressed_average(compressor), dl.replicated(optax.adam(0.05)))
    params = dl.replicate({"w": jnp.zeros((16, 4)), "b": jnp.zeros(4)}, mesh)
    state = dl.init_state(tx, params, mesh)
    target = jax.random.normal(jax.random.key(1), (16, 4))

    def loss(p, x):
        return jnp.mean((x @ p["w"] + p["b"] - x @ target) ** 2)

    step = dl.make_train_step(loss, tx, mesh, check_vma=check)
    losses = []
    for i in range(60):
        x = jax.random.normal(jax.random.fold_in(jax.random.key(2), i), (32, 16))
        params, state, metrics = step(params, state, x)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.5 * losses[0]
    assert dl.replicas_agree(params, mesh)
    assert state[1].inner[0].mu["w"].shape == (16, 4)
