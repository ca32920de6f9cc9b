# SPDX-License-Identifier: Apache-2.0
"""What the vote replaces: an ordinary optimizer on the workers' full-precision mean gradient."""

from typing import Any

import jax
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from distlion_jax._rules import AxisName
from distlion_jax._vote import wire
from distlion_jax.average import average_gradients
from distlion_jax.exchanges import exchange, replicated


def _plain_mean(
    axis_name: AxisName, wire_dtype: DTypeLike | None
) -> optax.GradientTransformationExtraArgs:
    """The mean as ``jax.lax.pmean`` takes it: one sick worker makes it NaN for all."""

    def mean(updates: Any, params: Any) -> Any:
        del params

        def one(x: Array) -> Array:
            total = wire.total(x.astype(wire_dtype or x.dtype), axis_name)
            return (total / wire.size(axis_name)).astype(x.dtype)

        return jax.tree.map(one, updates)

    return exchange(optax.stateless(mean))


def full_precision(
    tx: optax.GradientTransformation,
    axis_name: AxisName = "data",
    *,
    wire_dtype: DTypeLike | None = None,
    guarded: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """An ordinary optimizer, data-parallel: ``tx`` on the mean gradient, its state replicated.

    Args:
      tx: the optimizer, as ``optax.adamw(1e-3)``.
      axis_name: mapped axis, or axes, that the workers lie on.
      wire_dtype: what gradients are summed and sent in; None: float32, or the gradients' own dtype
        where it is not guarded.
      guarded: whether a worker with a gradient that is not finite is left out of the mean, as of a
        vote. That takes two more passes over the gradients. False: the quickest mean there is, for
        measurements of speed; one NaN makes all parameters NaN.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> tx = full_precision(optax.sgd(1.0))
      >>> g = jnp.array([[1.0], [2.0], [6.0]])  # of 3 workers
      >>> print(jax.vmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="data")(g)[0])
      [-3.]
    """
    if guarded:
        mean = average_gradients(axis_name, wire_dtype=wire_dtype)
    else:
        mean = _plain_mean(axis_name, wire_dtype)
    return optax.chain(mean, replicated(tx))


def full_precision_lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    *,
    axis_name: AxisName = "data",
    wire_dtype: DTypeLike | None = None,
    guarded: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Lion on the mean gradient: the yardstick that Distributed Lion is measured by.

    Args:
      learning_rate, b1, b2, weight_decay: as in ``optax.lion``.
      axis_name, wire_dtype, guarded: as in :func:`full_precision`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> tx = full_precision_lion(0.5, weight_decay=0.0)
      >>> g = jnp.array([[1.0], [1.0], [-5.0]])  # two workers of three say +, the mean says -
      >>> print(jax.vmap(lambda g: tx.update(g, tx.init(g), g)[0], axis_name="data")(g)[0])
      [0.5]
    """
    lion = optax.lion(learning_rate, b1, b2, weight_decay=weight_decay)
    return full_precision(lion, axis_name, wire_dtype=wire_dtype, guarded=guarded)
