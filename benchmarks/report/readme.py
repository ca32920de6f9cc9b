# SPDX-License-Identifier: Apache-2.0
"""Fills the pages' tables of training from benchmarks/results; a test says when they are stale.

    python -m benchmarks.report.readme          # README.md and docs/*.md

A table stands between ``<!-- results: NAME -->`` and ``<!-- end of results -->``.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.cli import UsageError, command_line, guarded
from benchmarks.report import rare_rows, resize
from benchmarks.report.evidence import UNITS, Evidence, Missing, standing
from benchmarks.report.markdown import table
from benchmarks.report.tables import by_split, qualities, score
from benchmarks.rows import edges, names_of

ROOT = Path(__file__).resolve().parents[2]
SIGNS = {"images": "%", "text": "nats"}
BLOCK = re.compile(r"(<!-- results: (.*?) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def compared(name: str, numbers: tuple[int, ...], bits_at: int) -> Callable[[Evidence], str]:
    """Bits, and quality on images and text by number of workers."""

    def write(ev: Evidence) -> str:
        every = {task: ev.groups(name).get((task, "iid"), {}) for task in UNITS}
        found = {task: some for task, some in every.items() if some}
        if not found:
            raise Missing(f"a run of {name}")
        columns = [
            (task, n) for task in found for n in numbers if any(k == n for _, k in found[task])
        ]

        def cells(method: str) -> Iterator[str]:
            for some in found.values():
                rows = [*some.get((method, bits_at), {}).values()]
                yield f"{rows[0]['bits']:.1f}" if rows else "not run"
            for task, n in columns:
                yield score(found[task], method, n, task)

        heads = [f"bits, {task}, n = {bits_at}" for task in found]
        heads += [f"{SIGNS[task]}, n = {n}" for task, n in columns]
        methods = names_of(key for some in found.values() for key in some)
        return table(["method", *heads], ([name, *cells(name)] for name in methods))

    return write


def gains(
    base: str, *others: str, name: str = "compare.jsonl", tasks: Sequence[str] = tuple(UNITS)
) -> Callable[[Evidence], str]:
    """What others gain over a method, paired by seed, and half of a 95 % interval."""

    def write(ev: Evidence) -> str:
        found = {
            (task, other): standing(ev.runs(task, name=name), task, other, base)
            for task in tasks
            for other in others
        }
        columns = [
            (task, n)
            for task in tasks
            for n in sorted({n for other in others for n in found[task, other].by_workers})
        ]

        def cells(other: str) -> Iterator[str]:
            for task, n in columns:
                one = found[task, other].by_workers.get(n)
                yield found[task, other].figure(*one) if one else ""

        heads = [f"{UNITS[task]}, n = {n}" for task, n in columns]
        return table([f"gain over {base}", *heads], ([other, *cells(other)] for other in others))

    return write


def one_task(name: str, task: str, split: str = "iid") -> Callable[[Evidence], str]:
    """Quality by number of workers, bits and rates."""

    def write(ev: Evidence) -> str:
        found = ev.runs(task, split, name)
        return qualities(found, task, edges(ev.rows(name), task, split))

    return write


def unlike(name: str) -> Callable[[Evidence], str]:
    """Quality on images by split."""

    def write(ev: Evidence) -> str:
        n, found = ev.splits("images", name)
        return by_split(found, "images", n)

    return write


HEADLINE = "headline.jsonl"
TABLES: dict[str, Callable[[Evidence], str]] = {
    "headline": compared(HEADLINE, (2, 4, 8, 16, 32), 8),
    "headline gains": gains(
        "D-Muon majority", "AdamW", "Lion", "D-Lion majority", "Muon", name=HEADLINE
    ),
    "compare": compared("compare.jsonl", (4, 8, 16, 32), 8),
    "gains": gains(
        "D-Lion majority",
        "Lion",
        "AdamW",
        "D-Lion average",
        "QSGD + AdamW",
        "TernGrad + AdamW",
        "EF-signSGD",
        "signSGD majority",
        "D-SIGNUM majority",
        "PowerSGD + AdamW",
    ),
    "two": compared("compare_two.jsonl", (2,), 2),
    "ties": compared("ties.jsonl", (4, 8), 8),
    "gap": one_task("gap.jsonl", "text"),
    "long": one_task("long.jsonl", "text"),
    "unlike, images": unlike("unlike.jsonl"),
    "unlike, 12 trials": unlike("unlike_twelve.jsonl"),
    "unlike, text": one_task("unlike.jsonl", "text", "groups"),
    "resize": lambda ev: resize.as_table(ev.lines("resize.jsonl")),
    "rare rows": lambda ev: rare_rows.as_table(ev.json("rare_rows.json")),
}


def pages() -> list[Path]:
    """The README and the guides."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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
    """Writes the pages that have tables."""
    ev, filled = Evidence(args.results), []
    for page in args.page:
        text = page.read_text()
        if BLOCK.search(text):
            page.write_text(fill(text, ev))
            filled.append(str(page))
    return f"filled: {', '.join(filled)}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = command_line(__doc__)
    p.add_argument("--page", type=Path, nargs="+", default=pages(), help="pages to fill")
    p.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    return p.parse_args(argv)


if __name__ == "__main__":
    sys.exit(guarded(run, parse(None)))
