# SPDX-License-Identifier: Apache-2.0
"""Every way to train a sharded model ends with the bits of unsharded workers, after 20 steps.

In float64: the compiler sums gradients in another order where they are split, and a blend that is
nearly 0 could change its sign with the last bit of a float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distlion_jax as dl
from tests.sharded_model import (
    HIDDEN,
    SHAPES,
    SPECS,
    WIDTH,
    WORDS,
    batches,
    initial,
    loss_fn,
    mesh_of,
    place,
    rows,
)

VOTE = {"ballot": "ternary", "ties": "zero", "weight_decay": 0.1}  # coins are of the layout
TRANSFORMATIONS = {
    "lion": lambda: dl.distributed_lion(0.01, axis_name="replica", **VOTE),
    "muon": lambda: dl.distributed_muon(0.01, axis_name="replica", **VOTE),
    "averaged": lambda: optax.chain(
        dl.average_gradients("replica"), dl.replicated(optax.adamw(0.01))
    ),
}


pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def mesh():
    return mesh_of(2, 2, 2)


def train_step(tx, mesh):
    """Our step, on a mesh with inner axes or without."""
    params = place(initial(), mesh) if "fsdp" in mesh.shape else dl.replicate(initial(), mesh)
    state, step = dl.init_state(tx, params, mesh, "replica"), dl.make_train_step(
        loss_fn, tx, mesh, "replica"
    )  # fmt: skip
    for batch in batches():
        batch = rows(batch, mesh) if "fsdp" in mesh.shape else batch
        params, state, _ = step(params, state, batch)
    return params, state


def own_jit(tx, mesh, how="vmap"):
    params = place(initial(), mesh)
    tx = dl.sharded(tx, mesh, params)
    gradients, state = dl.replica_value_and_grad(loss_fn, mesh, how=how), tx.init(params)

    @jax.jit
    def step(params, state, batch):
        _, grads = gradients(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for batch in batches():
        params, state = step(params, state, rows(batch, mesh))
    return params, state


def own_shard_map(tx, mesh):
    """A mapped function of one's own, manual over the vote's axis alone."""
    params = place(initial(), mesh)
    state = dl.init_state(tx, params, mesh, "replica")
    by_state = dl.state_specs(state, "replica")
    gradients = dl.replica_value_and_grad(loss_fn, mesh)

    def update(params, state, grads):
        grads = jax.tree.map(lambda x: x[0], grads)
        updates, state = tx.update(grads, dl.unstack(state, "replica"), params, specs=SPECS)
        return optax.apply_updates(params, updates), dl.stack(state)

    mapped = jax.shard_map(
        update, mesh=mesh, in_specs=(P(), by_state, P("replica")), out_specs=(P(), by_state),
        axis_names={"replica"},
    )  # fmt: skip
    step = jax.jit(lambda params, state, batch: mapped(params, state, gradients(params, batch)[1]))
    for batch in batches():
        params, state = step(params, state, rows(batch, mesh))
    return params, state


def flax_train_state(tx, mesh):
    train_state = pytest.importorskip("flax.training.train_state")
    params = place(initial(), mesh)
    gradients = dl.replica_value_and_grad(loss_fn, mesh)
    state = train_state.TrainState.create(
        apply_fn=None, params=params, tx=dl.sharded(tx, mesh, params)
    )

    @jax.jit
    def step(state, batch):
        return state.apply_gradients(grads=gradients(state.params, batch)[1])

    for batch in batches():
        state = step(state, rows(batch, mesh))
    return state.params, state.opt_state


def flax_nnx(tx, mesh):
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self):
            for name, x in place(initial(), mesh).items():
                setattr(self, name, nnx.Param(x))

    model = Model()
    tx = dl.sharded(tx, mesh, nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss(params, batch):
        return loss_fn({name: params[name][...] for name in SHAPES}, batch)

    gradients = dl.replica_value_and_grad(loss, mesh)

    @nnx.jit
    def step(model, optimizer, batch):
        optimizer.update(model, gradients(nnx.state(model, nnx.Param), batch)[1])

    for batch in batches():
        step(model, optimizer, rows(batch, mesh))
    params = {name: getattr(model, name)[...] for name in SHAPES}
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    state = jax.tree.map(lambda x: x[...], optimizer.opt_state, is_leaf=is_variable)
    return params, state


FACES = {
    "make_train_step": train_step,
    "own jit": own_jit,
    "own jit, shard_map": functools.partial(own_jit, how="shard_map"),
    "own shard_map": own_shard_map,
    "TrainState": flax_train_state,
    "nnx.Optimizer": flax_nnx,
}


@functools.cache
def unsharded(name):
    workers = dl.worker_mesh(2, "replica", devices=jax.devices()[:2])
    return train_step(TRANSFORMATIONS[name](), workers)


EVERY = [(face, name) for face in FACES for name in TRANSFORMATIONS]
SLOW = [(face, name) for face, name in EVERY if name != "lion" and face != "make_train_step"]


@pytest.mark.parametrize(
    ("face", "name"),
    [pytest.param(*one, marks=[pytest.mark.slow] if one in SLOW else []) for one in EVERY],
)
def test_ends_with_the_bits_of_unsharded_workers(face, name, mesh):
    rounded, (whole, their) = name == "averaged", unsharded(name)
    params, state = FACES[face](TRANSFORMATIONS[name](), mesh)
    for key in SHAPES:
        assert params[key].dtype == np.float64
        assert params[key].sharding.is_equivalent_to(NamedSharding(mesh, SPECS[key]), 2), key
        if rounded:  # floats are summed, in another order
            np.testing.assert_allclose(params[key], whole[key], 1e-9)
        else:
            np.testing.assert_array_equal(params[key], whole[key])
    got, want = jax.tree.leaves(state), jax.tree.leaves(their)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, 1e-9, 1e-12)


# Flax Linen, whose modules say by name how they are split.

RULES = (("words", None), ("layers", None), ("width", "fsdp"), ("hidden", "tensor"))


def linen_model():
    """Two layers under scan and remat, with logical axes; float64."""
    nn = pytest.importorskip("flax.linen")
    named = nn.with_logical_partitioning
    normal = nn.initializers.normal(0.3)

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            options = {"param_dtype": float, "use_bias": False}
            scale = named(nn.initializers.ones, ("width",))
            y = nn.LayerNorm(param_dtype=float, use_bias=False, scale_init=scale)(x)
            y = nn.Dense(HIDDEN, kernel_init=named(normal, ("width", "hidden")), **options)(y)
            y = nn.with_logical_constraint(jnp.tanh(y), (None, None, "hidden"))
            y = nn.Dense(WIDTH, kernel_init=named(normal, ("hidden", "width")), **options)(y)
            return x + y, None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            table = named(normal, ("words", "width"))
            embed = nn.Embed(WORDS, WIDTH, param_dtype=float, embedding_init=table)
            layers = nn.scan(
                nn.remat(Layer, prevent_cse=False), variable_axes={"params": 0}, length=2,
                split_rngs={"params": True}, metadata_params={nn.PARTITION_NAME: "layers"},
            )  # fmt: skip
            x, _ = layers(name="layers")(embed(tokens), None)
            return embed.attend(x)

    return nn, Model()


def test_linen_with_logical_axes(mesh):
    nn, model = linen_model()
    boxed = model.init(jax.random.key(0), np.zeros((1, 5), int))["params"]
    start = nn.meta.unbox(boxed)

    def loss(params, batch):
        logits = model.apply({"params": params}, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    def train(mesh, params, put):
        tx = TRANSFORMATIONS["lion"]()
        state = dl.init_state(tx, params, mesh, "replica")
        step = dl.make_train_step(loss, tx, mesh, "replica")
        for batch in batches():
            params, state, metrics = step(params, state, put(batch))
        return params, metrics

    workers = dl.worker_mesh(2, "replica", devices=jax.devices()[:2])
    want, _ = train(workers, dl.replicate(start, workers), lambda batch: batch)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
        params = jax.device_put(start, shardings)
        kernel = params["layers"]["Dense_0"]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape) == (2, WIDTH // 2, HIDDEN // 2)
        got, metrics = train(mesh, params, lambda batch: rows(batch, mesh))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(x, y)
    assert list(metrics.health[0].voted) == [True, True]
    with pytest.warns(UserWarning, match=r"keep the names of their axes .*nn\.meta\.unbox"):
        dl.sharded(TRANSFORMATIONS["lion"](), mesh, params).init(boxed)
