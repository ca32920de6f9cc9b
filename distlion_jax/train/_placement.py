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

from distlion_jax._rules import AxisName
from distlion_jax._vote import wire
from distlion_jax.exchanges import is_once

REPLICATED = P()


def state_specs(state: Any, axis_name: AxisName = "data") -> Any:
    """``PartitionSpec`` of every part of a state, for ``in_specs`` and ``out_specs``.

    Args:
      state: a transformation's state, or its shapes.
      axis_name: the axis, or axes, that the workers lie on.

    Returns:
      A prefix of the state: the worker axis for what is each worker's own, ``P()`` for what is
      :func:`distlion_jax.replicated`.

    Examples:
      >>> from distlion_jax import ReplicatedState
      >>> state_specs({"count": 0, "same": ReplicatedState({"mu": 0})})["same"] == P()
      True
    """
    by_worker = P(wire.axes(axis_name))
    return jax.tree.map(lambda x: REPLICATED if is_once(x) else by_worker, state, is_leaf=is_once)


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

    def state(self, state: Any) -> Any:
        """Of a transformation's state with a worker axis, or of its shapes."""
        return state_specs(state, self.vote_axes)

    def shardings(self, specs: Any) -> Any:
        """Specs on this mesh."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)
