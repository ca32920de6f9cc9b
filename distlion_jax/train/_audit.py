# SPDX-License-Identifier: Apache-2.0
"""Runtime checks of what JAX cannot tell at trace time: who holds what, bit for bit.

Train steps look now and then where JAX cannot; the rest is for debugging and tests. JAX checks
nothing under ``jax.pmap`` and ``shard_map(check_vma=False)``. There a gradient that was summed
already looks like a local one, and replicas that differ look replicated. These functions look at
the bits.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from distlion_jax._promotion import default_promotion
from distlion_jax._rules import AxisName
from distlion_jax._vote import wire
from distlion_jax._vote.coins import mix
from distlion_jax._vote.shards import names
from distlion_jax.train._specs import canonical, spec_of


@default_promotion
def checksum(tree: Any) -> Array:
    """``uint32[]``: a hash of every bit of a tree, its order included."""
    total = jnp.uint32(0)
    for x in jax.tree.leaves(tree):
        x = jnp.asarray(x)
        if wire.is_key(x):
            x = jax.random.key_data(x)
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        if jnp.iscomplexobj(x):
            x = jnp.stack([x.real, x.imag])
        unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).reshape(-1)
        place = mix(jnp.arange(bits.size, dtype=jnp.uint32) ^ np.uint32(0x9E3779B9))
        total = mix(total ^ mix(bits ^ place).sum(dtype=jnp.uint32))
    return total


@default_promotion
def all_same(tree: Any, axis_name: AxisName) -> Array:
    """``bool[]``, inside a mapped function: whether the tree has the same bits on all workers.

    Applied to gradients it shows the trap of gradients that were summed before the vote: local
    gradients of different batches are never all the same. Two words cross the network.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> same = jax.vmap(lambda g: all_same(g, "data"), axis_name="data")
      >>> print(same(jnp.array([1.0, 2.0])), same(jnp.array([2.0, 2.0])))
      [False False] [ True  True]
    """
    mine = checksum(tree)
    # The largest of the complements is the complement of the smallest: one all-reduce for both.
    largest, smallest = wire.largest(jnp.stack([mine, ~mine]), axis_name)
    return largest == ~smallest


def replicas_agree(tree: Any, mesh: Mesh) -> bool:
    """Whether all devices that hold the same part of an array hold the same bits of it.

    Args:
      tree: arrays that are replicated over the mesh, or over some of its axes (parameters; not
        per-worker state).
      mesh: the mesh; every process of a multi-process job must call this.

    Returns:
      True if all replicas are bit-identical.

    Raises:
      ValueError: for an array that does not claim to be replicated.

    Examples:
      >>> from distlion_jax import replicate, worker_mesh
      >>> mesh = worker_mesh(8)
      >>> replicas_agree(replicate({"w": jnp.ones(3)}, mesh), mesh)
      True
    """
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        sharding = getattr(x, "sharding", None)
        if sharding is None or sharding.num_devices == _shards(sharding, x.shape):
            raise ValueError(
                f"`tree{jax.tree_util.keystr(path)}` is not replicated over devices (its sharding "
                f"is {sharding}): there are no replicas of it to compare."
            )
    return agree(tree, mesh)


def _shards(sharding: Any, shape: tuple[int, ...]) -> int:
    """How many different parts of an array its devices hold."""
    return len({str(index) for index in sharding.devices_indices_map(shape).values()})


def agree(tree: Any, mesh: Mesh) -> bool:
    """Whether all devices that hold the same part of an array hold the same bits of it."""
    leaves = jax.tree.leaves(tree)
    specs = tuple(canonical(spec_of(x, mesh), mesh) for x in leaves)
    return everywhere(comparison(mesh, specs)(leaves)) if leaves else True


@functools.cache
def comparison(mesh: Mesh, specs: tuple[P, ...]) -> Callable[[list[Array]], Array]:
    """Of arrays with these specs: ``bool[devices]``, whether all copies have the same bits.

    All devices say the same.
    """
    copies = [tuple(a for a in mesh.axis_names if a not in names(spec)) for spec in specs]

    def compare(leaves: list[Array]) -> Array:
        same = jnp.bool_(True)
        for axes in dict.fromkeys(copies):
            some = [x for x, mine in zip(leaves, copies, strict=True) if mine == axes]
            if axes:
                same &= all_same(some, axes)
        # Devices compare their own parts, but all processes must go on alike, or none.
        return wire.largest((~same).astype(jnp.int32), mesh.axis_names)[None] == 0

    return jax.jit(
        jax.shard_map(
            compare,
            mesh=mesh,
            in_specs=(list(specs),),
            out_specs=P(mesh.axis_names),
            check_vma=False,
        )
    )


def everywhere(same: Array) -> bool:
    """Whether all that this process holds of an array is true."""
    return all(bool(np.all(np.asarray(shard.data))) for shard in same.addressable_shards)


def is_scheduled(call: int) -> bool:
    """Whether a step looks in this call: in 1, 2, 4, ..., 256, and then in every 256th."""
    return call & (call - 1) == 0 or call % 256 == 0  # a power of two has one bit


def differing(agree: Callable[[Any], bool], same: dict[str, Any]) -> str:
    """The path of the first leaf on which workers do not agree."""
    return next(
        name + jax.tree_util.keystr(path)
        for name, tree in same.items()
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if not agree(x)
    )


def check_alike(agree: Callable[[Any], bool], same: dict[str, Any], call: int) -> None:
    """Raises unless all workers hold the same bits after a call of a step.

    For steps in which JAX does not check it. It costs a small program to compile, and a wait.

    Args:
      agree: whether all workers hold the same bits of a tree.
      same: trees of what must be the same, by name.
      call: the number of the call.
    """
    if not agree(same):
        raise ValueError(
            f"`{differing(agree, same)}` differs by worker after call {call} of this step: it "
            "differed from the start, or what `tx` does to it, or in some steps, is each worker's "
            "own (as an ordinary optimizer on local gradients, what optax.masked passes on, or a "
            "vote over some of the axes only), or processes run with options that differ, such as "
            "the learning rate. Begin with one set for all, and let every leaf be voted on, "
            "averaged or frozen: distributed_lion, distributed_lion_by_label, average_gradients "
            "before another optimizer, or make_train_step with gradients='mean'."
        )
