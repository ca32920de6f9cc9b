# SPDX-License-Identifier: Apache-2.0
"""What a step sends: exact bytes, predicted from shapes.

:func:`wire_cost` predicts, in integers, what each worker receives and sends per step, for any
tree, number of workers and options. It sums what the transports state of themselves.
:func:`distlion_jax.compiled_collectives` reads the collectives of a compiled step, so that a user
can check the prediction on their own model. A test ties the two together.
"""

from typing import Any, Unpack

import jax
import numpy as np
from jax.sharding import NamedSharding

from distlion_jax._rules import Aggregation, AxisName, Rules, VoteOptions, takes_vote_options
from distlion_jax._vote import shards, transports, wire
from distlion_jax._vote.costs import Collective, WireCost
from distlion_jax._vote.words import Layout
from distlion_jax.hlo import compiled_collectives  # its old home

__all__ = [
    "Collective",
    "WireCost",
    "compiled_collectives",
    "full_precision_cost",
    "layout_of",
    "wire_cost",
]


def layout_of(params: Any) -> Layout:
    """The layout of a tree of arrays or ``jax.ShapeDtypeStruct``."""
    return Layout([np.shape(x) for x in jax.tree.leaves(params)])


def _voted_layout(params: Any, axis_name: AxisName | None) -> Layout:
    """The layout of what one device votes on, of arrays that lie on a mesh."""
    if axis_name is None:
        for path, x in jax.tree_util.tree_leaves_with_path(params):
            sharding = shards.sharding_of(x)
            if sharding is not None and sharding.shard_shape(np.shape(x)) != np.shape(x):
                raise ValueError(
                    f"`params{jax.tree_util.keystr(path)}` is split over devices: name the mesh's "
                    'axis that votes, as wire_cost(..., axis_name="replica").'
                )
        return layout_of(params)
    shapes = []
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        sharding = shards.sharding_of(x)
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"`params{jax.tree_util.keystr(path)}` lies on no mesh (its sharding is "
                f"{sharding}): with `axis_name` {axis_name!r} pass placed arrays, or "
                "jax.ShapeDtypeStruct(..., sharding=NamedSharding(mesh, spec))."
            )
        sizes = {k: v for k, v in sharding.mesh.shape.items() if k not in wire.axes(axis_name)}
        shapes.append(shards.voted_shape(np.shape(x), sharding.spec, sizes))
    return Layout(shapes)


@takes_vote_options
def wire_cost(
    params: Any,
    n: int,
    *,
    axis_name: AxisName | None = None,
    aggregation: Aggregation = "majority",
    **options: Unpack[VoteOptions],
) -> WireCost:
    """Exact wire cost of one :func:`distlion_jax.distributed_lion` step.

    Args:
      params: tree of arrays or ``jax.ShapeDtypeStruct``; only shapes matter.
      n: number of workers.
      axis_name: of a model that is split over devices inside a worker: the axis, or axes, of its
        mesh that vote. The cost is then that of each device, with its peers of the other workers.
        None: a worker is one device.
      aggregation: as in ``distributed_lion``.
      **options: as listed below.

    Returns:
      A :class:`WireCost`: transport, collectives, bytes and bits per parameter.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
      >>> cost = wire_cost(params, 8, ties="coin", transport="two_phase")
      >>> round(cost.bits_per_parameter, 3), cost.bytes_received
      (1.764, 3698856)
      >>> round(full_precision_cost(params, 8).bits_per_parameter, 1)
      56.0
    """
    if n < 1:
        raise ValueError(f"`n` (workers) must be at least 1; got {n}.")
    return transports.cost(_voted_layout(params, axis_name), n, Rules(aggregation, **options))


def full_precision_cost(params: Any, n: int, dtype: str = "f32") -> WireCost:
    """Cost of the ring all-reduce of gradients that the vote replaces.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
      >>> full_precision_cost(params, 8).bits_per_parameter
      56.0
    """
    size = layout_of(params).size
    return WireCost(
        "all_reduce", size, (Collective("all-reduce", dtype, size, n),) if n > 1 else ()
    )
