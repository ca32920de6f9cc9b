# SPDX-License-Identifier: Apache-2.0
"""The collectives of a compiled program, read from its HLO."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from distlion_jax._groups import group_size, groups_of, numbers_of_devices
from distlion_jax._rules import AxisName
from distlion_jax._vote import wire
from distlion_jax._vote.costs import Collective

__all__ = ["Crossing", "compiled_collectives", "crossings", "leaks"]

UPDATE = "distlion_update"  # the scope that names what updates of replicas send, in programs
SMALL = 1024  # bytes: scalars, keys; what TPUs send to other slices is padded to 512

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
        Collective(move.op, dtype, elements, group_size(move.attributes, workers))
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
    be all. :func:`leaks` lists what is there beside them.

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
    inside, between = numbers_of_devices(mesh)
    found = []
    for move in _moves(text):
        groups = groups_of(move.attributes, inside, between)
        if any((at[group] != at[group[0]]).any() for group in groups):
            n = group_size(move.attributes, mesh.size)
            found += [Crossing(Collective(move.op, dtype, size, n), move.operation)
                      for dtype, size in move.arrays]  # fmt: skip
    return found


def leaks(compiled: Any, mesh: Mesh, axis_name: AxisName = "replica") -> list[Crossing]:
    """What a compiled program moves along the axis that votes, beside updates and scalars.

    There should be nothing. The compiler moves activations between replicas, over the slow links,
    where it cannot split an operation inside a replica. Mend the operation that is named: constrain
    what it gathers from, for example the table of an embedding
    (``jax.lax.with_sharding_constraint(table, NamedSharding(mesh, P("tensor", None)))``), or look
    up by a one-hot product. :func:`distlion_jax.make_train_step` looks by itself, and warns.

    Updates are those of :func:`distlion_jax.sharded` and of the ready-made step, and every vote.

    Args:
      compiled, mesh, axis_name: as in :func:`crossings`.

    Returns:
      What is larger than 1,024 bytes on a device.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((2, 4), ("replica", "fsdp"), axis_types=(AxisType.Auto,) * 2)
      >>> x = jax.device_put(jnp.ones((8, 4096)), NamedSharding(mesh, P("replica", "fsdp")))
      >>> leaks(jax.jit(lambda x: x.sum(0)).lower(x).compile(), mesh)[0].operation
      'jit(<lambda>)/reduce_sum'
    """
    found = crossings(compiled, mesh, axis_name)
    return [one for one in found
            if UPDATE not in one.operation and one.collective.operand_bytes > SMALL]  # fmt: skip
