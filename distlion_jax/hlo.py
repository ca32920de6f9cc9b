# SPDX-License-Identifier: Apache-2.0
"""The collectives of a compiled program, read from its HLO."""

import math
import re
from typing import Any

from distlion_jax._vote.costs import Collective

__all__ = ["compiled_collectives"]

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
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")


def _arrays(text: str) -> list[tuple[str, int]]:
    """Every array type in the text, as ``(dtype, elements)``."""
    return [
        (dtype, math.prod(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(text)
    ]


def _group_size(attributes: str, fallback: int) -> int:
    """Workers that take part together, in each way that HLO spells ``replica_groups``."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):  # {{0,1},{2,3}}
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):  # [groups,size]<=[devices]
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):  # jax >= 0.12
        sizes = dict(re.findall(r"('\w+')=(\d+)", match[1]))
        return math.prod(int(sizes[name]) for name in match[2].split(","))
    return fallback


def compiled_collectives(compiled: Any, workers: int) -> list[Collective]:
    """The collectives in a compiled program, in program order, with this worker's operand sizes.

    One :class:`Collective` per array that the program moves. A tuple is one array where the tuple
    only splits it by peer (an all-to-all on CPU, which has an operand for each worker); where XLA's
    combiner merged several arrays into one instruction (an all-reduce of a tuple) each is listed.
    Of an asynchronous pair the ``-start`` is read, its ``-done`` moves nothing. Branches of a
    conditional count as if taken, and the body of a loop once.

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
    results: dict[str, list[tuple[str, int]]] = {}  # of the instructions so far, by name
    found = []
    if not _INSTRUCTION.search(text):
        raise ValueError(
            f"`compiled` holds no HLO instruction (%name = type op(...)); it begins {text[:40]!r}. "
            "Pass jax.jit(f).lower(...).compile(), or its as_text()."
        )
    for name, result, op, rest in _INSTRUCTION.findall(text):
        results[name] = _arrays(result)
        op = op.removesuffix("-start")
        if op not in _OPS:
            continue
        operands, _, attributes = rest.partition("), ")
        arrays = [a for x in re.findall(r"%([\w.\-]+)", operands) for a in results[x]]
        if op == "all-to-all":
            arrays = [(arrays[0][0], sum(elements for _, elements in arrays))]
        n = _group_size(attributes, workers)
        found += [Collective(op, dtype, elements, n) for dtype, elements in arrays]
    return found
