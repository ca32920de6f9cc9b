# SPDX-License-Identifier: Apache-2.0
"""Votes of replicas whose models are split: the same bits as unsharded, and exact bytes."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers as Numbers

import distlion_jax as dl
from distlion_jax._vote import shards
from tests.helpers import B1, B2, beside

SHAPES = {
    "both": (64, 128),
    "one": (40, 20),
    "flat": (9000,),
    "table": (48, 64),
    "norm": (33,),
    "shared": (256, 128),  # large, and the same on devices of a replica: they share its vote
}
SPECS = {
    "both": P("fsdp", "tensor"),
    "one": P(None, "tensor"),
    "flat": P("fsdp"),
    "table": P(("fsdp", "tensor")),
    "norm": P(),
    "shared": P(),
}
MESHES = {  # axes and sizes; which of them vote
    "2x2x2": (("replica", "fsdp", "tensor"), (2, 2, 2), "replica"),
    "2x4": (("replica", "fsdp", "tensor"), (2, 4, 1), "replica"),
    "4x2": (("replica", "fsdp", "tensor"), (4, 1, 2), "replica"),
    "in the middle": (("fsdp", "replica", "tensor"), (2, 2, 2), "replica"),
    "two axes": (("dcn", "replica", "fsdp", "tensor"), (2, 2, 2, 1), ("dcn", "replica")),
}


@functools.cache
def mesh_of(name):
    axes, sizes, _ = MESHES[name]
    return jax.make_mesh(sizes, axes, (AxisType.Auto,) * len(axes))


def axis_of(name):
    return MESHES[name][2]


def workers(name):
    axes, sizes, voting = MESHES[name]
    voting = (voting,) if isinstance(voting, str) else voting
    return math.prod(size for axis, size in zip(axes, sizes, strict=True) if axis in voting)


def place(tree, mesh, lead=()):
    return {
        name: jax.device_put(x, NamedSharding(mesh, P(*lead, *SPECS[name])))
        for name, x in tree.items()
    }


def parameters(mesh, shapes=SHAPES):
    rng = np.random.default_rng(9)
    return place({k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}, mesh)


def draws(n, rounds, seed=0, shapes=SHAPES):
    """Quarters, some of them 0: exact in a blend and a momentum of a few rounds."""
    rng = np.random.default_rng(seed)
    return [{k: rng.integers(-4, 5, (n, *s)).astype(np.float32) / 4 for k, s in shapes.items()}
            for _ in range(rounds)]  # fmt: skip


def run_sharded(tx, name, rounds, specs=SPECS, **extra):
    """Updates and states of plain jit, on a mesh."""
    mesh, axis = mesh_of(name), axis_of(name)
    lead = ((axis,) if isinstance(axis, str) else axis,)
    params = parameters(mesh)
    tx = dl.sharded(tx, mesh, specs, axis)
    state = jax.jit(tx.init)(params)
    step = jax.jit(tx.update)
    out = []
    for grads in rounds:
        updates, state = step(place(grads, mesh, lead), state, params, **extra)
        out.append((updates, state))
    return out


def run_whole(make, n, rounds, **extra):
    """The same of n unsharded workers, under vmap."""
    params = jax.tree.map(np.asarray, parameters(mesh_of("2x2x2")))
    tx = make("replica")
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), tx.init(params))
    step = jax.jit(jax.vmap(lambda g, s, e: tx.update(g, s, params, **e), axis_name="replica"))
    out = []
    for grads in rounds:
        updates, state = step(grads, state, extra)
        out.append((jax.tree.map(lambda x: x[0], updates), state))
    return out


def assert_same(got, want, rounded=False):
    """All updates and all states, bit for bit; of states only nearly, if something rounds."""
    for (updates, state), (others, other) in zip(got, want, strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(updates[name], others[name], 1e-5 * rounded)
        for path, x in jax.tree_util.tree_leaves_with_path(state):
            y = dict(jax.tree_util.tree_leaves_with_path(other))[path]
            y = y[0] if np.ndim(y) > np.ndim(x) else y  # stored once
            where = jax.tree_util.keystr(path)
            if rounded or ("health" in where and x.dtype == np.float32):
                np.testing.assert_allclose(x, y, 1e-5, err_msg=where)  # sums in another order
            else:
                np.testing.assert_array_equal(x, y, err_msg=where)


def assert_copies_agree(tree):
    """Devices that hold the same part of an array hold the same bits."""
    for x in jax.tree.leaves(tree):
        seen = {}
        for shard in x.addressable_shards:
            first = seen.setdefault(str(shard.index), np.asarray(shard.data))
            np.testing.assert_array_equal(first, shard.data)


# What is sent.

KINDS = [
    {"transport": "all_gather"},
    {"transport": "two_phase", "health": "leaf"},
    {"transport": "psum"},
    {"aggregation": "average"},
    {"ballot": "ternary", "ties": "coin", "health": "off"},
    {"noise": 1.0},
]


def placed_shapes(tx, mesh, axis="replica", shapes=SHAPES, specs=SPECS):
    """The sharded transformation, and shapes of the gradients, state and parameters it takes."""
    axes = (axis,) if isinstance(axis, str) else axis
    n = math.prod(mesh.shape[name] for name in axes)

    def shaped(shape, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    params = {k: shaped(s, specs[k]) for k, s in shapes.items()}
    tx = dl.sharded(tx, mesh, params, axis)
    state = jax.eval_shape(tx.init, params)
    state = jax.tree.map(
        lambda x, spec: shaped(x.shape, spec, x.dtype), state, dl.state_specs(state, axis, params)
    )
    grads = {k: shaped((n, *s), P(axes, *specs[k])) for k, s in shapes.items()}
    return tx, grads, state, params


def compiled_update(tx, name):
    tx, *args = placed_shapes(tx, mesh_of(name), axis_of(name))
    return jax.jit(tx.update).lower(*args).compile(), args[-1]


def check_moves(over, every, ledger, options):
    """Between replicas the ledger and scalars; inside them the flag, health and shared verdicts."""
    # The rows of arange say who is who: scalars, which move by a permutation at most.
    for c in beside(over, ledger):
        assert c.operand_bytes <= 4
        assert c.op == "collective-permute"
    inside = beside(every, over)
    segments = len(SHAPES) if options.get("health") == "leaf" else 1
    floats = [c for c in inside if c.dtype == "f32" and c.op == "all-reduce"]
    assert sum(c.elements for c in floats) <= 2 * segments + len(SHAPES) * ("noise" in options)
    # The flag; and the verdict on what copies share, a byte a coordinate (the average: a float).
    words = [c for c in beside(inside, floats) if c.operand_bytes > 4]
    assert {c.dtype for c in words} <= {"f32" if "aggregation" in options else "s8"}
    assert sum(c.elements for c in words) <= math.prod(SHAPES["shared"])


def on_meshes(fast, *more):
    """Every mesh, with each of ``more``; marked slow but for those that ``fast`` picks."""
    every = itertools.product(MESHES, *more)
    return [pytest.param(*one, marks=[] if fast(*one) else [pytest.mark.slow], id=str(one))
            for one in every]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"),
    on_meshes(lambda name, options: name == "2x2x2" or options in KINDS[:2], KINDS),
)
def test_moves_the_ledger_of_the_shards_and_no_more(name, options):
    mesh, axis, n = mesh_of(name), axis_of(name), workers(name)
    tx = dl.scale_by_distributed_lion(axis_name=axis, **options)
    compiled, params = compiled_update(tx, name)
    over = [one.collective for one in dl.crossings(compiled, mesh, axis)]
    ledger = dl.wire_cost(params, n, axis_name=axis, **options).collectives
    check_moves(over, dl.compiled_collectives(compiled, mesh.size), ledger, options)


def test_inside_a_mapped_function_of_ones_own():
    """With specs as an argument; the step's check of JAX on, and off."""
    mesh, tx = mesh_of("2x2x2"), dl.scale_by_distributed_lion(B1, B2, axis_name="replica",
                                                              ballot="ternary")  # fmt: skip
    params, (grads,) = parameters(mesh), draws(2, 1)
    state = dl.init_state(tx, params, mesh, "replica")
    by_worker = dl.state_specs(state, "replica")
    want = run_whole(
        lambda axis: dl.scale_by_distributed_lion(B1, B2, axis_name=axis, ballot="ternary"),
        2, [grads],
    )  # fmt: skip
    for check in (True, False):

        def update(g, s):
            g = jax.tree.map(lambda x: x[0], g)
            direction, s = tx.update(g, dl.unstack(s, "replica"), specs=SPECS)
            return direction, dl.stack(s)

        mapped = jax.shard_map(
            update, mesh=mesh, in_specs=(P("replica"), by_worker), out_specs=(P(), by_worker),
            axis_names={"replica"}, check_vma=check,
        )  # fmt: skip
        assert_same([jax.jit(mapped)(place(grads, mesh, ("replica",)), state)], want)


# The same bits as unsharded.

TERNARY = {"ballot": "ternary", "ties": "zero"}  # of whole leaves; else coins are of the shards


def lion(axis, **options):
    return dl.scale_by_distributed_lion(B1, B2, axis_name=axis, **{**TERNARY, **options})


NUMBERS = {name: Numbers() if len(s) == 2 else None for name, s in SHAPES.items()}
LABELS = {"both": "majority", "one": "average", "flat": "full", "table": "majority",
          "norm": "frozen", "shared": "average"}  # fmt: skip

COMPOSITIONS = {
    "vote": lion,
    "average": lambda axis: lion(axis, aggregation="average"),
    "psum": lambda axis: lion(axis, transport="psum"),
    "two phases": lambda axis: lion(axis, transport="two_phase", chunks=3, health="leaf"),
    "with decay": lambda axis: dl.distributed_lion(
        0.125, B1, B2, weight_decay=0.5, mask=lambda p: {k: k != "norm" for k in p},
        axis_name=axis, **TERNARY,
    ),
    "clipped": lambda axis: optax.chain(optax.clip_by_global_norm(64.0), lion(axis)),
    "traced": lambda axis: optax.chain(optax.trace(0.5), lion(axis)),
    "bfloat16": lambda axis: dl.scale_by_distributed_lion(
        B1, B2, jnp.bfloat16, axis_name=axis, **TERNARY
    ),
    "by label": lambda axis: dl.distributed_lion_by_label(
        0.125, LABELS, B1, B2, axis_name=axis, **TERNARY
    ),
    "accumulated": lambda axis: dl.accumulate_gradients(lion(axis), 2),
    "synchronised": lambda axis: dl.synchronize_momentum(lion(axis), 2, axis),
    "warmed up": lambda axis: optax.chain(dl.average_gradients(axis, steps=1), lion(axis)),
    "injected": lambda axis: optax.inject_hyperparams(
        dl.distributed_lion, static_args=("axis_name", "ballot", "ties")
    )(optax.linear_schedule(0.5, 0.25, 2), b1=B1, b2=B2, threshold=0.25, axis_name=axis, **TERNARY),
    "dense": lambda axis: optax.chain(
        dl.average_gradients(axis), dl.replicated(optax.trace(0.5))
    ),
    "adam": lambda axis: optax.chain(
        dl.average_gradients(axis), dl.replicated(optax.scale_by_adam())
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions_equal_unsharded_workers(name):
    make, rounds = COMPOSITIONS[name], draws(2, 4)
    got = run_sharded(make("replica"), "2x2x2", rounds)
    assert_same(got, run_whole(make, 2, rounds), rounded=name in ("clipped", "adam"))
    assert_copies_agree(got)


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_equals_unsharded_workers(name):
    rounds = draws(workers(name), 3)
    got = run_sharded(lion(axis_of(name)), name, rounds)
    assert_same(got, run_whole(lion, workers(name), rounds))


def test_who_sits_out_and_who_weighs_more():
    rounds = draws(2, 2)
    extra = {"participating": jnp.array([True, True]), "weight": jnp.array([3, 1])}
    make = functools.partial(lion, max_weight=3)
    assert_same(run_sharded(make("replica"), "2x2x2", rounds, **extra),
                run_whole(make, 2, rounds, **extra))  # fmt: skip
    extra["participating"] = jnp.array([False, True])
    got = run_sharded(make("replica"), "2x2x2", rounds, **extra)
    assert list(got[-1][1].health.voted) == [False, True]


@pytest.mark.parametrize("options", [{}, {"period": 2}, {"ns_steps": 3}, {"inject": 1}], ids=str)
def test_orthogonalised_ballots_equal_unsharded_workers(options):
    """A whole matrix is orthogonalised on every device that has a part of it."""

    def make(axis):
        factory, more = dl.scale_by_distributed_muon, dict(options)
        if more.pop("inject", None):
            fixed = ("axis_name", "muon_weight_dimension_numbers", "ballot", "ties")
            factory = optax.inject_hyperparams(factory, static_args=fixed)
        return factory(
            b1=B1, b2=B2, axis_name=axis, muon_weight_dimension_numbers=NUMBERS, **TERNARY, **more
        )

    rounds = draws(2, 3)
    got = run_sharded(make("replica"), "2x2x2", rounds)
    assert_same(got, run_whole(make, 2, rounds))
    compiled, _ = compiled_update(make("replica"), "2x2x2")
    crossing = dl.crossings(compiled, mesh_of("2x2x2"))
    assert {one.collective.dtype for one in crossing if one.collective.operand_bytes > 4} == {"u32"}


@pytest.mark.parametrize("name", on_meshes(lambda name: name == "2x2x2"))
def test_matrices_are_gathered_inside_a_worker_as_the_ledger_says(name):
    axis = axis_of(name)
    tx = dl.scale_by_distributed_muon(axis_name=axis, muon_weight_dimension_numbers=NUMBERS)
    compiled, params = compiled_update(tx, name)
    gathered = [c for c in dl.compiled_collectives(compiled, 8) if c.dtype == "f32"
                and c.op == "all-gather"]  # fmt: skip
    cost = dl.newton_schulz_cost(params, axis, NUMBERS)
    assert sorted(gathered) == sorted(cost.collectives)
    assert cost.bytes_received > 0
    vote = dl.wire_cost(params, workers(name), axis_name=axis)
    crossing = [one.collective for one in dl.crossings(compiled, mesh_of(name), axis)]
    words = [c for c in crossing if c.operand_bytes > 4 or c.op != "collective-permute"]
    assert sorted(words) == sorted(vote.collectives)


def test_stacks_of_layers_are_orthogonalised_where_they_lie():
    """Layers that are split over devices are not gathered; heads and both axes of a layer are."""
    mesh, shapes = mesh_of("2x2x2"), {"stack": (4, 8, 16), "split": (4, 8, 16)}
    specs = {"stack": P("fsdp"), "split": P("fsdp", "tensor")}
    numbers = {name: Numbers(1, 2) for name in shapes}
    rng = np.random.default_rng(3)
    grads = {k: rng.normal(size=(2, *s)).astype(np.float32) for k, s in shapes.items()}
    params = {k: np.zeros(s, np.float32) for k, s in shapes.items()}
    make = functools.partial(dl.scale_by_distributed_muon, axis_name="replica",
                             muon_weight_dimension_numbers=numbers, **TERNARY)  # fmt: skip
    tx = dl.sharded(make(), mesh, specs)
    update = jax.jit(tx.update).lower(grads, tx.init(params), params).compile()
    gathered = [c for c in dl.compiled_collectives(update, 8) if c.dtype == "f32"
                and c.op == "all-gather"]  # fmt: skip
    assert [(c.elements, c.workers) for c in gathered] == [(2 * 4 * 16, 2)]  # "split" along tensor
    whole = jax.vmap(lambda g: make().update(g, make().init(params))[0], axis_name="replica")(grads)
    got, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    for name in shapes:
        np.testing.assert_array_equal(got[name], whole[name][0])


# What the devices of a replica agree on; and that it goes wrong without.


def poisoned(leaf, device):
    """Gradients of two workers; the first has a NaN in one device's shard of a leaf."""
    (grads,) = draws(2, 1)
    mesh = mesh_of("2x2x2")
    sharding = NamedSharding(mesh, P("replica", *SPECS[leaf]))
    index = sharding.devices_indices_map((2, *SHAPES[leaf]))[mesh.devices[(0, *device)]]
    grads[leaf][tuple(s.start or 0 for s in index)] = np.nan
    return grads


def check_sits_out(leaf, device):
    grads = poisoned(leaf, device)
    ((updates, state),) = run_sharded(lion("replica"), "2x2x2", [grads])
    other = jax.tree.map(lambda g: g[1:], grads)
    ((alone, _),) = run_whole(functools.partial(lion, allow_single_worker=True), 1, [other])
    assert list(state.health.voted) == [False, True]
    assert list(state.health.voters) == [1, 1]
    for name in SHAPES:
        np.testing.assert_array_equal(updates[name], alone[name])
        assert not np.asarray(state.mu[name][0]).any()
    assert_copies_agree((updates, state))


@pytest.mark.parametrize("leaf", ["both", "flat", "table", "one"])
def test_a_bad_shard_makes_its_whole_replica_sit_out(leaf):
    for device in ((0, 0), (1, 1)):
        check_sits_out(leaf, device)


def test_a_bad_shard_is_not_seen_elsewhere_without_agreement(monkeypatch):
    monkeypatch.setattr(shards.Shards, "all", lambda self, flag: flag)
    with pytest.raises(AssertionError):
        check_sits_out("both", (1, 1))


def check_coins():
    """All coordinates are tied: a coin decides each."""
    (grads,) = draws(2, 1)
    grads = {k: np.stack([np.abs(g[0]) + 1, -np.abs(g[0]) - 1]) for k, g in grads.items()}
    tx = dl.scale_by_distributed_lion(axis_name="replica", ties="coin")
    ((updates, _),) = run_sharded(tx, "2x2x2", [grads])
    assert_copies_agree(updates)
    both = np.asarray(updates["both"])
    parts = [both[i : i + 32, j : j + 64] for i in (0, 32) for j in (0, 64)]
    shared = np.asarray(updates["shared"])
    parts += [shared[i : i + 64] for i in range(0, 256, 64)]
    for i, x in enumerate(parts):
        for y in parts[i + 1 :]:
            if x.shape == y.shape:
                assert 0.4 < np.mean(x == y) < 0.6
    for x in updates.values():
        assert set(np.unique(x)) <= {-1.0, 1.0}
        assert abs(np.mean(x)) < 0.5


def test_coins_are_of_the_shard():
    check_coins()


def test_coins_without_salt_are_alike_on_all_shards(monkeypatch):
    monkeypatch.setattr(shards.Shards, "salt", lambda self, kind: jnp.int32(0))
    with pytest.raises(AssertionError):
        check_coins()


def test_coins_of_the_device_part_copies(monkeypatch):
    everything = lambda self, kind: sum(  # noqa: E731
        self.index[name] << k for k, name in enumerate(self.axes)
    )
    monkeypatch.setattr(shards.Shards, "salt", everything)
    with pytest.raises(AssertionError):
        check_coins()


def check_isolated_zeros():
    """A zero in a live block votes by its worker's coin: alike on copies of a shard."""
    rounds = draws(2, 2)
    tx = dl.scale_by_distributed_lion(B1, B2, axis_name="replica")
    assert_copies_agree(run_sharded(tx, "2x2x2", rounds))


def test_zeros_vote_alike_on_copies(monkeypatch):
    check_isolated_zeros()
    device = lambda self, kind: self.index["fsdp"] * 2 + self.index["tensor"]  # noqa: E731
    monkeypatch.setattr(shards.Shards, "salt", device)
    with pytest.raises(AssertionError):
        check_isolated_zeros()


def check_health():
    rounds = draws(2, 2)
    make = functools.partial(lion, health="leaf")
    got, want = run_sharded(make("replica"), "2x2x2", rounds), run_whole(make, 2, rounds)
    assert_same(got, want)


def test_copies_count_once_in_health(monkeypatch):
    check_health()
    monkeypatch.setattr(shards.Shards, "is_first", lambda self, kind: jnp.bool_(True))
    with pytest.raises(AssertionError):
        check_health()


def check_noise():
    """As many ways as unsharded workers vote, and alike on copies."""
    rounds = draws(2, 2)
    tx = dl.scale_by_distributed_lion(B1, B2, axis_name="replica", noise=1.0)
    got = run_sharded(tx, "2x2x2", rounds)
    assert_copies_agree(got)
    whole = run_whole(lambda axis: dl.scale_by_distributed_lion(B1, B2, axis_name=axis, noise=1.0),
                      2, rounds)  # fmt: skip
    for (updates, _), (others, _) in zip(got, whole, strict=True):
        for name in ("both", "flat", "table", "shared"):
            # A noise of another size would turn more signs, or fewer.
            assert abs(np.mean(updates[name] == 0) - np.mean(others[name] == 0)) < 0.03
            halves = np.asarray(updates[name]).reshape(2, -1)
            assert np.mean(halves[0] == halves[1]) < 0.6


def test_noise_is_of_the_shard(monkeypatch):
    check_noise()
    monkeypatch.setattr(shards.Shards, "salts", lambda self: [self.index["tensor"]] * 6)
    with pytest.raises(AssertionError):
        check_noise()


@pytest.mark.skipif(
    tuple(map(int, jax.__version__.split(".")[:2])) < (0, 10), reason="JAX has no callbacks there"
)
def test_the_scale_of_noise_is_of_the_whole_leaf(monkeypatch):
    """Squares are summed over all shards of a worker, each once."""
    seen = []
    total = shards.Shards.total_of_leaves

    def spy(self, x):
        out = total(self, x)
        jax.debug.callback(lambda *two: seen.append(two), x, out)
        return out

    monkeypatch.setattr(shards.Shards, "total_of_leaves", spy)
    (grads,) = draws(2, 1)
    tx = dl.scale_by_distributed_lion(0.0, B2, axis_name="replica", noise=1.0)
    run_sharded(tx, "2x2x2", [grads])
    jax.effects_barrier()
    want = [{k: np.sum(g[i] ** 2) for k, g in grads.items()} for i in range(2)]
    for _, total_of in seen:
        assert any(np.allclose(total_of, [w[k] for k in sorted(SHAPES)]) for w in want)
    assert len(seen) == 8


# Where it lies.


def test_momentum_is_split_and_init_needs_no_room():
    mesh = mesh_of("2x2x2")
    params = parameters(mesh)
    tx = dl.distributed_lion(0.1, axis_name="replica")
    state = dl.init_state(tx, params, mesh, "replica")
    for name, spec in SPECS.items():
        assert (
            state[0]
            .mu[name]
            .sharding.is_equivalent_to(
                NamedSharding(mesh, P("replica", *spec)), len(SHAPES[name]) + 1
            )
        )
        assert state[0].mu[name].sharding.shard_shape(state[0].mu[name].shape)[1:] == (
            params[name].sharding.shard_shape(SHAPES[name])
        )
    made = jax.jit(dl.sharded(tx, mesh, params).init)
    assert jax.tree.map(lambda x: x.sharding.spec, made(params)[0].mu) == {
        name: jax.tree.leaves(state[0].mu[name].sharding.spec, is_leaf=lambda x: True)[0]
        for name in SPECS
    }
    memory = made.lower(params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64
    mine = sum(math.prod(x.sharding.shard_shape(x.shape)) * 4 for x in params.values())
    assert memory.output_size_in_bytes < mine + 512


def test_a_device_holds_its_shards_alone():
    """Of parameters and momenta, before an update and after it."""
    mesh, tx = mesh_of("2x2x2"), lion("replica")
    params = parameters(mesh)
    first = dl.init_state(tx, params, mesh, "replica")
    ((updates, state),) = run_sharded(tx, "2x2x2", draws(2, 1))
    for name, shape in SHAPES.items():
        mine = 4 * math.prod(shards.shard_shape(shape, SPECS[name], mesh.shape))
        for x in (params[name], first.mu[name], updates[name], state.mu[name]):
            assert [shard.data.nbytes for shard in x.addressable_shards] == [mine] * 8


def test_specs_of_a_state_follow_paths_and_shapes():
    mesh = mesh_of("2x2x2")
    params = {"layer": {"w": parameters(mesh)["both"]}, "w": parameters(mesh)["norm"]}
    tx = optax.chain(optax.trace(0.9), dl.distributed_lion(0.1, axis_name="replica"))
    state = dl.init_state(tx, params, mesh, "replica")
    specs = dl.state_specs(state, "replica", params)
    split = {"layer": {"w": P("replica", "fsdp", "tensor")}, "w": P("replica")}
    as_specs = lambda tree: jax.tree.map(  # noqa: E731
        lambda spec: P(*spec), tree, is_leaf=lambda x: isinstance(x, P)
    )
    assert specs[0].trace == split
    assert as_specs(specs[1][0].mu) == split
    assert specs[1][0].count == P("replica")
    once = dl.replicated(optax.scale_by_adam())
    found = dl.state_specs(dl.init_state(once, params, mesh, "replica"), "replica", params)
    assert found.inner.mu == {"layer": {"w": P("fsdp", "tensor")}, "w": P()}


def test_ledger_is_of_what_a_device_votes_on():
    mesh = mesh_of("2x2x2")
    params = parameters(mesh)
    split = {"both": (32, 64), "one": (40, 10), "flat": (4500,), "table": (12, 64), "norm": (33,),
             "shared": (64, 128)}  # fmt: skip
    same = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in split.items()}
    for options in KINDS:
        assert dl.wire_cost(params, 2, axis_name="replica", **options) == dl.wire_cost(
            same, 2, **options
        )


def test_replicas_that_differ_are_found():
    """Of a split leaf: devices are compared that hold the same part."""
    mesh = mesh_of("2x2x2")
    params = parameters(mesh)
    assert dl.replicas_agree(params, mesh)
    for name in ("both", "norm"):
        x = params[name]
        parts = [np.array(shard.data) for shard in x.addressable_shards]
        parts[5].reshape(-1)[3] += 1
        bad = jax.make_array_from_single_device_arrays(
            x.shape, x.sharding,
            [jax.device_put(part, shard.device)
             for part, shard in zip(parts, x.addressable_shards, strict=True)],
        )  # fmt: skip
        assert not dl.replicas_agree({**params, name: bad}, mesh)
