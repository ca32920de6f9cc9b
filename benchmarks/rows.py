# SPDX-License-Identifier: Apache-2.0
"""Rows of results, and their rules: one JSON line a run of compare.py or sensitivity.py.

In:  a results file. Out: its rows, grouped; or a new row in it. Nothing but the standard library is
imported, so that a page of results loads no trainer.
"""

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cli import UsageError

FORMAT = 3  # of a line of results
SEARCH_SEEDS = (1000, 1001)  # of the trials of a search; no result uses them
BASE = "Lion"  # what differences are taken to, seed by seed
VOTE = "D-Lion majority"  # tables say how soon the others reach its final loss
Row = dict[str, Any]
Found = dict[tuple[str, int], dict[int, Row]]  # by method and workers, then by seed

# The methods of quality/methods.py, in the order of the tables, and their groups: a hue each.
GROUPS: dict[str, str] = {
    "D-Muon majority": "orthogonal",
    "D-Lion majority": "vote",
    "D-Lion average": "vote",
    "D-SIGNUM majority": "vote",
    "D-SIGNUM average": "vote",
    "signSGD majority": "vote",
    "Lion": "full precision",
    "AdamW": "full precision",
    "Muon": "full precision",
    "SGD momentum": "full precision",
    "EF-signSGD": "compressed",
    "QSGD": "compressed",
    "TernGrad": "compressed",
    "GradDrop": "compressed",
    "DGC": "compressed",
    "PowerSGD": "compressed",
    "QSGD + AdamW": "compressed",
    "TernGrad + AdamW": "compressed",
    "PowerSGD + AdamW": "compressed",
    "PowerSGD rank 1": "compressed",
    "PowerSGD rank 1 + AdamW": "compressed",
    "Lion bf16": "full precision",
    "AdamW bf16": "full precision",
    "SGD momentum bf16": "full precision",
    "D-Lion majority, coin": "vote",
    "D-Lion majority, ternary": "vote",
    "D-Lion majority, ties -1": "constants",
    "D-Lion majority, ties and zeros -1": "constants",
    "D-Lion majority, ties and zeros +1": "constants",
    "D-Lion majority, vote EMA 0.9": "vote",
    "D-Lion majority, noise 2": "vote",
    "D-Lion majority, sync 16": "vote",
    "D-Lion majority, sync 64": "vote",
    "D-Lion majority, noise 2, sync 16": "vote",
    "D-Muon majority, coin": "orthogonal",
    "D-Muon average": "orthogonal",
    "D-SignMuon majority": "orthogonal",
    "D-Muon majority, 3 steps": "orthogonal",
    "D-Muon majority, bfloat16": "orthogonal",
    "D-Muon majority, period 2": "orthogonal",
    "D-Muon majority, period 4": "orthogonal",
    "D-Muon majority, sync 16": "orthogonal",
    "D-Muon majority, noise 2": "orthogonal",
    "D-Muon majority, cautious": "orthogonal",
    "D-Muon majority, error feedback": "orthogonal",
    "D-Muon majority, blocks": "orthogonal",
    "D-Muon owner": "orthogonal",
}


class Job(NamedTuple):
    """One run."""

    kind: str  # "trial" of the search, or "run"
    split: str  # how rows are split over workers: "iid", "groups", or an alpha
    method: str
    workers: int
    seed: int
    learning_rate: float
    weight_decay: float
    betas: tuple[float, ...] | None = None  # None: the method's published ones

    def key(self, task: str) -> tuple[Any, ...]:
        """What tells it from others in the file."""
        numbers = self.learning_rate, self.weight_decay, *(self.betas or ())
        return (task, *self[:5], *(f"{x:.6g}" for x in numbers))


def job_of(row: Row) -> Job:
    """The run that a row is of. Rows without betas are of searches that left them alone."""
    betas = row.get("betas")
    return Job(**{name: row[name] for name in Job._fields[:-1]}, betas=betas and tuple(betas))


class Results:
    """The file of results: a JSON line a run."""

    def __init__(self, file: Path) -> None:
        self.file, self.rows = file, read(file)
        self.known = {self._key(row): row for row in self.rows}

    @staticmethod
    def _key(row: Row) -> tuple[Any, ...]:
        return job_of(row).key(row["task"])

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


def quality(row: Row) -> float:
    """Accuracy in % of images, loss in nats of text; nan where a run diverged."""
    return 100 * row["accuracy"] if row["task"] == "images" else row["loss"]


def listed(versions: dict[str, str]) -> str:
    """What a figure depends on, on one line."""
    return ", ".join(f"{name} {value}" for name, value in versions.items())


def runs(rows: Iterable[Row], task: str, split: str) -> Found:
    """The runs of a task and split: by method and workers, then by seed.

    Runs of two settings or versions, or of one method at two rates, are not of one comparison:
    refused.
    """
    out: Found = {}
    mixed: dict[tuple[str, ...], set[Any]] = {}
    for row in rows:
        if row["kind"] == "run" and (row["task"], row["split"]) == (task, split):
            method, n = row["method"], row["workers"]
            if method not in GROUPS:
                raise UsageError(f"{method!r} is no method of compare.py")
            out.setdefault((method, n), {})[row["seed"]] = row
            mixed.setdefault(("settings",), set()).add(row["setting"])
            mixed.setdefault(("versions",), set()).add(listed(row["versions"]))
            rates = ", ".join(job_of(row).key(task)[6:])
            mixed.setdefault(("rates of", method), set()).add(rates)
    for what, values in mixed.items():
        if len(values) > 1:
            found = "; ".join(sorted(map(str, values)))
            raise UsageError(f"runs of {task}, {split}, are of several {' '.join(what)}: {found}")
    return out


def searched(row: Row) -> dict[str, float]:
    """What a search chose: rates, and how far the betas stay below 1."""
    rates = {name: row[name] for name in ("learning_rate", "weight_decay")}
    betas = row.get("betas") or ()
    return rates | {f"b{i}": 1 - b for i, b in enumerate(betas, start=1)}


def edges(rows: Iterable[Row], task: str, split: str) -> dict[str, set[str]]:
    """Of each method: which chosen numbers are the largest or smallest that its search tried."""
    rows = [row for row in rows if (row["task"], row["split"]) == (task, split)]
    out: dict[str, set[str]] = {}
    for row in rows:
        if row["kind"] == "run":
            trials = [searched(x) for x in rows
                      if x["kind"] == "trial" and x["method"] == row["method"]]  # fmt: skip
            for name, chosen in searched(row).items():
                tried = [trial[name] for trial in trials if name in trial] or [chosen]
                least, most = (1 + 1e-5) * min(tried), max(tried) / (1 + 1e-5)
                if least < most and not least < chosen < most:  # one value alone was not searched
                    out.setdefault(row["method"], set()).add(name)
    return out


def names_of(found: Iterable[tuple[str, int]]) -> list[str]:
    """The methods that ran, in the order of the tables."""
    have = {method for method, _ in found}
    return [name for name in GROUPS if name in have]


def skew_of(split: str) -> float:
    """Where a split stands among others: i.i.d. first, then alphas from large to small."""
    return {"iid": -math.inf, "groups": math.inf}.get(split) or -float(split)


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str], Found]:
    """The runs of every task and split that has some, in order."""
    rows = list(rows)
    done = {(row["task"], row["split"]) for row in rows if row["kind"] == "run"}
    return {(task, split): runs(rows, task, split) for task, split in sorted(done)}


def several_splits(
    groups: dict[tuple[str, str], Found],
) -> dict[str, tuple[int, dict[str, Found]]]:
    """Of each task with more than one split: the number of workers most run, and all by split."""
    out: dict[str, dict[str, Found]] = {}
    for (task, split), found in groups.items():
        out.setdefault(task, {})[split] = found
    return {
        task: (statistics.mode(n for found in splits.values() for _, n in found), splits)
        for task, splits in out.items()
        if len(splits) > 1
    }
