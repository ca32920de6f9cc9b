# SPDX-License-Identifier: Apache-2.0
"""Whole train steps of a loss, a transformation and a mesh, against NumPy, with ==.

The loss is linear in the parameters, so that a worker's gradient is the mean of its rows of the
batch, exactly.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import distlion_jax as dl
from distlion_jax import reference
from tests.helpers import B1, B2, gradients, run_reference, shapes_to_params

TREE = {"a": (3, 5), "flat": (4097,), "rows": (16, 128), "scalar": ()}
RATE, N, ROWS, STEPS = 0.25, 8, 2, 3
HOW = ["shard_map", "shard_map_unchecked", "pmap"]
every_map = pytest.mark.parametrize("how", HOW)


def loss(params, batch):
    parts = jax.tree.map(lambda x, rows: jnp.sum(x * rows.mean(0)), params, batch)
    return sum(jax.tree.leaves(parts), jnp.float32(0))


def batches(seed=0):
    """The batches of all steps: ``ROWS`` rows a worker."""
    return [gradients(TREE, N * ROWS, seed + t, zero_rows=False) for t in range(STEPS)]


def means(batch, workers=N):
    """Gradients: ``{name: [workers, *shape]}``."""
    split = {k: x.reshape(workers, -1, *x.shape[1:]) for k, x in batch.items()}
    return {k: x.mean(1) for k, x in split.items()}


def lion(**options):
    return dl.distributed_lion(RATE, B1, B2, weight_decay=0.0, **options)


def begin(how, tx, mesh, **options):
    """A step, and parameters (zero) and state for it."""
    params = shapes_to_params(TREE)
    if how == "pmap":
        step = dl.make_pmap_train_step(loss, tx, **options)
        return step, dl.pmap_replicate(params), dl.pmap_replicate(tx.init(params))
    axis = options.get("axis_name", "data")
    step = dl.make_train_step(loss, tx, mesh, check_vma=how == "shard_map", **options)
    return step, dl.replicate(params, mesh), dl.init_state(tx, params, mesh, axis)


def train(how, tx, data, extra=None, mesh=None, **options):
    """Trains from zero; returns parameters, state and metrics after each step, as NumPy."""
    mesh, history = mesh or dl.worker_mesh(N), []
    step, params, state = begin(how, tx, mesh, **options)
    for t, batch in enumerate(data):
        params, state, metrics = step(params, state, batch, **({} if extra is None else extra[t]))
        assert dl.replicas_agree(params, mesh) if how != "pmap" else all_rows_equal(params)
        host = jax.tree.map(as_numpy, (params, state, metrics))
        first = jax.tree.map(lambda x: x[0], host[0]) if how == "pmap" else host[0]
        history.append((first, *host[1:]))
    return history


def as_numpy(x):
    return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)


def all_rows_equal(tree):
    return all((np.asarray(x) == np.asarray(x)[:1]).all() for x in jax.tree.leaves(tree))


def assert_parameters(history, directions, names=TREE):
    """Parameters are the start (0) less the directions of the rounds so far, times RATE."""
    x = {name: np.zeros(TREE[name], np.float32) for name in names}
    for (params, *_), direction in zip(history, directions, strict=True):
        for name in names:
            x[name] = x[name] - np.float32(RATE) * direction[name]
            np.testing.assert_array_equal(params[name], x[name])


def named(rounds, names=TREE):
    return [dict(zip(sorted(names), verdict.direction, strict=True)) for verdict, _ in rounds]


def reference_run(grads, n=N, tree=TREE, **options):
    return run_reference(tree, n, len(grads), grads=grads, **options)


@every_map
@pytest.mark.parametrize("aggregation", ["majority", "average"])
def test_equals_reference(how, aggregation):
    take = np.array([True] * 5 + [False] + [True] * 2)
    extra = [{}, {"participating": take}, {}]
    history = train(how, lion(aggregation=aggregation), batches(), extra)
    grads = [means(b) for b in batches()]
    given = [{"participating": [True] * N}, {"participating": take}, {"participating": [True] * N}]
    want = reference_run(grads, extra=given, aggregation=aggregation)
    assert_parameters(history, named(want))
    before = shapes_to_params(TREE)
    for t, (params, state, metrics) in enumerate(history):
        verdict, after = want[t]
        for leaf, name in enumerate(sorted(TREE)):
            for i in range(N):
                mu = state[0].mu[name][i].reshape(TREE[name])
                np.testing.assert_array_equal(mu, after.mu[i][leaf])
        assert metrics.health[0].voted.tolist() == verdict.voted
        assert int(metrics.health[0].voters) == verdict.voters
        np.testing.assert_allclose(metrics.health[0].tied, verdict.tied, rtol=1e-5)
        np.testing.assert_allclose(metrics.health[0].margin, verdict.margin, rtol=1e-5)
        mine = [{k: g[i] for k, g in grads[t].items()} for i in range(N)]
        losses = [sum(np.sum(before[k] * g[k]) for k in TREE) for g in mine]
        voted = [x for x, entered in zip(losses, verdict.voted, strict=True) if entered]
        np.testing.assert_allclose(metrics.loss, np.mean(voted), rtol=1e-5)
        before = params


@every_map
def test_dense_warm_up_then_votes(how):
    """For two steps all vote on the same mean; then each on its own."""
    tx = optax.chain(dl.average_gradients("data", steps=2), lion())
    grads = [means(b) for b in batches()]
    for g in grads[:2]:
        g.update({k: np.broadcast_to(x.mean(0), x.shape) for k, x in g.items()})
    assert_parameters(train(how, tx, batches()), named(reference_run(grads)))


@pytest.mark.parametrize("how", HOW[:2])
@pytest.mark.parametrize(
    ("sick", "kind"),
    [(None, AxisType.Auto), (1, AxisType.Auto), (4, AxisType.Auto), (None, AxisType.Explicit)],
)
def test_nodes_average_inside_and_vote_across(how, sick, kind):
    """A fast inner axis: two nodes of four chips are two workers that see their nodes' means.

    Sick chips are left out of the mean; a node of none but sick chips sits out. Batches from NumPy
    go where they belong on a mesh of either kind of axes.
    """
    mesh = jax.make_mesh((2, 4), ("node", "chip"), (kind,) * 2)
    options = {"axis_name": "node", "mean_axis_name": "chip"}
    data = batches()
    grads = [means(b, 2) for b in data]
    if sick:
        data[1]["a"][: ROWS * sick] = np.nan  # of the chips of the first node
        for name, rows in data[1].items():
            well = rows[ROWS * sick : ROWS * 4]
            grads[1][name][0] = well.mean(0, dtype=np.float32) if len(well) else np.nan
    history = train(how, lion(axis_name="node"), data, mesh=mesh, **options)
    if sick == 1:  # a mean of three is not exact: the votes may differ in the last place
        assert [h[2].health[0].voters for h in history] == [2] * STEPS
        return
    want = reference_run(grads, n=2)
    assert_parameters(history, named(want))
    assert [int(h[2].health[0].voters) for h in history] == [2, 1 if sick else 2, 2]


def test_average_gradients_over_an_inner_axis():
    """The same in a mapped function of one's own, as a transformation before the vote."""
    mesh = jax.make_mesh((2, 4), ("node", "chip"), (AxisType.Auto,) * 2)
    tx = optax.chain(dl.average_gradients("chip"), lion(axis_name="node"))
    params, both = shapes_to_params(TREE), P(("node", "chip"))

    def worker(batch):
        g = jax.tree.map(lambda x: x.mean(0), batch)
        return tx.update(g, tx.init(params), params)[0]

    mapped = jax.shard_map(worker, mesh=mesh, in_specs=both, out_specs=P())
    updates = jax.tree.map(np.asarray, jax.jit(mapped)(batches()[0]))
    want = reference_run([means(batches()[0], 2)], n=2)
    assert_parameters([(updates,)], named(want))


def test_a_sick_worker_sits_out_of_the_warm_up_too():
    data = batches()
    data[0]["a"][2 * ROWS] = np.nan
    tx = optax.chain(dl.average_gradients("data", steps=2), lion())
    history = train("shard_map", tx, data)
    assert [int(h[2].health[0].voters) for h in history] == [N - 1, N, N]
    assert not history[0][2].health[0].voted[2]
    assert not history[0][1][1][0].mu["flat"][2].any()  # its momentum stays
    assert np.isfinite(history[0][2].loss)


LABELS = {"a": "full", "flat": "average", "rows": "majority", "scalar": "frozen"}


@every_map
@pytest.mark.parametrize("sick", [None, "a", "flat"])
def test_policy_by_label(how, sick):
    """Each group as if it were alone; who is sick in one leaf sits out in all."""
    data = batches()
    entered = [[True] * N for _ in data]
    if sick:
        data[1][sick][2 * ROWS, ...] = np.nan  # in a row of worker 2
        entered[1][2] = False
    tx = dl.distributed_lion_by_label(RATE, LABELS, B1, B2, weight_decay=0.0)
    history = train(how, tx, data)
    grads = [means(b) for b in data]
    extra = [{"participating": e} for e in entered]
    for name, options in (("flat", {"aggregation": "average"}), ("rows", {})):
        tree = {name: TREE[name]}
        want = reference_run(grads, tree=tree, extra=extra, **options)
        assert_parameters(history, named(want, tree), tree)
    assert_parameters(history, full_directions(grads, entered, "a"), ["a"])
    assert_parameters(history, [{"scalar": np.float32(0)}] * STEPS, ["scalar"])
    assert [h[2].health[0].voted.tolist() for h in history] == entered


def full_directions(grads, entered, name):
    """Lion on sums of full-precision blends, with momentum per worker."""
    mu, out = np.zeros((N, *TREE[name]), np.float32), []
    for g, take in zip(grads, entered, strict=True):
        who = np.flatnonzero(take)
        g = g[name][who]
        out.append({name: np.sign(((1 - B1) * g + B1 * mu[who]).sum(0))})
        mu[who] = (1 - B2) * g + B2 * mu[who]
    return out


@every_map
def test_each_worker_draws_its_own_randomness(how):
    """``rng`` is folded with the worker's index, and ``aux`` averaged over workers."""

    def noisy(params, batch, key):
        draw = jax.random.uniform(key)
        return loss(params, batch), {"draw": draw, "square": draw**2}

    tx, params = lion(), shapes_to_params(TREE)
    if how == "pmap":
        step = dl.make_pmap_train_step(noisy, tx, has_aux=True)
        params, state = dl.pmap_replicate(params), dl.pmap_replicate(tx.init(params))
    else:
        mesh = dl.worker_mesh(N)
        step = dl.make_train_step(noisy, tx, mesh, has_aux=True, check_vma=how == "shard_map")
        params, state = dl.replicate(params, mesh), dl.init_state(tx, params, mesh)
    key = jax.random.key(3)
    *_, metrics = step(params, state, batches()[0], rng=key)
    draws = np.array([jax.random.uniform(jax.random.fold_in(key, i)) for i in range(N)])
    np.testing.assert_allclose(metrics.aux["draw"], draws.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics.aux["square"], (draws**2).mean(), rtol=1e-6)


def test_ordinary_optimizers_take_the_mean():
    """``gradients="mean"``: plain ``optax.sgd`` on the mean gradient of the whole batch."""
    mesh, tx = dl.worker_mesh(N), optax.sgd(RATE)
    params = dl.replicate(shapes_to_params(TREE), mesh)
    step = dl.make_train_step(loss, tx, mesh, gradients="mean")
    history, state = [], dl.replicate(tx.init(params), mesh)
    for batch in batches():
        params, state, _ = step(params, state, batch)
        history.append((jax.tree.map(np.asarray, params),))
    directions = [{k: x.mean(0) for k, x in batch.items()} for batch in batches()]
    assert_parameters(history, directions)


def test_reference_apply_is_the_update():
    """Weight decay and learning rate: ``x - lr * (Delta + weight_decay * x)``, in NumPy's loops."""
    start = [np.float32(2.0) * np.ones(s, np.float32) for _, s in sorted(TREE.items())]
    tx = dl.distributed_lion(RATE, B1, B2, weight_decay=0.5)
    mesh = dl.worker_mesh(N)
    params = dict(zip(sorted(TREE), map(jnp.asarray, start), strict=True))
    step = dl.make_train_step(loss, tx, mesh)
    got, *_ = step(dl.replicate(params, mesh), dl.init_state(tx, params, mesh), batches()[0])
    ((verdict, _),) = reference_run([means(batches()[0])])
    want = reference.apply(start, verdict.direction, RATE, 0.5)
    for x, name in zip(want, sorted(TREE), strict=True):
        np.testing.assert_array_equal(got[name], x)


def test_weights_reach_every_group():
    """A worker's say is its weight, also in what is averaged; weight 0 sits out everywhere."""
    labels = {"vote": "majority", "mean": "average", "full": "full"}
    tx = optax.chain(
        dl.average_gradients("data", steps=0, max_weight=300),
        dl.distributed_lion_by_label(1.0, labels, B1, B2, weight_decay=0.0, max_weight=300),
    )
    weight = np.array([100, 200, 1, 0], np.uint8)  # of a dtype in which 300 is 44

    def worker(g, weight):
        g = {name: g for name in labels}
        return tx.update(g, tx.init(g), g, weight=weight)[0]

    g = jnp.array([[1.0], [-0.25], [-8.0], [-99.0]])
    got = jax.vmap(worker, axis_name="data")(g, weight)
    assert got["vote"].ravel().tolist() == [1.0] * 4  # 100 against 201: down, so up by the rate
    assert got["mean"].ravel().tolist() == [np.float32(101) / np.float32(301)] * 4
    assert got["full"].ravel().tolist() == [-1.0] * 4  # 100 - 50 - 8 > 0

    dense = dl.average_gradients("data", max_weight=300)
    mean = jax.vmap(lambda g, w: dense.update(g, dense.init(g), weight=w)[0], axis_name="data")
    np.testing.assert_allclose(mean(g, weight).ravel(), [(100 - 50 - 8) / 301] * 4, rtol=1e-6)


def test_margin_of_heavy_votes():
    """Sums of ``4096 * n * max_weight`` do not fit 32 bits."""
    n, top = 16, 2**16 - 1
    tx = dl.scale_by_distributed_lion(max_weight=top)

    def worker(g):
        return tx.update(g, tx.init(g), weight=jnp.int32(top))[1].health

    health = jax.vmap(worker, axis_name="data")(jnp.ones((n, 8192)))
    np.testing.assert_allclose(health.margin, 1.0, rtol=1e-6)
    assert not health.tied.any()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_means_are_summed_in_float32(dtype):
    tx = dl.average_gradients("data")
    g = jnp.full((N, 4), 30_000.0, dtype)  # their sum is beyond float16
    got = jax.vmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="data")(g)
    np.testing.assert_array_equal(got, g)


@pytest.mark.parametrize(
    "number", [{"b1": 1.5}, {"b2": -0.1}, {"b2": 1.0}, {"threshold": -1.0}, {"threshold": np.nan}]
)
def test_traced_numbers_out_of_range_stop_the_vote(number):
    options = dict({"b1": B1, "b2": B2, "threshold": 0.0}, **number)

    def worker(g, options):
        tx = dl.scale_by_distributed_lion(ballot="ternary", **options)
        direction, state = tx.update(g, tx.init(g))
        return direction, state.mu, state.health.voters

    mapped = jax.jit(jax.vmap(worker, axis_name="data", in_axes=(0, None)))
    direction, mu, voters = mapped(jnp.ones((N, 5)), options)
    assert not direction.any()
    assert not mu.any()
    assert not voters.any()
    *_, voters = mapped(jnp.ones((N, 5)), {"b1": B1, "b2": B2, "threshold": 0.0})
    assert (voters == N).all()


def test_metrics_of_steps_without_a_vote():
    """``optax.MultiSteps``: the loss is all workers', whoever sat out of the vote before."""
    data = batches()
    data[1]["a"][2 * ROWS] = np.nan  # worker 2 is sick when the vote is held
    tx = optax.MultiSteps(lion(), 2)
    history = train("shard_map", tx, data)
    voted = [[True] * N, [i != 2 for i in range(N)]]
    for t, (_, state, metrics) in enumerate(history):
        health = metrics.health[0]
        assert health.voted.tolist() == voted[min(t, 1)]  # of the last vote
        assert int(health.voters) == [0, N - 1, N - 1][t]
        assert np.isfinite(metrics.loss)
        assert state.mini_step.tolist() == [(t + 1) % 2] * N


@pytest.mark.parametrize("how", HOW[:2])
def test_noise_with_its_own_key(how):
    """A typed random key in the state is no count to be shared."""
    tx = optax.chain(optax.add_noise(0.0, 1.0, jax.random.key(0)), lion())
    assert_parameters(
        train(how, tx, batches()), named(reference_run([means(b) for b in batches()]))
    )


def test_pmap_splits_the_batch_whatever_the_number_of_arrays():
    """Five arrays, as many as the step has arguments: pmap took the axes of one for another's."""
    mean = dl.exchange(optax.stateless(lambda g, _: jax.lax.pmean(g, "data")))
    tx = optax.chain(mean, dl.replicated(optax.sgd(lambda _: 0.01, momentum=0.9)))
    w = jnp.zeros(16)
    x = jax.random.normal(jax.random.key(0), (32, 16))
    batch = (x, x @ jnp.linspace(-1.0, 1.0, 16))

    def loss(w, batch):
        return jnp.mean((batch[0] @ w - batch[1]) ** 2)

    mesh = dl.worker_mesh(8)
    params, state = dl.replicate(w, mesh), dl.init_state(tx, w, mesh)
    step = dl.make_train_step(loss, tx, mesh)
    many, states = dl.pmap_replicate(w), dl.pmap_replicate(tx.init(w))
    assert len(jax.tree.leaves((many, states, batch))) == 5
    pmap_step = dl.make_pmap_train_step(loss, tx)
    for _ in range(20):
        params, state, metrics = step(params, state, batch)
        many, states, other = pmap_step(many, states, batch)
    np.testing.assert_allclose(other.loss, metrics.loss, rtol=1e-4)
    np.testing.assert_allclose(many[0], params, rtol=1e-4, atol=1e-6)


NOT_A = optax.masked(lion(), {name: name != "a" for name in TREE})
WARMED_UP = optax.chain(dl.average_gradients(steps=2), optax.adam(0.1))


@pytest.mark.parametrize("how", HOW[1:])
@pytest.mark.parametrize(("tx", "steps"), [(NOT_A, 1), (WARMED_UP, 4)], ids=["masked", "warm-up"])
def test_workers_that_part_are_found(how, tx, steps):
    """A leaf, or a step, that nobody exchanges, where JAX does not check what is replicated."""
    step, params, state = begin(how, tx, dl.worker_mesh(N))
    data = [*batches(), *batches(9)]
    for batch in data[: steps - 1]:
        params, state, _ = step(params, state, batch)
    with pytest.raises(
        ValueError, match=rf"`params\['a'\]` differs by worker after call {steps} of"
    ):
        step(params, state, data[steps - 1])


def test_a_state_that_would_be_broadcast_is_refused():
    """Of shard_map's form, given to pmap: a worker's momentum would be a row of the parameter."""
    tx = optax.chain(dl.average_gradients(), dl.replicated(optax.trace(0.9)))
    params, mesh = {"w": jnp.zeros((N, 4))}, dl.worker_mesh(N)
    state = dl.init_state(tx, params, mesh)
    step = dl.make_pmap_train_step(lambda p, x: jnp.sum(p["w"] * x.mean()), tx)
    with pytest.raises(
        ValueError, match=r"`state\[1\].* would change shape in the step.* for pmap"
    ):
        step(dl.pmap_replicate(params), state, jnp.ones(2 * N))


@pytest.mark.parametrize("how", HOW)
def test_a_step_can_be_traced(how):
    step, params, state = begin(how, lion(), dl.worker_mesh(N))
    new, *_ = jax.eval_shape(step, params, state, batches()[0])
    assert new["a"].shape == params["a"].shape
    if how != "pmap":  # which older JAX warns of in jit
        new, *_ = jax.jit(step)(params, state, batches()[0])
        assert new["a"].shape == params["a"].shape


class Container(NamedTuple):
    """Parameters with a field of the name that Optax's injected hyperparameters have."""

    net: Any
    hyperparams: Any


def test_a_parameter_may_be_called_hyperparams():
    mesh = dl.worker_mesh(8)
    tx = optax.chain(optax.trace(0.9), dl.average_gradients(), optax.scale(-0.1))
    params = Container(jnp.zeros(3), {"noise": jnp.zeros(())})
    target = jnp.where(jnp.arange(8) == 0, -8.0, 1.0)  # of each worker

    def loss(p, t):
        return jnp.sum(p.net**2) + p.hyperparams["noise"] * jnp.mean(t)

    step = dl.make_train_step(loss, tx, mesh)
    placed, state = dl.replicate(params, mesh), dl.init_state(tx, params, mesh)
    for _ in range(5):
        placed, state, _ = step(placed, state, target)
    momentum, x, mean = 0.0, 0.0, float(target.mean())
    for _ in range(5):
        momentum = 0.9 * momentum + mean
        x -= 0.1 * momentum
    assert float(placed.hyperparams["noise"]) == pytest.approx(x, rel=1e-5)
