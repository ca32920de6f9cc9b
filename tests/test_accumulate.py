# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation: one exchange an update, and a bad micro-batch is forgotten."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distlion_jax as dl
from distlion_jax import baselines
from tests.steps import MAPS, start

X = np.random.default_rng(0).integers(-4, 5, (16, 4)).astype(np.float32) / 4
SICK = X.copy()
SICK[0, 0] = np.nan
PARAMS = {"w": np.ones((4, 3), np.float32), "b": np.zeros(3, np.float32)}


def loss(params, x):
    return jnp.mean((x @ params["w"] + params["b"] - 1.0) ** 2)


def averaged(optimizer):
    return optax.chain(dl.average_gradients(), dl.replicated(optimizer))


EXCHANGES = {
    "vote": lambda: dl.distributed_lion(0.1),
    "labels": lambda: dl.distributed_lion_by_label(0.1, {"w": "majority", "b": "full"}),
    "synchronized": lambda: dl.synchronize_momentum(dl.distributed_lion(0.1), 2),
    "average": lambda: averaged(optax.adam(0.1)),
    "averaged Lion": lambda: optax.chain(dl.scale_by_averaged_lion(), optax.scale(-0.1)),
    "compressed": lambda: optax.chain(
        baselines.compressed_average(baselines.EFSign()), dl.replicated(optax.sgd(0.1))
    ),
    "DGC": lambda: optax.chain(
        baselines.deep_gradient_compression(0.5), dl.replicated(optax.sgd(0.1))
    ),
}


def counted(metrics):
    healths = [h.voters for h in metrics.health] + [h.workers for h in metrics.means]
    return [int(x) for x in healths]


@pytest.mark.parametrize("how", MAPS)
@pytest.mark.parametrize("kind", EXCHANGES)
def test_a_worker_comes_back_after_a_bad_micro_batch(kind, how):
    step, params, state = start(loss, optax.MultiSteps(EXCHANGES[kind](), 2), PARAMS, how)
    seen = []
    for batch in (SICK, X, X, X):
        params, state, metrics = step(params, state, batch)
        seen.append(counted(metrics))
    assert set(seen[1]) == {7}  # the update of which the bad micro-batch is a part
    assert set(seen[3]) == {8}
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(params))


BEFORE = {"trace": optax.trace(0.9), "ema": optax.ema(0.9), "adam": optax.scale_by_adam()}


@pytest.mark.parametrize("how", MAPS)
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("kind", ["vote", "labels"])
def test_state_before_a_vote_forgets_a_bad_gradient(kind, before, how):
    tx = optax.chain(BEFORE[before], EXCHANGES[kind]())
    step, params, state = start(loss, tx, PARAMS, how)
    params, state, metrics = step(params, state, SICK)
    assert set(counted(metrics)) == {7}
    params, state, metrics = step(params, state, X)
    assert set(counted(metrics)) == {8}


def test_keep_finite_in_a_loop_of_ones_own():
    tx = dl.keep_finite(optax.chain(optax.trace(0.9), dl.scale_by_distributed_lion()))
    worker = jax.vmap(lambda g, s: tx.update({"w": g}, s)[1], axis_name="data")
    state = jax.tree.map(lambda x: jnp.stack([x] * 4), tx.init({"w": jnp.zeros(3)}))
    bad = jnp.ones((4, 3)).at[2, 1].set(jnp.inf)
    state = worker(bad, state)
    assert state[1].health.voted.tolist() == [True, True, False, True]
    state = worker(jnp.ones((4, 3)), state)
    assert state[1].health.voted.all()


@pytest.mark.parametrize("how", MAPS)
@pytest.mark.parametrize("made", ["MultiSteps", "gradient_transformation", "accumulate_gradients"])
def test_one_exchange_an_update(made, how):
    seen = []

    def count(g, _):
        jax.debug.callback(lambda _: seen.append(1), g["w"][0, 0])
        return g

    inner = optax.chain(optax.stateless(count), dl.distributed_lion(0.1))
    if made == "accumulate_gradients":
        tx = optax.chain(optax.clip(1e3), dl.accumulate_gradients(inner, 4))
    else:
        tx = optax.MultiSteps(inner, 4)
        tx = tx.gradient_transformation() if made == "gradient_transformation" else tx
    step, params, state = start(loss, tx, PARAMS, how)
    for _ in range(8):
        params, state, _ = step(params, state, X)
    jax.effects_barrier()
    assert len(seen) == 2 * 8  # 8 workers


@pytest.mark.filterwarnings("error")
def test_multi_steps_inside_another_transformation_is_named():
    multi = optax.MultiSteps(dl.distributed_lion(0.1), 2).gradient_transformation()
    step, params, state = start(loss, optax.chain(optax.clip(1.0), multi), PARAMS, "shard_map")
    with pytest.raises(UserWarning, match=r"exchanged in every micro-step.*accumulate_gradients"):
        step(params, state, X)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("schedule", [2, lambda update: 1 + update % 2])
def test_accumulating_is_what_optax_does(mean, schedule):
    """With sums that float32 holds exactly, an update is the inner one of the mean (or sum)."""
    ours = dl.accumulate_gradients(optax.sgd(0.5), schedule, mean)
    theirs = optax.MultiSteps(optax.sgd(0.5), schedule, mean)
    g = {"w": jnp.arange(6.0).reshape(2, 3)}
    a, b = ours.init(g), theirs.init(g)
    for i in range(6):
        given = {"w": g["w"] * 2.0**i}
        mine, a = ours.update(given, a, g)
        other, b = theirs.update(given, b, g)
        assert (mine["w"] == other["w"]).all()
        assert (a.mini_step, a.gradient_step) == (b.mini_step, b.gradient_step)
        assert (a.acc_grads["w"] == b.acc_grads["w"]).all()


@pytest.mark.parametrize("how", [*MAPS, "mean"])
def test_microbatches_are_one_vote_on_the_mean(how):
    """Two micro-batches of a quadratic loss with dyadic numbers: the gradients of the whole."""
    vote = dl.distributed_lion(0.5, 0.75, 0.5, weight_decay=0.0)
    tx, square = optax.sgd(0.5) if how == "mean" else vote, np.ones((4, 4), np.float32)
    got = []
    for k in (1, 2):
        given = {"w": square, "b": square[0]}
        step, params, state = start(loss, tx, given, how, microbatches=k)
        for _ in range(3):
            params, state, metrics = step(params, state, X)
        got.append((params, state, metrics.loss))
    for x, y in zip(*map(jax.tree.leaves, got), strict=True):
        assert (x == y).all()


@pytest.mark.parametrize("how", MAPS)
def test_extra_arguments_reach_through_accumulation(how):
    step, params, state = start(loss, optax.MultiSteps(dl.distributed_lion(0.1), 2), PARAMS, how)
    for _ in range(2):
        few = np.arange(8) < 3
        params, state, metrics = step(params, state, X, participating=few)
    assert int(metrics.health[0].voters) == 3
    assert metrics.health[0].voted.tolist() == few.tolist()
