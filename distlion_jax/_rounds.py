# SPDX-License-Identifier: Apache-2.0
"""The ``update`` that every vote, average and compressor shares: it opens a round.

In:  what only the exchange knows: its initial state, and what it does in a round.
Out: an Optax transformation whose extra arguments say who takes part.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.core import Tracer
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from distlion_jax import _checks as checks
from distlion_jax._promotion import default_promotion
from distlion_jax._rules import AxisName, Rules
from distlion_jax._vote import shards, stamp, turnout, wire
from distlion_jax._vote.turnout import Round
from distlion_jax._vote.words import Layout
from distlion_jax.hlo import UPDATE


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
    split: Literal["shards", "whole", "never"] = "whole",
) -> optax.GradientTransformationExtraArgs:
    """A transformation of the worker's own gradients, a round an ``update``.

    Args:
      init: the initial state. It has a field ``count``, the rounds so far; and ``stamp``, if some
        of it is each worker's own.
      update: ``(context, updates, state, params)`` to the new updates and state, but for those two.
      axis_name: mapped axis, or axes.
      rules: what the workers follow; None where all weigh alike.
      split: what it needs of leaves that a worker's own devices share: their shards, each on its
        device; nothing, as it takes whole leaves and leaves the rest to the compiler; or that there
        are none.
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
        specs: Any = None,
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
        if split == "shards":
            found = shards.find(updates, specs, axis_name, context.layout)
            context = dataclasses.replace(context, shards=found)
        elif split == "never" and (inner := shards.inner_sizes(axis_name)):
            raise ValueError(
                f"`mesh` has axes {list(inner)} beside `axis_name` {axis_name!r}, which split the "
                "parameters: a compressed average looks at whole leaves. Use distributed_lion, or "
                "average_gradients before an ordinary optimizer."
            )
        updates, new = update(context, updates, state, params)
        counted = {"count": jnp.asarray(optax.safe_increment(state.count))}
        if hasattr(state, "stamp"):
            counted["stamp"] = stamp.mark(state.stamp, context)
        return updates, new._replace(**counted)

    return optax.GradientTransformationExtraArgs(init, update_fn)


Hold = Callable[[Round, optax.Updates, optax.Updates, Any], tuple[Any, Any, Any]]


def on_shards(
    hold: Hold, context: Round, updates: Any, mu: Any, betas: tuple[ArrayLike, ArrayLike]
) -> tuple[Any, Any, Any]:
    """``hold(context, updates, mu, betas)`` by every device of a worker, each on its own shards.

    Args:
      hold: what a round does: to new updates, new momenta, and figures that are the same on all
        devices of the worker.
      context: the round.
      updates: the worker's own, of whole shapes.
      mu: likewise, or with a leading axis of size 1.
      betas: numbers, traced ones too.
    """
    split = context.shards
    if split is None:
        return hold(context, updates, mu, betas)
    rules = context.rules
    hyper = {"betas": betas, "threshold": rules.threshold, "noise": rules.noise}
    flat, form = jax.tree.flatten(hyper)
    # Traced numbers are of the outer region, and are handed in. Python's own stay as they are: as
    # arrays they would be rounded, and 1 - b2 another number.
    traced = {i: x for i, x in enumerate(flat) if isinstance(x, Tracer)}

    def on_device(g: Any, m: Any, index: Any, numbers: Any, given: Any) -> tuple[Any, Any, Any]:
        # Not lax.axis_index: in a nested region it does not lower before jax 0.10.
        own = dataclasses.replace(split, index={name: i[0] for name, i in index.items()})
        layout = Layout([x.shape for x in jax.eval_shape(own.ballots, jax.tree.leaves(g))])
        now = form.unflatten([given.get(i, x) for i, x in enumerate(flat)])
        here = dataclasses.replace(
            context,
            **numbers,
            layout=layout,
            shards=own,
            rules=dataclasses.replace(rules, threshold=now["threshold"], noise=now["noise"]),
        )
        return hold(here, g, m, now["betas"])

    treedef = jax.tree.structure(updates)
    specs = treedef.unflatten(split.specs)
    by_leaf = jax.tree.map(
        lambda spec, g, m: P(None, *spec) if m.ndim > g.ndim else spec,
        specs, updates, mu, is_leaf=lambda x: isinstance(x, P),
    )  # fmt: skip
    numbers = {name: getattr(context, name) for name in ("count", "number", "worker", "weight")}
    mapped = jax.shard_map(
        on_device,
        in_specs=(specs, by_leaf, {name: P(name) for name in split.axes}, P(), P()),
        out_specs=(specs, by_leaf, P()),
        axis_names=set(split.axes),
        check_vma=False,
    )
    index = {name: jnp.arange(size, dtype=jnp.int32) for name, size in split.sizes.items()}
    with jax.named_scope(UPDATE):
        return mapped(updates, mu, index, numbers, traced)
