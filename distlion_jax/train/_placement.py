# SPDX-License-Identifier: Apache-2.0
"""Where parameters, state, batches and figures live: all ``PartitionSpec`` derive from here.

In:  a mesh, the axes that vote, the axes that average inside a voter.
Out: specs and shardings of everything that a step takes and returns.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import tree_leaves_with_path

from distlion_jax._rules import AxisName
from distlion_jax._vote import wire
from distlion_jax._vote.shards import sharding_of
from distlion_jax.exchanges import is_once
from distlion_jax.train._specs import is_spec, key_path, specs_of

REPLICATED = P()


def state_specs(state: Any, axis_name: AxisName = "data", params: Any = None) -> Any:
    """``PartitionSpec`` of every part of a state, for ``in_specs`` and ``out_specs``.

    Args:
      state: a transformation's state with its worker axis, or its shapes.
      axis_name: the axis, or axes, that the workers lie on.
      params: of a model that is split over other axes of the mesh: its arrays, or their shapes,
        whose ``sharding`` is read. None: every worker is one device.

    Returns:
      Without ``params`` a prefix of the state: the worker axis for what is each worker's own,
      ``P()`` for what is :func:`distlion_jax.replicated`. With ``params`` a spec for every leaf.
      One that has a parameter's shape, and a path that ends in the parameter's, as momenta have, is
      split as the parameter is, behind the worker axis.

    Examples:
      >>> from distlion_jax import ReplicatedState
      >>> state_specs({"count": 0, "same": ReplicatedState({"mu": 0})})["same"] == P()
      True
    """
    by_worker = P(wire.axes(axis_name))
    if params is None:
        return jax.tree.map(
            lambda x: REPLICATED if is_once(x) else by_worker, state, is_leaf=is_once
        )
    placed = [x for x in map(sharding_of, jax.tree.leaves(params)) if isinstance(x, NamedSharding)]
    if not placed:
        raise ValueError(
            "`params` has no array with a sharding to read. Pass arrays that are placed on a mesh, "
            "or jax.ShapeDtypeStruct(..., sharding=...)."
        )
    mesh: Any = placed[0].mesh
    specs = specs_of(params, mesh, axis_name)
    return specs_like(state, axis_name, params, specs)


def specs_like(state: Any, axis_name: AxisName, params: Any, specs: Any) -> Any:
    """A spec for every leaf of a state with a worker axis, of parameters with these specs."""
    paths = [key_path(path) for path, _ in tree_leaves_with_path(params)]
    shapes, each = map(np.shape, jax.tree.leaves(params)), jax.tree.leaves(specs, is_leaf=is_spec)
    known = dict(zip(paths, zip(shapes, each, strict=True), strict=True))

    def one(path: tuple[str, ...], x: Any, lead: P) -> P:
        for start in range(len(path) + 1):  # the longest end that is a parameter's path
            shape, spec = known.get(path[start:], (None, None))
            if spec is not None and np.shape(x)[len(lead) :] == shape:
                return P(*lead, *spec)
        return lead

    def part(path: Any, node: Any) -> Any:
        lead = REPLICATED if is_once(node) else P(wire.axes(axis_name))
        return jax.tree_util.tree_map_with_path(
            lambda inner, x: one(key_path((*path, *inner)), x, lead), node
        )

    return jax.tree_util.tree_map_with_path(part, state, is_leaf=is_once)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a data-parallel step's arrays lie."""

    mesh: Mesh
    vote_axes: AxisName  # a state for each of their workers
    inner_axes: tuple[str, ...] = ()  # what a worker's own devices lie on: they share its state

    def __post_init__(self) -> None:
        missing = [name for name in wire.axes(self.vote_axes) if name not in self.mesh.shape]
        missing += [name for name in self.inner_axes if name not in self.mesh.shape]
        if missing:
            votes = missing[0] in wire.axes(self.vote_axes)
            name = "axis_name" if votes else "mean_axis_name"
            wanted = self.vote_axes if votes else missing[0]
            raise ValueError(
                f"`{name}` {wanted!r} is not an axis of the mesh, which has {self.mesh.axis_names}."
            )

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes that the batch is split over."""
        return wire.axes(self.vote_axes) + self.inner_axes

    @property
    def workers(self) -> int:
        """How many vote."""
        return int(np.prod([self.mesh.shape[name] for name in wire.axes(self.vote_axes)]))

    @property
    def shards(self) -> int:
        """How many share a batch."""
        return int(np.prod([self.mesh.shape[name] for name in self.axes]))

    @property
    def batch(self) -> P:
        """Rows, split over all axes."""
        return P(self.axes)

    @property
    def by_worker(self) -> P:
        """An entry for each worker, such as ``participating``."""
        return P(wire.axes(self.vote_axes))

    @property
    def replica_axes(self) -> tuple[str, ...]:
        """The mesh's other axes, over which the model of a worker is split."""
        return tuple(name for name in self.mesh.axis_names if name not in self.axes)

    def specs(self, params: Any) -> Any:
        """Of parameters, as their arrays lie."""
        return specs_of(params, self.mesh, self.vote_axes)

    def state(self, state: Any, params: Any = None) -> Any:
        """Of a transformation's state with a worker axis, or of its shapes."""
        if params is None or not self.replica_axes:
            return state_specs(state, self.vote_axes)
        return specs_like(state, self.vote_axes, params, self.specs(params))

    def shardings(self, specs: Any) -> Any:
        """Specs on this mesh."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=is_spec)
