# SPDX-License-Identifier: Apache-2.0
"""Distributed Lion beside what it is compared with: quality against workers, bits and bytes.

    python benchmarks/compare.py --size quick          # a look, in minutes on 2 cores
    python benchmarks/compare.py --task images text    # what the README shows: hours on 2 cores
    python benchmarks/compare.py --splits 0.25 0.05    # workers with unlike data
    python benchmarks/compare.py --size paper --images-dir CIFAR   # the paper's, for a GPU or TPU

Every method gets a search of its own over learning rate and weight decay, with the same number of
trials, at one number of workers, with a seed and held-out rows that no result uses, by the figure
that is reported. Then it runs at each number of workers with each seed: same data order and initial
weights for all methods at a seed. Workers are simulated on one device: votes exactly, sums of
floating-point numbers in the order of the workers. Results are kept, one JSON line a run: a killed
comparison goes on where it stopped, and a finished one only reports.
"""

import argparse
import importlib.metadata
import itertools
import json
import math
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from compare_methods import DEFAULT, METHODS
from tqdm import tqdm

FORMAT = 2  # of a line of results
SEARCH_SEED = 1000
LEARNING_RATE_STEP, WEIGHT_DECAY_STEP = 3.0, 4.0  # factors of the search's grid
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {
        "text": {"steps": 50, "batch": 4, "layers": 1, "width": 32, "eval_rows": 128},
        "images": {
            "steps": 50, "batch": 16, "patch": 7, "layers": 1, "width": 32, "eval_rows": 1000,
        },
    },
    "small": {
        "text": {"steps": 500, "batch": 4, "layers": 2, "width": 64, "eval_rows": 1024},
        "images": {
            "steps": 500, "batch": 16, "patch": 7, "layers": 2, "width": 64, "eval_rows": 10_000,
        },
    },
    "paper": {
        "text": {"steps": 14_000, "batch": 15, "layers": 6, "width": 512, "eval_rows": 4096},
        "images": {
            "steps": 200 * 50_000 // 32, "batch": 32, "patch": 4, "layers": 6, "width": 512,
            "eval_rows": 10_000,
        },
    },
}  # fmt: skip

Row = dict[str, Any]
Place = tuple[float, float]  # exponents of the two factors


class Job(NamedTuple):
    """One run."""

    kind: str  # "trial" of the search, or "run"
    split: str  # how rows are split over workers: "iid", "groups", or an alpha
    method: str
    workers: int
    seed: int
    learning_rate: float
    weight_decay: float

    def key(self, task: str) -> tuple[Any, ...]:
        """What tells it from others in the file."""
        return (task, *self[:5], f"{self.learning_rate:.6g}", f"{self.weight_decay:.6g}")


class UsageError(Exception):
    """Something the user can mend: reported in one line, with exit code 2."""


class Results:
    """The file of results: a JSON line a run."""

    def __init__(self, file: Path) -> None:
        self.file, self.rows = file, read(file)
        self.known = {self._key(row): row for row in self.rows}

    @staticmethod
    def _key(row: Row) -> tuple[Any, ...]:
        return Job(*(row[name] for name in Job._fields)).key(row["task"])

    def find(self, job: Job, task: str) -> Row | None:
        """The row of a job that was done."""
        return self.known.get(job.key(task))

    def add(self, row: Row) -> None:
        """Keeps a row, at once."""
        with open(self.file, "a") as out:
            out.write(json.dumps(row) + "\n")
        self.rows.append(row)
        self.known[self._key(row)] = row


def read(file: Path) -> list[Row]:
    """The rows of a results file, if there is one."""
    if not file.exists():
        return []
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        other = {row["format"] for row in rows} - {FORMAT}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is no results file of compare.py: {error}") from error
    if other:
        raise UsageError(f"{file} is of format {other.pop()}, this is {FORMAT}: use another --out")
    return rows


def badness(row: Row) -> float:
    """What the search makes small: the figure that is reported, and infinity where it diverged."""
    value = -row["accuracy"] if row["task"] == "images" else row["loss"]
    return value if math.isfinite(value) else math.inf


def nearby(best: Place, seen: dict[Place, float]) -> Place:
    """The next place to try: beside the best one, learning rate first, at first in whole steps."""
    i, j = best
    for step in (1.0, 0.5, 0.25):
        for di, dj in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)):
            place = (i + di * step, j + dj * step)
            if place not in seen:
                return place
    raise AssertionError("the budget is larger than the grid")


def search(
    split: str, method: str, workers: int, budget: int, scores: dict[Place, float]
) -> Iterator[tuple[Place, Job]]:
    """The trials of a method and their places, under which the caller notes how bad each was."""
    place: Place = (0.0, 0.0)
    for _ in range(budget):
        start = METHODS[method]
        rate = start.learning_rate * LEARNING_RATE_STEP ** place[0]
        decay = start.weight_decay * WEIGHT_DECAY_STEP ** place[1]
        yield place, Job("trial", split, method, workers, SEARCH_SEED, rate, decay)
        place = nearby(min(scores, key=lambda p: (scores[p], p)), scores)


class Comparison:
    """All runs of one task."""

    def __init__(self, args: argparse.Namespace, name: str, results: Results, bar: Any) -> None:
        import compare_train  # imports JAX, which takes seconds

        size = dict(SIZES[args.size][name])
        if args.steps:
            size["steps"] = args.steps
        self.task = compare_train.make_task(name, size, args.images_dir)
        self.make_trainer = lambda m, n: compare_train.Trainer(self.task, m, n)
        self.args, self.results, self.bar = args, results, bar
        self.runs: list[Row] = []
        try:  # a split that cannot be, before any time is spent
            for n, split in itertools.product([*args.workers, args.search_workers], args.splits):
                compare_train.split_rows(self.task.data, split, n, 0)
        except ValueError as error:
            raise UsageError(f"--splits, --workers: {error}") from error
        self.trainer: tuple[Any, Any] = (None, None)
        others = {row["setting"] for row in results.rows if row["task"] == name}
        if others - {self.task.summary}:
            raise UsageError(
                f"{results.file} has results of another setting ({others.pop()}), "
                f"this is {self.task.summary}: use another --out"
            )

    def do(self, job: Job) -> Row:
        """A job's row: looked up, or run."""
        found = self.results.find(job, self.task.name)
        weight = self.task.steps * job.workers
        if found:
            self.bar.update(weight)
            return found
        if self.trainer[0] != (job.method, job.workers):
            self.trainer = ((job.method, job.workers), self.make_trainer(job.method, job.workers))
        trainer = self.trainer[1]
        self.bar.set_postfix_str(
            f"{self.task.name}, {job.split}: {job.kind} of {job.method}, n = {job.workers}"
        )
        result = trainer.run(
            job.seed,
            job.learning_rate,
            job.weight_decay,
            job.split,
            job.kind,
            lambda steps: self.bar.update(steps * job.workers),
        )
        cost = trainer.cost()
        row = job._asdict() | {
            "format": FORMAT,
            "task": self.task.name,
            "setting": self.task.summary,
            "steps": self.task.steps,
            "loss": result.loss,
            "accuracy": result.accuracy,
            "curve": binned(result.losses, 50),
            "seconds": result.seconds,
            "parameters": cost.parameters,
            "bytes": cost.bytes_received,
            "bits": cost.bits_per_parameter,
            "versions": versions(),
        }
        self.results.add(row)
        return row

    def best(self, split: str, method: str) -> Row:
        """The best trial of a method."""
        scores: dict[Place, float] = {}
        rows = []
        trials = search(split, method, self.args.search_workers, self.args.budget, scores)
        for place, job in trials:
            rows.append(self.do(job))
            scores[place] = badness(rows[-1])
        return min(rows, key=badness)

    def run(self) -> None:
        """The search of every method, then all runs, one number of workers after the other."""
        pairs = list(itertools.product(self.args.splits, self.args.methods))
        best = {pair: self.best(*pair) for pair in pairs}
        for n, pair, seed in itertools.product(self.args.workers, pairs, self.args.seeds):
            rates = best[pair]["learning_rate"], best[pair]["weight_decay"]
            self.runs.append(self.do(Job("run", *pair, n, seed, *rates)))


def binned(losses: list[float], bins: int) -> list[float]:
    """Means of so many stretches of equal length (the last may be cut short)."""
    width = max(1, math.ceil(len(losses) / bins))
    parts = [losses[i : i + width] for i in range(0, len(losses), width)]
    return [round(sum(part) / len(part), 5) for part in parts]


def versions() -> dict[str, str]:
    """What a figure depends on."""
    import jax

    names = ("jax", "jaxlib", "optax", "flax", "distlion_jax")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version()} | found | {"on": jax.devices()[0].device_kind}


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


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],  # type: ignore[union-attr]
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--task", nargs="+", choices=("images", "text"), default=["images", "text"])
    p.add_argument("--size", choices=SIZES, default="small", help="model, data and steps")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(DEFAULT), metavar="NAME",
                   help=f"of: {'; '.join(METHODS)}")  # fmt: skip
    p.add_argument("--workers", nargs="+", type=int, default=[4, 8, 16, 32], metavar="N")
    p.add_argument("--seeds", nargs="+", type=int, default=[42, 52, 62], metavar="SEED")
    p.add_argument("--splits", nargs="+", type=_split, default=["iid"], metavar="SPLIT",
                   help="whose rows a worker sees: iid (anybody's), groups (whole works; whole "
                   "labels), or a number: alpha of a Dirichlet mix of labels")  # fmt: skip
    p.add_argument("--budget", type=int, default=10, help="trials of each method's search")
    p.add_argument("--search-workers", type=int, default=8, metavar="N", help="workers of a trial")
    p.add_argument("--steps", type=int, help="training steps, instead of the size's")
    p.add_argument("--images-dir", type=Path, help="MNIST-style idx files, or CIFAR-10's binary")
    p.add_argument("--out", type=Path, help="folder of the results (default: runs/compare/SIZE)")
    args = p.parse_args(argv)
    if min(args.workers) < 2 or args.search_workers < 2:
        p.error("--workers and --search-workers: at least 2, or there is nobody to vote with")
    if not 1 <= args.budget <= 24:
        p.error(f"--budget must lie in [1, 24]; got {args.budget}")
    if args.steps is not None and args.steps < 1:
        p.error(f"--steps must be at least 1; got {args.steps}")
    if SEARCH_SEED in args.seeds or min(args.seeds) < 0:
        p.error(f"--seeds must be at least 0, and not {SEARCH_SEED}, which the search uses")
    args.out = args.out or Path("runs/compare") / args.size
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    args = parse(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        results = Results(args.out / "results.jsonl")
        each = args.budget * args.search_workers + sum(args.workers) * len(args.seeds)
        runs = []
        for name in args.task:
            steps = args.steps or SIZES[args.size][name]["steps"]
            total = steps * each * len(args.methods) * len(args.splits)
            with tqdm(total=total, unit="worker step", unit_scale=True, dynamic_ncols=True,
                      disable=not sys.stderr.isatty()) as bar:  # fmt: skip
                comparison = Comparison(args, name, results, bar)
                comparison.run()
                runs += comparison.runs
    except UsageError as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compare.py: interrupted; what was done is kept", file=sys.stderr)
        return 130
    import compare_report

    print(compare_report.write(runs, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
