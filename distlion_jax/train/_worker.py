# SPDX-License-Identifier: Apache-2.0
"""The step of one worker, whatever maps it: gradient, update, figures."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from distlion_jax._rounds import Healthy, listen
from distlion_jax._vote import wire
from distlion_jax._vote.turnout import all_finite, finite_mean
from distlion_jax.accumulate import adopt, sends_too_often
from distlion_jax.exchanges import with_extra_args
from distlion_jax.finite import keep_finite
from distlion_jax.train import _model_state
from distlion_jax.train._audit import all_same
from distlion_jax.train._checks import (
    check_decided_alike,
    check_shapes,
    check_unconditional,
    stands_side_by_side,
)
from distlion_jax.train._extra import KNOWN, VOTES_TAKE, check_heard, check_read
from distlion_jax.train._gradient import value_and_gradient
from distlion_jax.train._keys import own_keys
from distlion_jax.train._metrics import average, took_part
from distlion_jax.train._notes import warn


def worker_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    axes: tuple[str, ...],
    vote_axes: tuple[str, ...],
    mean_axes: tuple[str, ...] = (),
    *,
    has_aux: bool = False,
    has_model_state: bool = False,
    microbatches: int = 1,
) -> Callable[..., tuple[Any, ...]]:
    """``step(params, model_state, state, batch, rng, extra)`` of one worker.

    The state has no worker axis. The step returns the first three anew, and the figures. With
    ``compare`` it looks whether all workers hold the same parameters after it.

    Args:
      loss_fn: of the worker's own batch.
      tx: the transformation.
      axes: all axes that the batch is split over.
      vote_axes: those of them that vote.
      mean_axes: axes over which the step itself averages gradients, in full precision.
      has_aux: whether ``loss_fn`` returns aux.
      has_model_state: whether it takes and returns the model's state.
      microbatches: how many parts the batch is taken in.
    """
    gradient = value_and_gradient(loss_fn, axes, has_aux, has_model_state, microbatches)
    finish = worker_update(tx, axes, vote_axes, mean_axes)

    def step(
        params: Any, model_state: Any, state: Any, batch: Any, rng: Any, extra: dict[str, Any],
        *, compare: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        key = None if rng is None else jax.random.fold_in(rng, wire.worker(axes))
        found = gradient(params, model_state, batch, key)
        return finish(params, model_state, state, found, extra, compare=compare)

    return step


def worker_update(
    tx: optax.GradientTransformation,
    axes: tuple[str, ...],
    vote_axes: tuple[str, ...],
    mean_axes: tuple[str, ...] = (),
    specs: Any = None,
) -> Callable[..., tuple[Any, ...]]:
    """``finish(params, model_state, state, found, extra)``: a worker's step after its gradient.

    ``found`` is the loss, the model's new state, aux and the gradient. It returns as
    :func:`worker_step` does, whose other arguments these are.

    Args:
      tx: the transformation.
      axes: all axes that the batch is split over.
      vote_axes: those of them that vote.
      mean_axes: axes over which the step itself averages gradients, in full precision.
      specs: how the leaves are split over a worker's own devices; None: it is one device.
    """
    tx = keep_finite(with_extra_args(tx) if mean_axes == axes else adopt(tx))
    known = {} if specs is None else {"specs": specs}

    def update(grads: Any, state: Any, params: Any, extra: dict[str, Any]) -> tuple[Any, Any]:
        for name in set(extra) - set(KNOWN):
            check_read(tx, name, grads, state, params, {**extra, **known})
        if set(extra) - {"value"}:
            check_decided_alike(state)
        if not mean_axes and stands_side_by_side(state):
            extra = {**extra, "healthy": Healthy(axes, all_finite(grads))}
        with listen() as heard:
            out = tx.update(grads, own_keys(state, vote_axes), params, **extra, **known)
        check_heard(heard, extra)
        for name in set() if heard else set(extra) & set(VOTES_TAKE):
            check_read(tx, name, grads, state, params, {**extra, **known})
        return out

    def update_with(value: Array, grads: Any, state: Any, params: Any, extra: Any) -> Any:
        try:
            return update(grads, state, params, {**extra, "value": value})
        except TypeError as error:  # a transformation that takes less than it says
            if "value" in extra or "unexpected keyword argument 'value'" not in str(error):
                raise
            return update(grads, state, params, extra)

    def finish(
        params: Any, model_state: Any, state: Any, found: tuple[Any, ...], extra: dict[str, Any],
        *, compare: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        check_unconditional(state)
        if sends_too_often(state):
            warn(
                "`tx` holds a vote or an average in an optax.MultiSteps inside another "
                "transformation: it is exchanged in every micro-step, and most of it thrown away. "
                "Use distlion_jax.accumulate_gradients there, or microbatches=k in the step."
            )
        loss, seen, aux, grads = found
        # Optimizers that look at the loss get the workers' mean; where none does, XLA drops it.
        told = jnp.where(extra.get("participating", True), 1, 0)
        value, _ = finite_mean(jnp.asarray(extra.get("value", loss), jnp.float32), axes, told)
        entered, own = jnp.bool_(True), None
        if mean_axes:
            grads, own = finite_mean(grads, mean_axes)
            entered = own.counted
        updates, new_state = update_with(value, grads, state, params, extra)
        new_params = optax.apply_updates(params, updates)
        check_shapes("params", params, new_params)
        check_shapes("state", state, new_state)
        entered &= took_part(state, new_state)
        figures = average(loss, aux, new_state, own, entered, axes, vote_axes)
        figures = figures._replace(unmoved=unmoved(params, updates, new_params))
        if compare:  # nobody else can: a loss that is NaN is seen
            same = all_same(new_params, axes)
            figures = figures._replace(loss=jnp.where(same, figures.loss, jnp.nan))
        return (
            new_params,
            _model_state.agree(seen, model_state, entered & (told > 0), axes),
            new_state,
            figures,
        )

    return finish


def unmoved(old: Any, updates: Any, new: Any) -> Any:
    """``float32[]``: share of the updates that rounding lost; None where all parameters are wide.

    Of parameters in 16 bits or fewer: a bfloat16 1.0 is the same after an update of 0.003.
    """
    lost, size = [], 0
    for x, u, y in zip(*map(jax.tree.leaves, (old, updates, new)), strict=True):
        if jnp.issubdtype(y.dtype, jnp.floating) and y.dtype.itemsize < 4:
            lost.append(jnp.sum((u != 0) & (x == y), dtype=jnp.float32))
            size += x.size
    return sum(lost) / max(size, 1) if lost else None
