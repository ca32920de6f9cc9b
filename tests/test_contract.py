# SPDX-License-Identifier: Apache-2.0
"""Optax's own contract: one table of optimizers, each of which passes every check below."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

import distlion_jax as dl
from tests.helpers import B1, B2, gradients, shapes_to_params

N = 4  # workers, under `jax.vmap` unless a check needs a mesh
RATE = 0.125  # exact, so that results can be compared with ==
SHAPES = {"w": (3, 5), "b": (4,), "s": ()}
KEPT = ("s", "w")  # where only a part of the tree is optimised


class Case(NamedTuple):
    factory: Callable[..., Any]
    options: dict[str, Any]
    ascends: bool = False  # a direction without a learning rate
    votes: bool = True  # the workers decide together
    replicates: bool = True  # updates are replicated where the state differs by worker


def average_then_lion(learning_rate, b1, b2):
    return optax.chain(dl.average_gradients("data"), optax.lion(learning_rate, b1, b2))


def warmed_up(learning_rate, b1, b2):
    vote = dl.distributed_lion(learning_rate, b1, b2)
    return optax.chain(dl.average_gradients("data", steps=1), vote)


def kernels(params):
    return {name: MuonDimensionNumbers() if name == "w" else None for name in params}


def kinds(params):
    names = {"w": "majority", "b": "average", "s": "full"}
    return {name: names[name] for name in params}


def _cases():
    exact = dict(b1=B1, b2=B2)
    yield "two_phase", Case(dl.distributed_lion, dict(exact, transport="two_phase"))
    choices = (("majority", "average"), ("zero", "coin"), ("binary", "ternary"))
    for a, t, b in itertools.product(*choices):
        options = dict(exact, aggregation=a, ties=t, ballot=b)
        yield f"lion-{a}-{t}-{b}", Case(dl.distributed_lion, options)
        yield f"direction-{a}-{t}-{b}", Case(dl.scale_by_distributed_lion, options, ascends=True)
    muon = dict(exact, muon_weight_dimension_numbers=kernels)
    yield "muon", Case(dl.distributed_muon, dict(muon, rest_factor=0.5))
    yield "muon-period", Case(dl.distributed_muon, dict(muon, period=2))
    yield "muon-direction", Case(dl.scale_by_distributed_muon, muon, ascends=True)
    yield "muon-one", Case(dl.distributed_muon, dict(muon, axis_name=None), votes=False)
    yield "by_label", Case(dl.distributed_lion_by_label, dict(exact, labels=kinds))
    yield "averaged", Case(dl.scale_by_averaged_lion, exact, ascends=True)
    yield "average_then_lion", Case(average_then_lion, exact, replicates=False)
    yield "warmed_up", Case(warmed_up, exact)
    yield "one", Case(dl.distributed_lion, dict(exact, axis_name=None), votes=False)


CASES = dict(_cases())
every = pytest.mark.parametrize("name", CASES)


def make(name, learning_rate=RATE, wrap=lambda factory: factory):
    """The case's optimizer, its factory wrapped by ``wrap``."""
    factory, options, ascends, *_ = CASES[name]
    if ascends:
        return optax.chain(wrap(factory)(**options), optax.scale_by_learning_rate(learning_rate))
    return wrap(factory)(learning_rate=learning_rate, **options)


PARAMS = jax.tree.map(lambda x: x + 0.5, shapes_to_params(SHAPES))
ROUNDS = [gradients(SHAPES, N, seed, zero_rows=False) for seed in (1, 2)]


def four_workers(f):
    """Operation by operation: quicker than to compile what runs once."""
    return jax.disable_jit()(jax.vmap(f, axis_name="data"))


def play(tx, rounds=ROUNDS, params=PARAMS, **extra):
    """The updates of some rounds; ``extra`` holds an entry for each worker."""
    tx = optax.with_extra_args_support(tx)

    def worker(rounds, state, extra):
        x, seen = params, []
        for g in rounds:
            updates, state = tx.update(g, state, x, **extra)
            x = optax.apply_updates(x, updates)
            seen.append(updates)
        return seen

    state = jax.vmap(lambda _: tx.init(params))(jnp.arange(N))
    return four_workers(worker)(rounds, state, extra)


plain = functools.cache(lambda name: play(make(name)))


def only(tree):
    return {name: tree[name] for name in KEPT}


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def types(tree):
    """What JAX knows of each leaf: shape, dtype, weak type, and the axes it varies over."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): jax.typeof(x) for path, x in named}


def shapes(tree):
    return {k: (x.shape, x.dtype, x.weak_type) for k, x in types(tree).items()}


STEPS = 150
QUICK = {"xla_backend_optimization_level": 0}  # to compile, not to run


@functools.cache
def compiled(name):
    """A jitted step of all workers, the list it grows by when traced, and what it starts from."""
    tx = make(name, optax.cosine_decay_schedule(0.1, STEPS))
    traces = []

    def step(g, state, params):
        traces.append(name)
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(lambda x: jnp.zeros((N, *x.shape)), PARAMS)
    state = jax.vmap(tx.init)(params)
    return jax.jit(jax.vmap(step, axis_name="data"), compiler_options=QUICK), traces, state, params


def losses(params):
    """A parabola of one half of the parameters, and Rosenbrock's valley of the other."""
    half, x, y = jnp.split(jax.flatten_util.ravel_pytree(params)[0], (10, 15))
    bowl = jnp.sum((half - jnp.linspace(-1, 2, 10)) ** 2)
    return bowl, jnp.sum((1 - x) ** 2 + 10 * (y - x**2) ** 2)


@jax.jit
def noisy_gradients(params, t):
    def one(params, key):
        noise = jax.random.normal(key, (20,))
        unravel = jax.flatten_util.ravel_pytree(params)[1]
        return jax.tree.map(jnp.add, jax.grad(lambda x: sum(losses(x)))(params), unravel(noise))

    return jax.vmap(one)(params, jax.random.split(jax.random.key(t), N))


@every
def test_converges(name):
    step, _, state, params = compiled(name)
    start = jax.vmap(losses)(params)
    for t in range(STEPS):
        params, state = step(noisy_gradients(params, t), state, params)
    for before, after in zip(start, jax.vmap(losses)(params), strict=True):
        assert (after < 0.05 * before).all()
    if CASES[name].votes:
        assert_same(params, jax.tree.map(lambda x: jnp.stack([x[0]] * N), params))


@every
def test_second_call_compiles_nothing(name):
    step, traces, state, params = compiled(name)
    for t in range(3):
        params, state = step(noisy_gradients(params, t), state, params)
    assert len(traces) == 1
    assert step._cache_size() == 1


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_keeps_types(name, dtype):
    """Of updates and of the state, which is a carry of ``scan`` and a branch's result."""
    tx, params = make(name), shapes_to_params(SHAPES, dtype)

    def worker(g, ready):
        state = tx.init(params)
        updates, after = tx.update(g, state, params)
        assert shapes(updates) == shapes(params)
        assert shapes(after) == shapes(state)
        assert not any(x.weak_type for x in types(state).values())
        advance = lambda s: tx.update(g, s, params)[1]  # noqa: E731
        step = lambda s, ready: (jax.lax.cond(ready, advance, lambda s: s, s), None)  # noqa: E731
        return jax.lax.scan(step, state, ready)

    g = jax.tree.map(lambda x: jnp.stack([x] * N), params)
    jax.eval_shape(jax.vmap(worker, axis_name="data"), g, jnp.ones((N, 2), bool))


@every
def test_keeps_types_in_shard_map(name):
    """With JAX's check on: what varies over the workers still does, what does not does not."""
    tx, case = make(name), CASES[name]
    replicated = case.votes and case.replicates

    def worker(g, state, params):
        g, state = jax.tree.map(lambda x: x[0], g), dl.unstack(state)
        updates, after = tx.update(g, state, params)
        assert types(after) == types(state)
        return updates if replicated else dl.stack(updates), dl.stack(after)

    mesh, data = dl.worker_mesh(N), P("data")
    state = jax.eval_shape(lambda: dl.init_state(tx, PARAMS, mesh))
    specs = dict(in_specs=(data, data, P()), out_specs=(P() if replicated else data, data))
    mapped = jax.shard_map(worker, mesh=mesh, **specs)
    _, after = jax.eval_shape(mapped, ROUNDS[0], state, PARAMS)
    assert shapes(after) == shapes(state)


@every
def test_initialises_from_abstract_parameters(name):
    init, abstract = make(name).init, jax.eval_shape(lambda: PARAMS)
    assert shapes(jax.eval_shape(init, abstract)) == shapes(init(PARAMS))


@every
def test_ignores_unknown_extra_arguments(name):
    got = play(make(name), ROUNDS[:1], loss=jnp.ones(N), batch={"x": jnp.zeros((N, 2))})
    assert_same(got, plain(name)[:1])


@every
def test_chains(name):
    tx = optax.chain(optax.scale(4.0), make(name), optax.scale(0.5))
    assert_same(play(tx, ROUNDS[:1]), jax.tree.map(lambda x: x / 2, plain(name)[:1]))


@every
def test_masked_and_partitioned(name):
    """A mask lets what it hides through: local gradients, until something makes them zero."""
    keep = {k: k in KEPT for k in SHAPES}
    want = play(make(name), [only(g) for g in ROUNDS], only(PARAMS))

    masked = optax.masked(make(name), keep)
    got = play(masked, ROUNDS[:1])[0]
    assert_same([only(got), got["b"]], [want[0], ROUNDS[0]["b"]])

    rest = optax.masked(optax.set_to_zero(), {k: not v for k, v in keep.items()})
    split = optax.partition({True: make(name), False: optax.set_to_zero()}, keep)
    for got in (play(optax.chain(masked, rest)), play(split)):
        assert_same([only(u) for u in got], want)
        assert all(not np.any(u["b"]) for u in got)


@every
def test_multi_steps(name):
    """Accumulates local gradients, votes on their mean every second step."""
    tx = optax.MultiSteps(make(name), 2)
    step = four_workers(lambda g, s: tx.update(g, s, PARAMS))
    state = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(N))
    first, state = step(ROUNDS[0], state)
    assert all(not np.any(x) for x in jax.tree.leaves(first))
    second, _ = step(ROUNDS[1], state)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *ROUNDS)
    assert_same([second], play(make(name), [mean]))


@every
def test_inject_hyperparams(name):
    static = [k for k, v in CASES[name].options.items() if callable(v) or k == "period"]
    wrap = functools.partial(optax.inject_hyperparams, static_args=static)
    assert_same(play(make(name, RATE, wrap)), plain(name))
    assert_same(play(make(name, lambda count: RATE, wrap)), plain(name))


@every
def test_learning_rate_is_a_number_or_a_schedule(name):
    assert_same(play(make(name, lambda count: RATE), ROUNDS[:1]), plain(name)[:1])


@every
def test_non_finite_gradients(name):
    """Whoever votes guards itself; one worker alone is guarded by ``apply_if_finite``."""
    bad = np.arange(N) == 2
    nan = dict(ROUNDS[0], b=np.where(bad[:, None], np.nan, ROUNDS[0]["b"]).astype(np.float32))
    if CASES[name].votes:
        got = play(make(name), [nan])
        assert_same(got, play(make(name), [ROUNDS[0]], participating=~bad))
    else:
        got = play(optax.apply_if_finite(make(name), 3), [nan])
        alone = play(make(name), [ROUNDS[0]])
        assert_same(got, jax.tree.map(lambda x: x.at[2].set(0), alone))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


def test_max_weight_is_a_static_argument_of_inject_hyperparams():
    injected = optax.inject_hyperparams(dl.distributed_lion, static_args="max_weight")
    options, weight = dict(learning_rate=RATE, max_weight=5), jnp.array([1, 5, 2, 1])
    want = play(dl.distributed_lion(**options), weight=weight)
    assert_same(play(injected(**options), weight=weight), want)
