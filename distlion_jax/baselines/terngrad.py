# SPDX-License-Identifier: Apache-2.0
"""TernGrad: stochastic ternary gradients, which a vote can count."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from distlion_jax._rules import Rules, Transport, concrete_value
from distlion_jax._vote import coins, transports, verdict, wire, words
from distlion_jax._vote.ballot import Ballot
from distlion_jax._vote.turnout import Round
from distlion_jax._vote.words import Layout
from distlion_jax.baselines.compress import Averaged, Compressor, Leaves, split_scale
from distlion_jax.ledger import Collective, WireCost, layout_of


@dataclasses.dataclass(frozen=True)
class TernGrad(Compressor):
    r"""Ternary gradients: each coordinate is -1, 0 or +1 times a scale that all workers share.

    A leaf g is first clipped to ``clip`` standard deviations about zero. Its scale is the largest
    absolute value over all workers (the paper's scaler sharing), and

    .. math::

      b_j \sim \mathrm{Bernoulli}(|g_j| / s), \qquad t_j = s \, \mathrm{sign}(g_j) \, b_j

    which is the clipped g_j on average. With one scale for all, the sum over workers is a count. So
    the engine of Distributed Lion averages the ternary ballots: 2 bits up,
    ``ceil(log2(2n+1))`` bits down. The cost scales like that of an all-reduce.

    Differs from the paper:

    * Every layer is made ternary; the paper leaves the last one alone.
    * The random numbers are a hash of (round, coordinate, worker).
    * Deviations are from zero, not from the mean. A leaf whose numbers are nearly the same would
      otherwise be clipped to nothing.

    Args:
      clip: standard deviations about zero that a leaf is clipped to; None: not clipped.
      transport: as in :func:`distlion_jax.distributed_lion`.

    References:
      Wen et al, `TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep Learning
      <https://arxiv.org/abs/1705.07878>`_, 2017

    Examples:
      >>> import jax
      >>> cost = TernGrad().cost({"w": jax.ShapeDtypeStruct((4096, 4096), "float32")}, n=8)
      >>> round(cost.bits_per_parameter, 2)
      6.13
    """

    clip: float | None = 2.5
    transport: Transport = "auto"  # type: ignore[misc]
    feedback = False

    def __post_init__(self) -> None:
        clip = None if self.clip is None else concrete_value(self.clip)
        if clip is not None and not (clip.ndim == 0 and 0 < clip < np.inf):
            raise ValueError(f"`clip` must be a finite number above 0, or None; got {self.clip!r}.")
        self._rules()

    def _rules(self) -> Rules:
        return Rules("average", self.transport, ballot="ternary", health="off")

    def _clipped(self, x: Array) -> Array:
        if self.clip is None:
            return x
        unit, scaled = split_scale(x)
        most = self.clip * jnp.sqrt(jnp.mean(scaled * scaled)) * unit
        return jnp.clip(x, -most, most)

    def mean(self, leaves: Leaves, memory: Any, context: Round) -> Averaged:
        """Agrees on scales, casts ternary ballots, and holds a vote on them."""
        layout = context.layout
        leaves = [self._clipped(x) for x in leaves]
        mine = jnp.stack([jnp.max(jnp.abs(x), initial=0.0) for x in leaves])
        scales = wire.largest(jnp.where(context.weight > 0, mine, 0.0), context.axis)

        def code(x: Array, threshold: Array) -> Array:
            lives = jnp.abs(x) > threshold  # never for 0, as thresholds are at least 0
            positive = (lives & (x > 0)).astype(jnp.uint16)
            return positive | (lives.astype(jnp.uint16) << np.uint16(8))

        uniforms = coins.uniforms(context.number, context.worker + 1, [x.shape for x in leaves])
        thresholds = [u * scale for u, scale in zip(uniforms, scales, strict=True)]
        votes, present = words.pack(layout, code, leaves, thresholds)
        present = jnp.where(context.weight > 0, present, np.uint32(0))
        ballot = Ballot(votes, present, context.weight)
        rules = self._rules().for_workers(context.workers)
        context = dataclasses.replace(context, rules=rules)
        decided = transports.run_round(ballot, context)
        counts = verdict.decode(decided, context, [jnp.float32] * len(leaves))
        nobody = jnp.where(decided.weight > 0, 0.0, jnp.nan)
        mean = [count * scale + nobody for count, scale in zip(counts, scales, strict=True)]
        return Averaged(mean, leaves, memory, decided.voters)

    def collectives(self, layout: Layout, n: int) -> tuple[Collective, ...]:
        """The largest absolute value of every leaf, and a vote."""
        scales = Collective("all-reduce", "f32", len(layout.leaves), n)
        return (scales, *self._vote(layout, n).collectives)

    def cost(self, params: Any, n: int) -> WireCost:
        """Exact wire cost of one round; ``auto`` is resolved."""
        transport = self._vote(layout_of(params), n).transport
        return super().cost(params, n)._replace(transport=transport)

    def _vote(self, layout: Layout, n: int) -> WireCost:
        return transports.cost(layout, n, self._rules())
