# SPDX-License-Identifier: Apache-2.0
"""Only the largest coordinates: Gradient Dropping, and Deep Gradient Compression on top of it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from distlion_jax import _checks as checks
from distlion_jax._rounds import in_rounds
from distlion_jax._rules import AxisName, check_fraction, concrete_value
from distlion_jax._vote import wire
from distlion_jax._vote.frames import to_floats, to_words
from distlion_jax._vote.stamp import blank
from distlion_jax._vote.turnout import MeanHealth, Round, as_held, finite_norm, no_mean, nothing
from distlion_jax._vote.words import Layout
from distlion_jax.baselines.compress import (
    Averaged,
    Gathered,
    Leaves,
    as_updates,
    keep_unless_absent,
)
from distlion_jax.exchanges import Roles


def _check_density(name: str, value: Any) -> None:
    number = concrete_value(value)
    if number is None or number.ndim or not 0 < number <= 1:
        raise ValueError(f"`{name}` must be a static number in (0, 1]; got {value!r}.")


@dataclasses.dataclass(frozen=True)
class TopK(Gathered):
    r"""The coordinates of largest absolute value of every leaf, the rest kept for later.

    With error feedback (:func:`compressed_average`) this is Gradient Dropping. A message holds the
    values in float32 and their places in uint32: 64 bits for each of ``ceil(density * size)``
    coordinates a leaf, at least one. Workers choose different places, so messages are gathered.

    Differs from Gradient Dropping: the k largest are found exactly, leaf by leaf. The paper
    estimates one threshold from a sample.

    Args:
      density: share of coordinates that are sent, in (0, 1].

    References:
      Aji and Heafield, `Sparse Communication for Distributed Gradient Descent
      <https://arxiv.org/abs/1704.05021>`_, 2017

    Examples:
      >>> import jax
      >>> cost = TopK(0.01).cost({"w": jax.ShapeDtypeStruct((4096, 4096), "float32")}, n=2)
      >>> round(cost.bits_per_parameter, 2)
      0.64
    """

    density: float = 0.01
    feedback = True

    def __post_init__(self) -> None:
        _check_density("density", self.density)

    def _sent(self, layout: Layout) -> list[int]:
        sizes = [leaf.size for leaf in layout.leaves]
        # 0.07 * 100 is 7.000000000000001; of an empty leaf nothing is sent
        return [max(min(1, x), math.ceil(round(self.density * x, 6))) for x in sizes]

    def words(self, layout: Layout) -> int:
        """A value and a place for each coordinate that is sent."""
        return 2 * sum(self._sent(layout))

    def encode(self, leaves: Leaves, context: Round) -> list[Array]:
        """Values, then places."""
        flat = [x.reshape(-1) for x in leaves]
        pairs = zip(flat, self._sent(context.layout), strict=True)
        places = [jax.lax.top_k(jnp.abs(x), k)[1] for x, k in pairs]
        values = [to_words(x[at]) for x, at in zip(flat, places, strict=True)]
        return [*values, *(at.astype(jnp.uint32) for at in places)]

    def decode(self, message: Array, layout: Layout) -> Leaves:
        """Zeros, but for the places that were sent."""
        values, places = jnp.split(message, 2)
        sizes = self._sent(layout)
        rows = zip(
            layout.leaves,
            wire.split(to_floats(values), sizes),
            wire.split(places, sizes),
            strict=True,
        )
        return [
            jnp.zeros(leaf.size, jnp.float32).at[at].set(x).reshape(leaf.shape)
            for leaf, x, at in rows
        ]


class DeepGradientCompressionState(NamedTuple):
    """State of :func:`deep_gradient_compression`; one per worker."""

    count: Array  # int32[]; the same on all workers: rounds so far
    momentum: Any  # float32, the parameters' shapes; differs by worker
    accumulated: Any  # float32, likewise: what was not sent yet
    health: MeanHealth  # the last round's
    stamp: Array  # int32[2]; differs by worker: index and number of workers, since its first round
    roles = Roles(
        exchange=True,
        own=("momentum", "accumulated", "stamp"),
        shared=("count",),
        like_params=("momentum", "accumulated"),
        shares_itself=True,
    )


def deep_gradient_compression(
    density: float = 0.001,
    momentum: float = 0.9,
    warmup: Sequence[float] = (),
    warmup_steps: int = 1,
    clip_norm: float | None = None,
    axis_name: AxisName = "data",
) -> optax.GradientTransformationExtraArgs:
    r"""Deep Gradient Compression: Top-K with momentum correction and masking, clipping, warm-up.

    Each worker clips its gradient to a norm of ``clip_norm * sqrt(n)``, and then

    .. math::

      u_i \leftarrow m u_i + g_i, \qquad v_i \leftarrow v_i + u_i

    sends the largest coordinates of v_i, and sets them to 0 in v_i and u_i. The mean of what is
    sent is the update of SGD *with* momentum: chain ``optax.sgd(learning_rate)`` after it, without
    any of its own.

    Differs from the paper: the k largest are found exactly, leaf by leaf, without sampling; the
    momentum is not Nesterov's.

    Args:
      density: share of coordinates that are sent in the end; the paper's 0.1 %.
      momentum: m, in [0, 1).
      warmup: densities of the stages before that; the paper's: (0.25, 0.0625, 0.015625, 0.004).
      warmup_steps: steps of a stage.
      clip_norm: norm of all leaves together that the mean of n independent gradients should not
        exceed. One worker's gradient is sqrt(n) times as long, and is clipped there. (The paper
        divides gradients by n first, and its threshold by sqrt(n).) None: not clipped.
      axis_name: mapped axis, or axes, that the workers lie on.

    References:
      Lin et al, `Deep Gradient Compression: Reducing the Communication Bandwidth for Distributed
      Training <https://arxiv.org/abs/1712.01887>`_, 2018

    Examples:
      >>> tx = deep_gradient_compression(density=0.5, momentum=0.5)
      >>> g = jnp.array([[4.0, 1.0], [1.0, -2.0]])  # two workers, who send a number each
      >>> print(jax.vmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="data")(g)[0])
      [ 2. -1.]
    """
    stages = [*warmup, density]
    for value in stages:
        _check_density("density", value)
    check_fraction("momentum", momentum)
    if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 1:
        raise ValueError(f"`warmup_steps` must be an int of at least 1; got {warmup_steps!r}.")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"`clip_norm` must be a number above 0, or None; got {clip_norm!r}.")

    def init(params: optax.Params) -> Any:
        checks.check_params(params, jnp.float32, 0.0)
        # Two trees and not one twice: buffers that are donated must differ.
        u, v = (optax.tree.zeros_like(params, dtype=jnp.float32) for _ in range(2))
        count = jnp.zeros([], jnp.int32)
        return DeepGradientCompressionState(count, u, v, no_mean(), blank())

    def clipped(g: Any) -> Any:
        if clip_norm is None:
            return g
        most = clip_norm * wire.size(axis_name) ** 0.5
        norm = optax.tree.norm(g)
        factor = jnp.minimum(1.0, most / jnp.maximum(norm, 1e-30))
        factor = jnp.where(jnp.isfinite(norm), factor, jnp.nan)  # inf would clip it to zeros
        return jax.tree.map(lambda x: x * factor, g)

    def update(
        context: Round, updates: optax.Updates, state: Any, params: optax.Params | None
    ) -> tuple[optax.Updates, Any]:
        del params
        checks.check_momentum(updates, state.momentum)
        if not context.layout.size:  # nothing to send, as for a label that no leaf has
            return nothing(updates), state
        g = clipped(jax.tree.map(lambda g: g.astype(jnp.float32), updates))
        u = jax.tree.map(lambda u, g: momentum * u + g, state.momentum, g)
        v = jax.tree.map(jnp.add, state.accumulated, u)
        context = context.only_if(finite_norm(v))
        leaves, treedef = jax.tree.flatten(v)
        branches = [
            lambda leaves, d=d: TopK(d).mean(leaves, (), context)  # the same on all workers
            for d in stages
        ]
        number = wire.from_first(state.count, axis_name)
        stage = jnp.minimum(number // warmup_steps, len(warmup))
        out: Averaged = jax.lax.switch(stage, branches, leaves)
        sent = treedef.unflatten(out.sent)
        rest = lambda tree: jax.tree.map(lambda x, s: jnp.where(s == 0, x, 0), tree, sent)  # noqa: E731
        health = MeanHealth(context.takes_part, out.workers)
        return as_updates(out.mean, updates), state._replace(
            momentum=keep_unless_absent(context, rest(u), state.momentum),
            accumulated=keep_unless_absent(context, rest(v), state.accumulated),
            health=as_held(health, state.health, axis_name),
        )

    return in_rounds(init, update, axis_name, None, split="never")
