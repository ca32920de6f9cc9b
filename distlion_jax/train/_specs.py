# SPDX-License-Identifier: Apache-2.0
"""How the leaves of a model lie on a mesh: specs read from arrays, in one spelling.

In:  arrays that a user's model has placed, and the mesh. Out: a ``PartitionSpec`` for each leaf.
"""

import functools
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distlion_jax._rules import AxisName
from distlion_jax._vote import wire
from distlion_jax._vote.shards import names, sharding_of


@functools.lru_cache(maxsize=4096)
def canonical(spec: P, mesh: Mesh) -> P:
    """The spec without axes of size 1, single axes without a tuple, no None at its end.

    XLA hands specs back in this spelling; in any other a program would be compiled twice.
    """
    parts: list[Any] = []
    for part in spec:
        some = () if part is None else part if isinstance(part, tuple) else (part,)
        some = tuple(name for name in some if mesh.shape[name] > 1)
        parts.append(some[0] if len(some) == 1 else some or None)
    while parts and parts[-1] is None:
        parts.pop()
    return P(*parts)


def is_spec(node: Any) -> bool:
    """Whether a node of a tree says how a leaf lies."""
    return isinstance(node, P | NamedSharding)


def specs_of(tree: Any, mesh: Mesh, axis_name: AxisName, name: str = "params") -> Any:
    """A spec for each leaf, of arrays, their shapes, shardings or specs.

    Args:
      tree: leaves that lie on the mesh. What has no sharding on it, such as a NumPy array, counts
        as replicated.
      mesh: the mesh.
      axis_name: the vote's axis, or axes, over which no leaf may be split.
      name: of the tree, for errors.
    """

    def one(path: Any, x: Any) -> P:
        spec = x if isinstance(x, P) else spec_of(x, mesh)
        if missing := [axis for axis in names(spec) if axis not in mesh.shape]:
            raise ValueError(
                f"`{name}{jax.tree_util.keystr(path)}` is split over {missing}, which are no axes "
                f"of the mesh: it has {mesh.axis_names}."
            )
        if voting := set(names(spec)) & set(wire.axes(axis_name)):
            raise ValueError(
                f"`{name}{jax.tree_util.keystr(path)}` is split over {sorted(voting)}, the axis "
                f"that votes ({axis_name!r}): each worker needs a whole copy of the model. Split "
                "it over the mesh's other axes."
            )
        return canonical(spec, mesh)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_spec)


def spec_of(x: Any, mesh: Mesh) -> P:
    """How an array, a shape or a sharding lies on the mesh; replicated, if nothing says."""
    sharding = x if isinstance(x, NamedSharding) else sharding_of(x)
    if not isinstance(sharding, NamedSharding):
        return P()
    if sharding.mesh.shape_tuple != mesh.shape_tuple and not sharding.is_fully_replicated:
        raise ValueError(
            f"an array lies on a mesh of {dict(sharding.mesh.shape)}, and the step's has "
            f"{dict(mesh.shape)}: place it on the step's mesh."
        )
    return P() if sharding.is_fully_replicated else sharding.spec


def key_path(path: Any) -> tuple[str, ...]:
    """A path as names, so that trees in other containers have the same."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
