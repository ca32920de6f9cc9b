# SPDX-License-Identifier: Apache-2.0
"""Which leaves of a model are hidden matrices, told by their paths and shapes.

In:  parameters. Out: a tree in the convention of ``optax.contrib.muon``: ``MuonDimensionNumbers``
     for a hidden matrix, None for any other leaf.

A leaf of three axes can be a stack of matrices, or one matrix whose heads lie apart. Shapes of
other leaves tell the two apart where they can; where not, the user is asked.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

__all__ = ["NOT_HIDDEN", "hidden_matrices"]

# Searched in a leaf's path, such as "blocks/0/mlp/kernel". All but heads are looked for in the last
# two names alone: a norm inside of "PreNormBlock_0/..." says nothing of the layers beside it.
_LAST = r"(^|/)(?=[^/]+(/[^/]+)?$)"  # begins one of the last two names
NOT_HIDDEN = "|".join(
    (
        _LAST + r"[^/]*(?i:embed|logit|vocab|classifier)",
        _LAST + r"([^/]*_)?(emb|embs|tokemb|posemb)(_|/|$)",
        _LAST + r"([^/]*(norm|Norm)|ln|rms)(_?\w?\d*)(/|$)",
        _LAST + r"(wte|wpe|pos|position|positional|score|readout|qa_outputs|W_E|W_U|W_pos)(/|$)",
        r"(^|/)((lm|mlp|cls|output|classification|policy|value)_?)?head(/|$)",
        r"(^|/)(LM|Policy|Value|Output|Mlp|MLP)Head(_\d+)?(/|$)",
        r"(bias|scale|offset|gamma|beta|gain|table|tokens?|prompts?|latents|codebook|_log)[^/]*$",
        r"(^|/)(b|b\w|g)$",
    )
)
_VECTOR = re.compile(
    r"(bias|scale|offset|gamma|beta|gain)[^/]*$|(^|/)(b|g)$|(norm|Norm|ln)\w*/\w+$"
)
_ATTENTION = re.compile(r"^(.*/|)(query|key|value|out)(/kernel)$")  # Flax's names
_CONVOLUTION = re.compile(r"(?i:conv)[^/]*/[^/]*$")
Shape = tuple[int, ...]


def hidden_matrices(params: Any, exclude: str = NOT_HIDDEN) -> Any:
    """The leaves that :func:`distlion_jax.distributed_muon` orthogonalises by default.

    They are the floating-point leaves of two axes, less those with a path that says otherwise:
    embeddings, heads, norms, biases. Two kinds of leaves with more axes count too:

    * Stacks of matrices, ``[layers, rows, columns]``, as ``nn.scan`` and ``nnx.vmap`` make them,
      with the layers on the first axis or the second. The norms and biases beside them tell: they
      have an axis of layers as well.
    * Kernels of Flax's attention, ``[width, heads, features]``. Each is one matrix.

    All other leaves are left out. Convolutions are among them.

    A head that Flax has named ``Dense_0`` cannot be told from a hidden layer, nor can anything in a
    tree without names. Name it, exclude it here, or give the tree.

    Args:
      params: tree of arrays or ``jax.ShapeDtypeStruct``.
      exclude: regular expression, searched in a leaf's path, its names joined by ``/``.

    Returns:
      A tree as ``params``: ``optax.contrib.MuonDimensionNumbers``, or None for the other leaves.

    Raises:
      ValueError: for a leaf of three axes that can be a stack as well as one matrix; for an
        ``exclude`` that is no regular expression.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"embed": jnp.zeros((9, 4)), "mlp": {"w": jnp.zeros((4, 8)), "b": jnp.zeros(8)}}
      >>> print(hidden_matrices(params)["mlp"]["w"])
      MuonDimensionNumbers(reduction_axis=0, output_axis=1)
      >>> mine = hidden_matrices(params, exclude=NOT_HIDDEN + "|^mlp/")  # a pattern of one's own
      >>> print(mine["mlp"]["w"])
      None
    """
    try:
        excluded = re.compile(exclude)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"`exclude` must be a regular expression, as '^Dense_0/'; got {exclude!r}: {error}."
        ) from error
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    if len(leaves) == 1 and not leaves[0][0] and jnp.ndim(leaves[0][1]) == 0:
        raise ValueError(
            f"`params` is a single number, {leaves[0][1]!r}: optax.inject_hyperparams takes a "
            "function for a schedule and calls it with the step. Name it in "
            "static_args=('muon_weight_dimension_numbers',)."
        )
    # nnx has the array in a field of its own.
    names = [_name(path).removesuffix("/value") for path, _ in leaves]
    shapes = [jnp.shape(x) if _is_float(x) else () for _, x in leaves]
    known = list(zip(names, shapes, strict=True))
    return treedef.unflatten(
        [None if excluded.search(name) else _numbers(name, shape, known) for name, shape in known]
    )


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_float(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def _numbers(
    name: str, shape: Shape, known: Sequence[tuple[str, Shape]]
) -> MuonDimensionNumbers | None:
    """The axes of one leaf; None for a leaf that is no matrix."""
    if len(shape) == 2:
        return MuonDimensionNumbers()
    if len(shape) < 2 or _CONVOLUTION.search(name):
        return None
    if whole := _of_attention(name, dict(known)):
        return whole
    axis = _stack_axis(name, shape, known)
    layer = shape if axis is None else _without(shape, axis)
    numbers = None
    if len(layer) == 2:
        numbers = MuonDimensionNumbers()
    elif axis is not None:
        numbers = _of_attention(name, {path: _without(one, axis) for path, one in known})
    if numbers is None and len(layer) == 3:
        raise ValueError(
            f"`params` {name!r} of shape {shape} can be a stack of matrices as well as one matrix. "
            "Say which in muon_weight_dimension_numbers: MuonDimensionNumbers(1, 2) for a stack, "
            "MuonDimensionNumbers(0, (1, 2)) for one matrix of [width, heads, features], "
            "MuonDimensionNumbers((0, 1), 2) for one of [heads, features, width], or None to leave "
            "it out."
        )
    if numbers is None or axis is None:
        return numbers
    return MuonDimensionNumbers(*(_shifted(axes, axis) for axes in numbers))


def _without(shape: Shape, axis: int) -> Shape:
    return shape[:axis] + shape[axis + 1 :]


def _shifted(axes: Any, by: int) -> Any:
    """Axes of a layer as those of a stack of them, which has one more."""
    if isinstance(axes, int):
        return axes + (axes >= by)
    return tuple(axis + (axis >= by) for axis in axes)


def _stack_axis(name: str, shape: Shape, known: Sequence[tuple[str, Shape]]) -> int | None:
    """The axis of layers; None where nothing says that the leaf is a stack.

    Norms and biases of a layer have one axis. Where those beside the leaf, under the first common
    name that has some, have two, they are of several layers. Then the axis of layers is the one
    along which all leaves under that name are as long. If both axes are, look further up.
    """
    parts = name.split("/")
    module = name.rpartition("/")[0]
    if any(one == shape[1:] and path.rpartition("/")[0] == module for path, one in known):
        return None  # it has a bias as of one layer, of [width, heads, features]
    for i in range(len(parts) - 1, -1, -1):
        above = "".join(f"{part}/" for part in parts[:i])
        beside = [(path, one) for path, one in known if path.startswith(above)]
        vectors = [one for path, one in beside if _VECTOR.search(path)]
        if not vectors:
            continue
        if any(len(one) != 2 for one in vectors):
            return None
        axes = [axis for axis in (0, 1) if axis < len(shape) and
                all(len(one) > axis and one[axis] == shape[axis] for _, one in beside)]  # fmt: skip
        if len(axes) < 2:
            return axes[0] if axes else None
    return None


def _of_attention(name: str, shapes: dict[str, Shape]) -> MuonDimensionNumbers | None:
    """The axes of a kernel of Flax's attention; None if it is none.

    Its kernels are [width, heads, features], and [heads, features, width] on the way out. The first
    axes of stacks would be as long.
    """
    if not (names := _ATTENTION.match(name)):
        return None
    before, role, after = names.groups()
    query, out = (shapes.get(f"{before}{x}{after}", ()) for x in ("query", "out"))
    if not (len(query) == len(out) == 3 and query[1:] == out[:2] and query[0] != out[0]):
        return None
    return MuonDimensionNumbers((0, 1), 2) if role == "out" else MuonDimensionNumbers(0, (1, 2))
