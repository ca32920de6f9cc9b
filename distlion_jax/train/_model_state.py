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
from distlion_jax._vote.turnout import weighted_sum
from distlion_jax.train._checks import check_shapes


@default_promotion
def agree(new: Any, old: Any, entered: Array, axes: tuple[str, ...]) -> Any:
    """The mean over the workers that took part; the old one where nobody did.

    Floats are averaged in float32 at least. Integers and bools, such as counters, become the
    largest of any worker. Typed random keys become worker 0's.

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
    check_shapes("model_state", old, new, ". Return statistics in the shapes that came in.")
    leaves, treedef = jax.tree.flatten(new)
    before = jax.tree.leaves(old)
    real = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves]
    floats = [(jnp.asarray(x), y) for x, y, it in zip(leaves, before, real, strict=True) if it]
    # What was not finite before, as a minimum that begins at infinity, may stay so.
    fine = [jnp.all(jnp.isfinite(x) | ~jnp.isfinite(y)) for x, y in floats]
    entered &= jnp.all(jnp.stack([*fine, jnp.bool_(True)]))
    weight = jnp.where(entered, 1, 0)
    sums, whole, _ = weighted_sum([x for x, _ in floats], weight, axes)
    means = iter([s / whole.astype(s.dtype) for s in sums])

    def one(x: Any, x0: Any, chosen: bool) -> Array:
        if chosen:
            return jnp.where(whole > 0, next(means), x0).astype(x0.dtype)
        if wire.is_key(x):
            return wire.copies_of_first(x, axes)
        mine = jnp.where(entered, x, x0)
        if x0.dtype == jnp.bool_:
            return wire.largest(mine.astype(jnp.uint8), axes).astype(jnp.bool_)
        return wire.largest(mine.astype(x0.dtype), axes)

    return treedef.unflatten([one(*each) for each in zip(leaves, before, real, strict=True)])
