# SPDX-License-Identifier: Apache-2.0
"""How quality depends on what one sets: heat maps, and the best learning rate by workers.

    python -m benchmarks.quality.sensitivity --steps 500          # hours on 2 cores
    python -m benchmarks.quality.sensitivity --size quick         # a look

First every learning rate with every weight decay and pair (b1, b2), for full-precision Lion, for
both aggregations and three ways to break ties, at one number of workers, with one seed and the
held-out rows that no result uses. The best of them then run with each seed. Last, learning rates
around the best one, at each number of workers with each seed. Results are kept as compare.py's are
(a killed run goes on where it stopped): results.jsonl, results.md, TASK_heat.png, TASK_rates.png.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.cli import command_line, guarded, progress
from benchmarks.quality.methods import Method, lion_family
from benchmarks.quality.runs import Runner, add_arguments, check_arguments, make_task
from benchmarks.report import sensitivity as report
from benchmarks.report.sensitivity import AROUND, BETAS, FAMILY, FOLLOWED, Plan, named
from benchmarks.rows import Results


def methods() -> dict[str, Method]:
    """All that is run, by name."""
    return {
        named(name, *betas): method
        for betas in BETAS
        for name, method in lion_family(*betas).items()
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = command_line(__doc__)
    default = Plan()
    add_arguments(p, seeds=list(default.seeds))
    p.add_argument(
        "--heat-workers",
        type=int,
        default=default.heat_workers,
        metavar="N",
        help="of the heat maps",
    )
    p.add_argument("--workers", nargs="+", type=int, default=list(default.workers), metavar="N",
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
    plan = Plan(args.task, args.heat_workers, args.workers, args.seeds)
    by_workers = sum(args.workers) * len(FOLLOWED) * len(AROUND) * len(args.seeds)
    for name in args.task:
        task = make_task(args, name)
        maps = len(report.heat_cells(name)) + 3 * len(FAMILY) * len(
            args.seeds
        )  # about: places coincide
        each = maps * args.heat_workers + by_workers
        with progress(task.steps * each) as bar:
            heat, _, rows = report.measure(name, Runner(task, methods(), results, bar).do, plan)
        report.draw_heat(heat, name, args.heat_workers, args.out / f"{name}_heat.png")
        report.draw_rates(rows, name, args.out / f"{name}_rates.png")
    text = report.tables(results, plan)
    (args.out / "results.md").write_text(text + "\n")
    return text


if __name__ == "__main__":
    sys.exit(guarded(run, parse(None)))
