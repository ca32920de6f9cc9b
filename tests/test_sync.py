# SPDX-License-Identifier: Apache-2.0
"""Momenta that are averaged now and then: the reference's, in every map, at the bytes it says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distlion_jax as dl
from distlion_jax import reference
from tests.helpers import B1, B2, gradients, map_workers, shapes_to_params, stack_state

TREE = {"a": (3, 5), "rows": (16, 128)}
NAMES = sorted(TREE)
MAPS = ["vmap", "pmap", "shard_map", pytest.param("shard_map_unchecked", marks=pytest.mark.slow)]
N = 4


def rounds(tx, how, grads):
    def step(g, state):
        return tx.update(g, state, g)

    mapped = map_workers(step, how, N)
    state = stack_state(tx, shapes_to_params(TREE), N)
    for g in grads:
        updates, state = mapped(g, state)
        yield jax.tree.map(np.asarray, (updates, state))


@pytest.mark.parametrize("how", MAPS)
def test_equals_the_reference(how):
    grads = [gradients(TREE, N, r) for r in range(5)]
    grads[2]["a"][1, 0, 0] = np.nan  # sits a round out, and takes part in the mean of round 3
    vote = dl.scale_by_distributed_lion(B1, B2, transport="two_phase")
    state = reference.init([np.zeros(TREE[k], np.float32) for k in NAMES], N)
    history = rounds(dl.synchronize_momentum(vote, 2), how, grads)
    for r, (g, (updates, got)) in enumerate(zip(grads, history, strict=True)):
        workers = [[g[k][i] for k in NAMES] for i in range(N)]
        verdict, state = reference.vote(state, workers, b1=B1, b2=B2)
        if r % 2:
            mean = [sum(xs) / np.float32(N) for xs in zip(*state.mu, strict=True)]
            state.mu = [mean] * N
        for leaf, name in enumerate(NAMES):
            np.testing.assert_array_equal(updates[name][0], verdict.direction[leaf])
            for i in range(N):
                np.testing.assert_allclose(
                    got.inner.mu[name][i], state.mu[i][leaf], rtol=0, atol=1e-7
                )


def test_every_step_it_is_the_momentum_of_lion_on_the_mean():
    grads = [gradients(TREE, N, r) for r in range(4)]
    lion = optax.scale_by_lion(B1, B2)
    state = lion.init(shapes_to_params(TREE))
    tx = dl.synchronize_momentum(dl.distributed_lion(0.1, B1, B2), 1)
    for g, (_, got) in zip(grads, rounds(tx, "vmap", grads), strict=True):
        _, state = lion.update({k: jnp.asarray(v.mean(0)) for k, v in g.items()}, state)
        for name in NAMES:
            np.testing.assert_allclose(got.inner[0].mu[name][0], state.mu[name], atol=1e-6)


def test_bytes_are_those_of_a_vote_and_an_average():
    tx = dl.synchronize_momentum(dl.scale_by_distributed_lion(health="off"), 8)
    params = shapes_to_params(TREE)
    state = stack_state(tx, params, 8)
    grads = jax.tree.map(lambda x: jnp.stack([x] * 8), params)
    mapped = map_workers(lambda g, state: tx.update(g, state, params), "shard_map", 8)
    found = dl.compiled_collectives(mapped.lower(grads, state).compile(), 8)
    mine = [c for c in found if c.dtype == "f32"]
    (figures,) = (c for c in mine if c.elements == 2)  # weight and number of those in the mean
    dense = sum(c.elements for c in mine) - figures.elements
    assert dense == dl.full_precision_cost(params, 8).collectives[0].elements
    rest = [c for c in found if c.dtype == "u32"]
    assert rest == list(dl.wire_cost(params, 8, health="off").collectives)
    assert len(found) == len(mine) + len(rest)


@pytest.mark.parametrize("check", [True, False])
def test_trains(check):
    """Each worker sees one coordinate only; a train step, its state stacked by worker."""
    mesh = dl.worker_mesh(8)
    tx = dl.synchronize_momentum(
        dl.distributed_lion(0.01, weight_decay=0.0), 4, wire_dtype=jnp.float32
    )
    params = dl.replicate({"w": jnp.zeros(8)}, mesh)
    state = dl.init_state(tx, params, mesh)
    step = dl.make_train_step(lambda p, x: jnp.mean((x @ p["w"] - 1.0) ** 2), tx, mesh,
                              check_vma=check)  # fmt: skip
    for _ in range(152):
        params, state, metrics = step(params, state, jnp.eye(8))
    assert float(metrics.loss) < 0.5
    assert dl.replicas_agree(params, mesh)
    mu = np.asarray(state.inner[0].mu["w"])
    assert mu.shape == (8, 8)
    assert (mu == mu[0]).all()  # the 152nd step is a fourth one
