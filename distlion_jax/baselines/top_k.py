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
from jax.typing import ArrayLike

from distlion_jax import checks, wire
from distlion_jax.baselines.compress import (
    Gathered,
    Leaves,
    Round,
    as_updates,
    enter,
    keep,
    to_floats,
    to_words,
)
from distlion_jax.rules import AxisName, check_fraction, known
from distlion_jax.words import Layout


def _check_density(name: str, value: Any) -> None:
    number = known(value)
    if number is None or number.ndim or not 0 < number <= 1:
        raise ValueError(f"`{name}` must be a static number in (0, 1]; got {value!r}.")


@dataclasses.dataclass(frozen=True)
class TopK(Gathered):
    r"""The coordinates of largest absolute value of every leaf, the rest kept for later.

    With error feedback (:func:`compressed_average`) this is Gradient Dropping. Sent as the values
    in float32 and their places in uint32: 64 bits for each of ``ceil(density * size)`` coordinates
    a leaf, at least one. Workers choose different places, so that messages are gathered.

    Differs from Gradient Dropping: the k largest are found exactly, leaf by leaf, where the paper
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

    def encode(self, leaves: Leaves, layout: Layout, round_: Round) -> list[Array]:
        """Values, then places."""
        del round_
        flat = [x.reshape(-1) for x in leaves]
        pairs = zip(flat, self._sent(layout), strict=True)
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
      clip_norm: norm, of all leaves together, that the mean of n independent gradients should not
        exceed: one worker's is sqrt(n) times as long. (The paper divides gradients by n first, and
        its threshold by sqrt(n).) None: not clipped.
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
    checks.check_axis_name(axis_name)

    def init_fn(params: optax.Params) -> Any:
        checks.check_params(params, jnp.float32, 0.0)
        zeros = [optax.tree.zeros_like(params, dtype=jnp.float32) for _ in range(2)]
        return DeepGradientCompressionState(jnp.zeros([], jnp.int32), *zeros)  # two, to be donated

    def clipped(g: Any) -> Any:
        if clip_norm is None:
            return g
        most = clip_norm * wire.size(axis_name) ** 0.5
        norm = optax.tree.norm(g)
        factor = jnp.minimum(1.0, most / jnp.maximum(norm, 1e-30))
        factor = jnp.where(jnp.isfinite(norm), factor, jnp.nan)  # inf would clip it to zeros
        return jax.tree.map(lambda x: x * factor, g)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        participating: ArrayLike = True,
        weight: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        wire.size(axis_name)  # says so where the axis is not bound
        checks.check_update(updates, state.momentum, axis_name)
        g = clipped(jax.tree.map(lambda g: g.astype(jnp.float32), updates))
        u = jax.tree.map(lambda u, g: momentum * u + g, state.momentum, g)
        v = jax.tree.map(jnp.add, state.accumulated, u)
        round_ = enter(axis_name, state.count, updates, v, participating, weight)
        leaves, treedef = jax.tree.flatten(v)
        branches = [
            lambda leaves, d=d: TopK(d).mean(leaves, (), round_)[:2]  # the same on all workers
            for d in stages
        ]
        stage = jnp.minimum(state.count // warmup_steps, len(warmup))
        mean, sent = jax.lax.switch(stage, branches, leaves)
        sent = treedef.unflatten(sent)
        rest = lambda tree: jax.tree.map(lambda x, s: jnp.where(s == 0, x, 0), tree, sent)  # noqa: E731
        return as_updates(mean, updates), DeepGradientCompressionState(
            jnp.asarray(optax.safe_increment(state.count)),
            keep(round_, rest(u), state.momentum),
            keep(round_, rest(v), state.accumulated),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
