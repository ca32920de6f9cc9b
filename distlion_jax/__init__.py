# SPDX-License-Identifier: Apache-2.0
"""Distributed Lion for JAX: data-parallel training that sends one bit per parameter."""

from distlion_jax.audit import all_same as all_same
from distlion_jax.audit import replicas_agree as replicas_agree
from distlion_jax.dense import AverageGradientsState as AverageGradientsState
from distlion_jax.dense import ScaleByAveragedLionState as ScaleByAveragedLionState
from distlion_jax.dense import average_gradients as average_gradients
from distlion_jax.dense import scale_by_averaged_lion as scale_by_averaged_lion
from distlion_jax.forecast import Forecast as Forecast
from distlion_jax.forecast import Link as Link
from distlion_jax.forecast import break_even as break_even
from distlion_jax.forecast import forecast_all_reduce as forecast_all_reduce
from distlion_jax.forecast import forecast_vote as forecast_vote
from distlion_jax.health import VoteHealth as VoteHealth
from distlion_jax.ledger import Collective as Collective
from distlion_jax.ledger import WireCost as WireCost
from distlion_jax.ledger import compiled_collectives as compiled_collectives
from distlion_jax.ledger import full_precision_cost as full_precision_cost
from distlion_jax.ledger import wire_cost as wire_cost
from distlion_jax.lion import ScaleByDistributedLionState as ScaleByDistributedLionState
from distlion_jax.lion import distributed_lion as distributed_lion
from distlion_jax.lion import scale_by_distributed_lion as scale_by_distributed_lion
from distlion_jax.mesh import ReplicatedState as ReplicatedState
from distlion_jax.mesh import init_state as init_state
from distlion_jax.mesh import local_value_and_grad as local_value_and_grad
from distlion_jax.mesh import replicate as replicate
from distlion_jax.mesh import replicated as replicated
from distlion_jax.mesh import stack as stack
from distlion_jax.mesh import state_specs as state_specs
from distlion_jax.mesh import unstack as unstack
from distlion_jax.mesh import worker_mesh as worker_mesh
from distlion_jax.metrics import Metrics as Metrics
from distlion_jax.metrics import vote_health as vote_health
from distlion_jax.policy import distributed_lion_by_label as distributed_lion_by_label
from distlion_jax.policy import wire_cost_by_label as wire_cost_by_label
from distlion_jax.rendezvous import join as join
from distlion_jax.rules import TRANSPORTS as TRANSPORTS
from distlion_jax.sync import SynchronizeMomentumState as SynchronizeMomentumState
from distlion_jax.sync import synchronize_momentum as synchronize_momentum
from distlion_jax.train import make_pmap_train_step as make_pmap_train_step
from distlion_jax.train import make_train_step as make_train_step
from distlion_jax.train import pmap_replicate as pmap_replicate

__version__ = "0.1.0"
