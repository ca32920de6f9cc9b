# SPDX-License-Identifier: Apache-2.0
"""What a collective moves, in exact bytes: the records that transports and compressors state.

Counted is what crosses the worker's own link, with bandwidth-optimal collectives. An all-gather of
``b`` bytes a worker, or an all-to-all of ``b`` bytes a peer, receives ``(n-1) b``. A ring
all-reduce of ``b`` bytes receives ``2 (n-1)/n b``.
"""

import math
import re
from typing import Any, NamedTuple

import numpy as np


class Collective(NamedTuple):
    """One collective of one worker."""

    op: str  # "all-gather", "all-to-all", "all-reduce", "reduce-scatter", "collective-permute"
    dtype: str  # as HLO spells it: "u32", "s8", "f32"
    elements: int  # of this worker's operand
    workers: int  # group size n

    @property
    def operand_bytes(self) -> int:
        """Bytes of this worker's operand."""
        bits = re.search(r"\d+", self.dtype)  # none in "pred", which travels as a byte
        return self.elements * (1 if bits is None else max(1, int(bits.group()) // 8))

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


def hlo_dtype(dtype: Any) -> str:
    """A floating dtype as HLO spells it."""
    return "bf16" if dtype == "bfloat16" else f"f{8 * np.dtype(dtype).itemsize}"


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
