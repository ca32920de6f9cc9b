# SPDX-License-Identifier: Apache-2.0
"""Models with state of their own: the statistics of BatchNorm, counters, keys."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distlion_jax as dl
from tests.steps import MAPS, one, start

X = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
PARAMS = {"w": np.ones((4, 3), np.float32)}


def moving(params, model_state, x):
    """A loss, and statistics that move by a tenth of the batch's mean."""
    new = {
        "mean": 0.9 * model_state["mean"] + 0.1 * x.mean(0),
        "steps": model_state["steps"] + 1,
        "key": jax.random.fold_in(model_state["key"], 1),
    }
    return jnp.mean((x @ params["w"] - 1.0) ** 2), new


def fresh():
    return {"mean": jnp.zeros(4), "steps": jnp.int32(0), "key": jax.random.key(3)}


@pytest.mark.parametrize("how", [*MAPS, "mean"])
@pytest.mark.parametrize("k", [1, 2])
def test_statistics_are_the_mean_over_all_workers(how, k):
    tx = optax.sgd(0.1) if how == "mean" else dl.distributed_lion(0.1)
    step, params, model, state = start(moving, tx, PARAMS, how, fresh(), microbatches=k)
    for _ in range(3):
        params, model, state, _ = step(params, model, state, X)
    model = one(model, how)
    assert int(model["steps"]) == 3 * k
    # Each micro-batch moves the statistics; the two halves of a worker's rows differ.
    want = np.zeros(4)
    halves = X.reshape(8, k, 4 // k, 4).mean(2)  # [worker, micro-batch, feature]
    for _ in range(3):
        for j in range(k):
            want = 0.9 * want + 0.1 * halves[:, j].mean(0)
    np.testing.assert_allclose(model["mean"], want, rtol=1e-5)
    assert model["key"].dtype == jax.random.key(3).dtype


@pytest.mark.parametrize("how", [*MAPS, "mean"])
def test_a_sick_worker_leaves_no_trace_in_the_statistics(how):
    tx = optax.sgd(0.1) if how == "mean" else dl.distributed_lion(0.1)
    step, params, model, state = start(moving, tx, PARAMS, how, fresh())
    sick = X.copy()
    sick[0] = np.nan
    params, model, state, _ = step(params, model, state, sick)
    model = one(model, how)
    np.testing.assert_allclose(model["mean"], 0.1 * X[4:].mean(0), rtol=1e-5)
    assert np.isfinite(jax.tree.leaves(params)[0]).all()


def test_nobody_took_part_so_the_statistics_stay():
    step, params, model, state = start(
        moving, dl.distributed_lion(0.1), PARAMS, "shard_map", fresh()
    )
    params, model, state, metrics = step(params, model, state, np.full_like(X, np.nan))
    assert int(metrics.health[0].voters) == 0
    assert (np.asarray(model["mean"]) == 0).all()
    assert int(model["steps"]) == 0


def test_with_aux():
    def loss(params, model_state, x):
        value, new = moving(params, model_state, x)
        return value, (new, {"largest": x.max()})

    tx = dl.distributed_lion(0.1)
    step, params, model, state = start(loss, tx, PARAMS, "shard_map", fresh(), has_aux=True)
    _, model, _, metrics = step(params, model, state, X)
    np.testing.assert_allclose(metrics.aux["largest"], X.reshape(8, 4, 4).max((1, 2)).mean(), 1e-6)
    assert int(model["steps"]) == 1


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, momentum=0.5)(nn.Dense(5)(x))
        return nn.Dense(3)(x)


@pytest.mark.parametrize("how", MAPS)
def test_batch_norm_of_flax(how):
    net = Net()
    variables = net.init(jax.random.key(0), X)

    def loss(params, batch_stats, x):
        given = {"params": params, "batch_stats": batch_stats}
        y, new = net.apply(given, x, mutable=["batch_stats"])
        return jnp.mean((y - 1.0) ** 2), new["batch_stats"]

    tx = dl.distributed_lion(0.01)
    step, params, stats, state = start(loss, tx, variables["params"], how, variables["batch_stats"])
    losses = []
    for _ in range(20):
        params, stats, state, metrics = step(params, stats, state, X)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.8 * losses[0]
    # What the statistics converge to is the mean over workers of their batches' own.
    hidden = X @ np.asarray(one(params, how)["Dense_0"]["kernel"])
    np.testing.assert_allclose(one(stats, how)["BatchNorm_0"]["mean"], hidden.mean(0), atol=0.15)


def test_the_step_says_how_many_arguments_it_takes():
    step, params, _, state = start(moving, dl.distributed_lion(0.1), PARAMS, "shard_map", fresh())
    with pytest.raises(TypeError, match=r"takes \(params, model_state, state, batch\); got 3"):
        step(params, state, X)


def test_structure_of_the_model_state_must_stay():
    def loss(params, model_state, x):
        return moving(params, model_state, x)[0], {"other": x.mean()}

    step, *given = start(loss, dl.distributed_lion(0.1), PARAMS, "shard_map", fresh())
    with pytest.raises(ValueError, match="`model_state` changes its structure in `loss_fn`"):
        step(*given, X)
