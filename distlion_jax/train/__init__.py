# SPDX-License-Identifier: Apache-2.0
"""Train steps: meshes, state per worker, metrics, and checks of what replicas hold.

Nothing here knows an optimizer: a state class declares what a step must know of it
(:mod:`distlion_jax.exchanges`).
"""

from distlion_jax.exchanges import ReplicatedState, replicated
from distlion_jax.train._audit import all_same, replicas_agree
from distlion_jax.train._mesh import (
    local,
    local_value_and_grad,
    make_global_batch,
    replicate,
    worker_mesh,
)
from distlion_jax.train._metrics import Metrics, mean_health, vote_health
from distlion_jax.train._placement import state_specs
from distlion_jax.train._pmap import make_pmap_train_step, pmap_replicate
from distlion_jax.train._replicas import replica_value_and_grad, sharded
from distlion_jax.train._shard_map import make_train_step
from distlion_jax.train._state import init_state, stack, unstack

__all__ = [
    "Metrics",
    "ReplicatedState",
    "all_same",
    "init_state",
    "local",
    "local_value_and_grad",
    "make_global_batch",
    "make_pmap_train_step",
    "make_train_step",
    "mean_health",
    "pmap_replicate",
    "replica_value_and_grad",
    "replicas_agree",
    "replicate",
    "replicated",
    "sharded",
    "stack",
    "state_specs",
    "unstack",
    "vote_health",
    "worker_mesh",
]
