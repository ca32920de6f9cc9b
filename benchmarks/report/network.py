# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of network.run's results file.

In:  ``results.jsonl``, a line a cell. Out: a Markdown table, and plots of steps a second against
bandwidth and of bytes counted against bytes predicted.
"""

import itertools
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.report.figures import pyplot
from benchmarks.report.markdown import table as markdown

Row = dict[str, Any]
PLOTTED = ("local", "lion fp32", "majority", "majority, 8 chunks", "average", "torch ddp",
           "torch ddp fp16", "torch ddp powersgd")  # fmt: skip
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


def ratio(row: Row, base: Row | None) -> str:
    """Speed against the base's, round by round: median and quartiles; ~ where not in one run."""
    if base is None:
        return ""
    if any(row.get(key) != base.get(key) for key in ("run", "versions")):
        return f"~{median(base) / median(row):.2f}"  # not in the same rounds
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
    body = []
    for (workload, n, rate), methods in groups(rows).items():
        base = methods.get("lion fp32")
        for name, row in methods.items():
            local = methods.get("torch local" if name.startswith("torch") else "local")
            exchange = f"{1e3 * (median(row) - median(local)):.0f}" if local else ""
            cells = (workload, str(n), rate, name, f"{1e3 * median(row):.0f}", exchange,
                     ratio(row, base), _counted(row))  # fmt: skip
            body.append(cells)
    return markdown(head, body)


def crossover(method: dict[str, Row], base: dict[str, Row]) -> float | None:
    """Bits a second at which a method stops being ahead of the base; None if it never does.

    Args:
      method, base: their rows by rate. Between two rates the logarithms are interpolated.
    """
    rates = sorted(method.keys() & base.keys(), key=BITS.__getitem__)
    leads = [math.log(median(base[r]) / median(method[r])) for r in rates]
    for (slow, lead), (fast, less) in itertools.pairwise(zip(rates, leads, strict=True)):
        if lead >= 0 > less:
            share = lead / (lead - less)
            return BITS[slow] * (BITS[fast] / BITS[slow]) ** share
    return None


def _verdict(by_rate: dict[str, dict[str, Row]], ax: Any) -> str:
    """Marks where the majority and full precision cross; says so in words where they do not."""
    if not {"majority", "lion fp32"} <= by_rate.keys():
        return ""
    method, base = by_rate["majority"], by_rate["lion fp32"]
    where = crossover(method, base)
    if where is not None:
        ax.axvline(where, color="black", linewidth=0.8)
        return f"\nmajority and fp32 cross at {where / 1e9:.2g} Gbit/s"
    ahead = all(median(method[r]) <= median(base[r]) for r in method.keys() & base.keys())
    return "\nno crossover: majority ahead everywhere" if ahead else "\nmajority behind"


def _plot_speed(rows: list[Row], folder: Path) -> None:
    """Steps a second against bandwidth, a panel a workload and number of processes."""
    workloads = list(dict.fromkeys(r["workload"] for r in rows))
    numbers = sorted({r["processes"] for r in rows})
    size = (4.2 * len(numbers), 3.4 * len(workloads))
    plt = pyplot()
    figure, axes = plt.subplots(
        len(workloads), len(numbers), figsize=size, layout="constrained", squeeze=False
    )
    shown: dict[str, Any] = {}  # every panel draws a method in the same colour
    for (y, workload), (x, n) in itertools.product(enumerate(workloads), enumerate(numbers)):
        ax, by_method = axes[y][x], {}
        for row in rows:
            if (row["workload"], row["processes"]) == (workload, n):
                by_method.setdefault(row["method"], {})[row["rate"]] = row
        if not by_method:
            ax.set_axis_off()
            continue
        for name in (name for name in PLOTTED if name in by_method):
            points = sorted((BITS[rate], 1 / median(r)) for rate, r in by_method[name].items())
            dots = {"linestyle": ":", "color": "black"} if name == "local" else {"marker": "o"}
            dashes = {"linestyle": "--"} if name.startswith("torch") else {}
            color = {} if name == "local" else {"color": f"C{PLOTTED.index(name) - 1}"}
            ax.plot(*zip(*points, strict=True), label=name, **(dots | dashes | color))
        ax.set_title(f"{workload}, {n} processes{_verdict(by_method, ax)}", fontsize=9)
        ax.set(xscale="log", yscale="log", xlabel="bits a second (40 Gbit/s: unshaped)",
               ylabel="steps a second")  # fmt: skip
        ax.grid(alpha=0.25)
        handles, labels = ax.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(folder / "speed.png", dpi=120)
    plt.close(figure)


def _plot_bytes(rows: list[Row], folder: Path) -> None:
    """Counted bytes against the ledger's."""
    counted = [r for r in rows if r["received"] and r["predicted"]]
    plt = pyplot()
    figure, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for i, name in enumerate(dict.fromkeys(r["method"] for r in counted)):
        x = [r["predicted"] / 1e6 for r in counted if r["method"] == name]
        y = [r["received"] / 1e6 for r in counted if r["method"] == name]
        ax.plot(x, y, "os^"[i // 10 % 3], label=name, alpha=0.6)  # ten colours
    ends = [min(r["predicted"] for r in counted) / 1e6, max(r["received"] for r in counted) / 1e6]
    ax.plot(ends, ends, color="black", linewidth=0.8)
    ax.set(xscale="log", yscale="log", xlabel="MB received a step, by the ledger",
           ylabel="MB received a step, by the interface")  # fmt: skip
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
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
