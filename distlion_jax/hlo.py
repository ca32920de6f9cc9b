# SPDX-License-Identifier: Apache-2.0
"""The collectives of a compiled program, read from its HLO."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from distlion_jax._rules import AxisName
from distlion_jax._vote import wire
from distlion_jax._vote.costs import Collective

__all__ = ["Crossing", "compiled_collectives", "crossings"]

_OPS = (
    "all-gather",
    "all-to-all",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
_INSTRUCTION = re.compile(r"%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")  # name, result, op, rest
_DCN = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")


def _arrays(text: str) -> list[tuple[str, int]]:
    """Every array type in the text, as ``(dtype, elements)``."""
    return [
        (dtype, math.prod(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(text)
    ]


_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")  # {{0,1},{2,3}}
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=(\S+)")  # [groups,size]<=[2,4]T(1,0)
# mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x','y':(1)2}: axes of XLA's own, or parts of them.
_MESH = re.compile(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}")
_AXIS = re.compile(r"('[^']*')(?::\((\d+)\)(\d+))?")  # a part: behind so many, of so many
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
_SLICES = re.compile(r"megascale_target=(?:\{|\"|)\{([\d,]+)\}")  # the first group, of slices


def _ints(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def _lists(text: str) -> list[list[int]]:
    return [_ints(group) for group in re.findall(r"\{([\d,]+)\}", text)]


def _replica_groups(attributes: str) -> list[list[int]]:
    """Devices that take part together, as places in the program's list of them; [] if not said."""
    if match := _LISTED.search(attributes):
        return _lists(match[1])
    if match := _IOTA.search(attributes):
        return _devices(match[2]).reshape(_ints(match[1])).tolist()
    if match := _MESH.search(attributes):
        return _mesh_groups(*match.groups())
    return []


def _devices(text: str) -> np.ndarray:
    """Devices in the order that ``[2,4]T(1,0)`` says, or that is listed."""
    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not match:
        return np.array(_ints(text))
    sizes = _ints(match[1])
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return (ids.transpose(_ints(match[2])) if match[2] else ids).reshape(-1)


def _mesh_groups(axes: str, devices: str | None, together: str) -> list[list[int]]:
    """Groups along axes of a mesh: devices whose places are equal but for these axes."""
    sizes = {name: int(size) for name, size in re.findall(r"('[^']*')=(\d+)", axes)}
    count = math.prod(sizes.values())
    places = np.stack(np.unravel_index(np.arange(count), list(sizes.values())), axis=1)
    for name, before, size in _AXIS.findall(together):
        k, whole = list(sizes).index(name), sizes[name]
        behind = whole // (int(before or 1) * int(size or whole))
        places[:, k] -= places[:, k] // behind % int(size or whole) * behind
    groups: dict[tuple[int, ...], list[int]] = {}
    ids = _devices(devices) if devices else np.arange(count)
    for place, device in zip(map(tuple, places.tolist()), ids.tolist(), strict=True):
        groups.setdefault(place, []).append(device)
    return list(groups.values())


def _group_size(attributes: str, fallback: int) -> int:
    """How many take part together."""
    if groups := _replica_groups(attributes):
        return len(groups[0])
    slices = _SLICES.search(attributes)
    return len(_ints(slices[1])) if slices else fallback


class _Move(NamedTuple):
    """An instruction that moves arrays between devices."""

    op: str
    arrays: list[tuple[str, int]]  # dtypes and elements, of one device
    attributes: str


def _moves(text: str) -> Iterator[_Move]:
    """The instructions of a program that move arrays, in its order."""
    results: dict[str, list[tuple[str, int]]] = {}  # of the instructions so far, by name
    if not _INSTRUCTION.search(text):
        raise ValueError(
            f"`compiled` holds no HLO instruction (%name = type op(...)); it begins {text[:40]!r}. "
            "Pass jax.jit(f).lower(...).compile(), or its as_text()."
        )
    for name, result, op, rest in _INSTRUCTION.findall(text):
        results[name] = _arrays(result)
        op = op.removesuffix("-start")
        operands, _, attributes = rest.partition("), ")
        arrays = [a for x in re.findall(r"%([\w.\-]+)", operands) for a in results.get(x, [])]
        if op == "send" and (match := _DCN.search(attributes)):
            # To other slices of TPUs. Its result holds what is sent, and a token.
            yield _Move(match[1].lower().replace("_", "-"), results[name][:1], attributes)
        elif op in _OPS:
            if op == "all-to-all":
                arrays = [(arrays[0][0], sum(elements for _, elements in arrays))]
            yield _Move(op, arrays, attributes)


def compiled_collectives(compiled: Any, workers: int) -> list[Collective]:
    """The collectives in a compiled program, in program order, with this worker's operand sizes.

    One :class:`Collective` per array that the program moves. A tuple is one array where the tuple
    only splits it by peer (an all-to-all on CPU, which has an operand for each worker); where XLA's
    combiner merged several arrays into one instruction (an all-reduce of a tuple) each is listed.
    Of an asynchronous pair the ``-start`` is read, its ``-done`` moves nothing. Branches of a
    conditional count as if taken, and the body of a loop once. What TPUs send to other slices over
    the data centre's network is listed by what it does there, as an all-gather.

    Args:
      compiled: ``jax.jit(f).lower(...).compile()``, or the HLO text of one (CPU, GPU or TPU).
      workers: number of devices, used where the program does not state a group.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> summed = jax.pmap(lambda x: jax.lax.psum(x, "data"), axis_name="data")
      >>> compiled = summed.lower(jnp.ones((8, 100))).compile()
      >>> [c.op for c in compiled_collectives(compiled, workers=8)]
      ['all-reduce']
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    return [
        Collective(move.op, dtype, elements, _group_size(move.attributes, workers))
        for move in _moves(text)
        for dtype, elements in move.arrays
    ]


class Crossing(NamedTuple):
    """An array that a compiled program moves between workers."""

    collective: Collective
    operation: str  # the JAX operation that it came from, as XLA names it


def crossings(compiled: Any, mesh: Mesh, axis_name: AxisName = "replica") -> list[Crossing]:
    """What a compiled program moves along the axis that votes.

    With a model that is split over the mesh's other axes, the vote's words and a few scalars should
    be all. Anything else is moved by the compiler, where it cannot split an operation inside a
    replica: activations, over the slow links. Look for large ones, and mend the operation that is
    named: constrain the operand that it gathers from, for example the table of an embedding
    (``jax.lax.with_sharding_constraint(table, P("tensor", None))``), or look up by a one-hot
    product. :func:`distlion_jax.make_train_step` looks by itself, and warns.

    Args:
      compiled: ``jax.jit(f).lower(...).compile()``, or the HLO text of one, of a program that runs
        on the mesh.
      mesh: the mesh.
      axis_name: the vote's axis, or axes.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((2, 4), ("replica", "fsdp"), axis_types=(AxisType.Auto,) * 2)
      >>> x = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P("replica", "fsdp")))
      >>> for what in (lambda x: x.sum(0), lambda x: x.sum(1)):
      ...     compiled = jax.jit(what).lower(x).compile()
      ...     print([one.collective.op for one in crossings(compiled, mesh)])
      ['all-reduce']
      []
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    places = [mesh.axis_names.index(name) for name in wire.axes(axis_name)]
    at = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), axis=1)[:, places]
    found = []
    for move in _moves(text):
        groups = _replica_groups(move.attributes)
        if not groups and (pairs := _PAIRS.search(move.attributes)):
            groups = _lists(pairs[1])
        groups = groups or [list(range(mesh.size))]  # not said, or between slices
        if any((at[group] != at[group[0]]).any() for group in groups if group):
            name = re.search(r'op_name="([^"]*)"', move.attributes)
            n = _group_size(move.attributes, mesh.size)
            found += [Crossing(Collective(move.op, dtype, size, n), name[1] if name else "")
                      for dtype, size in move.arrays]  # fmt: skip
    return found
