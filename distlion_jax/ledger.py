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

from distlion_jax._rules import Aggregation, Rules, VoteOptions, takes_vote_options
from distlion_jax._vote import transports
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


@takes_vote_options
def wire_cost(
    params: Any, n: int, *, aggregation: Aggregation = "majority", **options: Unpack[VoteOptions]
) -> WireCost:
    """Exact wire cost of one :func:`distlion_jax.distributed_lion` step.

    Args:
      params: tree of arrays or ``jax.ShapeDtypeStruct``; only shapes matter.
      n: number of workers.
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
    return transports.cost(layout_of(params), n, Rules(aggregation, **options))


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
