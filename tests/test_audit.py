# SPDX-License-Identifier: Apache-2.0
"""The runtime checks see every bit, and nothing but the bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import distlion_jax as dl
from distlion_jax.train._audit import checksum

DTYPES = ["bool", "int8", "uint8", "int16", "bfloat16", "float16", "int32", "uint32", "float32"]
N = 4


def checksum_of(*leaves):
    return int(checksum(list(leaves)))


def zeros_and_ones(dtype, size=9):
    return np.random.default_rng(0).integers(0, 2, size).astype(jnp.dtype(dtype))


def toggled(x, i):
    """A copy with element ``i`` 1 instead of 0, or 0 instead of 1."""
    y = x.copy()
    y[i] = not y[i]
    return y


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksum_sees_each_element_and_its_place(dtype):
    x = zeros_and_ones(dtype)
    changed = [toggled(x, i) for i in range(x.size)]
    rolled = [np.roll(x, shift) for shift in range(1, x.size)]
    sums = [checksum_of(y) for y in (x, *changed, *rolled)]
    assert len(set(sums)) == len(sums)
    assert checksum_of(jnp.asarray(x)) == sums[0] == int(jax.jit(checksum)([x]))


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
def test_checksum_sees_every_bit(dtype):
    x = np.ones(3, jnp.dtype(dtype))
    sums = [checksum_of(x)]
    for byte in range(x.itemsize):
        for bit in range(8):
            y = x.copy()
            y.view(np.uint8)[x.itemsize + byte] ^= 1 << bit  # of the middle element
            sums.append(checksum_of(y))
    assert len(set(sums)) == 1 + 8 * x.itemsize


def test_checksum_tells_apart_what_compares_equal():
    assert checksum_of(jnp.float32(0.0)) != checksum_of(jnp.float32(-0.0))
    assert checksum_of(jnp.float32(jnp.nan)) == checksum_of(jnp.float32(jnp.nan))


def test_checksum_sees_the_order_of_leaves():
    x, y = jnp.arange(5), jnp.arange(5, 10)
    assert checksum_of(x, y) != checksum_of(y, x)
    assert checksum_of(x, y[:0]) != checksum_of(x[:0], y)
    assert int(checksum({"b": y, "a": x})) == checksum_of(x, y)  # of jax.tree.leaves


def per_worker(values, how):
    """``all_same`` of one row a worker, as every worker sees it."""
    if how == "vmap":
        return jax.vmap(lambda x: dl.all_same(x, "data"), axis_name="data")(values)
    if how == "pmap":
        return jax.pmap(lambda x: dl.all_same(x, "data"), "data", devices=jax.devices()[:N])(values)
    checked = how == "shard_map"
    mapped = jax.shard_map(
        lambda x: dl.all_same(x[0], "data") if checked else dl.all_same(x[0], "data")[None],
        mesh=dl.worker_mesh(N),
        in_specs=P("data"),
        out_specs=P() if checked else P("data"),  # with the check on, JAX knows it is replicated
        check_vma=checked,
    )
    return jnp.broadcast_to(jax.jit(mapped)(values), N)


@pytest.mark.parametrize("how", ["vmap", "pmap", "shard_map", "shard_map_unchecked"])
def test_all_same(how):
    same = jnp.tile(jnp.arange(5.0), (N, 1))
    assert per_worker(same, how).tolist() == [True] * N
    for worker in range(N):
        assert per_worker(same.at[worker, 3].add(1e-6), how).tolist() == [False] * N


def test_all_same_shows_gradients_that_were_summed():
    """What cannot be told when tracing under pmap: a vote on these would save nothing."""

    def worker(batch):
        local = jax.grad(lambda x: jnp.sum((x - batch) ** 2))(jnp.zeros(3))
        summed = jax.lax.psum(local, "data")
        return dl.all_same(local, "data"), dl.all_same(summed, "data")

    batch = jnp.arange(3.0 * N).reshape(N, 3)
    local, summed = jax.pmap(worker, "data", devices=jax.devices()[:N])(batch)
    assert not local.any()
    assert summed.all()


def held(mesh, shards):
    """An array that claims to be replicated over the mesh, made of what each device holds."""
    arrays = [jax.device_put(x, d) for x, d in zip(shards, mesh.devices.flat, strict=True)]
    sharding = NamedSharding(mesh, P())
    return jax.make_array_from_single_device_arrays(arrays[0].shape, sharding, arrays)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "complex64"])
def test_replicas_agree(dtype):
    mesh = dl.worker_mesh(8)
    x = zeros_and_ones(dtype)
    tree = {"w": dl.replicate(x, mesh), "b": held(mesh, [x] * 8)}
    assert dl.replicas_agree(tree, mesh) is True
    for device in (0, 7):
        shards = [x] * 8
        shards[device] = toggled(x, 4)
        tree["b"] = held(mesh, shards)
        assert tree["b"].is_fully_replicated
        assert dl.replicas_agree(tree, mesh) is False


def test_replicas_agree_does_not_believe_an_unchecked_shard_map():
    mesh = dl.worker_mesh(8)
    lie = jax.shard_map(
        lambda x: x[0], mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False
    )
    differing = jax.jit(lie)(jnp.arange(8.0).reshape(8, 1))
    assert differing.is_fully_replicated
    assert not dl.replicas_agree(differing, mesh)
    assert dl.replicas_agree(jax.jit(lie)(jnp.ones((8, 1))), mesh)


def test_replicas_agree_over_every_axis_of_the_mesh():
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    x = jnp.arange(6.0)
    assert dl.replicas_agree(held(mesh, [x] * 8), mesh)
    along_model = [x, x + 1] * 4
    along_data = [x] * 6 + [x + 1] * 2
    assert not dl.replicas_agree(held(mesh, along_model), mesh)
    assert not dl.replicas_agree(held(mesh, along_data), mesh)
