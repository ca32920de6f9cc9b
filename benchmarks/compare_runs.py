# SPDX-License-Identifier: Apache-2.0
"""Runs that are kept: what compare.py and sensitivity.py do, one JSON line a run.

In:  jobs (what to train, with how many workers, which seed and rates). Out: their rows, looked up
in the results file or trained. A killed script goes on where it stopped.
"""

import argparse
import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import compare_train
from compare_methods import Method
from compare_train import Task, Trainer
from config import CORPUS, UsageError
from tqdm import tqdm

FORMAT = 3  # of a line of results
SEARCH_SEEDS = (1000, 1001)
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {
        "text": {"steps": 60, "batch": 4, "layers": 1, "width": 32, "eval_rows": 128},
        "images": {
            "steps": 60, "batch": 16, "patch": 7, "layers": 1, "width": 32, "eval_rows": 1000,
        },
    },
    "small": {
        "text": {"steps": 1000, "batch": 4, "layers": 2, "width": 64, "eval_rows": 1024},
        "images": {
            "steps": 500, "batch": 16, "patch": 7, "layers": 2, "width": 64, "eval_rows": 10_000,
        },
    },
    "paper": {
        # Its number of steps; a small model still: of characters, 64 at a time.
        "text": {
            "steps": 14_000, "batch": 15, "layers": 6, "width": 512, "heads": 8, "eval_rows": 4096,
        },
        "images": {
            "steps": 200 * 50_000 // 32, "batch": 32, "patch": 4, "layers": 6, "width": 512,
            "heads": 8, "eval_rows": 10_000,
        },
    },
}  # fmt: skip
Row = dict[str, Any]


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
        if self.file.exists() and (text := self.file.read_text()) != (whole := _whole(text)):
            self.file.write_text(whole)
        with open(self.file, "a") as out:
            out.write(json.dumps(row) + "\n")
        self.rows.append(row)
        self.known[self._key(row)] = row


def _whole(text: str) -> str:
    """Less half a last line, of who was killed."""
    end = text.rfind("\n") + 1
    if end == len(text):
        return text
    try:
        json.loads(text[end:])
    except ValueError:
        return text[:end]
    return text + "\n"


def read(file: Path) -> list[Row]:
    """The rows of a results file, if there is one; less a last line that was cut short."""
    if not file.exists():
        return []
    try:
        rows = [json.loads(line) for line in _whole(file.read_text()).splitlines()]
        other = {row["format"] for row in rows} - {FORMAT}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is no results file of compare.py: {error}") from error
    if other:
        raise UsageError(f"{file} is of format {other.pop()}, this is {FORMAT}: use another --out")
    return rows


def badness(row: Row) -> float:
    """To be made small: the figure that is reported, and infinity where it diverged."""
    value = -row["accuracy"] if row["task"] == "images" else row["loss"]
    return value if math.isfinite(value) else math.inf


def make_task(args: argparse.Namespace, name: str) -> Task:
    """The task of that name at the command line's size."""
    size = dict(SIZES[args.size][name])
    if args.steps:
        size["steps"] = args.steps
    return compare_train.make_task(name, size, args.images_dir, args.corpus)


def progress(total: int) -> tqdm:
    """A bar of a worker's steps, on a terminal."""
    return tqdm(total=total, unit="worker step", unit_scale=True, dynamic_ncols=True,
                disable=not sys.stderr.isatty())  # fmt: skip


def guarded(run: Callable[[argparse.Namespace], str], args: argparse.Namespace) -> int:
    """Runs, and prints what came out or one line of what went wrong; the exit code."""
    script = Path(sys.argv[0]).name
    try:
        print(run(args))
    except (UsageError, OSError) as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{script}: interrupted; what was done is kept", file=sys.stderr)
        return 130
    return 0


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """A parser that a module's docstring describes, and whose help shows defaults."""
    return argparse.ArgumentParser(
        description=(doc or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def add_arguments(parser: argparse.ArgumentParser, seeds: list[int]) -> None:
    """The flags that scripts share."""
    add = parser.add_argument
    add("--task", nargs="+", choices=("images", "text"), default=["images", "text"])
    add("--size", choices=SIZES, default="small", help="model, data and steps")
    add("--seeds", nargs="+", type=int, default=seeds, metavar="SEED")
    add("--steps", type=int, help="training steps, instead of the size's")
    add("--images-dir", type=Path, help="MNIST-style idx files, or CIFAR-10's binary")
    add("--corpus", type=Path, default=CORPUS, help="text, or a folder with train.bin and val.bin")
    add("--out", type=Path, help="folder of results.jsonl, tables and plots")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What argparse cannot see of them."""
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps must be at least 1; got {args.steps}")
    for name, values in vars(args).items():
        if isinstance(values, list) and len({*values}) < len(values):
            parser.error(
                f"--{name.replace('_', '-')} names something twice: {', '.join(map(str, values))}"
            )
    if {*SEARCH_SEEDS} & {*args.seeds} or min(args.seeds) < 0:
        parser.error(f"--seeds must be at least 0, and none of {SEARCH_SEEDS}, which searches use")


class Runner:
    """Does the jobs of one task."""

    def __init__(self, task: Task, methods: dict[str, Method], results: Results, bar: Any) -> None:
        self.task, self.methods, self.results, self.bar = task, methods, results, bar
        self.compiled: tuple[str, int] | None = None
        mine = {"setting": task.summary, "versions": versions()}
        for row in results.rows:
            if row["task"] == task.name:
                for name, here in mine.items():
                    if row[name] != here:
                        raise UsageError(
                            f"{results.file} has results of other {name} ({row[name]}), this is "
                            f"{here}: use another --out"
                        )

    def do(self, job: Job) -> Row:
        """A job's row: looked up, or run."""
        found = self.results.find(job, self.task.name)
        weight = self.task.steps * job.workers
        if found:
            self.bar.update(weight)
            return found
        compiled = (job.method, job.workers)
        if self.compiled != compiled:  # one program at a time: they take memory
            self.trainer = Trainer(self.task, self.methods[job.method], job.workers)
            self.compiled = compiled
        trainer = self.trainer
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
