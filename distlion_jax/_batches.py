# SPDX-License-Identifier: Apache-2.0
"""Leaves as batches of matrices, as a user's dimension numbers say, and back.

In:  ``muon_weight_dimension_numbers`` as in ``optax.contrib.muon``, and a tree.
Out: each leaf's numbers, checked; the axes that they name as ``[batch, rows, columns]``.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from optax.contrib import MuonDimensionNumbers

from distlion_jax._orthogonal import flops, newton_schulz
from distlion_jax._rules import by_params, check_static
from distlion_jax.matrices import hidden_matrices

Choice = Any | Callable[[Any], Any] | None  # what `muon_weight_dimension_numbers` may be
NS_STEPS, PERIOD = 5, 1  # the defaults
MOST_STEPS, LONGEST = 100, 2**31 - 1

_OTHER = object()  # stands for None, which is no leaf to JAX


def _is_number(node: Any) -> bool:
    return node is None or isinstance(node, MuonDimensionNumbers)


def numbers_of(chosen: Choice, tree: Any) -> list[MuonDimensionNumbers | None]:
    """What was chosen for each leaf of the tree.

    Args:
      chosen: a tree, a prefix of one, or a function of the parameters that returns one; None:
        :func:`distlion_jax.hidden_matrices`.
      tree: parameters or updates; paths, shapes and dtypes matter.
    """
    if not jax.tree.leaves(tree):  # Optax's placeholder for parameters has none, nor a structure
        return []
    chosen = by_params(hidden_matrices if chosen is None else chosen)(tree)
    named = jax.tree_util.tree_flatten_with_path(tree)[0]
    try:
        spread = jax.tree.map(
            lambda one, part: jax.tree.map(lambda _: _OTHER if one is None else one, part),
            chosen, tree, is_leaf=_is_number,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise ValueError(
            "`muon_weight_dimension_numbers` must be a tree of MuonDimensionNumbers and None as "
            f"the parameters are, or a prefix of one: {error}"
        ) from error
    ones = jax.tree.leaves(spread, is_leaf=lambda node: isinstance(node, MuonDimensionNumbers))
    return [
        None if one is _OTHER else _checked(one, x, jax.tree_util.keystr(path))
        for one, (path, x) in zip(ones, named, strict=True)
    ]


def _checked(one: Any, leaf: Any, path: str) -> MuonDimensionNumbers:
    """Numbers with their axes as tuples; raises unless the leaf has such axes."""
    name = f"`muon_weight_dimension_numbers{path}`"
    if not isinstance(one, MuonDimensionNumbers):
        raise ValueError(
            f"{name} must be optax.contrib.MuonDimensionNumbers, or None for a leaf that is no "
            f"hidden matrix; got {one!r}."
        )
    rank = jnp.ndim(leaf)
    try:
        rows, columns = (_axes(axes, rank) for axes in one)
        fits = min(len(rows), len(columns)) > 0 and len({*rows, *columns}) == len(rows + columns)
    except (TypeError, IndexError):
        fits, rows, columns = False, (), ()
    if not fits:
        raise ValueError(
            f"{name} must name different axes of shape {jnp.shape(leaf)}, at least one each, by "
            f"Python integers; got {one}. None is for leaves that are no hidden matrix."
        )
    return MuonDimensionNumbers(rows, columns)


def _axes(axes: Any, rank: int) -> tuple[int, ...]:
    """Counted from the front; raises for one that is no integer, or out of range."""
    return tuple(range(rank)[axis] for axis in (axes if isinstance(axes, tuple | list) else [axes]))


def axes_of(numbers: MuonDimensionNumbers) -> tuple[int, ...]:
    """The axes of a matrix, of numbers that were checked."""
    rows, columns = numbers
    assert isinstance(rows, tuple)
    assert isinstance(columns, tuple)
    return rows + columns


class Batch(NamedTuple):
    """A leaf as matrices ``[batch, rows, columns]``: the axes in that order, and their sizes."""

    order: tuple[int, ...]
    sizes: tuple[int, ...]  # of the axes in that order
    shape: tuple[int, int, int]

    def of(self, x: Array) -> Array:
        """The matrices of a leaf."""
        return x.transpose(self.order).reshape(self.shape)

    def back(self, x: Array) -> Array:
        """The leaf of its matrices."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return x.reshape(self.sizes).transpose(inverse)


def batch_of(shape: tuple[int, ...], numbers: MuonDimensionNumbers) -> Batch:
    """How a leaf is a batch, of the numbers that were checked for it.

    Rows are Muon's reduction axes, columns its output axes. Axes that are not named count a matrix
    each.
    """
    rows, columns = numbers
    assert isinstance(rows, tuple)
    assert isinstance(columns, tuple)
    rest = tuple(axis for axis in range(len(shape)) if axis not in rows + columns)
    many, high, wide = (math.prod(shape[axis] for axis in part) for part in (rest, rows, columns))
    order = rest + rows + columns
    return Batch(order, tuple(shape[axis] for axis in order), (many, high, wide))


def orthogonalised(x: Array, numbers: MuonDimensionNumbers, steps: int, dtype: DTypeLike) -> Array:
    """A leaf with each of its matrices orthogonalised, in the leaf's own dtype."""
    batch = batch_of(x.shape, numbers)
    return batch.back(newton_schulz(batch.of(x), steps, dtype)).astype(x.dtype)


def steps_and_period(ns_steps: int | None, period: int | None) -> tuple[int, int]:
    """Both with their defaults; raises unless they are static and in range."""
    steps = NS_STEPS if ns_steps is None else ns_steps
    period = PERIOD if period is None else period
    check_static("ns_steps", steps, "int or None", MOST_STEPS)
    check_static("period", period, "int or None", LONGEST)
    return steps, period


def newton_schulz_flops(
    params: Any,
    muon_weight_dimension_numbers: Choice = None,
    ns_steps: int | None = None,
    period: int | None = None,
) -> float:
    """Floating-point operations that :func:`distlion_jax.distributed_muon` adds to a worker's step.

    With r the smaller and s the larger side of a matrix, ``ns_steps (4 r^2 s + 2 r^3)``. Of square
    matrices that is ``30 r`` a parameter, where forward and backward pass are 6 a parameter and
    token.

    Args:
      params: tree of arrays or ``jax.ShapeDtypeStruct``.
      muon_weight_dimension_numbers, ns_steps, period: as in ``distributed_muon``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
      >>> newton_schulz_flops(params) / (1024 * 1024)
      30720.0
    """
    steps, period = steps_and_period(ns_steps, period)
    leaves = jax.tree.leaves(params)
    numbers = numbers_of(muon_weight_dimension_numbers, params)
    shapes = [batch_of(jnp.shape(x), one).shape
              for x, one in zip(leaves, numbers, strict=True) if one is not None]  # fmt: skip
    return sum(flops(shape, steps) for shape in shapes) / period
