# SPDX-License-Identifier: Apache-2.0
"""A policy per parameter: which leaves vote, which are averaged, which never move.

In:  a tree of labels. Out: one transformation in which all groups share the learning rate, the
weight decay and the decision who takes part in a round.

``optax.masked`` around a vote lets a leaf's *local* gradient through, and so does
``optax.partition`` with ``optax.identity``. Replicas then part ways in silence. Every label here
ends in something that is the same on all workers.
"""

import functools
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from distlion_jax import _checks as checks
from distlion_jax import ledger
from distlion_jax._rounds import Healthy
from distlion_jax._rules import AxisName, VoteOptions, by_params, takes_vote_options
from distlion_jax._vote import wire
from distlion_jax._vote.turnout import FIGURES, all_finite
from distlion_jax.average import scale_by_averaged_lion
from distlion_jax.lion import scale_by_distributed_lion

__all__ = ["distributed_lion_by_label", "wire_cost_by_label"]

LABELS: tuple[str, ...] = ("majority", "average", "full", "frozen")


def _labels_of(labels: Any, params: Any) -> Any:
    """The label tree, spread over the parameters and checked."""
    tree = by_params(labels)(params)
    if jax.tree.leaves(params):  # Optax's placeholder for parameters has no leaves, nor a shape
        tree = jax.tree.broadcast(tree, params)
    for path, label in jax.tree_util.tree_leaves_with_path(tree):
        if label not in LABELS:
            raise ValueError(
                f"`labels{jax.tree_util.keystr(path)}` must be one of "
                f"{', '.join(map(repr, LABELS))}; got {label!r}."
            )
    return tree


def _side_by_side(
    parts: dict[str, optax.GradientTransformationExtraArgs],
) -> optax.GradientTransformationExtraArgs:
    """One after the other, each of leaves of its own, with the state of ``optax.partition``."""

    def init(params: Any) -> Any:
        return optax.transforms.PartitionState(
            {name: tx.init(params) for name, tx in parts.items()}
        )

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if set(state.inner_states) != set(parts):
            raise ValueError(
                f"`labels` name the groups {sorted(parts)}, and the state has "
                f"{sorted(state.inner_states)}: it was made for other labels. Begin a state anew, "
                "tx.init or init_state, when a leaf changes its label."
            )
        new = {}
        for name, tx in parts.items():
            updates, new[name] = tx.update(updates, state.inner_states[name], params, **extra_args)
        return updates, optax.transforms.PartitionState(new)

    return optax.GradientTransformationExtraArgs(init, update)


def _zeros(g: Array) -> Array:
    """Zeros that JAX knows to be replicated; ``zeros_like`` a worker's gradient are its own."""
    return jnp.zeros(g.shape, g.dtype)


@takes_vote_options
def distributed_lion_by_label(
    learning_rate: optax.ScalarOrSchedule,
    labels: Any | Callable[[optax.Params], Any],
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    axis_name: AxisName = "data",
    **options: Unpack[VoteOptions],
) -> optax.GradientTransformationExtraArgs:
    """Distributed Lion with a label per leaf, in one step.

    Args:
      learning_rate, b1, b2, mu_dtype: as in ``distributed_lion``.
      weight_decay, mask: as in ``distributed_lion``; decay never reaches the frozen leaves.
      labels: tree (or prefix of one, or function of params) with ``"majority"`` or ``"average"``
        (one-bit votes), ``"full"`` (Lion on the gradients' full-precision mean) or ``"frozen"``
        (never moves, sends nothing).
      axis_name: as in ``distributed_lion``.
      **options: as listed below.

    Returns:
      A transformation. A worker with a non-finite gradient in *any* leaf that is not frozen sits
      the round out in *all* groups. Its cost is :func:`wire_cost_by_label`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = {"w": jnp.zeros(3), "norm": jnp.ones(2)}
      >>> tx = distributed_lion_by_label(0.1, {"w": "majority", "norm": "frozen"})
      >>> def updates(g):
      ...     return tx.update({"w": g, "norm": g[:2]}, tx.init(params), params)[0]
      >>> out = jax.vmap(updates, axis_name="data")(jnp.array([[1.0, 2.0, -3.0]] * 2))
      >>> print(out["w"][0], jnp.abs(out["norm"][0]))
      [-0.1 -0.1  0.1] [0. 0.]
    """
    checks.check_axis_name(axis_name)
    vote = functools.partial(
        scale_by_distributed_lion, b1, b2, mu_dtype, axis_name=axis_name, **options
    )
    directions = {
        "majority": vote(aggregation="majority"),
        "average": vote(aggregation="average"),
        "full": scale_by_averaged_lion(
            b1, b2, mu_dtype, axis_name=axis_name, max_weight=options.get("max_weight")
        ),
        "frozen": optax.stateless(lambda g, _: jax.tree.map(_zeros, g)),
    }

    known: list[str] = []

    def live(params: Any) -> Any:
        if not jax.tree.leaves(params):
            return params
        return jax.tree.map(lambda label: label != "frozen", _labels_of(labels, params))

    def groups(params: Any) -> optax.GradientTransformationExtraArgs:
        """The groups that have leaves, side by side, as ``optax.partition`` has them."""
        tree = _labels_of(labels, params)
        # optax.tree.map_params asks for the state of a placeholder, which no function can label:
        # that has the groups of the parameters before it.
        if used := sorted(set(jax.tree.leaves(tree))):
            known[:] = used
        parts = {}
        for label in used or known:
            chosen = jax.tree.map(lambda name, label=label: name == label, tree)
            # As a function: Optax would call a tree that can be called, such as an Equinox model.
            parts[label] = optax.masked(directions[label], by_params(chosen))
        return _side_by_side(parts)

    def init_fn(params: optax.Params) -> Any:
        return groups(params).init(params)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        moving = jax.tree.map(lambda g, keep: g if keep else None, updates, live(updates))
        extra_args["healthy"] = Healthy(wire.axes(axis_name), all_finite(moving))
        return groups(updates).update(updates, state, params, **extra_args)

    def decay_mask(params: Any) -> Any:
        chosen = True if mask is None else by_params(mask)(params)
        chosen = jax.tree.broadcast(chosen, params)
        return jax.tree.map(lambda a, b: a and b, chosen, live(params))

    return optax.chain(
        optax.GradientTransformationExtraArgs(init_fn, update_fn),
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


@takes_vote_options
def wire_cost_by_label(
    params: Any, labels: Any, n: int, **options: Unpack[VoteOptions]
) -> ledger.WireCost:
    """Exact wire cost of one :func:`distributed_lion_by_label` step.

    Args:
      params: tree of arrays or ``jax.ShapeDtypeStruct``.
      labels: as in ``distributed_lion_by_label``.
      n: number of workers.
      **options: as listed below.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = {"w": jnp.zeros((512, 512)), "norm": jnp.zeros(512)}
      >>> cost = wire_cost_by_label(params, {"w": "majority", "norm": "full"}, n=8)
      >>> [c.op for c in cost.collectives]
      ['all-reduce', 'all-reduce', 'all-to-all', 'all-gather']
    """
    names = jax.tree.leaves(_labels_of(labels, params))
    leaves = jax.tree.leaves(params)
    moved: list[ledger.Collective] = []
    transports = []
    for label in dict.fromkeys(names):
        group = [x for x, name in zip(leaves, names, strict=True) if name == label]
        if label == "full":
            moved += ledger.full_precision_cost(group, n).collectives
            moved += [ledger.Collective("all-reduce", "f32", FIGURES, n)] if n > 1 else []
        elif label != "frozen":
            cost = ledger.wire_cost(group, n, aggregation=label, **options)
            moved += cost.collectives
            transports.append(cost.transport)
    size = ledger.layout_of(params).size
    return ledger.WireCost("+".join(dict.fromkeys(transports)), size, tuple(moved))
