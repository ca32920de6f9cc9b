# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of network.py's results file.

In:  ``results.jsonl``, a line a cell. Out: a Markdown table, and plots of steps a second against
bandwidth and of bytes counted against bytes predicted.
"""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
BITS = {"unshaped": 4e10, "10gbit": 1e10, "1gbit": 1e9, "100mbit": 1e8, "10mbit": 1e7,
        "loopback": 4e10}  # fmt: skip


def read(file: Path) -> list[Row]:
    """The rows of the file, if there is one."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def median(row: Row) -> float:
    """Seconds a step."""
    return statistics.median(row["seconds"])


def _ratio(row: Row, base: Row | None) -> str:
    """Speed against the base's, round by round: median and quartiles."""
    if base is None:
        return ""
    each = [b / a for a, b in zip(row["seconds"], base["seconds"], strict=False)]
    if len(each) < 2:
        return f"{each[0]:.2f}"
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def _counted(row: Row) -> str:
    if not row["predicted"]:
        return ""
    if row["received"] is None:
        return f"{row['predicted'] / 1e6:.2f} / not counted"
    over = row["received"] / row["predicted"] - 1
    return f"{row['predicted'] / 1e6:.2f} / {row['received'] / 1e6:.2f} ({over:+.1%})"


def groups(rows: Iterable[Row]) -> dict[tuple[str, int, str], dict[str, Row]]:
    """Rows by (workload, processes, rate), then by method."""
    out: dict[tuple[str, int, str], dict[str, Row]] = {}
    for row in rows:
        out.setdefault((row["workload"], row["processes"], row["rate"]), {})[row["method"]] = row
    return out


def table(rows: list[Row]) -> str:
    """A row a cell and method: ms a step, ms of exchange, speed against fp32, megabytes."""
    head = ("workload", "n", "link", "method", "ms a step", "ms of exchange",
            "steps/s over lion fp32", "MB received a step: ledger / counted")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (workload, n, rate), methods in groups(rows).items():
        base = methods.get("lion fp32")
        for name, row in methods.items():
            local = methods.get("torch local" if name.startswith("torch") else "local")
            exchange = f"{1e3 * (median(row) - median(local)):.0f}" if local else ""
            cells = (workload, str(n), rate, name, f"{1e3 * median(row):.0f}", exchange,
                     _ratio(row, base), _counted(row))  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _plot_speed(rows: list[Row], folder: Path) -> None:
    """Steps a second against bandwidth, a panel a workload and number of processes."""
    panels = sorted({(r["workload"], r["processes"]) for r in rows})
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.8), layout="constrained", squeeze=False
    )
    for ax, (workload, n) in zip(axes[0], panels, strict=True):
        here = [r for r in rows if (r["workload"], r["processes"]) == (workload, n)]
        for name in dict.fromkeys(r["method"] for r in here):
            points = sorted((BITS[r["rate"]], 1 / median(r)) for r in here if r["method"] == name)
            style = {"linestyle": ":", "color": "black"} if name == "local" else {"marker": "o"}
            ax.plot(*zip(*points, strict=True), label=name, **style)
        ax.set(xscale="log", yscale="log", xlabel="bits a second (40 Gbit/s: unshaped)",
               ylabel="steps a second", title=f"{workload}, {n} processes")  # fmt: skip
        ax.grid(alpha=0.25)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(folder / "speed.png", dpi=140)
    plt.close(figure)


def _plot_bytes(rows: list[Row], folder: Path) -> None:
    """Counted bytes against the ledger's."""
    counted = [r for r in rows if r["received"] and r["predicted"]]
    figure, ax = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
    for name in dict.fromkeys(r["method"] for r in counted):
        x = [r["predicted"] / 1e6 for r in counted if r["method"] == name]
        y = [r["received"] / 1e6 for r in counted if r["method"] == name]
        ax.plot(x, y, "o", label=name, alpha=0.6)
    ends = [min(r["predicted"] for r in counted) / 1e6, max(r["received"] for r in counted) / 1e6]
    ax.plot(ends, ends, color="black", linewidth=0.8)
    ax.set(xscale="log", yscale="log", xlabel="MB received a step, by the ledger",
           ylabel="MB received a step, by the interface")  # fmt: skip
    ax.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "bytes.png", dpi=140)
    plt.close(figure)


def write(file: Path, folder: Path) -> str:
    """Writes the plots and the table; returns the table."""
    rows = read(file)
    text = table(rows)
    (folder / "results.md").write_text(text + "\n")
    if rows:
        _plot_speed(rows, folder)
    if any(r["received"] and r["predicted"] for r in rows):
        _plot_bytes(rows, folder)
    return text
