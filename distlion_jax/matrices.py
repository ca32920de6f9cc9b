# SPDX-License-Identifier: Apache-2.0
"""Which leaves are hidden matrices, and which of their axes a matrix multiplies.

In:  parameters, and what a user says of them in the convention of ``optax.contrib.muon``: a tree of
     ``MuonDimensionNumbers``, or None for a leaf that is no hidden matrix.
Out: leaves as batches of matrices, and back.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from optax.contrib import MuonDimensionNumbers

from distlion_jax._orthogonal import flops
from distlion_jax._rules import by_params

__all__ = ["NOT_HIDDEN", "hidden_matrices", "newton_schulz_flops"]

Choice = Any | Callable[[Any], Any] | None  # what `muon_weight_dimension_numbers` may be

# Searched in a leaf's path, such as "blocks/0/mlp/kernel". A component "head" or "lm_head" is one,
# "multi_head" and "heads" are attention.
NOT_HIDDEN = (
    r"(?i:embed|logit|classif|vocab|norm)"
    r"|(^|[/_])emb([/_]|$)"
    r"|(^|/)(?!multi_)(\w+_)?head(_?\d+)?(/|$)"
    r"|(^|/)(wte|wpe|pos|position\w*)(/|$)"
    r"|(^|/)(bias|scale|offset|gamma|beta|b)(/value)?$"
)
_ATTENTION = re.compile(r"^(.*/|)(query|key|value|out)(/kernel.*)$")  # Flax's names


def hidden_matrices(params: Any, exclude: str = NOT_HIDDEN) -> Any:
    """The leaves that :func:`distlion_jax.distributed_muon` orthogonalises by default.

    They are the floating-point leaves of two axes, and of three as a stack of matrices
    ``[layers, rows, columns]`` (``nn.scan``, ``nnx.vmap``), less those with a path that says
    otherwise: embeddings, heads, norms, biases. Kernels of Flax's attention, ``[width, heads,
    features]``, are one matrix each. All other leaves, such as convolutions, are left out.

    A head that Flax has named ``Dense_0`` cannot be told from a hidden layer: name it, or exclude
    it here.

    Args:
      params: tree of arrays or ``jax.ShapeDtypeStruct``.
      exclude: regular expression, searched in a leaf's path, its names joined by ``/``.

    Returns:
      A tree as ``params``: ``optax.contrib.MuonDimensionNumbers``, or None for the other leaves.

    Raises:
      ValueError: for attention kernels that could be a stack as well.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"embed": jnp.zeros((9, 4)), "mlp": {"w": jnp.zeros((4, 8)), "b": jnp.zeros(8)}}
      >>> print(hidden_matrices(params)["mlp"]["w"])
      MuonDimensionNumbers(reduction_axis=0, output_axis=1)
      >>> mine = hidden_matrices(params, exclude=NOT_HIDDEN + "|^mlp/")  # a pattern of one's own
      >>> print(mine["mlp"]["w"])
      None
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    shapes = {jax.tree_util.keystr(p, simple=True, separator="/"): jnp.shape(x) for p, x in leaves}

    def numbers(path: str, leaf: Any) -> MuonDimensionNumbers | None:
        shape = shapes[path]
        floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        if not floating or len(shape) not in (2, 3) or re.search(exclude, path):
            return None
        return MuonDimensionNumbers() if len(shape) == 2 else _of_three_axes(path, shapes)

    chosen = [numbers(path, x) for path, (_, x) in zip(shapes, leaves, strict=True)]
    return treedef.unflatten(chosen)


def _of_three_axes(path: str, shapes: dict[str, tuple[int, ...]]) -> MuonDimensionNumbers:
    """A stack of matrices; or a kernel of Flax's attention, by the shapes of its siblings."""
    stack = MuonDimensionNumbers(1, 2)
    if not (names := _ATTENTION.match(path)):
        return stack
    before, name, after = names.groups()
    query, out = (shapes.get(f"{before}{x}{after}", ()) for x in ("query", "out"))
    if len(query) != 3 or query[1:] != out[:2]:  # [width, heads, features], [heads, features, ...]
        return stack
    if query[0] == out[0]:
        raise ValueError(
            f"`params` {path!r} of shape {shapes[path]} can be a stack of {query[0]} matrices as "
            "well as one matrix of Flax's attention. Say which in muon_weight_dimension_numbers: "
            "MuonDimensionNumbers(1, 2) for a stack; for the other MuonDimensionNumbers(0, (1, 2)) "
            "for query, key and value, and MuonDimensionNumbers((0, 1), 2) for out."
        )
    return MuonDimensionNumbers((0, 1), 2) if name == "out" else MuonDimensionNumbers(0, (1, 2))


def _is_number(node: Any) -> bool:
    return node is None or isinstance(node, MuonDimensionNumbers)


def numbers_of(chosen: Any, tree: Any) -> list[MuonDimensionNumbers | None]:
    """What was chosen for each leaf of the tree.

    Args:
      chosen: a tree, a prefix of one, or a function of the parameters that returns one; None:
        :func:`hidden_matrices`.
      tree: parameters or updates; paths, shapes and dtypes matter.
    """
    chosen = by_params(hidden_matrices if chosen is None else chosen)(tree)
    named = jax.tree_util.tree_flatten_with_path(tree)[0]
    try:
        # None is no leaf to JAX, and False is.
        spread = jax.tree.map(
            lambda one, part: jax.tree.map(lambda _: one or False, part),
            chosen, tree, is_leaf=_is_number,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise ValueError(
            "`muon_weight_dimension_numbers` must be a tree of MuonDimensionNumbers and None as "
            f"the parameters are, or a prefix of one: {error}"
        ) from error
    out = []
    ones = jax.tree.leaves(spread, is_leaf=lambda node: isinstance(node, MuonDimensionNumbers))
    for one, (path, x) in zip(ones, named, strict=True):
        _check(one, x, jax.tree_util.keystr(path))
        out.append(one or None)
    return out


def _check(one: Any, leaf: Any, path: str) -> None:
    """Raises unless these are dimension numbers that the leaf has, or none at all."""
    name = f"`muon_weight_dimension_numbers{path}`"
    if one is False:
        return
    if not isinstance(one, MuonDimensionNumbers):
        raise ValueError(
            f"{name} must be optax.contrib.MuonDimensionNumbers, or None for a leaf that is no "
            f"hidden matrix; got {one!r}."
        )
    axes, rank = [*_tuple(one.reduction_axis), *_tuple(one.output_axis)], jnp.ndim(leaf)
    inside = [axis % rank for axis in axes if -rank <= axis < rank]
    if len(set(inside)) < len(axes) or not one.reduction_axis != () != one.output_axis:
        raise ValueError(
            f"{name} must name different axes of shape {jnp.shape(leaf)}, at least one each; got "
            f"{one}. None is for leaves that are no hidden matrix."
        )


def _tuple(axes: Any) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)


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
    """How a leaf of that shape is a batch: axes that are not named count one matrix each."""
    rank = len(shape)
    rows, columns = ([axis % rank for axis in _tuple(axes)] for axes in numbers)
    rest = [axis for axis in range(rank) if axis not in (*rows, *columns)]
    parts = (rest, rows, columns)
    order = tuple(axis for part in parts for axis in part)
    many, high, wide = (math.prod(shape[axis] for axis in part) for part in parts)
    return Batch(order, tuple(shape[axis] for axis in order), (many, high, wide))


def newton_schulz_flops(
    params: Any,
    muon_weight_dimension_numbers: Choice = None,
    ns_steps: int = 5,
    period: int = 1,
) -> float:
    """Floating-point operations that :func:`distlion_jax.distributed_muon` adds to a worker's step.

    With r the smaller and s the larger side of a matrix, ``ns_steps (4 r^2 s + 2 r^3)``: about
    ``30 r`` a parameter, where forward and backward pass are 6 a parameter and token.

    Args:
      params: tree of arrays or ``jax.ShapeDtypeStruct``.
      muon_weight_dimension_numbers, ns_steps, period: as in ``distributed_muon``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
      >>> newton_schulz_flops(params) / (1024 * 1024)
      30720.0
    """
    leaves = jax.tree.leaves(params)
    numbers = numbers_of(muon_weight_dimension_numbers, params)
    shapes = [batch_of(jnp.shape(x), one).shape
              for x, one in zip(leaves, numbers, strict=True) if one is not None]  # fmt: skip
    return sum(flops(shape, ns_steps) for shape in shapes) / period
