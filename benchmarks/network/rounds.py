# SPDX-License-Identifier: Apache-2.0
"""What every process of network.run measures, whichever framework it trains with.

In:  a runner a method; then, a line of standard input each, the cells to measure: the parent
changes the links between them, so that a program is compiled once for all rates.
Out: a file of rows per cell: seconds and bytes of each step. The methods alternate within each
round, so that they are compared under the same conditions.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from benchmarks.network import netns


class Runner(Protocol):
    """One method, ready to step."""

    warmup: int  # steps before the first that counts
    facts: dict[str, Any]  # what the row says beside the measurements

    def run(self) -> None:
        """One step, waited for."""


def _cell(
    cell: dict[str, Any],
    runners: dict[str, Any],
    interface: str,
    barrier: Callable[[str], Any],
    anyone: Callable[[bool], bool],
) -> list[dict[str, Any]]:
    """The rows of one cell: its methods, in rounds."""
    rows: dict[str, dict[str, Any]] = {
        name: {"method": name, **runners[name].facts, "seconds": [], "received": [], "sent": []}
        for name in cell["methods"]
    }
    began = time.monotonic()
    for done in range(cell["rounds"]):
        if anyone(done >= cell["least"] and time.monotonic() - began > cell["budget"]):
            break
        for name, row in rows.items():
            barrier(name)
            before, start = netns.counters(interface), time.perf_counter()
            runners[name].run()
            seconds, after = time.perf_counter() - start, netns.counters(interface)
            row["seconds"].append(seconds)
            row["received"].append(after[0] - before[0])
            row["sent"].append(after[1] - before[1])
    return list(rows.values())


def measure(
    runners: dict[str, Any],
    interface: str,
    barrier: Callable[[str], Any],
    anyone: Callable[[bool], bool],
) -> None:
    """Warms up, then measures cells until there are no more.

    A cell is a JSON object: ``methods``, ``rounds``, ``budget`` (seconds, after ``least`` rounds)
    and ``out``, the file, which is complete as soon as it is there.

    Args:
      runners: a :class:`Runner` a method.
      interface: whose bytes are counted.
      barrier: waits until all processes are there.
      anyone: whether it is true on any process.
    """
    for runner in runners.values():
        for _ in range(runner.warmup):
            runner.run()
    for line in sys.stdin:
        cell = json.loads(line)
        rows = _cell(cell, runners, interface, barrier, anyone)
        file = Path(cell["out"])
        file.with_suffix(".part").write_text(json.dumps(rows))
        os.replace(file.with_suffix(".part"), file)
