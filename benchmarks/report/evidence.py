# SPDX-License-Identifier: Apache-2.0
"""How one method stands to another in compare.py's results, and how surely."""

import functools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from benchmarks.report.tables import figure_form
from benchmarks.rows import Found, Results, Row, grouped, quality, several_splits

UNITS = {"images": "points", "text": "nats"}
MARGIN = {"images": 0.5, "text": 0.02}  # two methods this close are level
FAR = 4  # margins, "by a large margin"
LEAST = 3  # seeds: fewer are no evidence


def interval(values: list[float]) -> float:
    """Half of a 95 % interval of a mean, by Student's t."""
    t = float(stats.t.ppf(0.975, len(values) - 1))
    return t * statistics.stdev(values) / math.sqrt(len(values))


class Missing(Exception):
    """There are no results to say it from."""


class Standing(NamedTuple):
    """A method beside another: gains are above 0 where it is better, points or nats.

    Errors are halves of 95 % intervals over seeds.
    """

    task: str
    by_workers: dict[int, tuple[float, float]]  # mean gain, error: each over its own seeds
    gain: float  # mean, over the seeds that all numbers of workers have, of each seed's mean
    error: float
    diverged: tuple[int, int]  # runs of the method, of the other

    @property
    def word(self) -> str:
        """Level: within the margin for sure; ahead or behind: on one side of 0 for sure."""
        if any(self.diverged):
            mine, other = self.diverged
            return "behind" if mine > other else "ahead" if other > mine else "undecided"
        if abs(self.gain) + self.error <= MARGIN[self.task]:
            return "level"
        if abs(self.gain) > self.error:
            return "ahead" if self.gain > 0 else "behind"
        return "undecided"

    @property
    def on_par(self) -> bool | None:
        """Not behind by more than the margin, for sure; False: behind by more; None: undecided."""
        if any(self.diverged):
            return {"behind": False, "ahead": True}.get(self.word)
        if self.gain - self.error >= -MARGIN[self.task]:
            return True
        return False if self.gain + self.error < -MARGIN[self.task] else None

    @property
    def far(self) -> bool:
        """Ahead by a large margin."""
        return self.word == "ahead" and not self.gain < FAR * MARGIN[self.task]

    def figure(self, gain: float, error: float) -> str:
        """A gain and its error."""
        form = figure_form(self.task)
        return f"{gain:+{form}} ± {error:{form}}"

    @property
    def short(self) -> str:
        """The word and the gain."""
        if any(self.diverged):
            return f"{self.word} (diverged: {self.diverged[0]}, {self.diverged[1]})"
        return f"{self.word} ({self.figure(self.gain, self.error)} {UNITS[self.task]})"

    def __str__(self) -> str:
        if any(self.diverged) or len(self.by_workers) == 1:
            return f"{self.task}: {self.short}"
        each = ", ".join(f"n = {n}: {self.figure(*one)}" for n, one in self.by_workers.items())
        return f"{self.task}: {self.short[:-1]}; {each})"


def standing(found: Found, task: str, method: str, base: str) -> Standing:
    """A method beside another, paired by seed and number of workers."""
    sign = 1 if task == "images" else -1
    pairs = [(n, seed) for name, n in found if name == method
             for seed in found[name, n] if seed in found.get((base, n), {})]  # fmt: skip
    by_n = {n: {s for m, s in pairs if m == n} for n, _ in sorted(pairs)}
    seeds = {n: some for n, some in by_n.items() if len(some) >= LEAST}
    common = sorted(set.intersection(*seeds.values())) if seeds else []
    if len(common) < LEAST:
        raise Missing(f"{method} beside {base}, {task}: {LEAST} seeds of both")
    pairs = [(n, seed) for n, seed in pairs if n in seeds]
    values = {(name, n, s): quality(found[name, n][s]) for name in (method, base) for n, s in pairs}
    lost = tuple(
        sum(not math.isfinite(values[name, n, s]) for n, s in pairs) for name in (method, base)
    )
    gains = {(n, s): sign * (values[method, n, s] - values[base, n, s]) for n, s in pairs}

    def estimate(each: list[float]) -> tuple[float, float]:
        return statistics.mean(each), math.nan if any(lost) else interval(each)

    by_workers = {n: estimate([gains[n, s] for s in sorted(some)]) for n, some in seeds.items()}
    whole = estimate([statistics.mean(gains[n, s] for n in seeds) for s in common])
    return Standing(task, by_workers, *whole, (lost[0], lost[1]))


class Evidence:
    """All results, by file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results = functools.cache(self._results)
        self.groups = functools.cache(self._groups)

    def _path(self, name: str) -> Path:
        if not (self.folder / name).exists():
            raise Missing(name)
        return self.folder / name

    def _results(self, name: str) -> Results:
        """A file of compare.py or sensitivity.py, read once."""
        return Results(self._path(name))

    def _groups(self, name: str) -> dict[tuple[str, str], Found]:
        """The runs of a file by task and split, grouped once."""
        return grouped(self.rows(name))

    def rows(self, name: str) -> list[Row]:
        """Its rows."""
        return self.results(name).rows

    def json(self, name: str) -> Any:
        """What a script wrote whole."""
        return json.loads(self._path(name).read_text())

    def lines(self, name: str) -> list[Any]:
        """What a script wrote a line at a time."""
        return [json.loads(line) for line in self._path(name).read_text().splitlines()]

    def runs(self, task: str, split: str = "iid", name: str = "compare.jsonl") -> Found:
        """The runs of a task and split."""
        found = self.groups(name).get((task, split), {})
        if not found:
            raise Missing(f"{task}, {split}, in {name}")
        return found

    def splits(self, task: str, name: str = "unlike.jsonl") -> tuple[int, dict[str, Found]]:
        """The number of workers, and the runs by split, of those on unlike data."""
        found = several_splits(self.groups(name))
        if task not in found:
            raise Missing(f"several splits of {task} in {name}")
        return found[task]

    def beside(
        self,
        method: str,
        base: str,
        name: str = "compare.jsonl",
        tasks: Sequence[str] = tuple(UNITS),
    ) -> list[Standing]:
        """A method beside another on each task."""
        return [standing(self.runs(task, name=name), task, method, base) for task in tasks]
