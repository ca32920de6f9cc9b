# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of compare.py's results, or of a file of them.

    python -m benchmarks.report.compare benchmarks/results/compare.jsonl --out DIR

In:  the runs of one comparison. Out: ``results.md``, and for each task ``TASK_workers.png``,
``TASK_bits.png`` and ``TASK_bytes.png`` (``TASK_SPLIT_...`` where rows are not i.i.d., and
``TASK_splits.png`` where there are several).
"""

import sys
from argparse import Namespace
from pathlib import Path

from benchmarks.cli import UsageError, command_line, guarded
from benchmarks.report.plots import plot_splits, plots
from benchmarks.report.tables import (
    by_split,
    differences,
    equal_loss,
    qualities,
    seeds_of,
    unit,
)
from benchmarks.rows import Row, edges, grouped, listed, read, several_splits


def tables(rows: list[Row]) -> str:
    """All tables, in Markdown."""
    parts, groups = [], grouped(rows)
    for (task, split), found in groups.items():
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
    for task, (n, found) in several_splits(groups).items():
        parts += [f"## {task}, by split: {unit(task)}", by_split(found, task, n)]
    return "\n\n".join(parts) or "no runs yet"


def write(rows: list[Row], out: Path) -> str:
    """Writes tables and plots to the folder; returns the tables."""
    groups = grouped(rows)
    for (task, split), found in groups.items():
        plots(found, task, out, task if split == "iid" else f"{task}_{split}")
    for task, (n, found) in several_splits(groups).items():
        plot_splits(found, task, n, out / f"{task}_splits.png")
    text = tables(rows)
    (out / "results.md").write_text(text + "\n")
    return text


def parse(argv: list[str] | None) -> Namespace:
    """The command line."""
    p = command_line(__doc__)
    p.add_argument("results", type=Path, nargs="+", help="compare.py's results.jsonl")
    p.add_argument("--out", type=Path, help="folder of results.md and plots (none: print only)")
    return p.parse_args(argv)


def run(args: Namespace) -> str:
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
