# SPDX-License-Identifier: Apache-2.0
"""Distributed Lion beside what it is compared with: quality against workers, bits and bytes.

    python -m benchmarks.quality.compare --size quick         # a look, in minutes on 2 cores
    python -m benchmarks.quality.compare --task images text   # the README's: hours on 2 cores
    python -m benchmarks.quality.compare --splits 0.25 0.05   # workers with unlike data
    python -m benchmarks.quality.compare --size paper --images-dir CIFAR --corpus TOKENS  # a GPU

Every method gets a search of its own over learning rate and weight decay, with the same number of
trials, at one number of workers, with seeds and held-out rows that no result uses, by the figure
that is reported; its best three are tried with a second seed. (With --start-from it begins where an
earlier one ended.) Then it runs at each number of workers with each seed: same data order and
initial weights for all methods at a seed. Workers are simulated on one device: votes exactly, sums
of floating-point numbers in the order of the workers. Results are kept, one JSON line a run: a
killed comparison goes on where it stopped, and a finished one only reports.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.cli import UsageError, command_line, guarded, progress
from benchmarks.quality.methods import DEFAULT, METHODS
from benchmarks.quality.runs import Runner, add_arguments, check_arguments, make_task
from benchmarks.quality.training import Task, split_rows
from benchmarks.report import compare as report
from benchmarks.report.tables import titled
from benchmarks.rows import SEARCH_SEEDS, Job, Results, Row, badness, read
from benchmarks.tasks import partition

LEARNING_RATE_STEP, WEIGHT_DECAY_STEP = 3.0, 4.0  # factors of the search's grid
FINALISTS = 3
Place = tuple[float, float]  # exponents of the two factors


def nearby(best: Place, seen: dict[Place, float]) -> Place:
    """The next place to try: beside the best one, learning rate first, at first in whole steps."""
    i, j = best
    for step in (1.0, 0.5, 0.25):
        for di, dj in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)):
            place = (i + di * step, j + dj * step)
            if place not in seen:
                return place
    raise AssertionError("the budget is larger than the grid")


def tidy(rate: float) -> float:
    """As many digits as tell jobs apart, so that a rate reached by two ways is one."""
    return float(f"{rate:.6g}")


def search(start: Job, budget: int, scores: dict[Place, float]) -> Iterator[tuple[Place, Job]]:
    """The trials of a method and their places, under which the caller notes how bad each was."""
    place: Place = (0.0, 0.0)
    for _ in range(budget):
        yield (
            place,
            start._replace(
                learning_rate=tidy(start.learning_rate * LEARNING_RATE_STEP ** place[0]),
                weight_decay=tidy(start.weight_decay * WEIGHT_DECAY_STEP ** place[1]),
            ),
        )
        place = nearby(min(scores, key=lambda p: (scores[p], p)), scores)


def best(runner: Runner, start: Job, budget: int) -> Row:
    """The best trial of a method: the best few are tried with another seed too."""
    scores: dict[Place, float] = {}
    tried: list[tuple[float, Job, Row]] = []
    for place, job in search(start, budget, scores):
        row = runner.do(job)
        scores[place] = badness(row)
        tried.append((scores[place], job, row))

    def total(trial: tuple[float, Job, Row]) -> float:
        first, job, _ = trial
        others = [runner.do(job._replace(seed=seed)) for seed in SEARCH_SEEDS[1:]]
        return first + sum(map(badness, others))

    finalists = sorted(tried, key=lambda trial: trial[:2])[:FINALISTS]
    return min(finalists, key=total)[2]


def draw_splits(task: Task, args: argparse.Namespace) -> None:
    """Who holds what, where workers hold unlike rows."""
    n, seed = args.workers[0], args.seeds[0]
    parts = {split: split_rows(task.data, split, n, seed) for split in args.splits}
    unlike = {titled(split): rows for split, rows in parts.items() if rows is not None}
    if unlike:
        partition.picture(task.data.groups, unlike, args.out / f"{task.name}_who.png")


def beginning(earlier: dict[tuple[str, str], Place], task: str, method: str) -> Place:
    """The rates that a method's search begins at; those of "METHOD, VARIANT" are METHOD's."""
    for name in (method, method.split(",")[0]):
        if (task, name) in earlier:
            return earlier[task, name]
    return METHODS[method].learning_rate, METHODS[method].weight_decay


def compare(runner: Runner, args: argparse.Namespace) -> list[Row]:
    """The search of every method, then all runs, one number of workers after the other."""
    try:  # a split that cannot be, before any time is spent
        for n, split in itertools.product([*args.workers, args.search_workers], args.splits):
            split_rows(runner.task.data, split, n, 0)
    except ValueError as error:
        raise UsageError(f"--splits, --workers: {error}") from error
    draw_splits(runner.task, args)
    pairs = list(itertools.product(args.splits, args.methods))
    found = {}
    for split, method in pairs:
        rates = beginning(args.start_from, runner.task.name, method)
        start = Job("trial", split, method, args.search_workers, SEARCH_SEEDS[0], *rates)
        found[split, method] = best(runner, start, args.budget)
    rows = []
    for n, pair, seed in itertools.product(args.workers, pairs, args.seeds):
        rates = found[pair]["learning_rate"], found[pair]["weight_decay"]
        rows.append(runner.do(Job("run", *pair, n, seed, *rates)))
    return rows


def _split(text: str) -> str:
    if text in ("iid", "groups"):
        return text
    try:
        alpha = float(text)
    except ValueError:
        alpha = 0.0
    if not alpha > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not iid, groups, or an alpha above 0")
    return f"{alpha:g}"


def _chosen(file: str) -> dict[tuple[str, str], Place]:
    """The rates of each task and method of earlier results."""
    try:
        rows = read(Path(file))
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    found = {
        (row["task"], row["method"]): (row["learning_rate"], row["weight_decay"])
        for row in rows
        if (row["kind"], row["split"]) == ("run", "iid")
    }
    if not found:
        raise argparse.ArgumentTypeError(f"{file} has no results of i.i.d. runs")
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = command_line(__doc__)
    add_arguments(p, seeds=[42, 52, 62])
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(DEFAULT), metavar="NAME",
                   help=f"of: {'; '.join(METHODS)}")  # fmt: skip
    p.add_argument("--workers", nargs="+", type=int, default=[4, 8, 16, 32], metavar="N")
    p.add_argument("--splits", nargs="+", type=_split, default=["iid"], metavar="SPLIT",
                   help="whose rows a worker sees: iid (anybody's), groups (whole works; whole "
                   "labels), or a number: alpha of a Dirichlet mix of labels")  # fmt: skip
    p.add_argument("--budget", type=int, default=12, help="trials of each method's search")
    p.add_argument("--search-workers", type=int, default=8, metavar="N", help="workers of a trial")
    p.add_argument(
        "--start-from",
        type=_chosen,
        default={},
        metavar="RESULTS",
        help="begin each search at the rates of this file's i.i.d. runs, that of a variant at its "
        "method's",
    )
    args = p.parse_args(argv)
    if min(args.workers) < 2 or args.search_workers < 2:
        p.error("--workers and --search-workers: at least 2, or there is nobody to vote with")
    if not 1 <= args.budget <= 24:
        p.error(f"--budget must lie in [1, 24]; got {args.budget}")
    check_arguments(p, args)
    args.out = args.out or Path("runs/compare") / args.size
    return args


def run(args: argparse.Namespace) -> str:
    """All tasks; the tables."""
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results(args.out / "results.jsonl")
    each_search = args.budget + min(FINALISTS, args.budget) * (len(SEARCH_SEEDS) - 1)
    each = each_search * args.search_workers + sum(args.workers) * len(args.seeds)
    rows = []
    for name in args.task:
        task = make_task(args, name)
        with progress(task.steps * each * len(args.methods) * len(args.splits)) as bar:
            rows += compare(Runner(task, METHODS, results, bar), args)
    trials = [row for row in results.rows if row["kind"] == "trial"]
    return report.write(rows + trials, args.out)


if __name__ == "__main__":
    sys.exit(guarded(run, parse(None)))
