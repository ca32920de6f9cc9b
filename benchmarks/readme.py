# SPDX-License-Identifier: Apache-2.0
"""Fills the README's tables of training from benchmarks/results; a test says when they are stale.

    python benchmarks/readme.py

A table stands between ``<!-- results: NAME -->`` and ``<!-- end of results -->``.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import rare_rows
from compare_report import several_splits
from compare_runs import command_line, guarded
from compare_tables import by_split, differences, edges, qualities, runs
from config import UsageError
from evidence import Evidence, Missing

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- results: (.*?) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def compared(name: str, task: str) -> Callable[[Evidence], str]:
    """Quality by number of workers."""

    def write(ev: Evidence) -> str:
        rows = ev.rows(name)
        return qualities(runs(rows, task, "iid"), task, edges(rows, task, "iid"))

    return write


def paired(name: str, task: str) -> Callable[[Evidence], str]:
    """Differences to full-precision Lion."""
    return lambda ev: differences(ev.runs(task, name=name), task)


def unlike(task: str) -> Callable[[Evidence], str]:
    """Quality by split."""

    def write(ev: Evidence) -> str:
        n, found = several_splits(ev.rows("unlike.jsonl"))[task]
        return by_split(found, task, n)

    return write


TABLES: dict[str, Callable[[Evidence], str]] = {
    "compare, text": compared("compare.jsonl", "text"),
    "compare, images": compared("compare.jsonl", "images"),
    "ties, text": compared("ties.jsonl", "text"),
    "ties, images": compared("ties.jsonl", "images"),
    "long, text": compared("long.jsonl", "text"),
    "unlike, images": unlike("images"),
    "unlike, text": unlike("text"),
    "rare rows": lambda ev: rare_rows.as_table(ev.json("rare_rows.json")),
}


def fill(text: str, ev: Evidence) -> str:
    """A page with its tables as the results have them."""

    def block(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in TABLES:
            raise UsageError(f"there is no table {name!r}; known: {', '.join(TABLES)}")
        try:
            return f"{begin}{TABLES[name](ev)}\n{end}"
        except Missing as missing:
            raise UsageError(f"table {name!r}: {missing} is missing in {ev.folder}") from missing

    return BLOCK.sub(block, text)


def run(args: argparse.Namespace) -> str:
    """Writes the page."""
    args.page.write_text(fill(args.page.read_text(), Evidence(args.results)))
    return f"{args.page} filled"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = command_line(__doc__)
    p.add_argument("--page", type=Path, default=ROOT / "README.md")
    p.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    return p.parse_args(argv)


if __name__ == "__main__":
    sys.exit(guarded(run, parse(None)))
