# SPDX-License-Identifier: Apache-2.0
"""The ``update`` that every vote, average and compressor shares: it opens a round.

In:  what only the exchange knows: its initial state, and what it does in a round.
Out: an Optax transformation whose extra arguments say who takes part.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from distlion_jax import _checks as checks
from distlion_jax._promotion import default_promotion
from distlion_jax._rules import AxisName, Rules
from distlion_jax._vote import stamp, turnout, wire
from distlion_jax._vote.turnout import Round


class Healthy(NamedTuple):
    """Whether all that this worker has for the exchanges of some axes is finite.

    Transformations that stand side by side, of some leaves each, then sit out together. An exchange
    over other axes takes no notice: workers that share a vote may differ in it.
    """

    axes: tuple[str, ...]
    fine: Array  # bool[]; differs by worker

    def joins(self, axis_name: AxisName, participating: ArrayLike) -> ArrayLike:
        """Whether the worker takes part in an exchange over the axes, if it was told to."""
        if set(self.axes) != set(wire.axes(axis_name)):
            return participating
        return jnp.asarray(participating) & self.fine


_heard: list[list[set[str]]] = []  # of those who listen: what each exchange was given


@contextlib.contextmanager
def listen() -> Iterator[list[set[str]]]:
    """Notes, while tracing, the names of the extra arguments that every exchange received."""
    _heard.append([])
    try:
        yield _heard[-1]
    finally:
        _heard.pop()


InRound = Callable[[Round, optax.Updates, Any, optax.Params | None], tuple[optax.Updates, Any]]


def in_rounds(
    init: optax.TransformInitFn,
    update: InRound,
    axis_name: AxisName,
    rules: Rules | None,
) -> optax.GradientTransformationExtraArgs:
    """A transformation of the worker's own gradients, a round an ``update``.

    Args:
      init: the initial state. It has a field ``count``, the rounds so far; and ``stamp``, if some
        of it is each worker's own.
      update: ``(context, updates, state, params)`` to the new updates and state, but for those two.
      axis_name: mapped axis, or axes.
      rules: what the workers follow; None where all weigh alike.
    """
    checks.check_axis_name(axis_name)

    @default_promotion
    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        participating: ArrayLike | None = None,
        weight: ArrayLike | None = None,
        healthy: Healthy | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        n = wire.size(axis_name)
        given = {"participating": participating, "weight": weight}
        for names in _heard:
            names.append({name for name, value in given.items() if value is not None})
        participating = True if participating is None else participating
        if healthy is not None:
            participating = healthy.joins(axis_name, participating)
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
        updates, new = update(context, updates, state, params)
        counted = {"count": jnp.asarray(optax.safe_increment(state.count))}
        if hasattr(state, "stamp"):
            counted["stamp"] = stamp.mark(state.stamp, context)
        return updates, new._replace(**counted)

    return optax.GradientTransformationExtraArgs(init, update_fn)
