# SPDX-License-Identifier: Apache-2.0
"""A worker whose model is split over devices of its own: what they must agree on in a round.

In:  specs of the leaves, and the mesh that JAX traces under.
Out: :class:`Shards`; a region in which every device votes on its own shards.

A *worker* is then a replica of the model, on several devices. A vote's ``update`` runs where only
the vote's axis is manual: arrays have their whole shapes, and the compiler splits them over the
replica's other axes. Collectives on such arrays move whole leaves, so the round itself goes into a
region in which those axes are manual too. There each device packs, sends and decodes its own
shards, with its peers of the other replicas, and four things are agreed on inside a replica:

* whether all numbers are finite: one bad shard makes the whole replica sit out;
* coins: of the shard, so that copies of a shard toss alike and different shards do not;
* health: a shard that has copies counts once;
* the scale of noise, likewise.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from distlion_jax._rules import AxisName
from distlion_jax._vote import wire
from distlion_jax._vote.words import Layout


@dataclasses.dataclass(frozen=True)
class Shards:
    """How the leaves of a round are split over the devices of a worker."""

    sizes: dict[str, int]  # of the axes that a worker's own devices lie on
    specs: tuple[P, ...]  # of the leaves
    whole: Layout  # of the leaves before they were split
    index: dict[str, Array] | None = None  # int32[]: where this device lies; set in the region

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that a worker's own devices lie on."""
        return tuple(self.sizes)

    def all(self, flag: Array) -> Array:
        """``bool[]``: whether the flag is true on all devices of the worker.

        Outside the region it is of whole leaves, and so of all devices, already.
        """
        if self.index is None:
            return flag
        return wire.largest((~flag).astype(jnp.int32), self.axes) == 0

    def total(self, x: Array) -> Array:
        """Sum over all devices of the worker."""
        return wire.total(x, self.axes)

    def total_of_leaves(self, x: Array) -> Array:
        """Sum over the devices of ``x[leaves]``, each leaf's shards counted once."""
        firsts = [self.is_first(frozenset(names(spec))) for spec in self.specs]
        return self.total(jnp.where(jnp.stack(firsts), x, 0))

    def salts(self) -> list[Array]:
        """:meth:`salt` of each leaf."""
        return [self.salt(frozenset(names(spec))) for spec in self.specs]

    def kinds(self) -> list[tuple[frozenset[str], list[bool]]]:
        """Sets of axes that some leaf is split over; for each, which leaves are split over them."""
        used = [frozenset(names(spec)) for spec in self.specs]
        return [(kind, [one == kind for one in used]) for kind in dict.fromkeys(used)]

    def salt(self, kind: frozenset[str]) -> Array:
        """``int32[]``: which of the shards this device holds, of a leaf split over these axes."""
        assert self.index is not None
        salt = jnp.int32(0)
        for name, size in self.sizes.items():
            if name in kind:
                salt = salt * size + self.index[name]
        return salt

    def is_first(self, kind: frozenset[str]) -> Array:
        """``bool[]``: whether this device holds the first copy of a leaf split over these axes."""
        assert self.index is not None
        others = [self.index[name] == 0 for name in self.axes if name not in kind]
        return jnp.all(jnp.stack([*others, jnp.bool_(True)]))


def names(spec: P) -> tuple[str, ...]:
    """The axes that a spec names."""
    parts = (part if isinstance(part, tuple) else (part,) for part in spec)
    return tuple(name for part in parts for name in part if name is not None)


def inner_sizes(axis_name: AxisName) -> dict[str, int]:
    """Axes of the mesh that the compiler still splits arrays over, where the vote's are manual.

    Empty where there are none, or only of size 1; and where no mesh is in use, as under pmap.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if any(kinds.get(name) != AxisType.Manual for name in wire.axes(axis_name)):
        return {}
    left = {name: mesh.shape[name] for name, kind in kinds.items() if kind != AxisType.Manual}
    explicit = [name for name in left if kinds[name] == AxisType.Explicit and left[name] > 1]
    if explicit:
        raise ValueError(
            f"`mesh` has Explicit axes {explicit} beside the vote's {axis_name!r}, along which it "
            "cannot tell how leaves are split. Make the mesh with "
            "axis_types=(jax.sharding.AxisType.Auto,) * len(axes)."
        )
    return left if math.prod(left.values()) > 1 else {}


def find(updates: Any, specs: Any, axis_name: AxisName, layout: Layout) -> Shards | None:
    """How the updates are split inside this worker; None where the worker is one device.

    Args:
      updates: this worker's own gradients. Leaves may be masked out.
      specs: a ``PartitionSpec`` for each leaf, those that are masked out among them, in the order
        of the leaves; None: unknown.
      axis_name: the vote's axis, or axes.
      layout: of the updates.
    """
    sizes = inner_sizes(axis_name)
    if not sizes:
        return None
    if specs is None:
        raise ValueError(
            f"`mesh` has axes {list(sizes)} beside the vote's {axis_name!r}, which split the "
            "parameters: without their specs every worker would send whole leaves from each of its "
            "devices. Pass tx.update(..., specs=specs), a tree of PartitionSpec as the parameters; "
            "or use distlion_jax.sharded(tx, mesh, specs) or make_train_step, which do."
        )
    is_masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    every = jax.tree.leaves(updates, is_leaf=is_masked)
    given = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))
    if len(given) != len(every) or not all(isinstance(spec, P) for spec in given):
        raise ValueError(
            f"`specs` must hold a PartitionSpec for each of the {len(every)} parameters, P() for "
            f"those that are not split; got {len(given)} leaves."
        )
    present = [spec for spec, x in zip(given, every, strict=True) if not is_masked(x)]
    return Shards(sizes, tuple(P(*spec) for spec in present), layout)
