# SPDX-License-Identifier: Apache-2.0
"""What moves between replicas: read from HLO in all its spellings, and told to the user."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import distlion_jax as dl

AXES = ("replica", "fsdp", "tensor")


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 2, 2), AXES, (AxisType.Auto,) * 3)


def program(attributes, op="all-reduce"):
    return f"""ENTRY %main (p: f32[4]) -> f32[4] {{
  %p = f32[4]{{0}} parameter(0)
  ROOT %r = f32[4]{{0}} {op}(%p), channel_id=1, {attributes}, metadata={{op_name="jit(f)/sum"}}
}}"""


# The devices of the mesh are 0 to 7: replica * 4 + fsdp * 2 + tensor.
SPELLINGS = {  # attributes; the axes that are crossed; how many take part
    "replica_groups={{0,4},{1,5},{2,6},{3,7}}": ({"replica"}, 2),
    "replica_groups={{0,1},{2,3},{4,5},{6,7}}": ({"tensor"}, 2),
    "replica_groups={{0,1,2,3},{4,5,6,7}}": ({"fsdp", "tensor"}, 4),
    "replica_groups={{0,6},{1,7},{2,4},{3,5}}": ({"replica", "fsdp"}, 2),
    "replica_groups={}": ({"replica", "fsdp", "tensor"}, 8),
    "replica_groups=[4,2]<=[8]": ({"tensor"}, 2),
    "replica_groups=[2,4]<=[8]": ({"fsdp", "tensor"}, 4),
    "replica_groups=[4,2]<=[2,4]T(1,0)": ({"replica"}, 2),
    "replica_groups=[4,2]<=[2,2,2]T(0,2,1)": ({"fsdp"}, 2),
    "replica_groups=[2,4]<=[2,2,2]T(1,0,2)": ({"replica", "tensor"}, 4),
    "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}": ({"replica"}, 2),
    "replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_1','axis_2'}": (
        {"fsdp", "tensor"}, 4,
    ),
    # Other orders of devices, and parts of axes, which XLA makes of meshes as it needs them.
    "replica_groups=mesh['x'=2,'y'=2,'z'=2], device_ids=([2,2,2]T(0,2,1)) {'y'}": ({"tensor"}, 2),
    "replica_groups=mesh['x'=2,'y'=4], device_ids=([2,4]T(0,1)) {'y'}": ({"fsdp", "tensor"}, 4),
    "replica_groups=mesh['x'=4,'y'=2], device_ids=([4,2]T(0,1)) {'x':(1)2}": ({"replica"}, 2),
    "replica_groups=mesh['x'=8] {'x':(2)2}": ({"fsdp"}, 2),
    "replica_groups=mesh['x'=8] {'x':(4)2}": ({"tensor"}, 2),
    "replica_groups=mesh['x'=2,'y'=4], device_ids=(0,1,4,5,2,3,6,7) {'x'}": ({"fsdp"}, 2),
    "replica_groups=mesh['x'=2,'y'=4], device_ids=(0,1,4,5,2,3,6,7) {'x','y':(1)2}": (
        {"replica", "fsdp"}, 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("attributes", SPELLINGS)
def test_groups_are_read_in_every_spelling(attributes, mesh):
    crossed, together = SPELLINGS[attributes]
    text = program(attributes + ", use_global_device_ids=true, to_apply=%add")
    for axis in AXES:
        found = dl.crossings(text, mesh, axis)
        expected = dl.Collective("all-reduce", "f32", 4, together)
        assert found == [dl.Crossing(expected, "jit(f)/sum")] * (axis in crossed)
    assert bool(dl.crossings(text, mesh, ("fsdp", "tensor"))) == bool(crossed - {"replica"})


@pytest.mark.parametrize(
    ("pairs", "crossed"),
    [
        ("{{0,4},{4,0}}", {"replica"}),
        ("{{0,1},{1,0},{2,3}}", {"tensor"}),
        ("{{0,3}}", set(AXES[1:])),
    ],
)
def test_permutations_are_read(pairs, crossed, mesh):
    text = program(f"source_target_pairs={pairs}", "collective-permute")
    assert {axis for axis in AXES if dl.crossings(text, mesh, axis)} == crossed


def test_groups_are_places_in_the_mesh_and_not_numbers_of_devices():
    """A mesh whose devices are in another order."""
    devices = np.array(jax.devices()).reshape(2, 2, 2).transpose(2, 1, 0)
    mesh = jax.sharding.Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)
    x = jax.device_put(np.ones((8, 8), np.float32), NamedSharding(mesh, P("replica", "tensor")))
    for axis, along in (("replica", 0), ("tensor", 1)):
        compiled = jax.jit(lambda x, along=along: x.sum(along)).lower(x).compile()
        assert [name for name in AXES if dl.crossings(compiled, mesh, name)] == [axis]


def test_updates_are_no_leaks(mesh):
    """However they are run: votes and averages are named, and gradients that cross are not."""
    params = {"w": jnp.ones((256, 256))}
    grads = {"w": jnp.ones((2, 256, 256))}
    averaged = optax.chain(dl.average_gradients("replica"), dl.replicated(optax.sgd(0.1)))
    for tx in (dl.distributed_lion(0.1, axis_name="replica"), averaged):
        tx = dl.sharded(tx, mesh, {"w": P("fsdp", "tensor")})
        compiled = jax.jit(tx.update).lower(grads, tx.init(params), params).compile()
        assert dl.crossings(compiled, mesh)
        assert not dl.leaks(compiled, mesh)
    rows = jax.device_put(grads["w"], NamedSharding(mesh, P("replica")))
    (leak,) = dl.leaks(jax.jit(lambda x: x.sum(0)).lower(rows).compile(), mesh)
    assert leak.collective.op == "all-reduce"


# Operations that the compiler cannot split inside a replica.

SPECS = {"table": P("tensor", "fsdp"), "w": P("fsdp", "tensor")}


def lookup(params, batch):
    x = params["table"][batch] @ params["w"]
    return jnp.mean((x @ params["table"].T) ** 2)


def constrained(params, batch):
    table = jax.lax.with_sharding_constraint(params["table"], P("tensor", None))
    return lookup({**params, "table": table}, batch)


def one_hot(params, batch):
    x = jax.nn.one_hot(batch, len(params["table"])) @ params["table"] @ params["w"]
    return jnp.mean((x @ params["table"].T) ** 2)


def step_of(loss_fn, mesh):
    shapes = {"table": (64, 32), "w": (32, 32)}
    params = {k: jax.device_put(np.ones(s, np.float32), NamedSharding(mesh, SPECS[k]))
              for k, s in shapes.items()}  # fmt: skip
    tx = dl.distributed_lion(0.001, axis_name="replica")
    tokens = np.arange(8 * 16).reshape(8, 16) % 64
    batch = jax.device_put(tokens, NamedSharding(mesh, P(("replica", "fsdp"))))
    step = dl.make_train_step(loss_fn, tx, mesh, "replica", donate=False)
    return step, (params, dl.init_state(tx, params, mesh, "replica"), batch)


def test_a_lookup_that_leaks_is_found_and_told(mesh):
    step, args = step_of(lookup, mesh)
    with jax.set_mesh(mesh):
        with pytest.warns(UserWarning, match="bytes a step and device between replicas") as seen:
            step(*args)
        compiled = step.lower(*args).compile()
    (said,) = [str(one.message) for one in seen]
    leaks = dl.leaks(compiled, mesh)
    assert {one.collective.dtype for one in leaks} == {"f32"}
    assert set(leaks) < set(dl.crossings(compiled, mesh))
    worst = max(leaks, key=lambda one: one.collective.bytes_received)
    assert worst.operation in said
    assert f"{sum(one.collective.bytes_received for one in leaks):,} bytes" in said


@pytest.mark.parametrize("loss_fn", [constrained, one_hot])
def test_its_cures_are_clean(loss_fn, mesh):
    step, args = step_of(loss_fn, mesh)
    with jax.set_mesh(mesh):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(*args)
        found = dl.crossings(step.lower(*args).compile(), mesh)
        assert not dl.leaks(step.lower(*args).compile(), mesh)
    words = [one.collective for one in found if one.collective.operand_bytes > 32]
    assert words == list(dl.wire_cost(args[0], 2, axis_name="replica").collectives)
