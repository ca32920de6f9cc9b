# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of compare.py's results, or of a file of them.

    python benchmarks/compare_report.py benchmarks/results/compare.jsonl --out DIR

In:  the runs of one comparison. Out: ``results.md``, and for each task ``TASK_workers.png``,
``TASK_bits.png`` and ``TASK_bytes.png`` (``TASK_SPLIT_...`` where rows are not i.i.d., and
``TASK_splits.png`` where there are several).
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from compare_plots import plot_splits, plots
from compare_runs import Row, guarded, read
from compare_tables import (
    Found,
    by_split,
    differences,
    edges,
    equal_loss,
    listed,
    qualities,
    runs,
    seeds_of,
    unit,
)
from config import UsageError


def sections(rows: list[Row]) -> Iterator[tuple[str, str, Found]]:
    """Each task and split that has runs."""
    done = {(row["task"], row["split"]) for row in rows if row["kind"] == "run"}
    for task, split in sorted(done):
        yield task, split, runs(rows, task, split)


def several_splits(rows: list[Row]) -> dict[str, tuple[int, dict[str, Found]]]:
    """Of each task with more than one split: the number of workers most run, and all by split."""
    out: dict[str, dict[str, Found]] = {}
    for task, split, found in sections(rows):
        out.setdefault(task, {})[split] = found
    return {
        task: (statistics.mode(n for found in splits.values() for _, n in found), splits)
        for task, splits in out.items()
        if len(splits) > 1
    }


def tables(rows: list[Row]) -> str:
    """All tables, in Markdown."""
    parts = []
    for task, split, found in sections(rows):
        one = next(iter(next(iter(found.values())).values()))
        parts += [
            f"## {task}, {split}: {unit(task)}",
            f"{one['parameters']:,} parameters; {one['setting']}. Seeds "
            f"{seeds_of(found)}. Mean ± standard deviation over seeds, which set weights and "
            "batches; the random numbers of methods are the same at each. Every other held-out row "
            "chose the rates, the others are reported; (edge): the largest or smallest that the "
            "search tried. "
            f"{listed(one['versions'])}.",
            qualities(found, task, edges(rows, task, split)),
            f"Paired by seed:\n\n{differences(found, task)}",
        ]
        if split == "iid":  # unlike data: a loss of rows that workers do not choose alike
            parts.append(
                f"Share of the steps after which training loss stays below:\n\n{equal_loss(found)}"
            )
    for task, (n, found) in several_splits(rows).items():
        parts += [f"## {task}, by split: {unit(task)}", by_split(found, task, n)]
    return "\n\n".join(parts) or "no runs yet"


def write(rows: list[Row], out: Path) -> str:
    """Writes tables and plots to the folder; returns the tables."""
    for task, split, found in sections(rows):
        plots(found, task, out, task if split == "iid" else f"{task}_{split}")
    for task, (n, found) in several_splits(rows).items():
        plot_splits(found, task, n, out / f"{task}_splits.png")
    text = tables(rows)
    (out / "results.md").write_text(text + "\n")
    return text


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    p.add_argument("results", type=Path, nargs="+", help="compare.py's results.jsonl")
    p.add_argument("--out", type=Path, help="folder of results.md and plots (none: print only)")
    return p.parse_args(argv)


def run(args: argparse.Namespace) -> str:
    """The tables of all files together."""
    if missing := [file for file in args.results if not file.is_file()]:
        raise UsageError(f"there is no file {missing[0]}")
    rows = [row for file in args.results for row in read(file)]
    if args.out is None:
        return tables(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    return write(rows, args.out)


if __name__ == "__main__":
    sys.exit(guarded(run, parse(None)))
