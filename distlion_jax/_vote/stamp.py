# SPDX-License-Identifier: Apache-2.0
"""Whose state is this? A mark that shows when per-worker state was lost or copied.

In:  a worker's stamp, and the round it is in. Out: the stamp, set in the worker's first round.

Momenta differ by worker. Habits from replicated training lose them without a word: taking one
worker's copy for all, saving what one host holds, restoring onto fewer or more workers. A stamp
travels with the state that it marks, so that train steps can see it
(:mod:`distlion_jax.train._whole`).
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

from distlion_jax._vote.turnout import Round


def blank() -> Array:
    """Of a state that no worker has used: ``int32[2]`` of zeros."""
    return jnp.zeros([2], jnp.int32)


def marks(n: int) -> np.ndarray:
    """``int32[n, 2]``: of all n workers."""
    return np.stack([np.arange(n), np.full(n, n)], axis=1).astype(np.int32)


def mark(stamp: Array, context: Round) -> Array:
    """``int32[2]``: the worker's index and how many workers there were, in its first round."""
    mine = jnp.stack([context.worker, jnp.int32(context.workers)])
    return jnp.where(stamp[1] == 0, mine, stamp)
