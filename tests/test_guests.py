# SPDX-License-Identifier: Apache-2.0
"""Other people's transformations, containers, types and habits in the ready-made steps."""

import dataclasses
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import distlion_jax as dl
from distlion_jax import baselines
from distlion_jax.exchanges import exchanges
from tests.steps import MAPS, one, start

X = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
PARAMS = {"w": np.ones((4, 3), np.float32), "b": np.zeros(3, np.float32)}
FOLLOWS = dl.replicated(optax.sgd(0.1))
COMPRESSORS = (
    baselines.QSGD(),
    baselines.TernGrad(),
    baselines.EFSign(),
    baselines.PowerSGD(1),
    baselines.TopK(0.1),
)
EVERYTHING = {
    "distributed_lion": lambda: dl.distributed_lion(0.1),
    "health by leaf": lambda: dl.distributed_lion(0.1, health="leaf"),
    "a mask": lambda: dl.distributed_lion(0.1, mask={"w": True, "b": False}),
    "labels": lambda: dl.distributed_lion_by_label(0.1, {"w": "majority", "b": "full"}),
    "one label": lambda: dl.distributed_lion_by_label(0.1, "average"),
    "a function of labels": lambda: dl.distributed_lion_by_label(0.1, by_rank),
    "synchronized": lambda: dl.synchronize_momentum(dl.distributed_lion(0.1), 2),
    "accumulated": lambda: dl.accumulate_gradients(dl.distributed_lion(0.1), 2),
    "kept finite": lambda: dl.keep_finite(optax.chain(optax.trace(0.9), dl.distributed_lion(0.1))),
    "averaged Lion": lambda: optax.chain(dl.scale_by_averaged_lion(), optax.scale(-0.1)),
    "averaged Adam": lambda: optax.chain(dl.average_gradients(), dl.replicated(optax.adam(0.1))),
    "warm-up": lambda: optax.chain(dl.average_gradients(steps=2), dl.distributed_lion(0.1)),
    "exchange": lambda: dl.exchange(dl.average_gradients()),
    "full precision": lambda: baselines.full_precision_lion(0.1),
    "signum": lambda: baselines.distributed_signum(0.1),
    "DGC": lambda: optax.chain(baselines.deep_gradient_compression(0.5), FOLLOWS),
    **{
        type(c).__name__: (lambda c=c: optax.chain(baselines.compressed_average(c), FOLLOWS))
        for c in COMPRESSORS
    },
}


def loss(params, x):
    return jnp.mean((x @ params["w"] + params["b"] - 1.0) ** 2)


def by_rank(params):
    return jax.tree.map(lambda x: "majority" if x.ndim > 1 else "full", params)


@pytest.mark.parametrize("kind", EVERYTHING)
def test_optax_maps_the_parameters_in_every_state(kind):
    tx = EVERYTHING[kind]()
    state = tx.init(PARAMS)
    specs = {"w": "of w", "b": "of b"}
    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    got = optax.tree.map_params(
        tx, lambda x, spec: spec, state, specs, transform_non_params=lambda x: None, is_leaf=masked
    )
    assert set(jax.tree.leaves(got)) <= {"of w", "of b"}
    like_params = [
        leaf
        for node in exchanges(state)
        for name in type(node).roles.like_params
        for leaf in jax.tree.leaves(getattr(node, name))
    ]
    assert len(jax.tree.leaves(got)) >= len(like_params)


@pytest.mark.parametrize("kind", [kind for kind in EVERYTHING if kind not in ("a mask", "labels")])
@pytest.mark.parametrize("empty", [{}, {"none": np.zeros((0, 3), np.float32)}])
def test_trees_with_nothing_in_them(kind, empty):
    tx = EVERYTHING[kind]()
    state = jax.tree.map(lambda x: jnp.stack([x] * 2), tx.init(empty))
    update = jax.vmap(lambda s: tx.update(empty, s, empty), axis_name="data", axis_size=2)
    out, state = update(state)
    assert jax.tree.structure(out) == jax.tree.structure(empty)
    update(state)


@pytest.mark.parametrize("how", MAPS)
def test_a_mask_that_lets_nothing_through(how):
    """As a filter that matches no leaf: nothing votes, nothing moves, nothing is sent."""
    frozen = optax.masked(dl.distributed_lion(0.1), {"w": False, "b": False})
    tx = optax.chain(frozen, optax.masked(optax.set_to_zero(), {"w": True, "b": True}))
    if how == "shard_map":
        tx = dl.distributed_lion_by_label(0.1, "frozen")
    step, params, state = start(loss, tx, PARAMS, how)
    params, state, _ = step(params, state, X)
    assert (np.asarray(one(params, how)["w"]) == 1).all()


@pytest.mark.parametrize("how", MAPS)
@pytest.mark.parametrize("kind", ["distributed_lion", "labels", "averaged Adam", "warm-up", "DGC"])
def test_a_leaf_without_coordinates_beside_others(kind, how):
    given = {**PARAMS, "none": np.zeros((0, 3), np.float32)}
    tx = EVERYTHING[kind]()
    if kind == "labels":
        tx = dl.distributed_lion_by_label(0.1, {"w": "majority", "b": "full", "none": "average"})
    step, params, state = start(lambda p, x: loss(p, x) + p["none"].sum(), tx, given, how)
    for _ in range(3):
        params, state, metrics = step(params, state, X)
    assert np.isfinite(metrics.loss)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Net:
    """A model that is a pytree and can be called, as Equinox's are."""

    w: Any
    b: Any

    def __call__(self, x):
        return x @ self.w + self.b


@pytest.mark.parametrize("how", MAPS)
@pytest.mark.parametrize(
    "make",
    [
        lambda net: dl.distributed_lion(0.1, mask=jax.tree.map(lambda x: x.ndim > 1, net)),
        lambda net: dl.distributed_lion_by_label(0.1, "majority"),
        lambda net: dl.distributed_lion_by_label(0.1, by_rank),
        lambda net: dl.distributed_lion_by_label(0.1, by_rank(net)),
        lambda net: dl.distributed_lion_by_label(
            0.1, by_rank(net), mask=jax.tree.map(lambda x: x.ndim > 1, net)
        ),
    ],
)
def test_a_model_that_can_be_called(make, how):
    net = Net(PARAMS["w"], PARAMS["b"])
    step, params, state = start(lambda p, x: jnp.mean((p(x) - 1) ** 2), make(net), net, how)
    params, state, metrics = step(params, state, X)
    plain = start(loss, dl.distributed_lion_by_label(0.1, by_rank), PARAMS, how)
    assert float(metrics.loss) == float(plain[0](*plain[1:], X)[2].loss)
    assert not (np.asarray(one(params, how).w) == 1).any()


def noisy(named):
    noise, vote = optax.add_noise(1.0, 0.0, jax.random.key(0)), dl.distributed_lion(0.1)
    # JAX sorts the names, and so the noise comes last in the state.
    return optax.named_chain(("z", noise), ("a", vote)) if named else optax.chain(noise, vote)


@pytest.mark.parametrize("how", MAPS)
@pytest.mark.parametrize("named", [False, True])
def test_noise_before_the_vote_is_each_workers_own(named, how):
    tx = noisy(named)
    given = {"w": np.ones((40, 30), np.float32)}
    step, params, state = start(lambda p, x: 0.0 * (x @ p["w"][:4]).sum(), tx, given, how)
    for _ in range(2):
        params, state, metrics = step(params, state, X)
        assert float(metrics.health[0].margin) < 0.5  # of 8 fair voters: 0.27


def momo():
    return optax.contrib.momo(0.1)


@pytest.mark.parametrize("how", MAPS)
@pytest.mark.parametrize("optimizer", [momo, lambda: optax.polyak_sgd(1.0)])
def test_optimizers_that_look_at_the_loss_get_the_workers_mean(optimizer, how):
    tx = optax.chain(dl.average_gradients(), dl.replicated(optimizer()))
    step, params, state = start(loss, tx, PARAMS, how)
    alone, kept = PARAMS, optimizer().init(PARAMS)
    for _ in range(3):
        params, state, _ = step(params, state, X)
        value, g = jax.value_and_grad(loss)(alone, X)
        updates, kept = optimizer().update(g, kept, alone, value=value)
        alone = optax.apply_updates(alone, updates)
    for x, y in zip(jax.tree.leaves(one(params, how)), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", [*MAPS, "mean"])
@pytest.mark.parametrize("given", [lambda: 1.0, lambda: np.linspace(0.0, 2.0, 8)])
def test_a_loss_of_ones_own_takes_its_place(given, how):
    """One number, or an entry a worker, of which all get the mean."""
    seen = []

    def look(updates, state, params=None, *, value, **_):
        jax.debug.callback(lambda v: seen.append(float(v)), value)
        return updates, state

    watch = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), look)
    tx = optax.chain(watch, optax.sgd(0.1) if how == "mean" else dl.distributed_lion(0.1))
    step, params, state = start(loss, tx, PARAMS, how)
    step(params, state, X, value=given())
    jax.effects_barrier()
    assert set(seen) == {1.0}


@pytest.mark.parametrize("how", MAPS)
def test_the_rate_falls_on_a_plateau(how):
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    for after in (plateau, dl.replicated(plateau)):
        step, params, state = start(loss, optax.chain(dl.distributed_lion(0.1), after), PARAMS, how)
        for _ in range(6):
            params, state, _ = step(params, state, X, value=1.0)
        assert float(np.ravel(optax.tree.get(state, "scale"))[0]) < 0.5


@pytest.mark.parametrize("how", MAPS)
@pytest.mark.parametrize("sick", ["head", "body"])
def test_a_sick_worker_sits_out_of_all_groups(sick, how):
    """Votes and averages side by side, of some leaves each."""
    groups = {
        "vote": dl.distributed_lion(0.1),
        "slow": dl.distributed_lion(0.01),
        "adam": optax.chain(dl.average_gradients(), dl.replicated(optax.adam(0.1))),
    }
    tx = optax.partition(groups, {"head": "vote", "body": "slow", "scale": "adam"})
    given = {name: np.ones((4, 3), np.float32) for name in ("head", "body", "scale")}

    def one_leaf(params, x):
        clean = jnp.nan_to_num(x).mean(0)
        terms = [jnp.sum(v.T @ (x.mean(0) if k == sick else clean)) for k, v in params.items()]
        return sum(terms)

    step, params, state = start(one_leaf, tx, given, how)
    bad = X.copy()
    bad[0, 0] = np.nan
    *_, metrics = step(params, state, bad)
    assert [int(h.voters) for h in metrics.health] == [7, 7]
    assert [int(h.workers) for h in metrics.means] == [7]


@pytest.mark.parametrize("how", [*MAPS, "mean"])
def test_complex_parameters_go_down_the_loss(how):
    given = {"w": np.full((4, 3), 1 + 1j, np.complex64)}
    tx = optax.sgd(0.1)
    if how != "mean":
        tx = optax.chain(dl.average_gradients(), dl.replicated(tx))
    step, params, state = start(
        lambda p, x: jnp.mean(jnp.abs(x @ p["w"] - 1j) ** 2), tx, given, how
    )
    losses = []
    for _ in range(20):
        params, state, metrics = step(params, state, X)
        losses.append(float(metrics.loss))
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("how", [*MAPS, "mean"])
def test_parameters_that_rounding_holds_are_spoken_of(how):
    given = {"scale": jnp.ones(64, jnp.bfloat16)}
    far = lambda p, x: jnp.sum((p["scale"].astype(jnp.float32) - 2.0) ** 2) + 0 * x.sum()  # noqa: E731
    for rate, quiet in ((3e-4, False), (0.1, True)):
        make = optax.lion if how == "mean" else dl.distributed_lion
        step, params, state = start(far, make(rate, weight_decay=0.0), given, how)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            *_, metrics = step(params, state, X)
        assert any("did not move in call 1" in str(w.message) for w in said) != quiet
        assert float(metrics.unmoved) == (0.0 if quiet else 1.0)


@pytest.mark.parametrize("make", [dl.distributed_lion, baselines.distributed_signum])
@pytest.mark.parametrize("b2", [np.float32(0.998), jnp.float32(0.997), 0.998])
def test_a_momentum_in_bfloat16_decays(make, b2):
    tx, w = (
        make(0.1, b2, mu_dtype=jnp.bfloat16)
        if make is not dl.distributed_lion
        else make(0.1, b2=b2, mu_dtype=jnp.bfloat16),
        jnp.ones(8),
    )

    def worker(_):
        update = lambda s, g: (tx.update(jnp.full(8, g), s, w)[1], None)  # noqa: E731
        gradients = jnp.append(1.5, jnp.zeros(1500))
        return jax.lax.scan(update, tx.init(w), gradients)[0][0].mu

    mu = jax.jit(jax.vmap(worker, axis_name="data"))(jnp.arange(2))
    assert (np.asarray(mu, np.float32) < 0.5 * 1.5 * 0.002).all()


def test_a_traced_decay_that_rounds_to_one_holds_no_vote():
    tx = dl.scale_by_distributed_lion
    worker = lambda b2, g: tx(0.9, b2, jnp.bfloat16).update(g, tx(mu_dtype=jnp.bfloat16).init(g))  # noqa: E731
    given = jnp.array([0.999, 0.999]), jnp.ones((2, 3))
    _, state = jax.jit(jax.vmap(worker, axis_name="data"))(*given)
    assert state.health.voters.tolist() == [0, 0]


@pytest.mark.parametrize("how", ["shard_map", "unchecked"])
def test_libraries_that_differentiate_themselves_get_a_workers_own_gradient(how):
    """nnx.value_and_grad of ``local`` parameters, in a map of one's own."""
    graph, params = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    mesh = dl.worker_mesh(8)

    def worker(params, x):
        model = nnx.merge(graph, dl.local(params))
        return jax.tree.map(lambda g: g[None], nnx.grad(lambda m: jnp.mean(m(x) ** 2))(model))

    mapped = jax.shard_map(
        worker, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"),
        check_vma=how == "shard_map",
    )  # fmt: skip
    got = jax.jit(mapped)(params, X)
    for i in range(8):
        rows = X[2 * i : 2 * i + 2]
        want = jax.grad(lambda p, rows=rows: jnp.mean(nnx.merge(graph, p)(rows) ** 2))(params)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", MAPS)
def test_one_array_under_two_names(how):
    """Tied weights that are given away together: a buffer is donated once."""
    both = lambda p, x: loss(p["a"], x) + loss(p["b"], x)  # noqa: E731
    given = {"a": PARAMS, "b": PARAMS}
    step, params, state = start(both, dl.distributed_lion(0.1), given, how)
    params = {"a": params["a"], "b": params["a"]}
    for _ in range(2):
        params, state, metrics = step(params, state, X)
    assert np.isfinite(metrics.loss)


@pytest.mark.parametrize("how", ["shard_map", "unchecked"])
def test_what_is_lowered_is_called_like_the_step(how):
    step, params, state = start(loss, dl.distributed_lion(0.1), PARAMS, how)
    compiled = step.lower(params, state, X).compile()
    *_, metrics = compiled(params, state, X)
    assert int(metrics.health[0].voters) == 8
    step, params, state = start(loss, dl.distributed_lion(0.1), PARAMS, how)
    step.lower(params, state, X, value=1.0, participating=None)
    step.lower(*jax.eval_shape(lambda *a: a, params, state, X), value=1.0)


@pytest.mark.parametrize("x", [2.0, np.float32(2.0), np.float32([2.0])])
def test_a_number_has_a_workers_own_gradient_too(x):
    def worker(a):
        return dl.local_value_and_grad(lambda x, a: (a[0] * x).sum())(x, a)[1].reshape(1)

    mapped = jax.shard_map(worker, mesh=dl.worker_mesh(8), in_specs=P("data"), out_specs=P("data"))
    assert jax.jit(mapped)(jnp.arange(8.0)).tolist() == list(range(8))


class Kept(NamedTuple):
    last: Any


@pytest.mark.parametrize("how", MAPS)
def test_an_argument_that_is_kept_as_it_came_is_read(how):
    keep = optax.GradientTransformationExtraArgs(
        lambda params: Kept(np.int32(0)),
        lambda g, s, p=None, *, tag, **extra: (g, Kept(tag)),
    )
    tx = optax.chain(dl.exchange(keep), dl.distributed_lion(0.1))
    step, params, state = start(loss, tx, PARAMS, how)
    *_, state, _ = step(params, state, X, tag=np.arange(8, dtype=np.int32), weight=None)
    assert state[0].inner.last.tolist() == list(range(8))


@pytest.mark.parametrize("how", MAPS)
def test_an_init_of_numbers_or_of_values(how):
    """It holds a number of Python's, and looks at the parameters' values."""
    bound = optax.GradientTransformation(lambda params: Kept(0), lambda g, s, p=None: (g, s))
    looks = optax.GradientTransformation(
        lambda params: Kept(jnp.zeros(())) if np.asarray(params["b"]).size else None,
        lambda g, s, p=None: (g, s),
    )
    for tx in (bound, looks) if how == "pmap" else (bound,):
        tx = optax.chain(dl.exchange(tx), dl.distributed_lion(0.1))
        step, params, state = start(loss, tx, PARAMS, how)
        *_, metrics = step(params, state, X)
        assert int(metrics.health[0].voters) == 8


@pytest.mark.parametrize("how", MAPS)
def test_a_warning_points_at_the_users_line(how):
    tx = optax.chain(optax.MultiSteps(dl.distributed_lion(0.1), 2).gradient_transformation())
    step, params, state = start(loss, tx, PARAMS, how)
    with pytest.warns(UserWarning, match="optax.MultiSteps inside") as found:
        step(params, state, X)
    assert found[0].filename == __file__


def test_two_accumulations_leak_no_tracer():
    make = lambda: dl.accumulate_gradients(dl.distributed_lion(0.1), 2)  # noqa: E731
    tx = optax.partition({"w": make(), "b": make()}, {"w": "w", "b": "b"})
    with jax.checking_leaks():
        step, params, state = start(loss, tx, PARAMS, "shard_map")
        for _ in range(2):
            params, state, metrics = step(params, state, X)
    assert [int(h.voters) for h in metrics.health] == [8, 8]
