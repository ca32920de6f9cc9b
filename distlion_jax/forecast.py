# SPDX-License-Identifier: Apache-2.0
"""Does it pay on this cluster? Step times from the ledger's bytes and a model of the network.

In:  sizes (parameters, workers), a link, and the seconds that a step takes without an exchange.
Out: the seconds that it takes with one: of the vote, and of the all-reduce that it replaces.

The model is alpha-beta: a collective of n workers takes ``hops * alpha + bytes / beta``. Workers on
one node share its link, and what they exchange inside it costs nothing here. Across nodes,
all-reduces and all-gathers are hierarchical: each byte enters a node once, however many workers it
has. That is the best case for what the vote replaces. The all-to-all of a ``two_phase`` vote pays
for each worker. An all-reduce can begin while the backward pass still runs. A vote cannot: it waits
until the whole gradient is known to be finite.
``benchmarks.network.forecast_check`` holds the model against measurements.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from distlion_jax import ledger
from distlion_jax.ledger import Collective, WireCost

# Seconds a parameter. Beyond a fused Lion, a vote reads gradient and momentum once more, and the
# words: 9 bytes, from memory of 1 TB/s. Accelerators have 0.8 to 5 TB/s.
CODEC = 9 / 1e12
OVERLAP = 2 / 3  # of the compute is the backward pass, behind which an all-reduce can hide


class Link(NamedTuple):
    """The network as one node sees it."""

    bandwidth: float  # bits a second, each way, of the node's link, shared by its workers
    latency: float = 0.0  # seconds from one node to another, per message
    per_node: int = 1  # workers that share the link; inside a node the exchange is free


class Forecast(NamedTuple):
    """One step of every worker, in seconds."""

    cost: WireCost
    exchange: float  # of which `hidden` is spent while the worker computes
    hidden: float
    step: float  # compute, codec and what of the exchange is not hidden


def _number(name: str, value: Any, least: float = 0.0) -> None:
    number = np.asarray(value)
    if not (number.ndim == 0 and np.isfinite(number) and number >= least):
        raise ValueError(f"`{name}` must be a finite number of at least {least:g}; got {value!r}.")


def _check_link(link: Link, n: int) -> None:
    _number("link.bandwidth", link.bandwidth, 1)
    _number("link.latency", link.latency)
    if link.per_node < 1 or n % link.per_node:
        raise ValueError(
            f"`link.per_node` must divide the {n} workers, into whole nodes; got {link.per_node}."
        )


def _check(parameters: int, n: int, compute: float) -> None:
    _number("parameters", parameters, 1)
    _number("compute", compute)
    if n != int(n) or n < 2:
        raise ValueError(
            f"`n` (workers) must be a whole number of at least 2, or nothing is exchanged; got {n}."
        )


def _node_bytes(c: Collective, per_node: int) -> float:
    """Bytes that enter a node over its link, for all of its workers."""
    n, b = c.workers, c.operand_bytes
    nodes, others = n // per_node, n - per_node
    if c.op == "all-gather":
        return others * b
    if c.op == "all-to-all":
        return per_node * others * b / n
    if c.op == "all-reduce":
        return 2 * (nodes - 1) * b / nodes
    raise ValueError(f"`cost` has a collective of kind {c.op!r}, which this model does not know.")


def exchange_seconds(cost: WireCost, link: Link) -> float:
    """Seconds that the collectives of a step take on the link, one after the other.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = jax.ShapeDtypeStruct((1_000_000,), jnp.float32)
      >>> cost = ledger.full_precision_cost(params, 4)  # 6 MB
      >>> exchange_seconds(cost, Link(bandwidth=1e9))
      0.048
    """
    seconds = 0.0
    for c in cost.collectives:
        _check_link(link, c.workers)
        hops = (c.workers // link.per_node - 1) * (2 if c.op == "all-reduce" else 1)
        seconds += hops * link.latency + 8 * _node_bytes(c, link.per_node) / link.bandwidth
    return seconds


def _shapes(parameters: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((int(parameters),), np.float32)


def forecast_vote(
    parameters: int,
    n: int,
    link: Link,
    compute: float,
    *,
    codec: float = CODEC,
    newton_schulz: float = 0.0,
    **options: Any,
) -> Forecast:
    """A step with Distributed Lion, or with its orthogonalised ballots.

    Args:
      parameters: how many.
      n: workers.
      link: the network.
      compute: seconds of a step without exchange, as it is with ``optax.lion`` on one worker.
      codec: seconds a parameter that the vote's update takes longer than ``optax.lion``'s.
      newton_schulz: seconds a step that :func:`distlion_jax.distributed_muon` orthogonalises on
        each worker: :func:`distlion_jax.newton_schulz_flops` over the device's flops a second.
      **options: ``aggregation``, ``transport``, ``ties``, ... as in :func:`wire_cost`.

    Examples:
      >>> vote = forecast_vote(350_000_000, 32, Link(bandwidth=1e9), compute=0.4, ties="coin")
      >>> print(f"{vote.exchange:.2f} s of exchange, {vote.step:.2f} s a step")
      0.68 s of exchange, 1.09 s a step
    """
    _check(parameters, n, compute)
    _number("codec", codec)
    _number("newton_schulz", newton_schulz)
    cost = ledger.wire_cost(_shapes(parameters), int(n), **options)
    exchange = exchange_seconds(cost, link)
    step = compute + codec * parameters + newton_schulz + exchange
    return Forecast(cost, exchange, 0.0, step)


def forecast_all_reduce(
    parameters: int,
    n: int,
    link: Link,
    compute: float,
    *,
    dtype: str = "f32",
    overlap: float = OVERLAP,
) -> Forecast:
    """A step whose gradients are averaged by an all-reduce (a ring over the nodes).

    Args:
      parameters, n, link, compute: as in :func:`forecast_vote`.
      dtype: of the gradients on the wire: ``"f32"`` or ``"bf16"``.
      overlap: share of ``compute`` that the exchange can hide behind, in [0, 1]; 0 on CPU.

    Examples:
      >>> full = forecast_all_reduce(350_000_000, 32, Link(bandwidth=1e9), compute=0.4)
      >>> print(f"{full.exchange:.1f} s of exchange, {full.step:.1f} s a step")
      21.7 s of exchange, 21.8 s a step
    """
    _check(parameters, n, compute)
    if not 0 <= overlap <= 1:
        raise ValueError(f"`overlap` must lie in [0, 1]; got {overlap!r}.")
    if dtype not in ("f32", "bf16"):
        raise ValueError(f"`dtype` must be one of 'f32', 'bf16'; got {dtype!r}.")
    cost = ledger.full_precision_cost(_shapes(parameters), int(n), dtype)
    exchange = exchange_seconds(cost, link)
    hidden = min(exchange, overlap * compute)
    return Forecast(cost, exchange, hidden, compute + exchange - hidden)


def break_even(
    parameters: int,
    n: int,
    link: Link,
    compute: float,
    *,
    dtype: str = "f32",
    overlap: float = OVERLAP,
    codec: float = CODEC,
    newton_schulz: float = 0.0,
    **options: Any,
) -> float:
    """Bandwidth in bits a second up to which the vote's step is the quicker one.

    The link's own bandwidth is not read. Infinity: at any bandwidth. 0: there is no such bandwidth,
    as where the vote receives more bytes than the all-reduce (``all_gather`` among many workers).

    Examples:
      >>> bits = break_even(350_000_000, 32, Link(bandwidth=1e9), compute=0.4)
      >>> print(f"{bits / 1e9:.0f} Gbit/s")
      77 Gbit/s
    """

    def gain(exponent: float) -> float:
        at = link._replace(bandwidth=10.0**exponent)
        full = forecast_all_reduce(parameters, n, at, compute, dtype=dtype, overlap=overlap)
        vote = forecast_vote(
            parameters, n, at, compute, codec=codec, newton_schulz=newton_schulz, **options
        )
        return full.step - vote.step

    low, high = 2.0, 18.0
    if gain(low) <= 0:
        return 0.0
    if gain(high) > 0:
        return math.inf
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if gain(middle) > 0 else (low, middle)
    return 10.0**low
