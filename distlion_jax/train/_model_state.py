# SPDX-License-Identifier: Apache-2.0
"""What a model remembers beside its parameters, such as the statistics of BatchNorm.

In:  what each worker's forward pass made of it. Out: one copy, the same on all workers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from distlion_jax._promotion import default_promotion
from distlion_jax._vote import wire
from distlion_jax._vote.turnout import finite_mean


@default_promotion
def agree(new: Any, old: Any, entered: Array, axes: tuple[str, ...]) -> Any:
    """The mean over the workers that took part; the old one where nobody did.

    Floats are averaged in float32 at least. Integers and bools, such as counters, become the
    largest of any worker. Random keys become worker 0's.

    Args:
      new: this worker's.
      old: the same on all workers.
      entered: ``bool[]``: whether this worker took part in the round.
      axes: all axes that the batch is split over.
    """
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise ValueError(
            "`model_state` changes its structure in `loss_fn`, from "
            f"{jax.tree.structure(old)} to {jax.tree.structure(new)}. Return all of it, in the "
            "containers that it came in."
        )
    leaves, treedef = jax.tree.flatten(new)
    before = jax.tree.leaves(old)
    real = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves]
    floats = [jnp.asarray(x) for x, chosen in zip(leaves, real, strict=True) if chosen]
    means, health = finite_mean(floats, axes, jnp.where(entered, 1, 0))
    averaged = iter(means)

    def one(x: Any, x0: Any, chosen: bool) -> Array:
        if chosen:
            return jnp.where(health.workers > 0, next(averaged), x0).astype(x0.dtype)
        if wire.is_key(x):
            data = wire.from_first(jax.random.key_data(x), axes)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        whole = wire.largest(jnp.where(entered, x, x0).astype(jnp.int32), axes)
        return whole.astype(x0.dtype)

    return treedef.unflatten([one(*each) for each in zip(leaves, before, real, strict=True)])
