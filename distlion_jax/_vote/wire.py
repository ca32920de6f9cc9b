# SPDX-License-Identifier: Apache-2.0
"""Thin collectives on packed words, and the questions that only JAX can answer about an axis.

In:  ``uint32`` words of this worker. Out: words of all workers, or slices of them.
With workers ``i`` and ``n`` of them, each identity below is the shape law of one function:

* :func:`gather`:  ``[words] -> [n, words]``; ``gather(x)[i]`` is worker i's, on every worker.
* :func:`scatter`: ``[n, words] -> [n, words]``; row j of worker i's result is row i of worker j's
  operand. ``scatter(x)[j] == gather(x)[j, i]``, at one n-th of the traffic.
* :func:`total`:   ``[...] -> [...]``; ``total(x) == gather(x).sum(0)``.

:func:`from_first` moves nothing where JAX tracks no replication: its operand is the same on all
workers already, and only JAX cannot know it. It is no broadcast.

The first two take the sizes of the pieces that the words travel in, a collective each.

All differences between JAX versions, and between pmap, shard_map (replication check on or off)
and vmap, live here.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from distlion_jax._rules import AxisName

# `to` is older, but knows "invarying" from 0.10 on only.
_GATHER_HAS_TO = jax.__version_info__ >= (0, 10)


def axes(axis_name: AxisName) -> tuple[str, ...]:
    """The axis names as a tuple; several axes vote over their product."""
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def size(axis_name: AxisName) -> int:
    """Number of workers on the axis; a clear error where the axis is not bound."""
    try:
        return int(lax.axis_size(axis_name))
    except NameError as error:
        raise ValueError(
            f"`axis_name` {axis_name!r} is not bound here ({error}). Call `update` inside a "
            "function mapped over that axis, as jax.shard_map over a mesh with an axis "
            f"{axis_name!r}, or "
            f"jax.pmap(..., axis_name={axis_name!r}); check the spelling; or pass axis_name=None "
            "for one worker. Under plain jax.jit, with a model that is split over a mesh, wrap the "
            "transformation: distlion_jax.sharded(tx, mesh, params, axis_name)."
        ) from None


def varying_axes(x: Any) -> frozenset[str]:
    """Mesh axes that JAX knows ``x`` to differ over; empty where it does not keep track."""
    # Not the type of a shape: beside automatic axes, JAX cannot make one.
    aval = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    tracked = getattr(aval, "manual_axis_type", None)  # jax >= 0.10
    return frozenset(tracked.varying if tracked is not None else getattr(aval, "vma", ()) or ())


def is_checked(axis_name: AxisName) -> bool:
    """Whether JAX keeps track of replication over the axis (shard_map with its check on)."""
    return all(name in varying_axes(lax.axis_index(name)) for name in axes(axis_name))


def vary(x: Array, axis_name: AxisName) -> Array:
    """Marks ``x`` as differing by worker (no data moves); the identity where nothing is tracked."""
    if not is_checked(axis_name):
        return x
    missing = tuple(name for name in axes(axis_name) if name not in varying_axes(x))
    if not missing:
        return x
    if hasattr(lax, "pcast"):
        return lax.pcast(x, missing, to="varying")
    return getattr(lax, "pvary")(x, missing)  # noqa: B009 (jax < 0.9)


def vary_tree(tree: Any, axis_name: AxisName) -> Any:
    """Marks every array in the tree as differing by worker."""
    return jax.tree.map(lambda x: vary(x, axis_name), tree)


def vary_as(x: Array, like: Array) -> Array:
    """Marks ``x`` as differing over the axes that ``like`` differs over."""
    for name in sorted(varying_axes(like)):
        x = vary(x, name)
    return x


def zeros_as(shape: Any) -> Array:
    """Zeros of the shape, dtype and replication of an array, or of its shape."""
    return vary_as(jnp.zeros(shape.shape, shape.dtype), shape)


def unvarying(named: Iterable[tuple[str, Any]], axis_name: AxisName) -> list[str]:
    """Names of the values that JAX knows to be equal on all workers (none where untracked)."""
    if not is_checked(axis_name):
        return []
    wanted = set(axes(axis_name))
    return [name for name, x in named if not wanted <= varying_axes(x)]


def split(x: Array, pieces: Sequence[int], axis: int = 0) -> list[Array]:
    """``x`` in pieces of these sizes along an axis."""
    return jnp.split(x, np.cumsum(pieces)[:-1].tolist(), axis)


def gather(x: Array, axis_name: AxisName, pieces: Sequence[int]) -> Array:
    """All workers' ``x[words]``, stacked: an all-gather a piece; JAX knows it to be replicated."""
    with _one_kind(axis_name):
        parts = [_gather(part, axis_name) for part in split(x, pieces, 0)]
    return jnp.concatenate(parts, axis=1)


def joined(x: Array, axis_name: AxisName, along: int) -> Array:
    """The parts that devices hold of an array, joined along an axis of it: an all-gather."""
    return lax.all_gather(x, axis_name, axis=along, tiled=True)


@contextlib.contextmanager
def _one_kind(axis_name: AxisName) -> Iterator[None]:
    """A clear error where workers lie on a mesh axis and a vmapped one: no words move there."""
    try:
        yield
    except AssertionError as error:
        raise ValueError(
            f"`axis_name` {axis_name!r} joins axes that JAX cannot send words over together, as "
            "one of a mesh and one of jax.vmap. Let the workers lie on axes of one kind; or pass "
            "transport='psum', which sums their votes uncompressed."
        ) from error


def _gather(x: Array, axis_name: AxisName) -> Array:
    if not is_checked(axis_name):
        return lax.all_gather(x, axis_name)
    x = vary(x, axis_name)
    if _GATHER_HAS_TO:
        return lax.all_gather(x, axis_name, to="invarying")
    from jax._src.lax.parallel import all_gather_invariant  # jax < 0.10 has no public name for it

    return all_gather_invariant(x, axis_name)


def scatter(x: Array, axis_name: AxisName, pieces: Sequence[int]) -> Array:
    """Sends row j of ``x[n, words]`` to worker j; row j of the result came from worker j.

    An all-to-all a piece of each row.
    """
    parts = split(vary(x, axis_name), pieces, 1)
    with _one_kind(axis_name):
        parts = [lax.all_to_all(part, axis_name, 0, 0) for part in parts]
    return jnp.concatenate(parts, axis=1)


def total(x: Array, axis_name: AxisName) -> Array:
    """Sum over workers; replicated."""
    return lax.psum(vary(x, axis_name), axis_name)


def largest(x: Array, axis_name: AxisName) -> Array:
    """Maximum over workers; replicated."""
    return lax.pmax(vary(x, axis_name), axis_name)


def from_first(tree: Any, axis_name: AxisName) -> Any:
    """The tree, known to JAX as replicated: one small all-reduce of worker 0's values.

    The values must be the same on all workers already. Where JAX tracks no replication (pmap, vmap,
    ``check_vma=False``) the tree is returned as it is.
    """
    if not is_checked(axis_name) or not jax.tree.leaves(tree):
        return tree
    first = worker(axis_name) == 0
    mine = jax.tree.map(lambda x: jnp.where(first, x, jnp.zeros_like(x)), tree)
    sums = lax.psum(jax.tree.map(lambda x: vary(x, axis_name), mine), axis_name)
    return jax.tree.map(lambda x, like: x.astype(like.dtype), sums, tree)


def is_key(x: Any) -> bool:
    """Whether ``x`` is an array of typed random keys, which are no numbers."""
    return jnp.issubdtype(getattr(x, "dtype", np.float32), jax.dtypes.prng_key)


def copies_of_first(tree: Any, axis_name: AxisName) -> Any:
    """Worker 0's arrays, on all workers, bit for bit: an all-reduce of their bits.

    Not of the numbers, because ``-0.0 + 0.0`` is ``0.0``.
    """
    first = worker(axis_name) == 0

    def one(x: Any) -> Array:
        x = jnp.asarray(x)
        if is_key(x):
            return jax.random.wrap_key_data(
                one(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        if jnp.iscomplexobj(x):
            return lax.complex(one(x.real), one(x.imag))
        if x.dtype == jnp.bool_:
            return one(x.astype(jnp.uint8)).astype(jnp.bool_)
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        bits = lax.bitcast_convert_type(x, unsigned)
        sums = lax.psum(jnp.where(first, bits, jnp.zeros_like(bits)), axis_name)
        return lax.bitcast_convert_type(sums, x.dtype)

    return jax.tree.map(one, tree)


def worker(axis_name: AxisName) -> Array:
    """``int32[]``: this worker's index on the axis, or on the product of the axes."""
    return lax.axis_index(axis_name)
