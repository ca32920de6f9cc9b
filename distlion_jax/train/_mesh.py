# SPDX-License-Identifier: Apache-2.0
"""The mesh, copies of the parameters on it, and gradients that are truly a worker's own."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distlion_jax._rules import AxisName
from distlion_jax._vote import wire


def worker_mesh(
    n: int | None = None, axis_name: str = "data", devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of one axis, a device per worker.

    Args:
      n: number of workers; None: all devices, of which there must be at least two.
      axis_name: the axis.
      devices: None: ``jax.devices()``, of all processes.

    Raises:
      ValueError: for fewer devices than workers, or a single one that was not asked for by n=1.

    Examples:
      >>> dict(worker_mesh(8).shape)
      {'data': 8}
    """
    devices = jax.devices() if devices is None else devices
    wanted = max(2, len(devices)) if n is None else n
    if not 1 <= wanted <= len(devices):
        raise ValueError(
            f"`n` must lie in [1, {len(devices)}] (the devices there are); got {wanted}. On CPU, "
            f"jax.config.update('jax_num_cpu_devices', {max(wanted, 2)}) before anything else runs "
            "makes that many; n=1 asks for one worker."
        )
    return jax.make_mesh((wanted,), (axis_name,), (AxisType.Auto,), devices=devices[:wanted])


def local_value_and_grad(
    fun: Callable[..., Any], axis_name: AxisName = "data", has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """``jax.value_and_grad`` of this worker alone, also where autodiff would sum over workers.

    Under ``jax.shard_map`` with its replication check, JAX sums the gradients of replicated
    parameters over all workers, by an all-reduce in full precision. This function marks the
    parameters as varying over the axis first. Under pmap, vmap and ``check_vma=False`` it changes
    nothing.

    Args:
      fun: function of (params, ...) to a scalar, or (scalar, aux) with ``has_aux``.
      axis_name: the axis, or axes, that gradients must not be summed over.
      has_aux: as in ``jax.value_and_grad``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> grad = local_value_and_grad(lambda x, a: a * x)
      >>> def worker(a):
      ...     return grad(jnp.float32(1.0), a)[1]
      >>> print(jax.vmap(worker, axis_name="data")(jnp.array([1.0, 2.0])))
      [1. 2.]
    """
    value_and_grad = jax.value_and_grad(fun, has_aux=has_aux)

    def local(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        params = jax.tree.map(lambda x: wire.vary(x, axis_name), params)
        return value_and_grad(params, *args, **kwargs)

    return local


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of the tree on every device of the mesh (parameters; safe to donate).

    Examples:
      >>> replicate({"w": jnp.zeros(3)}, worker_mesh(8))["w"].is_fully_replicated
      True
    """
    copy = jax.jit(lambda t: jax.tree.map(jnp.copy, t), out_shardings=NamedSharding(mesh, P()))
    return copy(tree)
