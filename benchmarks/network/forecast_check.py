# SPDX-License-Identifier: Apache-2.0
"""The step times that distlion_jax.forecast predicts, against those that network.run measured.

    python -m benchmarks.network.forecast_check benchmarks/results/network.jsonl \
        --plot runs/forecast.png

For every workload and number of processes, what the unshaped link showed is given to the model (how
long a step takes there, and how fast the software moves an all-reduce); it predicts the shaped
links, at which it has not looked. Frames carry 1,448 of 1,514 bytes; nothing overlaps on CPU.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.network.methods import VOTES
from benchmarks.report import network as report
from benchmarks.report.network import Row
from distlion_jax.forecast import Link, forecast_all_reduce, forecast_vote

PAYLOAD = 1448 / 1514  # of a frame: the rest is TCP's, IP's and Ethernet's
LATENCY = 1e-4  # seconds; a round trip through the bridge and two schedulers


class Check(NamedTuple):
    """One prediction."""

    row: Row
    measured: float  # seconds a step
    predicted: float

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted / self.measured - 1


def predict(row: Row, unshaped: dict[str, Row], local: Row) -> float:
    """Seconds a step of a method on a shaped link, from the same methods on an unshaped one."""
    n, bits = row["processes"], report.BITS[row["rate"]] * PAYLOAD
    before, alone = (report.median(r) for r in (unshaped[row["method"]], unshaped["local"]))
    if row["method"] in VOTES:
        link = Link(bits, LATENCY)
        return forecast_vote(
            row["parameters"], n, link, before, codec=0.0, **VOTES[row["method"]]
        ).step
    software = 8 * row["predicted"] / max(before - alone, 1e-9)  # bits a second, with no limit
    link = Link(min(bits, software), LATENCY)
    compute = report.median(local)
    return forecast_all_reduce(row["parameters"], n, link, compute, overlap=0.0).step


def checks(rows: list[Row]) -> list[Check]:
    """A prediction for every shaped cell whose unshaped twin was measured."""
    cells, out = report.groups(rows), []
    for (workload, n, rate), methods in cells.items():
        unshaped = cells.get((workload, n, "unshaped"), {})
        if rate in ("unshaped", "loopback") or "local" not in unshaped:
            continue
        local = methods.get("local", unshaped["local"])
        for name, row in methods.items():
            if name in unshaped and (name == "lion fp32" or name in VOTES):
                seconds = predict(row, unshaped, local)
                out.append(Check(row, report.median(row), seconds))
    return out


def table(found: list[Check]) -> str:
    """Errors by workload, processes and link: median and largest over the methods."""
    head = "| workload | n | link | predictions | median error | largest |"
    lines = [head, "|" + "---|" * 6]
    cells: dict[tuple[str, int, str], list[float]] = {}
    for check in found:
        key = (check.row["workload"], check.row["processes"], check.row["rate"])
        cells.setdefault(key, []).append(check.error)
    for (workload, n, rate), errors in cells.items():
        worst = max(errors, key=abs)
        middle = statistics.median(errors)
        lines.append(
            f"| {workload} | {n} | {rate} | {len(errors)} | {middle:+.0%} | {worst:+.0%} |"
        )
    sizes = sorted(abs(check.error) for check in found)
    within = sum(size <= 0.25 for size in sizes) / len(sizes)
    lines.append(
        f"\n{len(sizes)} predictions: half are off by at most {statistics.median(sizes):.0%}, "
        f"{within:.0%} by at most 25%, the worst by {sizes[-1]:.0%}."
    )
    return "\n".join(lines)


def plot(found: list[Check], file: Path) -> None:
    """Predicted against measured, a colour a method."""
    figure, ax = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
    for name in dict.fromkeys(check.row["method"] for check in found):
        some = [check for check in found if check.row["method"] == name]
        x, y = [c.measured for c in some], [c.predicted for c in some]
        ax.plot(x, y, "o", markersize=4, alpha=0.7, label=name)
    ends = [f(c.measured for c in found) for f in (min, max)]
    ax.plot(ends, ends, color="black", linewidth=0.8)
    ax.set(xscale="log", yscale="log", xlabel="seconds a step, measured",
           ylabel="seconds a step, predicted")  # fmt: skip
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=140)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    p.add_argument("results", type=Path, help="network.run's results.jsonl")
    p.add_argument("--plot", type=Path, metavar="FILE", help="predicted against measured, as a PNG")
    args = p.parse_args(argv)
    found = checks(report.read(args.results))
    if not found:
        p.error(f"{args.results} holds no shaped link with `local` and an unshaped twin")
    print(table(found))
    if args.plot:
        plot(found, args.plot)
        print(f"wrote {args.plot}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
