# SPDX-License-Identifier: Apache-2.0
"""The mesh, copies of the parameters on it, and gradients that are truly a worker's own."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distlion_jax._rules import AxisName
from distlion_jax._vote import wire
from distlion_jax.train._checks import rows_are_apart
from distlion_jax.train._processes import spans_processes


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
            f"`n` must lie in [1, {len(devices)}] (the devices there are); got "
            f"{'None, which asks for at least 2' if n is None else n}. On CPU, "
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

    def own(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        params = jax.tree.map(jnp.asarray, params)  # a number of Python's has a gradient too
        return value_and_grad(local(params, axis_name), *args, **kwargs)

    return own


def local(params: Any, axis_name: AxisName = "data") -> Any:
    """Parameters whose gradients are this worker's own, inside a mapped function.

    :func:`local_value_and_grad` for libraries that differentiate in their own way, such as
    ``nnx.value_and_grad`` and ``eqx.filter_value_and_grad``: mark the parameters first, then
    differentiate with respect to what this returns. No data moves. Under pmap, vmap and
    ``check_vma=False`` it changes nothing.

    Args:
      params: a tree of arrays; what is no array, such as a number of Python's, is left as it is.
      axis_name: the axis, or axes, that gradients must not be summed over.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> def worker(a):
      ...     return jax.grad(lambda x: a * x)(local(jnp.float32(1.0)))
      >>> print(jax.vmap(worker, axis_name="data")(jnp.array([1.0, 2.0])))
      [1. 2.]
    """
    is_array = lambda x: isinstance(x, jax.Array | np.ndarray | np.generic)  # noqa: E731
    return jax.tree.map(lambda x: wire.vary(x, axis_name) if is_array(x) else x, params)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of the tree on every device of the mesh (parameters; safe to donate).

    In several processes all of them call it, and all receive process 0's numbers (more exactly:
    those of the mesh's first device).

    Args:
      tree: arrays, NumPy arrays or numbers.
      mesh: the mesh.

    Examples:
      >>> replicate({"w": jnp.zeros(3)}, worker_mesh(8))["w"].is_fully_replicated
      True
    """
    if not spans_processes(mesh.devices.flat):  # arrays may lie on other devices
        tree = jax.device_put(tree, NamedSharding(mesh, P()))
    return _copies(mesh)(tree)


@functools.cache
def _copies(mesh: Mesh) -> Callable[[Any], Any]:
    def copy(tree: Any) -> Any:
        return jax.tree.map(jnp.copy, tree)

    if spans_processes(mesh.devices.flat):
        first = lambda tree: wire.copies_of_first(tree, mesh.axis_names)  # noqa: E731
        copy = jax.shard_map(first, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(copy, out_shardings=NamedSharding(mesh, P()))


def make_global_batch(rows: Any, mesh: Mesh, axis_name: AxisName = "data") -> Any:
    """One batch of the rows that every process has loaded, split over the workers.

    A thin layer over ``jax.make_array_from_process_local_data``. In one process it places the rows
    on the mesh.

    Args:
      rows: a tree of arrays, this process's own; leading axes alike, and the same in all processes.
      mesh: the mesh.
      axis_name: the axis, or axes, that the batch is split over: those that vote, then those that
        average inside a node.

    Returns:
      Global arrays. Their leading axis is that of all processes together, in the order of the
      processes along the mesh.

    Raises:
      ValueError: for rows that this process's devices cannot share equally, and for axes that leave
        devices of several processes with the same rows.

    Examples:
      >>> import numpy as np
      >>> batch = make_global_batch({"x": np.ones((16, 3))}, worker_mesh(8))
      >>> batch["x"].addressable_shards[0].data.shape
      (2, 3)
    """
    sharding, here = NamedSharding(mesh, P(axis_name)), jax.process_index()
    split = int(np.prod([mesh.shape[name] for name in wire.axes(axis_name)]))
    if not rows_are_apart(sharding, (split,)):
        raise ValueError(
            f"`axis_name` {axis_name!r} leaves out axes of the mesh {dict(mesh.shape)}: their "
            "devices would share rows that processes have loaded apart. Name all axes that the "
            "batch is split over, those that vote first."
        )
    parts = sharding.devices_indices_map((split,)).items()
    mine = len({index[0].start for device, index in parts if device.process_index == here})
    for path, x in jax.tree_util.tree_leaves_with_path(rows):
        count = np.shape(x)[0] if np.ndim(x) else 0
        if not mine or not count or count % mine:
            raise ValueError(
                f"`rows{jax.tree_util.keystr(path)}` has {count} rows, which cannot be split into "
                f"the {mine} equal parts that this process's devices hold. Each process passes the "
                f"same number of rows, a multiple of {mine}."
            )

    def one(x: Any) -> jax.Array:
        x = np.asarray(x)
        whole = x.shape[0] // mine * split, *x.shape[1:]
        return jax.make_array_from_process_local_data(sharding, x, whole)

    return jax.tree.map(one, rows)
