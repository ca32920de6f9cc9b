# SPDX-License-Identifier: Apache-2.0
"""The paper's claims and its reviewers' objections, each with what came out here.

    python benchmarks/claims.py          # writes docs/claims.md from benchmarks/results

In:  the results of the other benchmarks. Out: one table. Figures and verdicts are computed; what
has no results says so. A test compares the page with the results.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from compare_runs import Row, guarded, read
from compare_tables import quality, table

ROOT = Path(__file__).resolve().parent.parent
COMPARE = "`python benchmarks/compare.py`"
UNLIKE = "`python benchmarks/compare.py --splits 100 0.25 0.05 --workers 10 --search-workers 10`"
MAJORITY, AVERAGE, LION, ADAMW = "D-Lion majority", "D-Lion average", "Lion", "AdamW"
UNITS = {"images": "points", "text": "nats"}


class Missing(Exception):
    """There are no results to say it from."""


class Standing(NamedTuple):
    """A method beside another, over pairs of the same seed and number of workers."""

    gain: float  # mean; above 0 where the method is better, in points of accuracy or nats
    error: float  # two standard errors of it
    pairs: int

    @property
    def word(self) -> str:
        """Ahead or behind by more than the error, or level."""
        if abs(self.gain) <= self.error:
            return "level"
        return "ahead" if self.gain > 0 else "behind"


class Evidence:
    """All results, by file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rows(self, name: str) -> list[Row]:
        """The runs of a comparison."""
        rows = [row for row in read(self.folder / name) if row["kind"] == "run"]
        if not rows:
            raise Missing(name)
        return rows

    def json(self, name: str) -> Any:
        """What a script wrote whole."""
        file = self.folder / name
        if not file.exists():
            raise Missing(name)
        return json.loads(file.read_text())

    def standing(
        self, task: str, method: str, base: str, file: str = "compare.jsonl", split: str = "iid",
        workers: int | None = None,
    ) -> Standing:  # fmt: skip
        """A method beside another."""
        found: dict[tuple[str, int, int], float] = {}
        for row in self.rows(file):
            if (row["task"], row["split"]) == (task, split) and workers in (None, row["workers"]):
                value = quality(row) if task == "images" else -quality(row)
                found[row["method"], row["workers"], row["seed"]] = value
        gains = [
            found[method, n, seed] - found[base, n, seed]
            for name, n, seed in found
            if name == method and (base, n, seed) in found
        ]
        gains = [gain for gain in gains if math.isfinite(gain)]
        if len(gains) < 2:
            raise Missing(f"{method} and {base}")
        error = 2 * statistics.stdev(gains) / math.sqrt(len(gains))
        return Standing(statistics.mean(gains), error, len(gains))

    def qualities(self, task: str, split: str, method: str, file: str) -> list[float]:
        """Of all seeds."""
        found = [
            quality(row)
            for row in self.rows(file)
            if (row["task"], row["split"], row["method"]) == (task, split, method)
        ]
        if not found:
            raise Missing(f"{method}, {split}")
        return found


def said(task: str, standing: Standing) -> str:
    """A standing in words."""
    form = "+.1f" if task == "images" else "+.3f"
    return (
        f"{task}: {standing.word} ({standing.gain:{form}} ± {standing.error:{form[1:]}} "
        f"{UNITS[task]}, {standing.pairs} pairs)"
    )


Finding = tuple[str, str]  # verdict, what came out
Find = Callable[[Evidence], Finding]


def verdict(holds: Sequence[bool]) -> str:
    """Of a claim that is looked at on several tasks."""
    return "holds" if all(holds) else "in part" if any(holds) else "**does not hold here**"


def stands(method: str, base: str, *words: str) -> Find:
    """That a method stands so to another, on images and on text."""

    def find(ev: Evidence) -> Finding:
        both = [(task, ev.standing(task, method, base)) for task in UNITS]
        text = f"{method} beside {base}: " + "; ".join(said(*x) for x in both)
        return verdict([s.word in words for _, s in both]), text

    return find


def all_of(*finds: Find) -> Find:
    """Several findings as one."""

    def find(ev: Evidence) -> Finding:
        found = [one(ev) for one in finds]
        verdicts = {word for word, _ in found}
        joint = verdicts.pop() if len(verdicts) == 1 else "in part"
        return joint, ". ".join(text for _, text in found)

    return find


def ahead_of(method: str, others: Sequence[str]) -> Find:
    """That a method is ahead of the best of others."""

    def find(ev: Evidence) -> Finding:
        texts, holds = [], []
        for task in UNITS:
            each = {name: ev.standing(task, method, name) for name in others}
            name = min(each, key=lambda name: each[name].gain)
            holds.append(each[name].word == "ahead")
            texts.append(f"{said(task, each[name])}, beside the best of them, {name}")
        return verdict(holds), f"{method}: " + "; ".join(texts)

    return find


def worse_with_workers(ev: Evidence) -> Finding:
    """Whether quality falls with the number of workers."""
    texts, holds = [], []
    for task in UNITS:
        for name in (MAJORITY, LION, ADAMW):
            by_n: dict[int, list[float]] = {}
            for row in ev.rows("compare.jsonl"):
                if (row["task"], row["method"], row["split"]) == (task, name, "iid"):
                    by_n.setdefault(row["workers"], []).append(quality(row))
            if len(by_n) < 2:
                raise Missing(f"{name} by workers")
            least, most = min(by_n), max(by_n)
            ends = statistics.mean(by_n[least]), statistics.mean(by_n[most])
            holds.append((ends[1] < ends[0]) == (task == "images"))
            form = ".1f" if task == "images" else ".3f"
            texts.append(
                f"{task}, {name}: {ends[0]:{form}} at n = {least}, {ends[1]:{form}} at n = {most}"
            )
    return verdict(holds), "; ".join(texts) + (
        ". Steps and each worker's batch are fixed, so that more workers see more data"
    )


def by_task(ev: Evidence) -> Finding:
    """Whether the average is better on images and the majority on text."""
    images, text = (ev.standing(task, AVERAGE, MAJORITY) for task in ("images", "text"))
    holds = [images.word == "ahead", text.word == "behind"]
    return verdict(holds), f"Average beside majority: {said('images', images)}; " + said(
        "text", text
    )


def phase_two(ev: Evidence) -> Finding:
    """The KKT score by number of workers."""
    rows = ev.json("theory.json")["rows"]
    ns = sorted({row["workers"] for row in rows})

    def mean(name: str, n: int) -> float:
        scores = [r["score"] for r in rows if (r["method"], r["workers"]) == (name, n)]
        return statistics.mean(scores)

    ends = {name: (mean(name, ns[0]), mean(name, ns[-1])) for name in (MAJORITY, AVERAGE, LION)}
    falls = {name: b / a for name, (a, b) in ends.items()}
    ok = falls[MAJORITY] < 0.5 and falls[AVERAGE] > 0.9
    shown = ", ".join(f"{name} {a:.3f} to {b:.3f}" for name, (a, b) in ends.items())
    return "holds" if ok else "in part", (
        f"S a coordinate from n = {ns[0]} to {ns[-1]} on a noisy quadratic: {shown}"
    )


def ties(ev: Evidence) -> Finding:
    """Constants for ties and zeros beside ours."""
    texts = []
    for name in ("D-Lion majority, coin", "ties -1", "ties and zeros -1", "ties and zeros +1"):
        both = [(task, ev.standing(task, name, MAJORITY, "ties.jsonl")) for task in UNITS]
        texts.append(f"{name}: " + "; ".join(said(*x) for x in both))
    return "measured", "Beside zero ties. " + ". ".join(texts)


def rare(ev: Evidence) -> Finding:
    """How far rows never seen move."""
    figures = ev.json("rare_rows.json")
    total, moved = figures["learning_rates"], {}
    for row in figures["rows"]:
        moved.setdefault(row["rule"], []).append(row["moved"][0][1] / total)
    shown = ", ".join(f"{rule} {statistics.mean(values):.2f}" for rule, values in moved.items())
    return "measured", f"A row never seen moves, in sums of the learning rates: {shown}"


def unlike(ev: Evidence) -> Finding:
    """The fall with unlike data, and the mend."""
    file = "unlike.jsonl"
    splits = sorted({row["split"] for row in ev.rows(file) if row["task"] == "images"},
                    key=lambda split: -float(split))  # fmt: skip
    names = list(dict.fromkeys(row["method"] for row in ev.rows(file) if row["task"] == "images"))

    def cell(name: str, split: str) -> str:
        return f"{statistics.mean(ev.qualities('images', split, name, file)):.1f}"

    shown = "; ".join(
        f"{name} {' / '.join(cell(name, split) for split in splits)}" for name in names
    )
    return "it falls, and is mended", (
        f"Images, 10 workers, % right at alpha {' / '.join(splits)}: {shown}"
    )


def network(text: str) -> Find:
    """What the README's network tables show; a test compares those with the measurements."""
    return lambda ev: ("answered", text)


PAPER: list[tuple[str, Find, str]] = [
    ("The majority is on par with full-precision Lion", stands(MAJORITY, LION, "level"), COMPARE),
    ("The average is slightly below full-precision Lion and on par with AdamW",
     all_of(stands(AVERAGE, LION, "behind"), stands(AVERAGE, ADAMW, "level")), COMPARE),
    ("Both votes are far ahead of TernGrad, GradDrop and DGC",
     all_of(*(ahead_of(x, ("TernGrad", "GradDrop", "DGC")) for x in (MAJORITY, AVERAGE))), COMPARE),
    ("The SIGNUM forms are below the Lion forms",
     all_of(stands("D-SIGNUM majority", MAJORITY, "behind"),
            stands("D-SIGNUM average", AVERAGE, "behind")), COMPARE),
    ("Every method gets worse with more workers", worse_with_workers, COMPARE),
    ("The average is better on images, the majority on text", by_task, COMPARE),
    ("One bit up and one down (majority); log2(n) down (average)",
     network("1.76 and 4.41 bits received at n = 8, counted in compiled programs: the average's "
             "verdict takes ceil(log2(n + 1)) bits, and a majority with zero ties 2"),
     "README, On the wire"),
    ("Phase I: the box |x| <= 1/weight_decay draws in, whatever the gradients",
     network("Holds exactly (a property test over any gradients, both aggregations)"),
     "`pytest tests/test_properties.py -k box`"),
    ("Phase II: the KKT score's floor falls with n for the majority (Theorem 3.6), not for the "
     "average (3.8)", phase_two, "`python benchmarks/theory.py`"),
    ("ImageNet, OpenWebText and LLaMA-7B",
     lambda ev: ("not run", "No accelerator and no such data here; `--size paper` has the CIFAR-10 "
                 "model and reads CIFAR-10's files"), "`compare.py --size paper --images-dir DIR`"),
]  # fmt: skip
OBJECTIONS: list[tuple[str, Find, str]] = [
    ("Is it compatible with all-reduce?",
     network("`two_phase` scales like one: 2 (n-1)/n bits with coin ties, measured on real links "
             "at n = 2, 4, 8"), "README, On the wire; On slow links"),
    ("What does packing cost?",
     network("0.99 of `optax.lion`'s update in time; stages against bandwidth"),
     "`python benchmarks/update.py`, `codec.py`"),
    ("End-to-end throughput, wall-clock time",
     network("Real processes on shaped links, beside PyTorch's; loss beside wall time"),
     "`sudo python benchmarks/network.py --peers`, `python examples/train.py`"),
    ("QSGD and signSGD are missing",
     all_of(ahead_of(MAJORITY, ("QSGD",)), ahead_of(MAJORITY, ("signSGD majority",))), COMPARE),
    ("Others were not tuned: fair settings",
     network("Every method has a search of its own, of the same number of trials"), COMPARE),
    ("The CIFAR-10 figures look low",
     lambda ev: ("open", "CIFAR-10 cannot be had offline; its files are read, and Fashion-MNIST "
                 "stands in, in short runs: compare orders, not levels"), COMPARE),
    ("What of hyperparameters?", network("Heat maps and the best learning rate by n"),
     "`python benchmarks/sensitivity.py`"),
    ("What are sign(0) and ties?", all_of(ties, rare),
     "`compare.py --methods ...`, `python benchmarks/rare_rows.py`"),
    ("Non-i.i.d. and federated data", unlike, UNLIKE),
    ("There is no code", network("This repository"), "README"),
]  # fmt: skip


def page(ev: Evidence) -> str:
    """The page."""

    def lines(claims: Sequence[tuple[str, Find, str]]) -> list[list[str]]:
        out = []
        for claim, find, command in claims:
            try:
                found = find(ev)
            except Missing:
                found = ("not measured yet", "")
            out.append([claim, *found, command])
        return out

    head = ["claim", "verdict", "what came out", "how"]
    return f"""# What the paper claims, and what its reviewers asked

Written by `python benchmarks/claims.py` from [benchmarks/results](../benchmarks/results). Images:
a small vision transformer on Fashion-MNIST. Text: a small transformer on Shakespeare's characters.
Both train for 500 steps, each method at the best rates of its own search: short runs of small
models, which tell how methods rank there and not at the paper's scale. A method is ahead or behind
where the mean difference over pairs (the same seed and number of workers) is more than two standard
errors, and level otherwise; above 0 is better.

## Claims of the paper

{table(head, lines(PAPER))}

## Objections of its reviewers

{table(head, lines(OBJECTIONS))}
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],  # type: ignore[union-attr]
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    p.add_argument("--out", type=Path, default=ROOT / "docs/claims.md")
    return p.parse_args(argv)


def run(args: argparse.Namespace) -> str:
    """Writes the page."""
    args.out.write_text(page(Evidence(args.results)))
    return f"{args.out} written"


if __name__ == "__main__":
    sys.exit(guarded(run, parse(None)))
