# SPDX-License-Identifier: Apache-2.0
"""How quality depends on what one sets: heat maps, and the best learning rate by workers.

    python benchmarks/sensitivity.py --steps 500          # hours on 2 cores
    python benchmarks/sensitivity.py --size quick         # a look

First every learning rate with every weight decay and pair (b1, b2), for full-precision Lion, for
both aggregations and three ways to break ties, at one number of workers, with one seed and the
held-out rows that no result uses. The best of them then run with each seed. Last, learning rates
around the best one, at each number of workers with each seed. Results are kept as compare.py's are
(a killed run goes on where it stopped): results.jsonl, results.md, TASK_heat.png, TASK_rates.png.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import sensitivity_report
from compare_methods import LION, Method, lion_family
from compare_runs import (
    SEARCH_SEEDS,
    Job,
    Results,
    Row,
    Runner,
    add_arguments,
    check_arguments,
    command_line,
    guarded,
    make_task,
    progress,
)
from compare_tables import listed, unit
from config import UsageError
from evidence import Missing
from sensitivity_report import Cell, Chosen, Heat, best, picks

RATES = {"images": (3e-4, 1e-3, 3e-3, 1e-2), "text": (1.5e-3, 5e-3, 1.5e-2, 5e-2)}
DECAYS = (0.1, 0.4, 1.6, 6.4)
BETAS = ((0.9, 0.99), (0.95, 0.98), (0.8, 0.95))  # the first is the default
AROUND = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the best learning rate
FOLLOWED = ("Lion", "D-Lion majority", "D-Lion average")  # by number of workers


def named(method: str, b1: float, b2: float) -> str:
    """A member of the family, for the results file."""
    return f"{method}, b1 {b1:g}, b2 {b2:g}"


def methods() -> dict[str, Method]:
    """All that is run, by name."""
    return {
        named(name, *betas): method
        for betas in BETAS
        for name, method in lion_family(*betas).items()
    }


def heat_cells(task: str) -> list[Cell]:
    """All places, in an order that compiles each program once."""
    grid = itertools.product(LION, BETAS, RATES[task], DECAYS)
    return [Cell(name, *betas, rate, decay) for name, betas, rate, decay in grid]


def measure(
    task: str, row_of: Callable[[Job], Row], args: argparse.Namespace
) -> tuple[Heat, Chosen, list[Row]]:
    """Rows of the heat maps, of their best places, and by number of workers.

    ``row_of`` trains, or looks up.
    """

    def do(kind: str, cell: Cell, n: int, seed: int) -> Row:
        name = named(cell.method, cell.b1, cell.b2)
        return row_of(Job(kind, "iid", name, n, seed, cell.rate, cell.decay))

    n = args.heat_workers
    heat = {cell: do("trial", cell, n, SEARCH_SEEDS[0]) for cell in heat_cells(task)}
    of_interest = dict.fromkeys(cell for name in LION for cell in picks(heat, name))
    chosen = {cell: [do("run", cell, n, seed) for seed in args.seeds] for cell in of_interest}
    rows = []
    for n, name in itertools.product(args.workers, FOLLOWED):
        start = best(heat, name, BETAS[0])
        for factor in AROUND:
            cell = start._replace(rate=start.rate * factor)
            rows += [do("run", cell, n, seed) | {"method": name} for seed in args.seeds]
    return heat, chosen, rows


def recall(results: Results, task: str) -> Callable[[Job], Row]:
    """Looks rows up, without training; refuses a file of several settings or versions."""
    rows = [row for row in results.rows if row["task"] == task]
    for name in ("setting", "versions"):
        if len(found := {str(row[name]) for row in rows}) > 1:
            raise UsageError(f"{results.file}: {task} was run with {len(found)} {name}")

    def row_of(job: Job) -> Row:
        if row := results.find(job, task):
            return row
        raise Missing(str(job))

    return row_of


def tables(results: Results, args: argparse.Namespace) -> str:
    """What came out of all tasks."""
    parts = []
    for task in args.task:
        heat, chosen, rows = measure(task, recall(results, task), args)
        head = f"{rows[0]['setting']}. Seeds {', '.join(map(str, args.seeds))}"
        parts += [
            f"## {task}: {unit(task)}",
            f"{head}; the heat maps, which choose the best settings, have one of their own and "
            f"other held-out rows. {listed(rows[0]['versions'])}.",
            f"{args.heat_workers} workers:",
            sensitivity_report.heat_table(heat, chosen, task),
            sensitivity_report.rate_table(rows, task),
        ]
    return "\n\n".join(parts)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = command_line(__doc__)
    add_arguments(p, seeds=[42, 52])
    p.add_argument("--heat-workers", type=int, default=4, metavar="N", help="of the heat maps")
    p.add_argument("--workers", nargs="+", type=int, default=[2, 8, 32], metavar="N",
                   help="for which the best learning rate is looked for")  # fmt: skip
    args = p.parse_args(argv)
    check_arguments(p, args)
    if min(*args.workers, args.heat_workers) < 2:
        p.error("--workers and --heat-workers: at least 2, or there is nobody to vote with")
    args.out = args.out or Path("runs/sensitivity") / args.size
    return args


def run(args: argparse.Namespace) -> str:
    """All tasks; the tables."""
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results(args.out / "results.jsonl")
    by_workers = sum(args.workers) * len(FOLLOWED) * len(AROUND) * len(args.seeds)
    for name in args.task:
        task = make_task(args, name)
        maps = len(heat_cells(name)) + 3 * len(LION) * len(args.seeds)  # about: places coincide
        each = maps * args.heat_workers + by_workers
        with progress(task.steps * each) as bar:
            heat, _, rows = measure(name, Runner(task, methods(), results, bar).do, args)
        sensitivity_report.draw_heat(heat, name, args.heat_workers, args.out / f"{name}_heat.png")
        sensitivity_report.draw_rates(rows, name, args.out / f"{name}_rates.png")
    text = tables(results, args)
    (args.out / "results.md").write_text(text + "\n")
    return text


if __name__ == "__main__":
    sys.exit(guarded(run, parse(None)))
