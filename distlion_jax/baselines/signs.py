# SPDX-License-Identifier: Apache-2.0
"""signSGD, SIGNUM and SignMuon with a vote: Distributed Lion with other momentum weights."""

from typing import Any

import optax
from jax.typing import ArrayLike

from distlion_jax.lion import distributed_lion
from distlion_jax.muon import distributed_muon


def distributed_signum(
    learning_rate: optax.ScalarOrSchedule,
    beta: ArrayLike = 0.99,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""D-SIGNUM: workers vote with the signs of their momentum.

    .. math::

      m_i \leftarrow \beta m_i + (1 - \beta) g_i, \qquad \delta_i = \mathrm{sign}(m_i)

    which is :func:`distlion_jax.distributed_lion` with ``b1 = b2 = beta``: its ballot is cast on
    the blend that becomes the momentum.

    Differs from the paper:

    * Ties and blocks of 128 exact zeros do not move, and isolated zeros vote by a fair coin (or as
      ``options`` say). Published code votes +1.
    * Weight decay is decoupled.
    * beta is what Distributed Lion's authors compare with.

    Args:
      learning_rate: step size or schedule.
      beta: decay of the momentum, in [0, 1).
      weight_decay: strength or schedule, times the learning rate.
      **options: ``distributed_lion``'s: ``aggregation``, ``transport``, ``ties``, ...

    References:
      Bernstein et al, `signSGD: Compressed Optimisation for Non-Convex Problems
      <https://arxiv.org/abs/1802.04434>`_, 2018

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> tx = distributed_signum(0.1)
      >>> g = jnp.array([[1.0, -1.0], [2.0, -3.0], [-1.0, 0.5]])  # 3 workers
      >>> print(jax.vmap(lambda g: tx.update(g, tx.init(g), g)[0], axis_name="data")(g)[0])
      [-0.1  0.1]
    """
    return distributed_lion(learning_rate, beta, beta, weight_decay=weight_decay, **options)


def sign_muon(
    learning_rate: optax.ScalarOrSchedule,
    beta: ArrayLike = 0.95,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""SignMuon with a vote: workers vote with the signs of their orthogonalised momentum.

    .. math::

      m_i \leftarrow \beta m_i + (1 - \beta) g_i, \qquad
      \delta_i = \mathrm{sign}(\mathrm{NS}(m_i))

    which is :func:`distlion_jax.distributed_muon` with ``b1 = b2 = beta``. It differs from the
    paper as :func:`distributed_signum` does.

    Args:
      learning_rate: step size or schedule.
      beta: decay of the momentum, in [0, 1).
      weight_decay: strength or schedule, times the learning rate.
      **options: ``distributed_muon``'s: ``muon_weight_dimension_numbers``, ``ns_steps``, ...

    References:
      `SignMuon <https://arxiv.org/abs/2605.16311>`_, 2026

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> tx = sign_muon(0.1)
      >>> g = jnp.array([[[2.0, 1.0], [1.0, 2.0]]] * 3)  # of 3 workers; its U V^T is 1
      >>> print(jax.vmap(lambda g: tx.update(g, tx.init(g), g)[0], axis_name="data")(g)[0])
      [[-0.1  0.1]
       [ 0.1 -0.1]]
    """
    return distributed_muon(learning_rate, beta, beta, weight_decay=weight_decay, **options)


def sign_sgd(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""SignSGD with majority vote: ``delta_i = sign(g_i)``, and no momentum.

    This is :func:`distlion_jax.distributed_lion` with ``b1 = b2 = 0``. It differs from the paper as
    :func:`distributed_signum` does.

    Args:
      learning_rate: step size or schedule.
      weight_decay: strength or schedule, times the learning rate.
      **options: ``distributed_lion``'s.

    References:
      Bernstein et al, `signSGD with Majority Vote is Communication Efficient And Fault Tolerant
      <https://arxiv.org/abs/1810.05291>`_, 2019

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> tx = sign_sgd(0.1)
      >>> g = jnp.array([[1.0, -1.0], [2.0, -3.0], [-1.0, 0.5]])  # 3 workers
      >>> print(jax.vmap(lambda g: tx.update(g, tx.init(g), g)[0], axis_name="data")(g)[0])
      [-0.1  0.1]
    """
    return distributed_lion(learning_rate, 0.0, 0.0, weight_decay=weight_decay, **options)
