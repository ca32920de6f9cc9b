# SPDX-License-Identifier: Apache-2.0
"""The ``update`` that every vote, average and compressor shares: it opens a round.

In:  what only the exchange knows: its initial state, and what it does in a round.
Out: an Optax transformation whose extra arguments say who takes part.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.typing import ArrayLike

from distlion_jax import _checks as checks
from distlion_jax._rules import AxisName, Rules
from distlion_jax._vote import turnout, wire
from distlion_jax._vote.turnout import Round

InRound = Callable[[Round, optax.Updates, Any, optax.Params | None], tuple[optax.Updates, Any]]


def in_rounds(
    init: optax.TransformInitFn,
    update: InRound,
    axis_name: AxisName,
    rules: Rules | None,
) -> optax.GradientTransformationExtraArgs:
    """A transformation of the worker's own gradients, a round an ``update``.

    Args:
      init: the initial state; it has a field ``count``, the rounds so far.
      update: ``(context, updates, state, params)`` to the new updates and state.
      axis_name: mapped axis, or axes.
      rules: what the workers follow; None where all weigh alike.
    """
    checks.check_axis_name(axis_name)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        participating: ArrayLike = True,
        weight: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        n = wire.size(axis_name)
        checks.check_state(state.count)
        checks.check_local(updates, axis_name)
        if rules is not None:
            checks.check_weights(rules, n)
        elif weight is not None:
            raise ValueError(
                "`weight` is for a vote; a compressed average weighs all workers alike."
            )
        leaves = jax.tree.leaves(updates)
        context = turnout.begin(state.count, leaves, axis_name, rules, participating, weight)
        return update(context, updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update_fn)
