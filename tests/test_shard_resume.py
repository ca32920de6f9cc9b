# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of sharded models: onto other devices of a replica, and onto other replicas."""

import itertools

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distlion_jax as dl
from tests.sharded_model import (
    SHAPES,
    SPECS,
    batches,
    initial,
    loss_fn,
    mesh_of,
    place,
    rows,
)

OPTIONS = {"axis_name": "replica", "ballot": "ternary", "ties": "zero", "weight_decay": 0.1}
KINDS = {
    "lion": lambda: dl.distributed_lion(0.01, **OPTIONS),
    "muon": lambda: dl.distributed_muon(0.01, **OPTIONS),
    "coins": lambda: dl.distributed_lion(0.01, axis_name="replica", ties="coin", noise=0.5),
    "accumulated": lambda: optax.MultiSteps(dl.distributed_lion(0.01, **OPTIONS), 2),
    "averaged": lambda: optax.chain(
        dl.average_gradients("replica"), dl.replicated(optax.adam(0.01))
    ),
}


pytestmark = pytest.mark.usefixtures("float64")


def begin(tx, mesh):
    params = place(initial(), mesh)
    return params, dl.init_state(tx, params, mesh, "replica")


def go_on(tx, mesh, params, state, first, last):
    step = dl.make_train_step(loss_fn, tx, mesh, "replica", donate=False)
    for batch in itertools.islice(batches(), first, last):
        params, state, metrics = step(params, state, rows(batch, mesh))
    return params, state, metrics


def assert_split(params, state, mesh):
    """Parameters and momenta lie on the mesh as the model says."""
    specs = dl.state_specs(state, "replica", params)
    each = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))
    pairs = zip(jax.tree.leaves(state), each, strict=True)
    for x, spec in [*pairs, *((params[k], SPECS[k]) for k in SHAPES)]:
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)


def one_of(fast, every):
    """All of them, of which one is in the fast suite."""
    return [pytest.param(x, marks=[] if x == fast else [pytest.mark.slow]) for x in every]


@pytest.mark.parametrize("kind", one_of("lion", KINDS))
def test_a_run_goes_on_bit_for_bit(kind, tmp_path):
    """On the same devices, and on a replica of another form."""
    tx, mesh = KINDS[kind](), mesh_of(2, 2, 2)
    params, state, _ = go_on(tx, mesh, *begin(tx, mesh), 0, 3)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "c", (params, state))
    want, their, _ = go_on(tx, mesh, params, state, 3, 6)
    others = [mesh_of(2, 4, 1)]
    for other in [mesh, *(others if kind != "coins" else [])]:  # those are of the shards
        with ocp.StandardCheckpointer() as saver:
            restored = saver.restore(tmp_path / "c", begin(tx, other))
        assert_split(*restored, other)
        for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves((params, state)), strict=True):
            np.testing.assert_array_equal(x, y)
        got, after, _ = go_on(tx, other, *restored, 3, 6)
        assert_split(got, after, other)
        for name in SHAPES:
            if kind == "averaged":
                np.testing.assert_allclose(got[name], want[name], 1e-9)
            else:
                np.testing.assert_array_equal(got[name], want[name])
        for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(their), strict=True):
            np.testing.assert_allclose(x, y, 1e-9, 1e-12)


@pytest.mark.parametrize("how", ["mean", "rows"])
@pytest.mark.parametrize("kind", one_of("lion", ["lion", "accumulated", "averaged"]))
def test_a_run_goes_on_with_other_replicas(kind, how, tmp_path):
    """From 4 replicas of two devices to 2 of four, through a checkpoint onto NumPy; and back."""
    tx, four, two = KINDS[kind](), mesh_of(4, 2, 1), mesh_of(2, 2, 2)
    params, state, _ = go_on(tx, four, *begin(tx, four), 0, 3)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "c", (params, state))
    with ocp.StandardCheckpointer() as saver:
        like = initial(), dl.state_like(tx, initial(), 4)
        params, state = saver.restore(tmp_path / "c", like)
    for mesh, n in ((two, 2), (four, 4)):
        params = place(jax.tree.map(np.asarray, params), mesh)
        old, state = state, dl.resize_state(state, mesh, "replica", how=how, params=params)
        assert_split(params, state, mesh)
        if kind == "lion":
            for name in SHAPES:
                mu = np.asarray(old[0].mu[name])
                want = mu[np.arange(n) % len(mu)] if how == "rows" else [mu.mean(0)] * n
                np.testing.assert_array_equal(state[0].mu[name], want)
        params, state, metrics = go_on(tx, mesh, params, state, 3, 5)
        assert all(list(health.voted) == [True] * n for health in metrics.health)
        assert_split(params, state, mesh)


def test_a_state_of_other_replicas_is_refused():
    """As it comes, and where rows were doubled."""
    tx, four, two = KINDS["lion"](), mesh_of(4, 2, 1), mesh_of(2, 2, 2)
    params, state, _ = go_on(tx, four, *begin(tx, four), 0, 1)
    for rows_of in (np.arange(2), np.array([1, 1])):
        torn = jax.tree.map(lambda x: jax.numpy.asarray(np.asarray(x)[rows_of]), state)  # noqa: B023
        with pytest.raises(ValueError, match="`state` was torn: "):
            go_on(tx, two, place(jax.tree.map(np.asarray, params), two), torn, 1, 2)


def test_lions_state_is_split_too():
    mesh, lion = mesh_of(2, 2, 2), optax.lion(0.01)
    params = place(initial(), mesh)
    _, theirs = lion.update(params, lion.init(params), params)
    ours = dl.from_lion_state(theirs, mesh, "replica", params)
    assert_split(params, ours, mesh)
    _, ours, metrics = go_on(KINDS["lion"](), mesh, params, ours, 0, 2)
    assert list(metrics.health[0].voted) == [True, True]
    back = dl.to_lion_state(ours)
    np.testing.assert_allclose(back[0].mu["up"], np.asarray(ours[0].mu["up"]).mean(0), 1e-12)
