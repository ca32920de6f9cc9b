# SPDX-License-Identifier: Apache-2.0
"""The optimizers that train.py compares, each as a ready train step, its state and its bytes.

In: a loss, initial weights, a number of workers. Out: a :class:`Method` of any name in
``config.METHODS``; the training loop need not know which.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.demo.config import Config
from benchmarks.tasks.models import hidden, spread
from distlion_jax import (
    Collective,
    WireCost,
    average_gradients,
    compiled_collectives,
    distributed_lion,
    distributed_muon,
    full_precision_cost,
    init_state,
    make_pmap_train_step,
    make_train_step,
    pmap_replicate,
    replicate,
    wire_cost,
)
from distlion_jax.baselines import full_precision, full_precision_lion

# A majority's update is as long as Lion's. An average's is shorter (workers disagree), so that it
# wants a larger learning rate, with the pull of the weight decay left as it is.
AVERAGE_FACTOR = 2.0
ADAMW_BETAS = (0.8, 0.95)  # of the searches in benchmarks/results, which the usual ones trail
FIGURES = 1024  # bytes that loss and vote health may add to a step


@dataclasses.dataclass(frozen=True)
class Method:
    """One optimizer, ready to train."""

    name: str
    workers: int
    step: Any  # (params, state, batch) -> (params, state, metrics)
    params: Any
    state: Any
    place: Callable[[Any], Any]  # puts a batch on the workers' devices
    cost: WireCost  # of one step, by the package's ledger
    dense: WireCost | None  # what each of the first dense_steps costs on top
    dense_steps: int


def warmup_cosine(peak: float, steps: int) -> Callable[[Any], Array]:
    """Up to the peak over the first 5 % of the steps, then down to 0 along a cosine."""
    warmup = max(1, steps // 20)

    def rate(count: Any) -> Array:
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * count / steps))
        return peak * jnp.minimum((count + 1) / warmup, cosine)

    return rate


def make_optimizer(name: str, config: Config, workers: int) -> optax.GradientTransformation:
    """The Optax transformation of each worker's own gradients."""
    if name == "adamw":
        schedule = warmup_cosine(config.adamw_learning_rate, config.steps)
        decay = config.adamw_weight_decay
        return full_precision(optax.adamw(schedule, *ADAMW_BETAS, weight_decay=decay))
    rate, decay = config.learning_rate, config.weight_decay
    if name == "lion":
        return full_precision_lion(
            warmup_cosine(rate, config.steps), config.b1, config.b2, weight_decay=decay
        )
    options = _options(name, config)
    if name == "muon":
        vote = distributed_muon(
            warmup_cosine(config.muon_learning_rate, config.steps),
            weight_decay=config.muon_weight_decay,
            muon_weight_dimension_numbers=hidden,
            allow_single_worker=workers == 1,
            **options,
        )
    else:
        factor = AVERAGE_FACTOR if name == "average" else 1.0
        vote = distributed_lion(
            warmup_cosine(factor * rate, config.steps),
            config.b1,
            config.b2,
            weight_decay=decay / factor,
            allow_single_worker=workers == 1,
            **options,
        )
    if not config.dense_warmup:
        return vote
    return optax.chain(average_gradients("data", steps=config.dense_warmup), vote)


def _options(name: str, config: Config) -> dict[str, Any]:
    """Of the vote and of its cost."""
    aggregation = "average" if name == "average" else "majority"
    rest = {"transport": config.transport, "ties": config.ties, "ballot": config.ballot}
    return {"aggregation": aggregation, **rest}


def make_method(
    name: str, config: Config, loss_fn: Callable[[Any, Any], Array], params: Any, mesh: Mesh
) -> Method:
    """The named method, with a copy of the initial weights on every worker of the mesh."""
    workers = mesh.size
    votes = name in ("muon", "majority", "average")
    tx = make_optimizer(name, config, workers)
    if votes:
        cost = wire_cost(params, workers, **_options(name, config))
    else:
        cost = full_precision_cost(params, workers)
    dense_steps = config.dense_warmup if votes else 0
    dense = full_precision_cost(params, workers) if dense_steps else None
    by_worker = NamedSharding(mesh, P("data"))
    if config.mode == "pmap":
        devices = list(mesh.devices.flat)
        step = make_pmap_train_step(loss_fn, tx, devices=devices)
        state = pmap_replicate(tx.init(params), devices)
        params, place = pmap_replicate(params, devices), lambda batch: batch
    else:
        step = make_train_step(loss_fn, tx, mesh)
        state = init_state(tx, params, mesh)
        params, place = replicate(params, mesh), lambda batch: spread(batch, by_worker)
    return Method(name, workers, step, params, state, place, cost, dense, dense_steps)


def _elements(collectives: Iterable[Collective]) -> Counter[tuple[str, str]]:
    """Elements that each kind of collective moves, however they are cut into operations."""
    total: Counter[tuple[str, str]] = Counter()
    for c in collectives:
        total[c.op, c.dtype] += c.elements
    return total


def check_bytes(method: Method, batch: Any) -> tuple[bool | None, str]:
    """Compares the ledger's bytes with the collectives of the compiled step.

    Returns:
      Whether they agree (None: not checked), and a line that says so.
    """
    if method.workers == 1:
        return None, f"{method.name}: one worker sends nothing"
    if not hasattr(method.step, "lower"):
        return None, f"{method.name}: ledger not checked (a pmap step hides its compiled program)"
    lowered = method.step.lower(method.params, method.state, batch)
    found = compiled_collectives(lowered.compile(), method.workers)
    ledger = [*method.cost.collectives, *(method.dense.collectives if method.dense else ())]
    rest = _elements(found)
    rest.subtract(_elements(ledger))
    figures = sum(4 * count for count in rest.values())
    agrees = min(rest.values()) >= 0 and figures <= FIGURES
    sent = sum(c.bytes_received for c in ledger)
    kinds = ", ".join(dict.fromkeys(f"{c.op} of {c.dtype}" for c in ledger))
    if agrees:
        return True, (
            f"{method.name}: ledger checked: {sent:,} bytes per step are what the compiled step "
            f"moves ({kinds}), beside {figures} bytes of figures such as the loss"
        )
    return False, (
        f"{method.name}: LEDGER DISAGREES: it says {sent:,} bytes per step ({kinds}), the compiled "
        f"step moves {sum(c.bytes_received for c in found):,}"
    )
