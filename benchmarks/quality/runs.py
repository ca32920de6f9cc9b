# SPDX-License-Identifier: Apache-2.0
"""Runs that are kept: what compare.py and sensitivity.py do, one JSON line a run.

In:  jobs (what to train, with how many workers, which seed and rates). Out: their rows, looked up
in the results file or trained. A killed script goes on where it stopped.
"""

import argparse
import importlib.metadata
import math
import platform
from pathlib import Path
from typing import Any

import jax

from benchmarks.cli import UsageError
from benchmarks.quality import training
from benchmarks.quality.methods import Method
from benchmarks.quality.training import Task, Trainer
from benchmarks.rows import FORMAT, SEARCH_SEEDS, Job, Results, Row
from benchmarks.tasks import CORPUS

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
    # The model of examples/train.py.
    "example": {
        "text": {"steps": 1000, "batch": 4, "layers": 2, "width": 128, "eval_rows": 1024},
        "images": {
            "steps": 500, "batch": 16, "patch": 7, "layers": 2, "width": 128, "eval_rows": 10_000,
        },
    },
    # Fifteen times as many parameters.
    "wide": {
        "text": {
            "steps": 1000, "batch": 8, "layers": 2, "width": 256, "heads": 8, "eval_rows": 1024,
        },
        "images": {
            "steps": 500, "batch": 16, "patch": 7, "layers": 2, "width": 256, "heads": 8,
            "eval_rows": 10_000,
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


def make_task(args: argparse.Namespace, name: str) -> Task:
    """The task of that name at the command line's size."""
    size = dict(SIZES[args.size][name])
    if args.steps:
        size["steps"] = args.steps
    return training.make_task(name, size, args.images_dir, args.corpus)


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
        self.bar.total = max(self.bar.total, self.bar.n + weight)  # a search may go on past an edge
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
        result = trainer.run(job, lambda steps: self.bar.update(steps * job.workers))
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
    names = ("jax", "jaxlib", "optax", "flax", "distlion_jax")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version()} | found | {"on": jax.devices()[0].device_kind}
