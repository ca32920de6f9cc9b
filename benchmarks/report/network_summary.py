# SPDX-License-Identifier: Apache-2.0
"""The README's tables of network.run's results; a test compares the two.

python -m benchmarks.report.network_summary benchmarks/results/network.jsonl
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.network.methods import COMPRESSED, PEERS
from benchmarks.report.markdown import table
from benchmarks.report.network import BITS, Row, groups, median, ratio, read

Cells = dict[tuple[str, int, str], dict[str, Row]]
LINKS = {"unshaped": "unshaped", "10gbit": "10 Gbit/s", "1gbit": "1 Gbit/s",
         "100mbit": "100 Mbit/s", "10mbit": "10 Mbit/s"}  # fmt: skip
CHUNKS = "majority, 8 chunks"


def _links(cells: Cells, workload: str) -> list[str]:
    return sorted({rate for w, _, rate in cells if w == workload}, key=lambda r: -BITS[r])


def speeds(cells: Cells, workload: str, columns: Sequence[tuple[str, int]]) -> str:
    """Steps a second over full precision's: a row a link, a column a method and number."""

    def cell(rate: str, name: str, n: int) -> str:
        methods = cells.get((workload, n, rate), {})
        return ratio(methods[name], methods["lion fp32"]) if name in methods else "not run"

    body = [
        [LINKS[rate], *(cell(rate, name, n) for name, n in columns)]
        for rate in _links(cells, workload)
    ]
    return table(["link of each process", *(f"{name}, n = {n}" for name, n in columns)], body)


def exchanges(cells: Cells) -> str:
    """Milliseconds of exchange, ours and PyTorch's: a step less the same framework's local one."""
    rates = _links(cells, "linear")

    def cell(rate: str, name: str) -> str:
        methods = cells["linear", 2, rate]
        if name not in methods:
            return "not run"
        local = methods["torch local" if name in PEERS else "local"]
        return f"{1e3 * (median(methods[name]) - median(local)):.0f}"

    names = ("majority", CHUNKS, "lion fp32", *PEERS[1:])
    unshaped = cells["linear", 2, "unshaped"]
    bits = {name: 8 * unshaped[name]["sent"] / unshaped[name]["parameters"] for name in names}
    body = [[name, f"{bits[name]:.2f}", *(cell(rate, name) for rate in rates)] for name in names]
    return table(["method", "sent, bits a parameter", *(LINKS[rate] for rate in rates)], body)


def others(cells: Cells) -> str:
    """Milliseconds a step of the other methods, before Lion: update and exchange alone."""
    rates = [rate for rate in _links(cells, "exchange") if "qsgd" in cells["exchange", 2, rate]]
    names = ("lion fp32", "majority", *COMPRESSED)
    head = [f"{LINKS[rate]}, n = {n}" for n in (2, 4) for rate in rates]

    def cell(n: int, rate: str, name: str) -> str:
        return f"{1e3 * median(cells['exchange', n, rate][name]):,.0f}"

    body = [[name, *(cell(n, rate, name) for n in (2, 4) for rate in rates)] for name in names]
    return table(["ms a step", *head], body)


def growth(cells: Cells) -> str:
    """Megabytes that the interfaces counted: what grows with the number of workers."""
    names = ("lion fp32", "majority, coin", "majority, all_gather")
    numbers = sorted({n for w, n, rate in cells if (w, rate) == ("exchange", "1gbit")})
    body = [
        [name, *(f"{cells['exchange', n, '1gbit'][name]['received'] / 1e6:.2f}" for n in numbers)]
        for name in names
    ]
    return table(["MB received a step", *(f"n = {n}" for n in numbers)], body)


def slices(cells: Cells) -> str:
    """Steps a second, and bytes, of processes with several devices, which share a link."""
    rates = _links(cells, "sharded")
    numbers = sorted({n for workload, n, _ in cells if workload == "sharded"})

    def speed(rate: str, n: int, name: str) -> str:
        methods = cells["sharded", n, rate]
        over = median(methods["lion fp32"]) / median(methods[name])
        return f"{1 / median(methods[name]):.2f} ({over:.1f} x)"

    def megabytes(n: int, name: str) -> str:
        row = cells["sharded", n, rates[0]][name]
        return f"{row['predicted'] / 1e6:.2f} / {row['received'] / 1e6:.2f}"

    body = [
        [name, *(speed(rate, n, name) for rate in rates for n in numbers),
         *(megabytes(n, name) for n in numbers)]
        for name in cells["sharded", numbers[0], rates[0]]
    ]  # fmt: skip
    head = [f"steps/s at {LINKS[rate]}, n = {n}" for rate in rates for n in numbers]
    head += [f"MB, ledger / counted, n = {n}" for n in numbers]
    return table(["method", *head], body)


def accuracy(rows: Sequence[Row]) -> str:
    """How far the counted bytes lie above the ledger's, at 25 M parameters."""
    over = [
        r["received"] / r["predicted"] - 1
        for r in rows
        if r["predicted"] and r["received"] and r["parameters"] > 2e7
        and r["method"] not in ("lion bf16", *PEERS)
    ]  # fmt: skip
    return (
        f"Counted over predicted bytes at 25 M parameters, {len(over)} cells: "
        f"+{min(over):.1%} to +{max(over):.1%}."
    )


def main(argv: list[str] | None = None) -> int:
    """Prints the tables."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    p.add_argument("results", type=Path, help="network.run's results.jsonl")
    results = p.parse_args(argv).results
    rows = read(results)
    if {"exchange", "large", "linear", "sharded"} - {row["workload"] for row in rows}:
        p.error(f"{results} lacks one of the workloads exchange, large, linear and sharded")
    cells = groups(rows)
    votes = [("majority", 2), (CHUNKS, 2), ("majority", 4), (CHUNKS, 4), ("majority", 8)]
    print(speeds(cells, "exchange", votes), speeds(cells, "large", votes[:4]), exchanges(cells),
          others(cells), slices(cells), growth(cells), accuracy(rows), sep="\n\n")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
