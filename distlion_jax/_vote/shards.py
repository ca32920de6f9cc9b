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
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from distlion_jax._rules import AxisName
from distlion_jax._vote import wire
from distlion_jax._vote.words import GROUP, Layout

LARGE = 4 * GROUP  # coordinates of a shard from which on its copies share the vote


class Shared(NamedTuple):
    """How the devices that hold the same shard of a leaf share the vote on it."""

    along: int  # the axis of the leaf
    over: tuple[str, ...]  # axes of the mesh


@dataclasses.dataclass(frozen=True)
class Shards:
    """How the leaves of a round are split over the devices of a worker."""

    sizes: dict[str, int]  # of the axes that a worker's own devices lie on
    specs: tuple[P, ...]  # of the leaves
    whole: Layout  # of the leaves before they were split
    shared: tuple["Shared | None", ...]  # of the leaves that several devices hold alike
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
        return self.total(jnp.where(jnp.stack([self.is_first(k) for k in self.used()]), x, 0))

    def salts(self) -> list[Array]:
        """:meth:`salt` of each leaf."""
        return [self.salt(kind) for kind in self.used()]

    def used(self) -> list[frozenset[str]]:
        """The axes that the vote on each leaf is split over."""
        pairs = zip(self.specs, self.shared, strict=True)
        return [frozenset((*names(spec), *(one.over if one else ()))) for spec, one in pairs]

    def ballots(self, leaves: Sequence[Array]) -> list[Array]:
        """Of this device's shards what it votes on: of large ones that others hold too, a part."""
        pairs = zip(leaves, self.shared, strict=True)
        return [x if one is None else self._part(x, one.along, one.over) for x, one in pairs]

    def verdicts(self, leaves: Sequence[Array], aggregation: str) -> list[Array]:
        """Whole shards of the parts that were voted on; a majority's travel in a byte each."""

        def join(x: Array, one: Shared | None) -> Array:
            if one is None:
                return x
            narrow = x.astype(jnp.int8) if aggregation == "majority" else x
            return wire.joined(narrow, one.over, one.along).astype(x.dtype)

        return [join(x, one) for x, one in zip(leaves, self.shared, strict=True)]

    def joined(self, x: Array, leaf: int, axes: Collection[int]) -> Array:
        """This device's shard of a leaf, joined with the others' along these axes of the leaf."""
        for axis, over in self._split(leaf, axes):
            x = wire.joined(x, over, axis)
        return x

    def part(self, x: Array, leaf: int, axes: Collection[int]) -> Array:
        """The inverse of :meth:`joined`: this device's part."""
        for axis, over in self._split(leaf, axes):
            x = self._part(x, axis, over)
        return x

    def _part(self, x: Array, axis: int, over: tuple[str, ...]) -> Array:
        """This device's part of an array, along an axis of it that is split over some axes."""
        assert self.index is not None
        place, parts = jnp.int32(0), 1
        for name in over:
            place, parts = place * self.sizes[name] + self.index[name], parts * self.sizes[name]
        size = x.shape[axis] // parts
        return lax.dynamic_slice_in_dim(x, place * size, size, axis)

    def _split(self, leaf: int, axes: Collection[int]) -> list[tuple[int, tuple[str, ...]]]:
        """Of these axes of a leaf, those that are split, and over which of the mesh's."""
        return [(axis, over) for axis, over in split_axes(self.specs[leaf]) if axis in axes]

    def kinds(self) -> list[tuple[frozenset[str], list[bool]]]:
        """Sets of axes that some leaf is split over; for each, which leaves are split over them."""
        used = self.used()
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


def split_axes(spec: P) -> list[tuple[int, tuple[str, ...]]]:
    """The axes of a leaf that are split, and over which of the mesh's."""
    each = enumerate(names(P(part)) for part in spec)
    return [(axis, over) for axis, over in each if over]


def shard_shape(shape: tuple[int, ...], spec: P, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """What one device holds of a leaf."""
    parts = [math.prod(sizes[name] for name in names(P(part))) for part in spec]
    parts += [1] * (len(shape) - len(parts))
    return tuple(size // k for size, k in zip(shape, parts, strict=True))


def shared_vote(shape: tuple[int, ...], spec: P, sizes: Mapping[str, int]) -> Shared | None:
    """How the copies of a large shard share its vote; None: each votes on all of it.

    Copies that all vote would send the same bits once for each, over the same slow link. Small ones
    do: they are not worth a message inside the worker.
    """
    over = tuple(name for name, size in sizes.items() if name not in names(spec) and size > 1)
    mine, copies = shard_shape(shape, spec, sizes), math.prod(sizes[name] for name in over)
    if copies == 1 or math.prod(mine) < LARGE:
        return None
    axes = [axis for axis, size in enumerate(mine) if size % copies == 0]
    return Shared(axes[0], over) if axes else None


def voted_shape(shape: tuple[int, ...], spec: P, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """What one device votes on, of a leaf."""
    mine, one = shard_shape(shape, spec, sizes), shared_vote(shape, spec, sizes)
    if one is None:
        return mine
    parts = math.prod(sizes[name] for name in one.over)
    return tuple(size // parts if axis == one.along else size for axis, size in enumerate(mine))


def sharding_of(x: Any) -> Any:
    """The sharding of an array or its shape; None where nothing says, as of a traced one."""
    return None if isinstance(x, Tracer) else getattr(x, "sharding", None)


def explicit_axes(mesh: Any) -> list[str]:
    """Axes of a mesh whose arrays say in their types how they are split."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [name for name, kind in kinds if kind == AxisType.Explicit and mesh.shape[name] > 1]


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
    if explicit := explicit_axes(mesh):
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
    shared = tuple(
        shared_vote(leaf.shape, spec, sizes)
        for leaf, spec in zip(layout.leaves, present, strict=True)
    )
    return Shards(sizes, tuple(P(*spec) for spec in present), layout, shared)
