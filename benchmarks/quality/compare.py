# SPDX-License-Identifier: Apache-2.0
"""Distributed Lion beside what it is compared with: quality against workers, bits and bytes.

    python -m benchmarks.quality.compare --size quick         # a look, in minutes on 2 cores
    python -m benchmarks.quality.compare --task images text   # rates alone: hours on 2 cores
    python -m benchmarks.quality.compare --betas --budget 32  # betas too, as the README's
    python -m benchmarks.quality.compare --splits 0.25 0.05   # workers with unlike data
    python -m benchmarks.quality.compare --size paper --images-dir CIFAR --corpus TOKENS  # a GPU

Every method gets a search of its own over learning rate and weight decay (with --betas over its
betas too, where it has some), with the same number of trials, at one number of workers, with seeds
and held-out rows that no result uses, by the figure that is reported; its best few are tried with a
second seed, and then what lies beyond, while the best lies at an edge of what was tried. (With
--start-from it begins where an earlier one ended.) Then it runs at each number
of workers with each seed: same data order and initial weights for all methods at a seed. Workers
are simulated on one device: votes exactly, sums of floating-point numbers in the order of the
workers. Results are kept, one JSON line a run: a killed comparison goes on where it stopped, and a
finished one only reports.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.cli import UsageError, command_line, guarded, progress
from benchmarks.quality.methods import DEFAULT, METHODS
from benchmarks.quality.runs import Runner, add_arguments, check_arguments, make_task
from benchmarks.quality.training import Task, split_rows
from benchmarks.report import compare as report
from benchmarks.report.tables import titled
from benchmarks.rows import SEARCH_SEEDS, Job, Results, Row, badness, job_of, read
from benchmarks.tasks import partition

# Factors of the search's grid: of learning rate, weight decay, and of what betas leave up to 1.
LEARNING_RATE_STEP, WEIGHT_DECAY_STEP, BETA_STEP = 3.0, 4.0, 2.0
STEPS = (1.0, 0.5, 0.25, 0.125)  # of the grid, one after the other
MOST = 32  # trials of a search: places around one of two dimensions
DIAGONALS = ((1, 1), (-1, -1), (1, -1), (-1, 1))
Place = tuple[float, ...]  # exponents of the factors: learning rate, weight decay, betas


def directions(dimensions: int) -> list[tuple[int, ...]]:
    """Where to look from a place: along each axis, then along rate and decay together."""
    axes = [tuple(sign * (i == k) for i in range(dimensions))
            for k in range(dimensions) for sign in (1, -1)]  # fmt: skip
    return axes + [(*pair, *(0,) * (dimensions - 2)) for pair in DIAGONALS]


def nearby(best: Place, seen: dict[Place, float]) -> Place:
    """The next place to try: beside the best one, learning rate first, at first in whole steps."""
    for step in STEPS:
        for way in directions(len(best)):
            place = tuple(x + step * dx for x, dx in zip(best, way, strict=True))
            if place not in seen:
                return place
    raise AssertionError("the budget is larger than the grid")


def tidy(rate: float) -> float:
    """As many digits as tell jobs apart, so that a rate reached by two ways is one."""
    return float(f"{rate:.6g}")


def job_at(start: Job, place: Place) -> Job:
    """The trial at a place."""
    betas = None
    if start.betas is not None:
        moved = zip(start.betas, place[2:], strict=True)
        betas = tuple(tidy(max(1 - (1 - b) * BETA_STEP**k, 0.0)) for b, k in moved)
    return start._replace(
        learning_rate=tidy(start.learning_rate * LEARNING_RATE_STEP ** place[0]),
        weight_decay=tidy(start.weight_decay * WEIGHT_DECAY_STEP ** place[1]),
        betas=betas,
    )


def beyond(best: Place, places: Iterable[Place]) -> list[Place]:
    """The places past the edge of what was tried, where the best one lies at an edge."""
    out = []
    for k, tried in enumerate(zip(*places, strict=True)):
        if min(tried) < max(tried):  # else this number was not searched
            steps = (best[k] == max(tried)) - (best[k] == min(tried))
            out += [tuple(x + steps * (i == k) for i, x in enumerate(best))] * abs(steps)
    return out


def finalists(budget: int) -> int:
    """How many of a search's trials are tried with a second seed."""
    return min(budget, max(3, budget // 5))


def search(measure: Callable[[Job], float], start: Job, budget: int) -> Job:
    """The best setting of a method, by how bad each job turns out.

    So many trials, each beside the best so far. The best few are tried with a second seed, and the
    least sum wins. While the winner lies at an edge of what was tried, what lies beyond is tried.
    """
    scores: dict[Place, float] = {}
    place: Place = (0.0, 0.0, *(0.0 for _ in start.betas or ()))
    for _ in range(budget):
        scores[place] = measure(job_at(start, place))
        place = nearby(min(scores, key=lambda p: (scores[p], p)), scores)

    def total(place: Place) -> float:
        job = job_at(start, place)
        return sum(measure(job._replace(seed=seed)) for seed in SEARCH_SEEDS)

    few = sorted(scores, key=lambda p: (scores[p], p))[: finalists(budget)]
    totals = {place: total(place) for place in few}
    while True:
        best = min(totals, key=lambda p: (totals[p], p))
        chosen = job_at(start, best)
        past = [p for p in beyond(best, [*scores, *totals]) if job_at(start, p) != chosen]
        if not past:
            return chosen
        totals |= {place: total(place) for place in past}


def draw_splits(task: Task, args: argparse.Namespace) -> None:
    """Who holds what, where workers hold unlike rows."""
    n, seed = args.workers[0], args.seeds[0]
    parts = {split: split_rows(task.data, split, n, seed) for split in args.splits}
    unlike = {titled(split): rows for split, rows in parts.items() if rows is not None}
    if unlike:
        partition.picture(task.data.groups, unlike, args.out / f"{task.name}_who.png")


Numbers = tuple[float, float, tuple[float, ...] | None]  # learning rate, weight decay, betas


def beginning(earlier: dict[tuple[str, str], Numbers], task: str, method: str) -> Numbers:
    """What a method's search begins at; for "METHOD, VARIANT" what METHOD has."""
    for name in (method, method.split(",")[0]):
        if (task, name) in earlier:
            rate, decay, betas = earlier[task, name]
            return rate, decay, betas or METHODS[method].betas
    return METHODS[method][2:]


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
        rate, decay, betas = beginning(args.start_from, runner.task.name, method)
        numbers = rate, decay, betas if args.betas else None
        start = Job("trial", split, method, args.search_workers, SEARCH_SEEDS[0], *numbers)
        found[split, method] = search(lambda job: badness(runner.do(job)), start, args.budget)
    rows = []
    for n, pair, seed in itertools.product(args.workers, pairs, args.seeds):
        rows.append(runner.do(found[pair]._replace(kind="run", workers=n, seed=seed)))
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


def _chosen(file: str) -> dict[tuple[str, str], Numbers]:
    """The rates and betas of each task and method of earlier results."""
    try:
        rows = read(Path(file))
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    found = {
        (row["task"], row["method"]): job_of(row)[-3:]
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
    p.add_argument("--betas", action="store_true",
                   help="search betas too, of methods that have some")  # fmt: skip
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
    if not 1 <= args.budget <= MOST:
        p.error(f"--budget must lie in [1, {MOST}]; got {args.budget}")
    check_arguments(p, args)
    args.out = args.out or Path("runs/compare") / args.size
    return args


def run(args: argparse.Namespace) -> str:
    """All tasks; the tables."""
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results(args.out / "results.jsonl")
    each_search = args.budget + finalists(args.budget) * (len(SEARCH_SEEDS) - 1)
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
