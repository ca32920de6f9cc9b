# SPDX-License-Identifier: Apache-2.0
"""States that travel: saved and restored, torn, resized, from Lion and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import jax_utils
from jax.sharding import PartitionSpec as P

import distlion_jax as dl
from distlion_jax import baselines
from tests.steps import MAPS, one, start

PARAMS = {"w": np.ones((4, 3), np.float32), "b": np.zeros(3, np.float32)}
XS = np.random.default_rng(0).normal(size=(6, 24, 4)).astype(np.float32)
FOLLOWS = dl.replicated(optax.adam(0.1))
KINDS = {
    "vote": lambda: dl.distributed_lion(optax.cosine_decay_schedule(0.1, 20), noise=1.0),
    "labels": lambda: dl.distributed_lion_by_label(0.1, {"w": "majority", "b": "full"}),
    "accumulated": lambda: optax.MultiSteps(dl.distributed_lion(0.1), 2),
    "EFSign": lambda: optax.chain(baselines.compressed_average(baselines.EFSign()), FOLLOWS),
    "DGC": lambda: optax.chain(baselines.deep_gradient_compression(0.5), FOLLOWS),
}


def loss(params, x):
    return jnp.mean((x @ params["w"] + params["b"] - 1.0) ** 2)


def run(step, params, state, xs):
    for x in xs:
        params, state, metrics = step(params, state, x)
    return params, state, metrics


def host(tree):
    return jax.tree.map(np.asarray, tree)


def same(a, b):
    pairs = zip(jax.tree.leaves(host(a)), jax.tree.leaves(host(b)), strict=True)
    return all((x == y).all() for x, y in pairs)


def made(kind, how="shard_map", n=8):
    """A step, and what it made in three."""
    step, params, state = start(loss, KINDS[kind](), PARAMS, how, n=n)
    return step, *run(step, params, state, XS[:3])[:2]


@functools.cache
def used(kind, how="shard_map", n=8):
    """The same for many tests, which get copies on the host."""
    step, params, state = made(kind, how, n)
    return step, host(params), host(state)


@pytest.mark.parametrize("how", ["shard_map", "pmap"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asynchronously", [False, True])
def test_orbax_resumes_bit_for_bit(kind, how, asynchronously, tmp_path):
    step, params, state = made(kind, how)
    make = ocp.AsyncCheckpointer if asynchronously else ocp.Checkpointer
    with make(ocp.StandardCheckpointHandler()) as saver:
        saver.save(tmp_path / "c", args=ocp.args.StandardSave((params, state)))
        want = run(step, params, state, XS[3:])[:2]  # may donate what is being saved
    fresh = start(loss, KINDS[kind](), PARAMS, how)[1:]
    with ocp.StandardCheckpointer() as saver:
        back = saver.restore(tmp_path / "c", fresh)
    assert same(run(step, *back, XS[3:])[:2], want)


TORN = {
    "unreplicate": (lambda s: jax_utils.replicate(jax_utils.unreplicate(s)), "of 1 of the 8"),
    "half of the rows twice": (lambda s: rows(s, [0, 1, 2, 3] * 2), "of 4 of the 8"),
    "another order": (lambda s: rows(s, range(8)[::-1]), "another order"),
    "zeros for some": (
        lambda s: jax.tree.map(lambda x: jnp.where(np.arange(8) < 4, x.T, 0 * x.T).T, host(s)),
        "4 of 8 workers hold a momentum",
    ),
}


def rows(state, which):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[np.asarray(which)]), state)


@pytest.mark.parametrize("how", MAPS)
@pytest.mark.parametrize("kind", ["vote", "labels", "accumulated"])
@pytest.mark.parametrize("tear", TORN)
def test_a_torn_state_is_refused_by_name(tear, kind, how):
    step, params, state = used(kind, how)
    damage, named = TORN[tear]
    with pytest.raises(ValueError, match=f"`state` was torn: .*{named}.*resize_state"):
        step(params, damage(state), XS[3])


@pytest.mark.parametrize("kind", ["EFSign", "DGC"])
def test_a_torn_error_of_a_compressor_is_refused(kind):
    step, params, state = used(kind)
    torn = (jax.tree.map(lambda x: jnp.stack([x[0]] * 8), state[0]), *state[1:])
    with pytest.raises(ValueError, match=r"`state` was torn: its 8 rows .* of 1 of the 8"):
        step(params, torn, XS[3])


def test_rows_restored_onto_fewer_workers_are_refused():
    """What Orbax does with strict=False: it cuts rows off."""
    _, params, state = used("vote")
    mesh = dl.worker_mesh(4)
    step, cut = dl.make_train_step(loss, KINDS["vote"](), mesh), rows(state, range(4))
    with pytest.raises(ValueError, match="8 workers made it, and the momenta of 4 are left"):
        step(dl.replicate(params, mesh), cut, XS[3])
    with pytest.warns(UserWarning, match="momenta of 4 are left"):  # NumPy: taken by hand
        step(dl.replicate(params, mesh), host(cut), XS[3])


def test_rows_restored_onto_more_workers_are_refused():
    """What Orbax does with strict=False: it fills up with zeros."""
    *_, state = used("vote", n=4)
    step, fresh, _ = start(loss, KINDS["vote"](), PARAMS, "shard_map")
    grown = jax.tree.map(lambda x: jnp.concatenate([jnp.asarray(host(x)), 0 * host(x)]), state)
    with pytest.raises(ValueError, match="4 of 8 workers hold a momentum, the others begin at 0"):
        step(fresh, grown, XS[3])


def test_a_state_through_an_unchecked_map_as_if_replicated_is_refused():
    """out_specs=P() without the check: every device's own, called the same."""
    _, params, state = used("vote")
    mesh = dl.worker_mesh()
    lie = jax.shard_map(lambda s: s, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
    torn = jax.tree.map(lambda x: jnp.concatenate([jnp.asarray(np.asarray(x))] * 8), lie(state))
    with pytest.raises(ValueError, match="of 1 of the 8"):
        dl.make_train_step(loss, KINDS["vote"](), mesh)(params, torn, XS[3])


@pytest.mark.parametrize("axes", [("a", "b"), ("b", "a")])
def test_votes_over_several_axes_are_whole(axes):
    mesh = jax.make_mesh((2, 4), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2)
    tx = dl.distributed_lion(0.1, axis_name=axes)
    step = dl.make_train_step(loss, tx, mesh, axes)
    params, state = dl.replicate(PARAMS, mesh), dl.init_state(tx, PARAMS, mesh, axes)
    params, state, _ = step(params, state, XS[0])
    params, state, metrics = step(params, jax.tree.map(jnp.copy, state), XS[1])
    assert int(metrics.health[0].voters) == 8


@pytest.mark.parametrize("how", ["mean", "rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_resized_states_go_on(kind, how):
    _, params, state = used(kind)
    params, state = host(params), host(state)
    for n in (4, 6):
        mesh = dl.worker_mesh(n)
        state = dl.resize_state(state, mesh, how=how)
        step = dl.make_train_step(loss, KINDS[kind](), mesh)
        params, state, metrics = run(step, dl.replicate(params, mesh), state, XS[3:5])
        healths = [h.voters for h in metrics.health] + [h.workers for h in metrics.means]
        assert {int(x) for x in healths} == {n}
        params = host(params)


def test_resizing_keeps_the_mean_of_the_momenta():
    _, _, state = used("vote")
    mesh = dl.worker_mesh(4)
    new = dl.resize_state(state, mesh)
    for old, mu in zip(jax.tree.leaves(state[0].mu), jax.tree.leaves(new[0].mu), strict=True):
        want = np.mean(np.asarray(old, np.float32), axis=0)
        assert (np.asarray(mu) == want).all()
    assert new[0].count.tolist() == [3] * 4
    assert new[2].count.tolist() == [3] * 4
    kept = dl.resize_state(state, mesh, how="rows")
    assert (np.asarray(kept[0].mu["w"]) == np.asarray(state[0].mu["w"])[:4]).all()


def test_pmaps_state_is_resized_too():
    _, params, state = used("EFSign", "pmap")
    mesh = dl.worker_mesh(4)
    state = dl.resize_state(state, mesh)
    step = dl.make_train_step(loss, KINDS["EFSign"](), mesh)
    *_, metrics = step(dl.replicate(host(one(params, "pmap")), mesh), state, XS[3])
    assert int(metrics.means[0].workers) == 4


def test_keys_and_arrays_of_a_users_own_are_resized_too():
    noise = optax.add_noise(1.0, 0.0, jax.random.key(0))
    tx = optax.chain(dl.exchange(optax.trace(0.9)), noise, dl.scale_by_distributed_lion(),
                     dl.replicated(optax.add_noise(0.0, 1.0, jax.random.key(1))))  # fmt: skip
    step, params, state = start(loss, tx, PARAMS, "shard_map")
    params, state, _ = step(params, state, XS[0])
    trace = np.asarray(state[0].inner.trace["w"])
    lion = dl.to_lion_state(state)
    assert jax.random.key_data(lion[1].rng_key).shape == (2,)
    mesh = dl.worker_mesh(4)
    new = dl.resize_state(state, mesh)
    np.testing.assert_allclose(new[0].inner.trace["w"], [trace.mean(0)] * 4, rtol=1e-6)
    *_, metrics = dl.make_train_step(loss, tx, mesh)(dl.replicate(host(params), mesh), new, XS[1])
    assert int(metrics.health[0].voters) == 4


@pytest.mark.parametrize("how", ["shard_map", "pmap"])
def test_one_copy_is_told_from_a_stack(how):
    """A replicated part that has as many rows as there are workers, all alike, and no counter."""
    tx = optax.chain(dl.scale_by_distributed_lion(), dl.replicated(optax.trace(0.9)))
    given = {"w": np.ones((8, 3), np.float32)}
    step, params, state = start(lambda p, x: (x @ p["w"][:4]).sum(), tx, given, how)
    _, state, _ = step(params, state, XS[0])
    new = dl.resize_state(state, dl.worker_mesh(4))
    assert new[1].inner.trace["w"].shape == (8, 3)
    fresh = dl.state_like(tx, given, 8)
    with pytest.raises(ValueError, match=r"a replicated part of shape \(8, 3\), all rows alike"):
        dl.resize_state(fresh, dl.worker_mesh(4))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_more_workers_than_devices(kind, tmp_path):
    """Restored onto NumPy, by one who has 4 devices."""
    _, params, state = made(kind)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "c", (params, state))
    like = PARAMS, dl.state_like(KINDS[kind](), PARAMS, 8)
    with ocp.StandardCheckpointer() as saver:
        params, restored = saver.restore(tmp_path / "c", like)
    assert same(restored, state)
    mesh = dl.worker_mesh(4)
    params, state = dl.replicate(params, mesh), dl.resize_state(restored, mesh)
    *_, metrics = dl.make_train_step(loss, KINDS[kind](), mesh)(params, state, XS[3])
    healths = [h.voters for h in metrics.health] + [h.workers for h in metrics.means]
    assert {int(x) for x in healths} <= {0, 4}


def test_from_lion_and_back():
    lion, mesh = optax.lion(0.1), dl.worker_mesh(8)
    g = jax.tree.map(lambda x: x + 0.5, PARAMS)
    _, state = lion.update(g, lion.init(PARAMS), PARAMS)
    ours = dl.from_lion_state(state, mesh)
    for x, y in zip(jax.tree.leaves(ours[0].mu), jax.tree.leaves(state[0].mu), strict=True):
        assert (np.asarray(x) == np.asarray(y)).all()
    step = dl.make_train_step(loss, dl.distributed_lion(0.1), mesh)
    _, ours, metrics = step(dl.replicate(PARAMS, mesh), ours, XS[0])
    assert int(metrics.health[0].voters) == 8
    back = dl.to_lion_state(ours)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert int(back[0].count) == 2
    np.testing.assert_allclose(back[0].mu["w"], np.asarray(ours[0].mu["w"]).mean(0), rtol=1e-6)
    lion.update(g, back, PARAMS)


@pytest.mark.parametrize("how", MAPS)
def test_hyperparameters_are_set_by_hand(how):
    tx = optax.inject_hyperparams(dl.distributed_lion)(0.1)
    for given in ("scalar", "function"):
        step, params, state = start(loss, tx, PARAMS, how)
        params, state, _ = step(params, state, XS[0])
        before = host(params)
        if given == "scalar":
            state.hyperparams["learning_rate"] = 0.0
        else:
            state = dl.set_hyperparams(state, learning_rate=0.0)
        params, state, _ = step(params, state, XS[1])
        assert same(params, before)


@pytest.mark.parametrize("how", MAPS)
@pytest.mark.parametrize(("old", "new"), [("total", "off"), ("off", "total"), ("total", "leaf")])
def test_health_may_change_at_a_resume(old, new, how):
    step, params, state = start(loss, dl.distributed_lion(0.1, health=old), PARAMS, how)
    params, state, _ = step(params, state, XS[0])
    kept = host(state[0].mu)
    step = start(loss, dl.distributed_lion(0.1, health=new), PARAMS, how)[0]
    params, state, metrics = step(params, state, XS[1])
    assert len(metrics.health) == (new != "off")
    assert state[0].count.tolist() == [2] * 8
    assert not same(kept, state[0].mu)


def test_a_state_of_another_transformation_is_named():
    step, params, state = used("vote")
    listed = jax.tree.map(lambda x: x, state)
    restored = {"0": listed[0]._asdict(), "1": {}, "2": {}}
    with pytest.raises(ValueError, match=r"`state` is not of this `tx`: it lacks \[0\].count"):
        step(params, restored, XS[3])
    with pytest.raises(ValueError, match="in other containers"):
        step(params, list(listed), XS[3])
