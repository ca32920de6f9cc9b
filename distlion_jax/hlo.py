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
_NAME = re.compile(r'op_name="([^"]*)"')
_DCN = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")


def _arrays(text: str) -> list[tuple[str, int]]:
    """Every array type in the text, as ``(dtype, elements)``."""
    return [
        (dtype, math.prod(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(text)
    ]


_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")  # {{0,1},{2,3}}
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}")  # jax >= 0.12
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
_TARGET = re.compile(r'_xla_megascale_target=("[^"]*"|\{\{.*?\}\})')  # between slices
_SLICE = 100_000  # device 3 of the first slice is 100003


def _ints(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def _lists(text: str) -> list[list[int]]:
    return [_ints(group) for group in re.findall(r"\{([\d,]+)\}", text)]


def _replica_groups(attributes: str) -> list[list[int]]:
    """Devices that take part together, as places in the program's list of them; [] if not said."""
    if match := _LISTED.search(attributes):
        return _lists(match[1])
    if match := _IOTA.search(attributes):  # [groups,size]<=[sizes of the axes]T(their order)
        sizes, order = _ints(match[2]), match[3]
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        ids = ids.transpose(_ints(order)) if order else ids
        return ids.reshape(_ints(match[1])).tolist()
    if match := _MESH.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", match[1])}
        ids, together = np.arange(math.prod(sizes.values())), match[2].split(",")
        names = [*(name for name in sizes if name not in together), *together]
        ids = ids.reshape(list(sizes.values())).transpose([list(sizes).index(x) for x in names])
        return ids.reshape(-1, math.prod(sizes[name] for name in together)).tolist()
    return []


def _between_slices(target: str) -> list[list[int]]:
    """Devices of several slices of TPUs that take part together, numbered as in the target."""
    slices, product, chips = target.strip('"').partition("x")
    if not product:  # {{100000,200000}}, or {{100000->200000}}
        return _lists(target.replace("->", ","))
    ends = _ints(chips.strip("{}").replace(":", ","))  # {1,2}x{0:3}: four groups of two
    return [[n * _SLICE + k for n in _lists(slices)[0]] for k in range(ends[0], ends[-1] + 1)]


def _numbers(mesh: Mesh) -> tuple[list[dict[int, int]], dict[int, int]]:
    """Places in the mesh by the numbers that a program gives them: in each slice, between slices.

    A slice of TPUs counts its own, in the order of the mesh; between slices they go by their ids.
    """
    slices: dict[int, list[int]] = {}
    for place, device in enumerate(mesh.devices.flat):
        slice_index = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        slices.setdefault(slice_index, []).append(place)
    between: dict[int, int] = {}
    for slice_index, places in slices.items():
        by_id = sorted(places, key=lambda place: mesh.devices.flat[place].id)
        between |= {(slice_index + 1) * _SLICE + k: place for k, place in enumerate(by_id)}
    return [dict(enumerate(places)) for places in slices.values()], between


def _groups(
    attributes: str, inside: list[dict[int, int]], between: dict[int, int]
) -> list[list[int]]:
    """Devices that take part together, as places in the mesh; all of it where that is not said."""
    if target := _TARGET.search(attributes):
        groups, known = _between_slices(target[1]), [between]
    else:
        pairs = _PAIRS.search(attributes)
        groups, known = _replica_groups(attributes) or _lists(pairs[1] if pairs else ""), inside
    everyone = [list(between.values())]
    try:
        return [[at[x] for x in group] for at in known for group in groups if group] or everyone
    except KeyError:  # numbers that are not of this mesh
        return everyone


def _group_size(attributes: str, fallback: int) -> int:
    """How many take part together."""
    if groups := _replica_groups(attributes):
        return len(groups[0])
    target = _TARGET.search(attributes)
    together = _lists(target[1]) if target else []
    return len(together[0]) if together else fallback


class _Move(NamedTuple):
    """An instruction that moves arrays between devices."""

    op: str
    arrays: list[tuple[str, int]]  # dtypes and elements, of one device
    attributes: str
    operation: str  # the JAX operation's name; where it has none, of what made its operands


def _moves(text: str) -> Iterator[_Move]:
    """The instructions of a program that move arrays, in its order."""
    results: dict[str, list[tuple[str, int]]] = {}  # of the instructions so far, by name
    operations: dict[str, str] = {}
    if not _INSTRUCTION.search(text):
        raise ValueError(
            f"`compiled` holds no HLO instruction (%name = type op(...)); it begins {text[:40]!r}. "
            "Pass jax.jit(f).lower(...).compile(), or its as_text()."
        )
    for name, result, op, rest in _INSTRUCTION.findall(text):
        results[name] = _arrays(result)
        op = op.removesuffix("-start")
        operands, _, attributes = rest.partition("), ")
        given = re.findall(r"%([\w.\-]+)", operands)
        arrays = [a for x in given for a in results.get(x, [])]
        said = _NAME.search(attributes)
        operation = said[1] if said else next(filter(None, map(operations.get, given)), "")
        operations[name] = operation
        if op == "send" and (match := _DCN.search(attributes)):
            # To other slices of TPUs. Its result holds what is sent, and a token.
            kind = match[1].lower().replace("_", "-")
            kind = "collective-permute" if kind == "one-to-one" else kind
            yield _Move(kind, results[name][:1], attributes, operation)
        elif op in _OPS:
            if op == "all-to-all":
                arrays = [(arrays[0][0], sum(elements for _, elements in arrays))]
            yield _Move(op, arrays, attributes, operation)


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
    operation: str  # the JAX operation that it came from, as XLA names it; else of what it moves


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
    inside, between = _numbers(mesh)
    found = []
    for move in _moves(text):
        groups = _groups(move.attributes, inside, between)
        if any((at[group] != at[group[0]]).any() for group in groups):
            n = _group_size(move.attributes, mesh.size)
            found += [Crossing(Collective(move.op, dtype, size, n), move.operation)
                      for dtype, size in move.arrays]  # fmt: skip
    return found
