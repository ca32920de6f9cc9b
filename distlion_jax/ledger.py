# SPDX-License-Identifier: Apache-2.0
"""What a step sends: exact bytes from the layout, and the same read out of a compiled program.

:func:`wire_cost` predicts, in integers, what each worker receives and sends per step, for any
tree, number of workers and rules. :func:`compiled_collectives` reads the collectives of a compiled
step, so that a user can check the prediction on their own model. A test ties the two together.

Counted is what crosses the worker's own link, with bandwidth-optimal collectives: an all-gather or
an all-to-all of ``b`` bytes a worker and peer receives ``(n-1) b``; a ring all-reduce of ``b``
bytes receives ``2 (n-1)/n b``.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from distlion_jax.rules import Rules
from distlion_jax.words import BLOCK, PLANES, Layout

HEADER = 2  # words of a ballot's header: weight, step
VERDICT_HEADER = 2  # words of a verdict's header: voters, weight of the voters


class Collective(NamedTuple):
    """One collective of one worker."""

    op: str  # "all-gather", "all-to-all", "all-reduce", "reduce-scatter", "collective-permute"
    dtype: str  # as HLO spells it: "u32", "s8", "f32"
    elements: int  # of this worker's operand
    workers: int  # group size n

    @property
    def operand_bytes(self) -> int:
        """Bytes of this worker's operand."""
        return self.elements * _item_bytes(self.dtype)

    @property
    def bytes_received(self) -> int:
        """Bytes that reach this worker over the wire (as many leave it), see the module."""
        n, b = self.workers, self.operand_bytes
        if self.op == "all-gather":
            return (n - 1) * b
        if self.op in ("all-to-all", "reduce-scatter"):
            return (n - 1) * b // n
        if self.op == "all-reduce":
            return math.ceil(2 * (n - 1) * b / n)
        return b


class WireCost(NamedTuple):
    """What one worker's step costs on the wire."""

    transport: str  # the one used, after "auto" has chosen
    parameters: int
    collectives: tuple[Collective, ...]

    @property
    def bytes_received(self) -> int:
        """Bytes each worker receives per step; each sends as many."""
        return sum(c.bytes_received for c in self.collectives)

    @property
    def bits_per_parameter(self) -> float:
        """Bits each worker receives per parameter and step."""
        return 8 * self.bytes_received / max(self.parameters, 1)


def _item_bytes(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return 1 if bits is None else max(1, int(bits.group()) // 8)  # pred travels as a byte


def layout_of(params: Any) -> Layout:
    """The layout of a tree of arrays or ``jax.ShapeDtypeStruct``."""
    return Layout(
        [np.shape(x) if not hasattr(x, "shape") else x.shape for x in jax.tree.leaves(params)]
    )


def slice_groups(layout: Layout, n: int) -> int:
    """Groups that one worker tallies under ``two_phase``: the tree's, split by n, rounded up."""
    return -(-layout.groups // n)


def health_words(rules: Rules, leaves: int) -> int:
    """Words that the health figures add to each slice's verdict."""
    return {"off": 0, "total": 2, "leaf": 2 * leaves}[rules.health]


def psum_dtype(n: int, rules: Rules) -> str:
    """Narrowest integer that holds any count of n workers and is summed natively."""
    return "s8" if n * rules.top_weight < 128 else "s32"


def _collectives(layout: Layout, n: int, rules: Rules, transport: str) -> tuple[Collective, ...]:
    columns = BLOCK + rules.present_columns

    def phase(op: str, words: int, rows: int = 1) -> tuple[Collective, ...]:
        return tuple(Collective(op, "u32", rows * piece, n) for piece in rules.pieces(words))

    if transport == "all_gather":
        return phase("all-gather", layout.groups * columns + HEADER)
    if transport == "two_phase":
        groups = slice_groups(layout, n)
        verdict = groups * sum(rules.verdict_columns(n)) + VERDICT_HEADER
        down = verdict + health_words(rules, len(layout.leaves))
        ballots = phase("all-to-all", groups * columns + HEADER, n)
        return ballots + phase("all-gather", down)
    elements = layout.groups * PLANES * columns
    votes = Collective("all-reduce", psum_dtype(n, rules), elements, n)
    if (rules.aggregation, rules.ties, rules.health) == ("majority", "zero", "off"):
        return (votes,)  # nobody reads the voters, their weight or the step: XLA drops them
    return (votes, Collective("all-reduce", "s32", 3, n))


def cost(layout: Layout, n: int, rules: Rules) -> WireCost:
    """Cost of one step for n workers; ``auto`` is resolved to the transport with fewest bytes."""
    if n < 1:
        raise ValueError(f"`n` (workers) must be at least 1; got {n}.")
    rules = rules.for_workers(n)
    names = ("all_gather", "two_phase") if rules.transport == "auto" else (rules.transport,)
    # The root mean squares that noise is measured by, and of how many workers they are.
    scales = Collective("all-reduce", "f32", len(layout.leaves) + 1, n)
    before = (scales,) if rules.noise else ()
    costs = [WireCost(t, layout.size, before + _collectives(layout, n, rules, t)) for t in names]
    return min(costs, key=lambda c: c.bytes_received)


def wire_cost(
    params: Any,
    n: int,
    *,
    aggregation: str = "majority",
    transport: str = "auto",
    ties: str = "zero",
    ballot: str = "binary",
    max_weight: int | None = None,
    health: str = "total",
    chunks: int | None = None,
    noise: ArrayLike | None = None,
) -> WireCost:
    """Exact wire cost of one :func:`distlion_jax.distributed_lion` step.

    Args:
      params: tree of arrays or ``jax.ShapeDtypeStruct``; only shapes matter.
      n: number of workers.
      aggregation, transport, ties, ballot, max_weight, health, chunks, noise: as in
        ``distributed_lion``.

    Returns:
      A :class:`WireCost`: transport, collectives, bytes and bits per parameter.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
      >>> cost = wire_cost(params, 8, ties="coin", transport="two_phase")
      >>> round(cost.bits_per_parameter, 3), cost.bytes_received
      (1.764, 3698856)
      >>> round(full_precision_cost(params, 8).bits_per_parameter, 1)
      56.0
    """
    rules = Rules(
        aggregation, transport, ties, ballot, max_weight, health, chunks, noise is not None
    )
    return cost(layout_of(params), n, rules)


def full_precision_cost(params: Any, n: int, dtype: str = "f32") -> WireCost:
    """Cost of the ring all-reduce of gradients that the vote replaces.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
      >>> full_precision_cost(params, 8).bits_per_parameter
      56.0
    """
    size = layout_of(params).size
    return WireCost(
        "all_reduce", size, (Collective("all-reduce", dtype, size, n),) if n > 1 else ()
    )


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
