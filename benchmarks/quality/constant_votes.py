# SPDX-License-Identifier: Apache-2.0
"""The majority vote with constants for zeros and ties, as public implementations do it.

Only to be compared with: it sums dense votes, where those implementations send bits. A worker's
exact zero votes ``zero``, and a coordinate whose votes cancel, or that has none, moves by ``tie``:
both -1 in the PyTorch code of kyleliang919, both +1 in that of signSGD with majority vote.
"""

import jax
import jax.numpy as jnp
import optax


def constant_vote(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 1e-3,
    *,
    zero: int,
    tie: int,
    axis_name: str = "data",
) -> optax.GradientTransformationExtraArgs:
    """Distributed Lion but for ``zero`` and ``tie``, each -1, 0 or +1 (0, 0: the paper's)."""

    def init(params: optax.Params) -> optax.ScaleByLionState:
        return optax.ScaleByLionState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params))

    def update(updates, state, params=None, **extra):  # type: ignore[no-untyped-def]
        del params, extra

        def verdict(g: jax.Array, m: jax.Array) -> jax.Array:
            blend = (1 - b1) * g + b1 * m
            total = jax.lax.psum(jnp.where(blend == 0, zero, jnp.sign(blend)), axis_name)
            return jnp.where(total == 0, tie, jnp.sign(total))

        direction = jax.tree.map(verdict, updates, state.mu)
        mu = optax.tree.update_moment(updates, state.mu, b2, 1)
        return direction, optax.ScaleByLionState(state.count + 1, mu)

    return optax.chain(
        optax.GradientTransformationExtraArgs(init, update),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
