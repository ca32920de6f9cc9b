# SPDX-License-Identifier: Apache-2.0
"""What compare.py compares: each method's transformation, bytes, and where its search begins.

A transformation is made of a learning rate, a weight decay and, where they are searched, betas. All
may be traced: one compiled program serves the whole search.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax

import distlion_jax as dl
from benchmarks.quality import trials
from benchmarks.quality.constant_votes import constant_vote
from benchmarks.tasks.models import hidden
from distlion_jax.baselines import (
    QSGD,
    Compressor,
    EFSign,
    PowerSGD,
    TernGrad,
    TopK,
    compressed_average,
    deep_gradient_compression,
    distributed_signum,
    full_precision,
    sign_muon,
    sign_sgd,
)

Tx = optax.GradientTransformationExtraArgs
DENSITY = 0.04  # of GradDrop and DGC, as in the paper's comparison
WARMUP = 0.05  # of the steps: up to the peak; then down along a cosine


class Method(NamedTuple):
    """One method of the comparison."""

    make: Callable[..., Tx]  # of learning rate (a schedule), weight decay, steps, and any betas
    cost: Callable[[Any, int], dl.WireCost]  # of parameters and workers
    learning_rate: float  # where its search begins
    weight_decay: float
    betas: tuple[float, ...] | None = None  # likewise; None: its published ones, not searched


def warmup_cosine(peak: Any, steps: int) -> Callable[[Any], Any]:
    """A schedule; the peak may be traced."""
    warmup = max(1, round(WARMUP * steps))

    def rate(count: Any) -> Any:
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * count / steps))
        return peak * jnp.minimum((count + 1) / warmup, cosine)

    return rate


def _decoupled(direction: optax.GradientTransformation, rate: Any, decay: Any) -> Any:
    return optax.chain(
        direction, optax.add_decayed_weights(decay), optax.scale_by_learning_rate(rate)
    )


class Optimizer(NamedTuple):
    """What follows an average of gradients."""

    direction: Callable[..., optax.GradientTransformation]  # of betas; of none, the published
    learning_rate: float  # where searches begin
    weight_decay: float
    betas: tuple[float, ...] | None = None


ADAMW = Optimizer(optax.scale_by_adam, 3e-3, 0.03, (0.8, 0.95))
SGDM = Optimizer(lambda: optax.trace(0.9), 3e-2, 1e-3)
SGD = Optimizer(optax.identity, 0.3, 1e-3)
MUON = (0.95, 0.95)  # beta of the momentum, and Adam's b2
MUON_ADAM_B1 = 0.8


def _after(average: Callable[[int], Any], optimizer: Optimizer, cost: Any) -> Method:
    """An ordinary optimizer on an average over the workers."""

    def make(rate: Any, decay: Any, steps: int) -> Any:
        after = _decoupled(optimizer.direction(), rate, decay)
        return optax.chain(average(steps), dl.replicated(after))

    return Method(make, cost, *optimizer[1:3])


def _dense(optimizer: Optimizer, dtype: str = "f32") -> Method:
    """An ordinary optimizer on the full-precision mean."""
    wire_dtype = {"f32": None, "bf16": jnp.bfloat16}[dtype]

    def make(rate: Any, decay: Any, steps: int, *betas: Any) -> Any:
        del steps
        after = _decoupled(optimizer.direction(*betas), rate, decay)
        return full_precision(after, wire_dtype=wire_dtype)

    cost = lambda params, n: dl.full_precision_cost(params, n, dtype)  # noqa: E731
    return Method(make, cost, *optimizer[1:])


def _muon(rate: Any, decay: Any, steps: int, beta: Any = MUON[0], adam_b2: Any = MUON[1]) -> Any:
    """Muon on the full-precision mean, with updates as long as AdamW's: one learning rate for both.

    The scale is that of Liu et al, "Muon is Scalable for LLM Training", 2025.
    """
    del steps
    muon = optax.contrib.muon(
        rate, beta=beta, weight_decay=decay, consistent_rms=0.2, adam_b1=MUON_ADAM_B1,
        adam_b2=adam_b2, adam_weight_decay=decay, muon_weight_dimension_numbers=hidden,
    )  # fmt: skip
    return full_precision(muon)


def _compressed(compressor: Compressor, optimizer: Optimizer) -> Method:
    return _after(lambda _: compressed_average(compressor), optimizer, compressor.cost)


# Four stages of falling density in the first fifth of the steps, as DGC's authors do by epochs.
DGC_STAGES, DGC_SHARE = (0.25, 0.16, 0.1, 0.0625), 0.2


def _dgc(steps: int) -> Any:
    each = max(1, round(DGC_SHARE * steps / len(DGC_STAGES)))
    return deep_gradient_compression(DENSITY, 0.9, DGC_STAGES, each, clip_norm=1.0)


def _dgc_cost(params: Any, n: int) -> dl.WireCost:
    """Of the mean step: a fifth of them send more (exact where 20 divides the steps)."""
    early = sum(DGC_STAGES) / len(DGC_STAGES)
    return TopK(DGC_SHARE * early + (1 - DGC_SHARE) * DENSITY).cost(params, n)


def _vote(
    make: Callable[..., Any],
    rate: float,
    decay: float,
    betas: tuple[float, ...] | None = None,
    **options: Any,
) -> Method:
    """A vote; simulated workers gather ballots, and the cost is of the transport with fewest bytes.

    All transports give the same, bit for bit. The cost has the health figures, a step's default.
    """

    def build(schedule: Any, weight_decay: Any, steps: int, *betas: Any) -> Any:
        del steps
        rest = {"transport": "all_gather", "health": "off"} | options
        return make(schedule, *betas, weight_decay=weight_decay, **rest)

    cost = lambda params, n: dl.wire_cost(params, n, **options)  # noqa: E731
    return Method(build, cost, rate, decay, betas)


def _orthogonal(make: Callable[..., Any] = dl.distributed_muon, **chosen: Any) -> Method:
    """A vote of orthogonalised ballots; ``chosen`` are options of the transformation alone."""
    betas = chosen.pop("betas", (0.8, 0.9))
    vote = {name: chosen.pop(name) for name in ("ties", "aggregation", "noise") if name in chosen}
    tx = functools.partial(make, muon_weight_dimension_numbers=hidden, **chosen)
    return _vote(tx, 8e-3, 0.4, betas, **vote)


def _constant(zero: int, tie: int, b1: float = 0.9, b2: float = 0.99) -> Method:
    """A vote as others do it; the cost is of bits, which some of them spread over bytes."""

    def build(schedule: Any, weight_decay: Any, steps: int) -> Any:
        del steps
        return constant_vote(schedule, b1, b2, weight_decay, zero=zero, tie=tie)

    ballot = "ternary" if zero == 0 else "binary"  # zeros that abstain take a second bit
    cost = lambda params, n: dl.wire_cost(params, n, ties="coin", ballot=ballot)  # noqa: E731
    return Method(build, cost, 1e-3, 0.1)


def _synchronized(vote: Method, every: int) -> Method:
    """A vote whose momenta are averaged now and then; bits of the average are spread out."""

    def build(schedule: Any, weight_decay: Any, steps: int, *betas: Any) -> Any:
        return dl.synchronize_momentum(vote.make(schedule, weight_decay, steps, *betas), every)

    def cost(params: Any, n: int) -> dl.WireCost:
        dense = dl.full_precision_cost(params, n).collectives[0]
        spread = dense._replace(elements=dense.elements // every)
        of_vote = vote.cost(params, n)
        return of_vote._replace(collectives=(*of_vote.collectives, spread))

    return vote._replace(make=build, cost=cost)


def lion_family(b1: float = 0.9, b2: float = 0.99) -> dict[str, Method]:
    """Lion and its votes, ties broken in three ways."""
    near = (0.9, 0.98)  # where a search of betas begins

    def vote(rate: Any, b1: Any = b1, b2: Any = b2, **options: Any) -> Any:
        return dl.distributed_lion(rate, b1, b2, **options)

    def lion(b1: Any = b1, b2: Any = b2) -> Any:
        return optax.scale_by_lion(b1, b2)

    return {
        "Lion": _dense(Optimizer(lion, 1e-3, 0.1, near)),
        "D-Lion majority": _vote(vote, 1e-3, 0.1, near),
        "D-Lion majority, coin": _vote(vote, 1e-3, 0.1, near, ties="coin"),
        "D-Lion majority, ties -1": _constant(0, -1, b1, b2),
        "D-Lion average": _vote(vote, 2e-3, 0.05, near, aggregation="average"),
    }


LION = lion_family()
METHODS: dict[str, Method] = {  # rows.py has the same names in the same order, for the tables
    "D-Muon majority": _orthogonal(),
    "D-Lion majority": LION["D-Lion majority"],
    "D-Lion average": LION["D-Lion average"],
    "D-SIGNUM majority": _vote(distributed_signum, 1e-3, 0.1),
    "D-SIGNUM average": _vote(distributed_signum, 2e-3, 0.05, aggregation="average"),
    "signSGD majority": _vote(sign_sgd, 1e-3, 0.1),
    "Lion": LION["Lion"],
    "AdamW": _dense(ADAMW),
    "Muon": Method(_muon, dl.full_precision_cost, 1e-2, 0.1, MUON),
    "SGD momentum": _dense(SGDM),
    "EF-signSGD": _compressed(EFSign(), SGD),
    "QSGD": _compressed(QSGD(), SGDM),
    "TernGrad": _compressed(TernGrad(), SGDM),
    "GradDrop": _compressed(TopK(DENSITY), SGD),
    "DGC": _after(_dgc, SGD, _dgc_cost),
    "PowerSGD": _compressed(PowerSGD(2), SGDM),
    # The same compressors before the optimizer that transformers are trained with.
    "QSGD + AdamW": _compressed(QSGD(), ADAMW),
    "TernGrad + AdamW": _compressed(TernGrad(), ADAMW),
    "PowerSGD + AdamW": _compressed(PowerSGD(2), ADAMW),
    # Other ranks and wires, which are not in the default comparison.
    "PowerSGD rank 1": _compressed(PowerSGD(1), SGDM),
    "PowerSGD rank 1 + AdamW": _compressed(PowerSGD(1), ADAMW),
    "Lion bf16": _dense(Optimizer(optax.scale_by_lion, 1e-3, 0.1), "bf16"),
    "AdamW bf16": _dense(ADAMW, "bf16"),
    "SGD momentum bf16": _dense(SGDM, "bf16"),
}
DEFAULT = tuple(name for name in METHODS if "bf16" not in name and "rank" not in name)
# What zeros and ties do elsewhere.
METHODS |= {
    "D-Lion majority, coin": LION["D-Lion majority, coin"],
    "D-Lion majority, ternary": _vote(dl.distributed_lion, 1e-3, 0.1, ballot="ternary"),
    "D-Lion majority, ties -1": LION["D-Lion majority, ties -1"],
    "D-Lion majority, ties and zeros -1": _constant(-1, -1),
    "D-Lion majority, ties and zeros +1": _constant(1, 1),
}


def _smoothed_vote(rate: Any, weight_decay: Any, **options: Any) -> Any:
    """A majority vote, and momentum on its verdicts: their moving average, the same everywhere."""
    vote = dl.scale_by_distributed_lion(**options)
    return _decoupled(optax.chain(vote, dl.replicated(optax.ema(0.9))), rate, weight_decay)


METHODS["D-Lion majority, vote EMA 0.9"] = _vote(_smoothed_vote, 2e-3, 0.05)
# For workers with unlike data.
_NOISY = _vote(dl.distributed_lion, 3e-3, 0.1, noise=2.0)
METHODS |= {
    "D-Lion majority, noise 2": _NOISY,
    "D-Lion majority, sync 16": _synchronized(METHODS["D-Lion majority"], 16),
    "D-Lion majority, sync 64": _synchronized(METHODS["D-Lion majority"], 64),
    "D-Lion majority, noise 2, sync 16": _synchronized(_NOISY, 16),
}
# Variants of orthogonalised ballots.
METHODS |= {
    "D-Muon majority, coin": _orthogonal(ties="coin"),
    "D-Muon average": _orthogonal(aggregation="average"),
    "D-SignMuon majority": _orthogonal(sign_muon, betas=(0.9,)),
    "D-Muon majority, 3 steps": _orthogonal(ns_steps=3),
    "D-Muon majority, bfloat16": _orthogonal(ns_dtype=jnp.bfloat16),
    "D-Muon majority, period 2": _orthogonal(period=2),
    "D-Muon majority, period 4": _orthogonal(period=4),
    "D-Muon majority, sync 16": _synchronized(METHODS["D-Muon majority"], 16),
    "D-Muon majority, noise 2": _orthogonal(noise=2.0),
}


def _tried(
    make: Callable[..., Any],
    rate: float,
    decay: float,
    betas: tuple[float, float],
    ties: Literal["zero", "coin"] = "zero",
) -> Method:
    """A trial; the cost is of the bits that it would send."""

    def build(schedule: Any, weight_decay: Any, steps: int, *betas: Any) -> Any:
        del steps
        return make(schedule, *betas, weight_decay=weight_decay, chosen=hidden)

    cost = lambda params, n: dl.wire_cost(params, n, ties=ties)  # noqa: E731
    return Method(build, cost, rate, decay, betas)


METHODS |= {
    "D-Muon majority, cautious": _tried(trials.cautious, 8e-3, 0.4, (0.8, 0.9)),
    "D-Muon majority, error feedback": _tried(trials.fed_back, 8e-3, 0.4, (0.8, 0.9)),
    "D-Muon majority, blocks": _tried(trials.in_blocks, 8e-3, 0.4, (0.8, 0.9)),
    # Its owners send one bit, whatever the ballots' mean.
    "D-Muon owner": _tried(trials.owner_momentum, 3.2e-2, 0.2, trials.BETAS, "coin"),
}
