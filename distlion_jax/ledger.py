# SPDX-License-Identifier: Apache-2.0
"""What a step sends: exact bytes, predicted from shapes.

:func:`wire_cost` predicts, in integers, what each worker receives and sends per step, for any
tree, number of workers and options. It sums what the transports state of themselves.
:func:`distlion_jax.compiled_collectives` reads the collectives of a compiled step, so that a user
can check the prediction on their own model. A test ties the two together.
"""

import math
from typing import Any, Unpack

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from distlion_jax._batches import Choice, axes_of, numbers_of
from distlion_jax._rules import Aggregation, AxisName, Rules, VoteOptions, takes_vote_options
from distlion_jax._vote import shards, transports, wire
from distlion_jax._vote.costs import Collective, WireCost, hlo_dtype
from distlion_jax._vote.words import Layout
from distlion_jax.hlo import compiled_collectives  # its old home

__all__ = [
    "Collective",
    "WireCost",
    "compiled_collectives",
    "full_precision_cost",
    "layout_of",
    "newton_schulz_cost",
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
    return Layout([shards.voted_shape(*one) for one in _placed(params, axis_name)])


Placed = tuple[tuple[int, ...], PartitionSpec, dict[str, int]]


def _placed(params: Any, axis_name: AxisName) -> list[Placed]:
    """Of each leaf its shape, and how it is split inside a worker: :func:`_split`."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [(np.shape(x), *_split(path, x, axis_name)) for path, x in leaves]


def _split(path: Any, x: Any, axis_name: AxisName) -> tuple[PartitionSpec, dict[str, int]]:
    """How a leaf is split inside a worker: its spec, and the sizes of the worker's own axes."""
    sharding = shards.sharding_of(x)
    if not isinstance(sharding, NamedSharding):
        raise ValueError(
            f"`params{jax.tree_util.keystr(path)}` lies on no mesh (its sharding is "
            f"{sharding}): with `axis_name` {axis_name!r} pass placed arrays, or "
            "jax.ShapeDtypeStruct(..., sharding=NamedSharding(mesh, spec))."
        )
    sizes = {k: v for k, v in sharding.mesh.shape.items() if k not in wire.axes(axis_name)}
    return sharding.spec, sizes


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


def full_precision_cost(
    params: Any, n: int, dtype: str = "f32", *, axis_name: AxisName | None = None
) -> WireCost:
    """Cost of the ring all-reduce of gradients that the vote replaces.

    Args:
      params, n, axis_name: as in :func:`wire_cost`.
      dtype: of the gradients on the wire, as HLO spells it.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
      >>> full_precision_cost(params, 8).bits_per_parameter
      56.0
    """
    if axis_name is None:
        size = layout_of(params).size
    else:
        size = sum(math.prod(shards.shard_shape(*one)) for one in _placed(params, axis_name))
    return WireCost(
        "all_reduce", size, (Collective("all-reduce", dtype, size, n),) if n > 1 else ()
    )


def newton_schulz_cost(
    params: Any, axis_name: AxisName, muon_weight_dimension_numbers: Choice = None
) -> WireCost:
    """What :func:`distlion_jax.distributed_muon` gathers inside a worker that is many devices.

    A matrix is orthogonalised whole, on every device that holds a part of it. Its blend is gathered
    over the axes that the matrix is split over, in the dtype of the gradient. Nothing of it leaves
    the worker: this comes on top of :func:`wire_cost`, on the links inside. With ``period`` P it
    comes in every P-th step only.

    Args:
      params: arrays that lie on a mesh, or ``jax.ShapeDtypeStruct`` with a sharding.
      axis_name: the axis, or axes, of the mesh that vote.
      muon_weight_dimension_numbers: as in ``distributed_muon``.

    Returns:
      The all-gathers of each device, in the order of the leaves.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((2, 4), ("replica", "fsdp"), axis_types=(AxisType.Auto,) * 2)
      >>> w = jax.device_put(jnp.zeros((64, 64)), NamedSharding(mesh, P("fsdp")))
      >>> newton_schulz_cost({"w": w}, "replica").bytes_received  # 3 quarters of 64 * 64 * 4
      12288
    """
    numbers = numbers_of(muon_weight_dimension_numbers, params)
    moved, leaves = [], jax.tree.leaves(params)
    placed = _placed(params, axis_name)
    for x, (shape, spec, sizes), one in zip(leaves, placed, numbers, strict=True):
        elements = math.prod(shards.shard_shape(shape, spec, sizes))
        for axis, over in shards.split_axes(spec):
            if one is not None and axis in axes_of(one):
                n = math.prod(sizes[name] for name in over)
                moved += [Collective("all-gather", hlo_dtype(x.dtype), elements, n)] * (n > 1)
                elements *= n
    return WireCost("all_gather", layout_of(params).size, tuple(moved))
