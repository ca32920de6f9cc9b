# SPDX-License-Identifier: Apache-2.0
"""Who makes workers agree, whose state is whose, and who is counted in a mean."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import distlion_jax as dl
from distlion_jax import baselines
from distlion_jax.exchanges import exchanges, roles_of
from tests.helpers import map_workers

N, ROWS = 8, 16
TARGETS = np.linspace(-1.0, 1.0, N * 2 * 3, dtype=np.float32).reshape(N * 2, 3)
HOW = ["shard_map", "shard_map_unchecked", "pmap"]


def loss(params, batch):
    return jnp.mean((params["w"] - batch) ** 2) + 0.1 * jnp.sum(params["b"] ** 2)


def start():
    return {"w": jnp.zeros(3), "b": jnp.ones(2)}


def train(tx, how, batches, gradients="local", steps=None, **options):
    """Parameters of worker 0, state and metrics after some steps."""
    mesh = options.pop("mesh", None) or dl.worker_mesh(N)
    if how == "pmap":
        step = dl.make_pmap_train_step(loss, tx)
        params, state = dl.pmap_replicate(start()), dl.pmap_replicate(tx.init(start()))
    else:
        step = dl.make_train_step(
            loss, tx, mesh, gradients=gradients, check_vma=how == "shard_map", **options
        )
        params = dl.replicate(start(), mesh)
        local = gradients == "local"
        axis = options.get("axis_name", "data")
        state = (
            dl.init_state(tx, params, mesh, axis) if local else dl.replicate(tx.init(params), mesh)
        )
    for batch in batches:
        params, state, metrics = step(params, state, batch)
    first = jax.tree.map(lambda x: np.asarray(x[0] if how == "pmap" else x), params)
    return first, state, metrics


def mean_over_workers(updates, params):
    del params
    return jax.lax.pmean(updates, "data")


def same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


# --- A transformation of a user's own -----------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("declared", [True, False])
def test_an_exchange_of_a_users_own_trains_in_every_map(how, declared):
    """Declared or not, it equals the ordinary optimizer on the mean gradient."""
    mean = optax.stateless(mean_over_workers)
    after = optax.adam(0.1)
    # With JAX's check on, state that follows the exchange must be known to be replicated.
    after = dl.replicated(after) if how == "shard_map" else after
    tx = optax.chain(dl.exchange(mean) if declared else mean, after)
    got, _, metrics = train(tx, how, [TARGETS] * 5)
    want, _, _ = train(optax.adam(0.1), "shard_map", [TARGETS] * 5, gradients="mean")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)
    assert np.isfinite(metrics.loss)
    assert bool(exchanges(tx.init(start()))) == declared


def test_state_that_follows_an_exchange_is_named():
    tx = optax.chain(dl.exchange(optax.stateless(mean_over_workers)), optax.adam(0.1))
    with pytest.raises(ValueError, match="would differ by worker") as info:
        train(tx, "shard_map", [TARGETS])
    assert "distlion_jax.replicated(...). ScaleByAdamState keep arrays" in str(info.value)


def test_an_exchange_of_a_users_own_trains_under_vmap():
    tx = optax.chain(dl.exchange(optax.stateless(mean_over_workers)), optax.adam(0.1))

    def worker(rows):
        params, state = start(), tx.init(start())
        for _ in range(5):
            updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
            params = optax.apply_updates(params, updates)
        return params

    rows = TARGETS.reshape(N, 2, 3)
    got = jax.tree.map(lambda x: x[0], jax.vmap(worker, axis_name="data")(rows))
    want, _, _ = train(optax.adam(0.1), "shard_map", [TARGETS] * 5, gradients="mean")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


class CountedState(NamedTuple):
    """Of a user's own schedule, which JAX must know to be the same on all workers."""

    calls: Any
    roles = dl.Roles(shared=("calls",))


def halving():
    def update(updates, state, params=None):
        del params
        scale = 0.5**state.calls
        updates = jax.tree.map(lambda u: u * scale.astype(u.dtype), updates)
        return updates, CountedState(state.calls + 1)

    return optax.GradientTransformation(lambda _: CountedState(jnp.int32(0)), update)


@pytest.mark.parametrize("how", HOW)
def test_a_state_of_a_users_own_declares_what_is_shared(how):
    tx = optax.chain(dl.distributed_lion(0.25, weight_decay=0.0), halving())
    got, state, _ = train(tx, how, [TARGETS] * 3)
    assert np.asarray(state[1].calls).tolist() == [3] * N
    steps = dl.distributed_lion(lambda count: 0.25 * 0.5**count, weight_decay=0.0)
    same(got, train(steps, how, [TARGETS] * 3)[0])


def test_declarations_name_the_fields_of_their_state():
    """Ours, by the states that the factories make."""
    kinds = [
        dl.distributed_lion(0.1),
        dl.scale_by_averaged_lion(),
        dl.average_gradients(),
        dl.synchronize_momentum(dl.distributed_lion(0.1), 2),
        dl.replicated(optax.adam(0.1)),
        dl.exchange(optax.adam(0.1)),
        baselines.compressed_average(baselines.PowerSGD()),
        baselines.deep_gradient_compression(),
    ]
    ours = 0
    for tx in kinds:
        declares = lambda node: roles_of(node) is not None  # noqa: E731
        for node in jax.tree.leaves(tx.init(start()), is_leaf=declares):
            if (roles := roles_of(node)) is not None:
                ours += 1
                named = {*roles.own, *roles.shared}
                assert named <= set(node._fields)
                assert not set(roles.own) & set(roles.shared)
                assert set(roles.in_place) <= set(roles.like_params) <= named
                for name in roles.like_params:  # of the parameters' shapes indeed
                    field = getattr(node, name)
                    if jax.tree.leaves(field):
                        assert jax.tree.map(jnp.shape, field) == jax.tree.map(jnp.shape, start())
    assert ours == len(kinds)


@pytest.mark.parametrize(
    "tx",
    [
        optax.scale_by_schedule(lambda count: 1.0 / (1 + count)),
        optax.inject_hyperparams(optax.scale)(lambda count: 1.0 / (1 + count)),
        optax.inject_hyperparams(optax.scale)(0.5),
        optax.add_decayed_weights(lambda count: 0.1 / (1 + count)),
        optax.conditionally_transform(optax.scale(0.5), lambda step: step > 1),
        optax.conditionally_mask(optax.scale(0.5), lambda step: step > 1),
    ],
    ids=["schedule", "injected schedule", "injected", "decay", "transform", "mask"],
)
def test_counters_of_optax_are_declared(tx):
    """After a vote, with JAX's check on: what they scale by is known to be replicated."""
    chain = optax.chain(dl.distributed_lion(0.25, weight_decay=0.0), tx)
    checked, _, _ = train(chain, "shard_map", [TARGETS] * 3)
    same(checked, train(chain, "shard_map_unchecked", [TARGETS] * 3)[0])


# --- One mean -----------------------------------------------------------------------------------


def with_nan(worker, batch=TARGETS):
    sick = batch.copy()
    sick[2 * worker, 0] = np.nan
    return sick


INSIDE = {"axis_name": "node", "mean_axis_name": "chip"}


def by_mean(kind, how, batches):
    """The same ordinary optimizer, its gradients averaged in one of the package's ways."""
    adam = optax.adam(0.1)
    if kind == "gradients":
        return train(adam, how, batches, gradients="mean")
    if kind == "average_gradients":
        return train(optax.chain(dl.average_gradients(), dl.replicated(adam)), how, batches)
    if kind == "full_precision":
        return train(baselines.full_precision(adam), how, batches)
    mesh = jax.make_mesh((1, N), ("node", "chip"), axis_types=(AxisType.Auto,) * 2)
    tx = optax.chain(dl.average_gradients("node"), dl.replicated(adam))
    return train(tx, how, batches, mesh=mesh, **INSIDE)


@pytest.mark.parametrize("how", HOW[:2])
@pytest.mark.parametrize("kind", ["average_gradients", "full_precision", "mean_axis_name"])
def test_one_nan_worker_gives_the_same_parameters_by_every_mean(how, kind):
    batches = [TARGETS, with_nan(3), TARGETS]
    want, _, _ = by_mean("gradients", how, batches)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(want))
    got, _, metrics = by_mean(kind, how, batches)
    same(got, want)
    assert np.isfinite(metrics.loss)


@pytest.mark.parametrize("kind", ["gradients", "average_gradients", "mean_axis_name"])
def test_the_sick_worker_is_left_out_of_mean_and_loss_and_shown(kind):
    _, _, metrics = by_mean(kind, "shard_map", [with_nan(3)])
    health = metrics.means[-1] if kind == "mean_axis_name" else metrics.means[0]
    assert health.counted.tolist() == [i != 3 for i in range(N)]
    assert int(health.workers) == N - 1
    rest = np.delete(TARGETS, [6, 7], axis=0)
    np.testing.assert_allclose(metrics.loss, np.mean(rest**2) + 0.2, rtol=1e-5)


def test_one_nan_worker_by_every_mean_under_pmap():
    tx = optax.chain(dl.average_gradients(), dl.replicated(optax.adam(0.1)))
    got, _, metrics = train(tx, "pmap", [with_nan(3)])
    same(got, by_mean("gradients", "shard_map", [with_nan(3)])[0])
    assert metrics.means[0].counted.tolist() == [i != 3 for i in range(N)]
    assert int(metrics.means[0].workers) == N - 1


BASELINES = {
    "average": dl.average_gradients(),
    "averaged lion": dl.scale_by_averaged_lion(),
    "QSGD": baselines.compressed_average(baselines.QSGD()),
    "TernGrad": baselines.compressed_average(baselines.TernGrad()),
    "EFSign": baselines.compressed_average(baselines.EFSign()),
    "TopK": baselines.compressed_average(baselines.TopK(0.5)),
    "PowerSGD": baselines.compressed_average(baselines.PowerSGD(1)),
    "DGC": baselines.deep_gradient_compression(0.5),
}


SLOW = [pytest.param(how, marks=pytest.mark.slow) for how in HOW[1:]]


@pytest.mark.parametrize("how", ["vmap", HOW[0], *SLOW])
@pytest.mark.parametrize("name", BASELINES)
def test_every_mean_counts_who_is_in_it(how, name):
    tx = BASELINES[name]
    rng = np.random.default_rng(0)
    shapes = {"w": (24, 16), "b": (3,)}
    g = {k: rng.standard_normal((N, *s)).astype(np.float32) for k, s in shapes.items()}
    g["b"][5, 1] = np.inf
    state = jax.vmap(lambda g: tx.init(g))(g)
    take = np.arange(N) != 2

    def update(g, state, take):
        return tx.update(g, state, g, participating=take)

    updates, state = map_workers(update, how, N)(g, state, take)
    (health,) = dl.mean_health(state)
    assert np.asarray(health.counted).tolist() == [i not in (2, 5) for i in range(N)]
    assert np.asarray(health.workers).tolist() == [N - 2] * N
    # The same as without those two, whatever they hold.
    for x in g.values():
        x[[2, 5]] = 1e3
    healthy = ~np.isin(np.arange(N), [2, 5])
    others = map_workers(update, how, N)(g, jax.vmap(tx.init)(g), healthy)
    same(updates, others[0])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
    if name == "average":
        np.testing.assert_allclose(updates["w"][0], np.delete(g["w"], [2, 5], 0).mean(0), rtol=1e-4)
    assert not dl.vote_health(state)


@pytest.mark.parametrize("guarded", [True, False])
def test_lion_on_the_mean_is_lion(guarded):
    """The yardstick equals Optax's Lion on gradients that are averaged beforehand, with ==."""
    rng = np.random.default_rng(0)
    g = rng.integers(-4, 5, (5, N, 3, 5)).astype(np.float32) / 4
    tx = baselines.full_precision_lion(0.25, 0.75, 0.5, weight_decay=0.125, guarded=guarded)
    plain = optax.lion(0.25, 0.75, 0.5, weight_decay=0.125)

    def play(tx, rounds):
        x, state = jnp.ones((3, 5)), tx.init(jnp.ones((3, 5)))
        for one in rounds:
            updates, state = tx.update(one, state, x)
            x = optax.apply_updates(x, updates)
        return x

    mapped = jax.vmap(lambda g: play(tx, g), in_axes=1, axis_name="data")
    got = np.asarray(mapped(g))
    np.testing.assert_array_equal(got, np.stack([np.asarray(play(plain, g.mean(1)))] * N))


def test_a_mean_without_a_guard_is_of_all():
    tx = baselines.full_precision(optax.sgd(1.0), guarded=False)
    got, _, _ = train(tx, "shard_map", [with_nan(3)])
    assert np.isnan(got["w"]).any()


# --- Average inside, vote across -----------------------------------------------------------------


BOTH = ("node", "chip")


@pytest.mark.parametrize(("axes", "steps"), [("node", None), (BOTH, None), (BOTH, 1)])
def test_an_average_inside_a_node_with_jaxs_check_on(axes, steps):
    """The state lies on nodes, or on all chips; a sick chip is left out of its node's mean."""
    mesh = jax.make_mesh((4, 2), ("node", "chip"), axis_types=(AxisType.Auto,) * 2)
    vote = dl.distributed_lion(0.25, weight_decay=0.0, axis_name="node", transport="two_phase")
    tx = optax.chain(dl.average_gradients("chip", steps), vote)
    params = dl.replicate({"w": jnp.zeros(3)}, mesh)
    state = dl.init_state(tx, params, mesh, axes)
    specs = dl.state_specs(state, axes)

    def step(params, state, rows):
        state = dl.unstack(state, axes)
        grads = {"w": rows.mean(0)}
        updates, state = tx.update(grads, state, params)
        if axes == BOTH:  # the same on all chips of a node, which JAX cannot know of their momenta
            updates = jax.lax.pmean(updates, "chip")
        return optax.apply_updates(params, updates), dl.stack(state)

    rows = with_nan(3)  # the second chip of the second node
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), specs, P(("node", "chip"))), out_specs=(P(), specs)
    )
    params, state = jax.jit(mapped)(params, state, rows)
    assert np.isfinite(params["w"]).all()
    (health,) = dl.mean_health(state)
    if axes == "node":
        assert health.counted.tolist() == [True, False, True, True]
        assert health.workers.tolist() == [2, 1, 2, 2]
    else:
        assert health.counted.tolist() == [i != 3 for i in range(N)]
        assert health.workers.tolist() == [2, 2, 1, 1, 2, 2, 2, 2]


def test_an_exchange_shows_the_health_of_what_it_wraps():
    _, _, metrics = train(dl.exchange(dl.distributed_lion(0.25)), "shard_map", [with_nan(3)])
    assert metrics.health[0].voted.tolist() == [i != 3 for i in range(N)]
    assert np.isfinite(metrics.loss)


class OwnState(NamedTuple):
    """Of a user's own exchange, with a counter that its updates depend on."""

    count: Any
    roles = dl.Roles(exchange=True, shared=("count",))


@pytest.mark.parametrize("how", HOW)
def test_an_exchange_of_a_users_own_may_count(how):
    def update(updates, state, params=None):
        del params
        mean = jax.lax.pmean(updates, "data")
        return jax.tree.map(lambda g: -(0.5**state.count) * g, mean), OwnState(state.count + 1)

    tx = optax.GradientTransformation(lambda _: OwnState(jnp.int32(0)), update)
    got, state, _ = train(tx, how, [TARGETS] * 3)
    assert np.asarray(state.count).tolist() == [3] * N
    want, _, _ = train(optax.sgd(lambda t: 0.5**t), "shard_map", [TARGETS] * 3, gradients="mean")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)
