# SPDX-License-Identifier: Apache-2.0
"""Runtime checks of what JAX cannot tell at trace time: who holds what, bit for bit.

For debugging and tests. Under ``jax.pmap`` and ``shard_map(check_vma=False)`` a gradient that was
summed already looks like a local one, and replicas that differ look replicated; these functions
look at the bits.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from distlion_jax import wire
from distlion_jax.rules import AxisName
from distlion_jax.words import mix


def checksum(tree: Any) -> Array:
    """``uint32[]``: a hash of every bit of a tree, its order included; float32 and narrower."""
    total = jnp.uint32(0)
    for x in jax.tree.leaves(tree):
        x = jnp.asarray(x)
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}.get(x.dtype.itemsize)
        if unsigned is None:
            raise ValueError(f"`tree` has a leaf of dtype {x.dtype}; 8, 16 and 32 bits are hashed.")
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).reshape(-1)
        place = mix(jnp.arange(bits.size, dtype=jnp.uint32) ^ np.uint32(0x9E3779B9))
        total = mix(total ^ mix(bits ^ place).sum(dtype=jnp.uint32))
    return total


def all_same(tree: Any, axis_name: AxisName) -> Array:
    """``bool[]``, inside a mapped function: whether the tree has the same bits on all workers.

    Applied to gradients it shows the trap of gradients that were summed before the vote: local
    gradients of different batches are never all the same. One word a worker crosses the network.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> same = jax.vmap(lambda g: all_same(g, "data"), axis_name="data")
      >>> print(same(jnp.array([1.0, 2.0])), same(jnp.array([2.0, 2.0])))
      [False False] [ True  True]
    """
    sums = wire.gather(checksum(tree)[None], axis_name, [1])
    return jnp.all(sums == sums[0])


def replicas_agree(tree: Any, mesh: Mesh) -> bool:
    """Whether every device of the mesh holds the same bits of arrays that claim to be replicated.

    Args:
      tree: arrays replicated over the mesh (parameters; not per-worker state).
      mesh: the mesh; every process of a multi-process job must call this.

    Returns:
      True if all replicas are bit-identical.

    Raises:
      ValueError: for an array that does not claim to be replicated.

    Examples:
      >>> from distlion_jax.mesh import replicate, worker_mesh
      >>> mesh = worker_mesh(8)
      >>> replicas_agree(replicate({"w": jnp.ones(3)}, mesh), mesh)
      True
    """
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        sharding = getattr(x, "sharding", None)
        if sharding is None or not sharding.is_fully_replicated:
            raise ValueError(
                f"`tree{jax.tree_util.keystr(path)}` is not replicated over devices (its sharding "
                f"is {sharding}): there are no replicas of it to compare."
            )
    names = mesh.axis_names
    compare = jax.shard_map(
        lambda tree: all_same(tree, names)[None],
        mesh=mesh,
        in_specs=P(),
        out_specs=P(names),
        check_vma=False,
    )
    same = jax.jit(compare)(tree)
    return all(bool(np.all(np.asarray(shard.data))) for shard in same.addressable_shards)
