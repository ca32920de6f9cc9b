# SPDX-License-Identifier: Apache-2.0
"""The same train step under ``jax.pmap``, for scripts that are built on it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from distlion_jax.exchanges import exchanges
from distlion_jax.train import _audit as audit
from distlion_jax.train._checks import check_declared, check_step, is_traced
from distlion_jax.train._worker import Step, block_on_cpu, worker_step


def make_pmap_train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    axis_name: str = "data",
    *,
    has_aux: bool = False,
    devices: Sequence[Any] | None = None,
    donate: bool = True,
) -> Step:
    """The same step under ``jax.pmap``, for scripts that are built on it.

    Parameters and state carry a leading worker axis (:func:`pmap_replicate`; the state is of the
    same form as :func:`distlion_jax.init_state`'s, but that what is replicated is stacked too). The
    batch does not: the step splits it. pmap does not check that workers stay alike; calls 1, 2, 4,
    8, ... of the step do, and every call for a ``tx`` that declares no exchange.

    Args:
      loss_fn, tx, axis_name, has_aux, donate: as in :func:`make_train_step`.
      devices: one per worker; None: ``jax.local_devices()``.

    Raises:
      ValueError: from the step: for a batch or state that does not fit the workers, and where their
        parameters are found to differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from distlion_jax import distributed_lion, pmap_replicate
      >>> tx, params = distributed_lion(0.01), {"w": jnp.zeros(3)}
      >>> step = make_pmap_train_step(lambda p, x: jnp.mean((x @ p["w"] - 1.0) ** 2), tx)
      >>> params, state = pmap_replicate(params), pmap_replicate(tx.init(params))
      >>> params, state, metrics = step(params, state, jnp.ones((16, 3)))
      >>> float(metrics.loss), params["w"].shape
      (1.0, (8, 3))
    """
    devices = jax.local_devices() if devices is None else devices
    n = len(devices)
    worker = worker_step(loss_fn, tx, (axis_name,), has_aux)

    def one(params: Any, state: Any, batch: Any, rng: Any, extra: dict[str, Any]) -> Any:
        params, state, metrics = worker(params, state, batch, rng, extra)
        votes = tuple(h._replace(voted=h.voted[0]) for h in metrics.health)
        means = tuple(h._replace(counted=h.counted[0]) for h in metrics.means)
        return params, state, metrics._replace(health=votes, means=means)

    # Two nested arguments. With five flat ones, pmap applied `in_axes` to the arrays whenever there
    # happened to be exactly five of them.
    mapped = jax.pmap(
        lambda kept, given: one(*kept, *given),
        axis_name,
        in_axes=((0, 0), (0, None, 0)),
        devices=devices,
        donate_argnums=(0,) if donate else (),
    )

    same = jax.pmap(lambda tree: audit.all_same(tree, axis_name), axis_name, devices=devices)
    wait = block_on_cpu(devices)
    look = audit.check_on_schedule(lambda params: audit.everywhere(same(params)))

    def step(params: Any, state: Any, batch: Any, *, rng: Any = None, **extra: Any) -> Any:
        check_step(batch, (params, state), extra, n, n)
        if n > 1 and is_traced((params, state, batch, rng, extra)):
            check_declared(state)
        batch = jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), batch)
        declared = bool(exchanges(state))
        params, state, metrics = mapped((params, state), (batch, rng, extra))
        wait(metrics)
        look(params, declared)
        first = jax.tree.map(lambda x: x[0], metrics)
        votes = zip(first.health, metrics.health, strict=True)
        means = zip(first.means, metrics.means, strict=True)
        return (
            params,
            state,
            first._replace(
                health=tuple(f._replace(voted=h.voted) for f, h in votes),
                means=tuple(f._replace(counted=h.counted) for f, h in means),
            ),
        )

    return step


def pmap_replicate(tree: Any, devices: Sequence[Any] | None = None) -> Any:
    """A copy of the tree for each device, stacked: parameters, or ``tx.init(params)``, for pmap.

    Examples:
      >>> import jax.numpy as jnp
      >>> pmap_replicate({"w": jnp.zeros(3)})["w"].shape == (jax.local_device_count(), 3)
      True
    """
    devices = jax.local_devices() if devices is None else devices
    stacked = jax.tree.map(lambda x: np.broadcast_to(x, (len(devices), *np.shape(x))), tree)
    return jax.pmap(lambda t: t, devices=devices)(stacked)
