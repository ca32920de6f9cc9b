# SPDX-License-Identifier: Apache-2.0
"""Distributed Lion for JAX: data-parallel training that sends one bit per parameter.

Optimizers, Optax transformations of each worker's own gradient:

    distributed_lion            Lion by a vote of one bit a parameter; the place to begin
    scale_by_distributed_lion   its direction, without learning rate and weight decay
    distributed_muon            the same vote on orthogonalised ballots: trains better
    scale_by_distributed_muon   its direction
    hidden_matrices             the leaves that it orthogonalises
    distributed_lion_by_label   a policy per parameter: vote, average, full precision, frozen
    average_gradients           the workers' full-precision mean: warm-up, inner axis, baseline
    scale_by_averaged_lion      Lion's direction on that mean, with the vote's state
    synchronize_momentum        averages the workers' momenta every so many steps
    replicated                  what follows a vote: state that all workers share
    accumulate_gradients        optax.MultiSteps that exchanges once an update
    keep_finite                 state before a vote that a bad gradient cannot spoil
    exchange                    declares that a transformation of yours makes workers agree

Train steps:

    worker_mesh                 a mesh of one axis, a device per worker
    replicate                   a copy of the parameters on every device
    init_state                  a transformation's state for every worker
    make_train_step             loss, transformation and mesh to a jitted step
    make_pmap_train_step        the same under jax.pmap
    pmap_replicate              parameters and state for it
    local_value_and_grad        a worker's own gradient, in a mapped function of yours
    local                       parameters to differentiate, for nnx and Equinox
    make_global_batch           one batch of the rows that every process has loaded
    unstack, stack              the state's worker axis, off and on, in such a function
    resize_state                a state for another number of workers
    state_like                  what to restore a checkpoint of other workers onto
    from_lion_state             optax.lion's state for all workers
    to_lion_state               and back, with the mean of their momenta
    set_hyperparams             injected hyperparameters, set by hand
    state_specs                 PartitionSpec of a state, for such a function
    vote_health, mean_health    how the last round went, from a state
    sharded                     a transformation for models that are split over other axes
    replica_value_and_grad      the gradient of every replica of such a model
    replicas_agree, all_same    compare what devices hold, bit for bit
    join                        several processes find each other, or end with the reason

Bytes and seconds:

    wire_cost                   exact bytes of a step, from shapes
    wire_cost_by_label          the same of distributed_lion_by_label
    full_precision_cost         the all-reduce that the vote replaces
    compiled_collectives        the collectives in a compiled program
    crossings                   those along the axis that votes, of a sharded model
    leaks                       those that are no update's: activations
    newton_schulz_flops         arithmetic that distributed_muon adds to a worker's step
    newton_schulz_cost          what it gathers inside a worker, of a sharded model
    forecast_vote               seconds of a step on a given network
    forecast_all_reduce         seconds of the step it replaces
    break_even                  the bandwidth up to which the vote is quicker

States and records: ``AverageGradientsState``, ``Collective``, ``Crossing``, ``Forecast``, ``Link``,
``MeanHealth``, ``Metrics``, ``ReplicatedState``, ``Roles``, ``ScaleByAveragedLionState``,
``ScaleByDistributedLionState``, ``SynchronizeMomentumState``, ``VoteHealth``, ``WireCost``;
``TRANSPORTS`` names the transports.

``distlion_jax.baselines`` holds what the vote is compared with, ``distlion_jax.reference`` the same
algorithm in plain NumPy. A name with an underscore anywhere in its path is internal.
"""

import importlib
from typing import Any

from distlion_jax import _old_paths
from distlion_jax._batches import newton_schulz_flops
from distlion_jax._rules import TRANSPORTS
from distlion_jax._version import __version__ as __version__
from distlion_jax._vote.turnout import MeanHealth
from distlion_jax._vote.verdict import VoteHealth
from distlion_jax.accumulate import accumulate_gradients
from distlion_jax.average import (
    AverageGradientsState,
    ScaleByAveragedLionState,
    average_gradients,
    scale_by_averaged_lion,
)
from distlion_jax.cluster import join
from distlion_jax.exchanges import ReplicatedState, Roles, exchange, replicated
from distlion_jax.finite import keep_finite
from distlion_jax.forecast import Forecast, Link, break_even, forecast_all_reduce, forecast_vote
from distlion_jax.hlo import Crossing, compiled_collectives, crossings, leaks
from distlion_jax.ledger import (
    Collective,
    WireCost,
    full_precision_cost,
    newton_schulz_cost,
    wire_cost,
)
from distlion_jax.lion import (
    ScaleByDistributedLionState,
    distributed_lion,
    scale_by_distributed_lion,
)
from distlion_jax.matrices import hidden_matrices
from distlion_jax.muon import distributed_muon, scale_by_distributed_muon
from distlion_jax.policy import distributed_lion_by_label, wire_cost_by_label
from distlion_jax.resume import (
    from_lion_state,
    resize_state,
    set_hyperparams,
    state_like,
    to_lion_state,
)
from distlion_jax.sync import SynchronizeMomentumState, synchronize_momentum
from distlion_jax.train import (
    Metrics,
    all_same,
    init_state,
    local,
    local_value_and_grad,
    make_global_batch,
    make_pmap_train_step,
    make_train_step,
    mean_health,
    pmap_replicate,
    replica_value_and_grad,
    replicas_agree,
    replicate,
    sharded,
    stack,
    state_specs,
    unstack,
    vote_health,
    worker_mesh,
)

__all__ = [
    "TRANSPORTS",
    "AverageGradientsState",
    "Collective",
    "Crossing",
    "Forecast",
    "Link",
    "MeanHealth",
    "Metrics",
    "ReplicatedState",
    "Roles",
    "ScaleByAveragedLionState",
    "ScaleByDistributedLionState",
    "SynchronizeMomentumState",
    "VoteHealth",
    "WireCost",
    "accumulate_gradients",
    "all_same",
    "average_gradients",
    "break_even",
    "compiled_collectives",
    "crossings",
    "distributed_lion",
    "distributed_lion_by_label",
    "distributed_muon",
    "exchange",
    "forecast_all_reduce",
    "forecast_vote",
    "from_lion_state",
    "full_precision_cost",
    "hidden_matrices",
    "init_state",
    "join",
    "keep_finite",
    "leaks",
    "local",
    "local_value_and_grad",
    "make_global_batch",
    "make_pmap_train_step",
    "make_train_step",
    "mean_health",
    "newton_schulz_cost",
    "newton_schulz_flops",
    "pmap_replicate",
    "replica_value_and_grad",
    "replicas_agree",
    "replicate",
    "replicated",
    "resize_state",
    "scale_by_averaged_lion",
    "scale_by_distributed_lion",
    "scale_by_distributed_muon",
    "set_hyperparams",
    "sharded",
    "stack",
    "state_like",
    "state_specs",
    "synchronize_momentum",
    "to_lion_state",
    "unstack",
    "vote_health",
    "wire_cost",
    "wire_cost_by_label",
    "worker_mesh",
]

_old_paths.install()


def __getattr__(name: str) -> Any:
    """``distlion_jax.baselines``, which is loaded when it is asked for."""
    if name == "baselines":
        return importlib.import_module("distlion_jax.baselines")
    raise AttributeError(f"module 'distlion_jax' has no attribute {name!r}")
