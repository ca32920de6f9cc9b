# SPDX-License-Identifier: Apache-2.0
"""What the vote replaces: an ordinary optimizer on the workers' full-precision mean gradient."""

import optax
from jax.typing import ArrayLike, DTypeLike

from distlion_jax._rules import AxisName
from distlion_jax.average import average_gradients
from distlion_jax.exchanges import replicated


def full_precision(
    tx: optax.GradientTransformation,
    axis_name: AxisName = "data",
    *,
    wire_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An ordinary optimizer, data-parallel: ``tx`` on the mean gradient, its state replicated.

    Args:
      tx: the optimizer, as ``optax.adamw(1e-3)``.
      axis_name: mapped axis, or axes, that the workers lie on.
      wire_dtype: what gradients are summed and sent in; None: float32.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> tx = full_precision(optax.sgd(1.0))
      >>> g = jnp.array([[1.0], [2.0], [6.0]])  # of 3 workers
      >>> print(jax.vmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="data")(g)[0])
      [-3.]
    """
    return optax.chain(average_gradients(axis_name, wire_dtype=wire_dtype), replicated(tx))


def full_precision_lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    *,
    axis_name: AxisName = "data",
    wire_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lion on the mean gradient: the yardstick that Distributed Lion is measured by.

    Args:
      learning_rate, b1, b2, weight_decay: as in ``optax.lion``.
      axis_name, wire_dtype: as in :func:`full_precision`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> tx = full_precision_lion(0.5, weight_decay=0.0)
      >>> g = jnp.array([[1.0], [1.0], [-5.0]])  # two workers of three say +, the mean says -
      >>> print(jax.vmap(lambda g: tx.update(g, tx.init(g), g)[0], axis_name="data")(g)[0])
      [0.5]
    """
    lion = optax.lion(learning_rate, b1, b2, weight_decay=weight_decay)
    return full_precision(lion, axis_name, wire_dtype=wire_dtype)
