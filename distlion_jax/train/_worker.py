# SPDX-License-Identifier: Apache-2.0
"""The step of one worker, whatever maps it: gradient, update, figures."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distlion_jax._vote import wire
from distlion_jax._vote.turnout import finite_mean
from distlion_jax.train._checks import check_shapes
from distlion_jax.train._mesh import local_value_and_grad
from distlion_jax.train._metrics import Metrics, average, took_part

Step = Callable[..., tuple[Any, Any, Metrics]]


def worker_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    axes: tuple[str, ...],
    has_aux: bool,
    mean_axes: tuple[str, ...] = (),
) -> Callable[..., tuple[Any, Any, Metrics]]:
    """``step(params, state, batch, rng, extra)`` of one worker; the state has no worker axis.

    Args:
      loss_fn: of the worker's own batch.
      tx: the transformation.
      axes: all axes that the batch is split over.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      mean_axes: axes over which the step itself averages gradients, in full precision.
    """
    tx = optax.with_extra_args_support(tx)
    value_and_grad = local_value_and_grad(loss_fn, axes, has_aux)

    def step(params: Any, state: Any, batch: Any, rng: Any, extra: dict[str, Any]) -> Any:
        key = () if rng is None else (jax.random.fold_in(rng, wire.worker(axes)),)
        value, grads = value_and_grad(params, batch, *key)
        loss, aux = value if has_aux else (value, ())
        entered, own = jnp.bool_(True), None
        if mean_axes:
            grads, own = finite_mean(grads, mean_axes)
            entered = own.counted
        updates, new_state = tx.update(grads, state, params, **extra)
        new_params = optax.apply_updates(params, updates)
        check_shapes("params", params, new_params)
        check_shapes("state", state, new_state)
        entered &= took_part(state, new_state)
        return new_params, new_state, average(loss, aux, new_state, own, entered, axes)

    return step


def block_on_cpu(devices: Iterable[Any]) -> Callable[[Any], Any]:
    """Waits for a step on virtual CPU devices, elsewhere does nothing.

    They share the threads of one pool: steps that queue up starve one another's collectives, until
    XLA gives up and aborts the process.
    """
    here = jax.process_index()
    virtual = sum(d.platform == "cpu" and d.process_index == here for d in devices) > 1
    return jax.block_until_ready if virtual else lambda metrics: metrics
