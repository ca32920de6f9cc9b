# SPDX-License-Identifier: Apache-2.0
"""The table of benchmarks.quality.resize."""

import statistics
from typing import Any

from benchmarks.report.markdown import table

WAYS = ("8 throughout", "mean", "rows", "none")
NAMES = {
    "8 throughout": "8 workers throughout",
    "mean": 'resize_state, `how="mean"`',
    "rows": 'resize_state, `how="rows"`',
    "none": "no momenta: init_state",
}


def as_table(rows: list[dict[str, Any]]) -> str:
    """Change of the held-out loss since the change of workers: mean and spread over seeds."""
    marks = [m for m in rows[0]["after"] if m]
    body = []
    for n, change in ((4, "8 to 4"), (12, "4 to 12")):
        for way in WAYS:
            mine = [row["losses"] for row in rows if (row["way"], row["to"]) == (way, n)]
            cells = []
            for i in range(1, len(marks) + 1):
                moved = [losses[i] - losses[0] for losses in mine]
                spread = statistics.stdev(moved) if len(moved) > 1 else 0.0
                cells.append(f"{statistics.mean(moved):+.3f} ± {spread:.3f}")
            body.append([change, NAMES[way], *cells])
    return table(["workers", "momenta", *(f"after {m}" for m in marks)], body)
