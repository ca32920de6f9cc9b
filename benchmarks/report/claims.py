# SPDX-License-Identifier: Apache-2.0
"""The paper's claims and its reviewers' objections, each with what came out here.

    python -m benchmarks.report.claims          # writes docs/claims.md from benchmarks/results

In:  the results of the other benchmarks. Out: one page. Verdicts over results are computed, and
what has no results says so; a test compares the page with the results.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.cli import command_line, guarded
from benchmarks.report import rare_rows, sensitivity, theory
from benchmarks.report.evidence import (
    FAR,
    LEAST,
    MARGIN,
    UNITS,
    Evidence,
    Missing,
    Standing,
    interval,
    standing,
)
from benchmarks.report.markdown import table
from benchmarks.report.tables import score
from benchmarks.rows import names_of, quality, skew_of

ROOT = Path(__file__).resolve().parents[2]
COMPARE = "`python -m benchmarks.quality.compare`"
MAJORITY, AVERAGE, LION, ADAMW = "D-Lion majority", "D-Lion average", "Lion", "AdamW"
OURS, MUON = "D-Muon majority", "Muon"
HEADLINE, VARIANTS = "headline.jsonl", "headline_variants.jsonl"
TEXT = ("text",)
Finding = tuple[str, str]  # verdict, what came out
Find = Callable[[Evidence], Finding]


def verdict(holds: Sequence[bool | None]) -> str:
    """Of a claim that is looked at on several tasks; None: undecided."""
    if len({*holds}) == 1:
        return {True: "holds", False: "**does not hold here**", None: "undecided"}[holds[0]]
    return "in part" if True in holds else "not shown"


def surely(word: str) -> Callable[[Standing], bool | None]:
    """Whether a method is ahead, or behind; None where that is undecided."""
    return lambda s: None if s.word == "undecided" else s.word == word


def on_par(s: Standing) -> bool | None:
    """Whether a method is not behind; None where that is undecided."""
    return s.on_par


def stands(
    method: str,
    base: str,
    holds: Callable[[Standing], bool | None],
    name: str = "compare.jsonl",
    tasks: Sequence[str] = tuple(UNITS),
) -> Find:
    """That a method stands so to another, on images and on text."""

    def find(ev: Evidence) -> Finding:
        both = ev.beside(method, base, name, tasks)
        text = f"{method} beside {base}: " + "; ".join(map(str, both))
        return verdict([*map(holds, both)]), text

    return find


def all_of(*finds: Find) -> Find:
    """Several findings as one."""

    def find(ev: Evidence) -> Finding:
        found = [one(ev) for one in finds]
        words = {word for word, _ in found}
        mixed = "in part" if words & {"holds", "in part"} else "not shown"
        return words.pop() if len(words) == 1 else mixed, ".<br>".join(text for _, text in found)

    return find


def ahead_of(method: str, others: Sequence[str], far: bool = False) -> Find:
    """That a method is ahead, or far ahead, of all others; the nearest is shown whole."""

    def find(ev: Evidence) -> Finding:
        texts, holds = [], []
        for task in UNITS:
            found = ev.runs(task)
            each = {name: standing(found, task, method, name) for name in others}
            name = min(each, key=lambda name: (any(each[name].diverged), each[name].gain))
            ones = [surely("ahead")(s) and (s.far or not far) for s in each.values()]
            holds.append(False if False in ones else None if None in ones else True)
            rest = (f"{other}: {each[other].short}" for other in others if other != name)
            texts.append(", ".join([f"{each[name]} beside {name}", *rest]))
        return verdict(holds), f"{method}: " + "; ".join(texts)

    return find


def worse_with_workers(ev: Evidence) -> Finding:
    """Whether quality falls with the number of workers, for every method."""
    texts, holds = [], []
    searched = {row["workers"] for row in ev.rows("compare.jsonl") if row["kind"] == "trial"}
    for task in UNITS:
        found = ev.runs(task)
        n, m = min(n for _, n in found), max(n for _, n in found)
        if n == m:
            raise Missing("more than one number of workers")
        sign, falls, rises = 1 if task == "images" else -1, [], []
        names = names_of(found)
        for name in names:
            ends = [found.get((name, k), {}) for k in (n, m)]
            both = [seed for seed in ends[0] if seed in ends[1]]
            gains = [sign * (quality(ends[1][s]) - quality(ends[0][s])) for s in both]
            if not all(math.isfinite(quality(row)) for row in ends[1].values()):
                falls.append(name)  # diverged
            elif len(gains) > 1 and all(map(math.isfinite, gains)):
                mean, error = statistics.mean(gains), interval(gains)
                (falls if mean < -error else rises if mean > error else []).append(name)
        holds.append(False if rises else True if len(falls) == len(names) else None)
        texts.append(
            f"{task}, n = {n} to {m}: {len(falls)} methods get worse "
            f"({', '.join(falls) or 'none'}), {len(rises)} better ({', '.join(rises) or 'none'})"
        )
    return verdict(holds), "; ".join(texts) + (
        ". Steps and each worker's batch are fixed, as in the paper, so that more workers see more "
        "data; rates are "
        f"those found at n = {', '.join(map(str, sorted(searched)))}"
    )


def by_task(ev: Evidence) -> Finding:
    """Whether the average is better on images and the majority on text."""
    images, text = ev.beside(AVERAGE, MAJORITY)
    holds = [surely("ahead")(images), surely("behind")(text)]
    return verdict(holds), f"Average beside majority: {images}; {text}"


def own_bits(ev: Evidence) -> Finding:
    """The bits of the votes that were compared."""
    found = ev.runs("text")
    common = [n for _, n in found if all((x, n) in found for x in (MAJORITY, AVERAGE, LION))]
    if not common:
        raise Missing("the votes and Lion at one number of workers")
    n = max(common)

    def bits(name: str) -> float:
        return next(iter(found[name, n].values()))["bits"]

    return "in part", (
        f"Received a parameter at n = {n}, a small model: majority {bits(MAJORITY):.2f} (zero ties "
        f"take two bits down, coin ties one), average {bits(AVERAGE):.2f} (its verdict takes "
        f"ceil(log2(n + 1)) bits), Lion {bits(LION):.1f}"
    )


def phase_two(ev: Evidence) -> Finding:
    """The KKT score by number of workers."""
    rows = ev.json("theory.json")["rows"]
    power = {name: theory.powers(rows, name) for name in (MAJORITY, AVERAGE, LION)}
    holds = [max(power[MAJORITY]) < -0.4, min(power[AVERAGE]) > -0.05]
    shown = ", ".join(
        f"{name} n^{statistics.mean(p):.2f} ± {statistics.stdev(p):.2f}"
        for name, p in power.items()
    )
    text = f"On a noisy quadratic the score falls as (± standard deviation): {shown}"
    return verdict(holds), text


def ties(ev: Evidence) -> Finding:
    """Constants for ties and zeros beside ours."""
    rules = ("coin", "ties -1", "ties and zeros -1", "ties and zeros +1")
    names = [f"{MAJORITY}, {rule}" for rule in rules]
    texts = [
        f"{name}: " + "; ".join(map(str, ev.beside(name, MAJORITY, "ties.jsonl"))) for name in names
    ]
    return "measured", "Beside zero ties. " + ".<br>".join(texts)


def rare(ev: Evidence) -> Finding:
    """How far rows never seen move."""
    figures = ev.json("rare_rows.json")
    total = figures["learning_rates"]
    shown = ", ".join(
        f"{rule}, width {width}: {rare_rows.moved(rows, 0)[1] / total:.2f}"
        for (width, rule), rows in rare_rows.of_kinds(figures).items()
    )
    return "measured", f"A row never seen moves, in sums of the learning rates: {shown}"


def unlike(ev: Evidence) -> Finding:
    """The fall with unlike data, and what mends it: more than half of the fall, for sure."""
    n, found = ev.splits("images")
    order = sorted(found, key=skew_of)
    names = names_of(key for some in found.values() for key in some)
    if absent := [(x, split) for x in names for split in order if (x, n) not in found[split]]:
        raise Missing(f"{absent[0]}")

    def each(name: str, split: str) -> dict[int, float]:
        some = {seed: quality(row) for seed, row in found[split][name, n].items()}
        return {seed: x if math.isfinite(x) else 0.0 for seed, x in some.items()}  # diverged

    def surely_above(one: dict[int, float], other: dict[int, float]) -> bool:
        gains = [one[seed] - other[seed] for seed in one if seed in other]
        if len(gains) < LEAST:
            raise Missing(f"{LEAST} seeds of all on unlike data")
        return statistics.mean(gains) > interval(gains)

    last = order[-1]
    like, apart = each(MAJORITY, order[0]), each(MAJORITY, last)
    half = {seed: (like[seed] + x) / 2 for seed, x in apart.items() if seed in like}
    remedies = [name for name in names if name.startswith(f"{MAJORITY}, ")]
    mends = [x for x in remedies if surely_above(each(x, last), half)]
    by = "; with ".join(name.removeprefix(f"{MAJORITY}, ") for name in mends)
    word = f"more than half comes back with {by}" if mends else "nothing brings back half of it"
    figures = {name: [score(found[split], name, n, "images") for split in order] for name in names}
    shown = "; ".join(f"{name} {' / '.join(means)}" for name, means in figures.items())
    return f"it falls; {word}" if surely_above(like, apart) else "it does not surely fall", (
        f"Images, % right (± standard deviation) at {' / '.join(order)}: {shown}"
    )


def ours(name: str, others: Sequence[str], tasks: Sequence[str] = TEXT) -> Find:
    """That orthogonalised ballots are ahead of others, in a file of results."""
    return all_of(*(stands(OURS, other, surely("ahead"), name, tasks) for other in others))


def variants(*names: str, base: str = OURS) -> Find:
    """Variants of orthogonalised ballots beside them."""

    def find(ev: Evidence) -> Finding:
        texts = []
        for name in names:
            try:
                (one,) = ev.beside(name, base, VARIANTS, TEXT)
                texts.append(f"{name}: {one.short}")
            except Missing:
                texts.append(f"{name}: not measured yet")
        return "measured", f"Text, n = 8, beside {base}: " + "; ".join(texts)

    return find


def works(ev: Evidence) -> Finding:
    """The vote beside Lion, where each worker holds whole works."""
    found = standing(ev.runs("text", "groups", "unlike.jsonl"), "text", MAJORITY, LION)
    return found.word, f"{MAJORITY} beside {LION}, works to each worker: {found}"


def gap(ev: Evidence) -> Finding:
    """What brings the majority closer to Lion on text."""
    found = ev.runs("text", name="gap.jsonl")
    names = [name for name in names_of(found) if name != MAJORITY]
    texts = [f"{name}: {standing(found, 'text', name, MAJORITY).short}" for name in names]
    return "measured", f"Text, n = 8, beside {MAJORITY}: " + "; ".join(texts)


def longer(ev: Evidence) -> Finding:
    """The majority beside Lion and AdamW, in runs of four times the steps."""
    found = ev.runs("text", name="long.jsonl")
    both = [standing(found, "text", MAJORITY, base) for base in (LION, ADAMW)]
    texts = [f"beside {base}: {one.short}" for base, one in zip((LION, ADAMW), both, strict=True)]
    return "measured", f"Text, 4,000 steps, n = 8, {MAJORITY} " + "; ".join(texts)


def hyperparameters(ev: Evidence) -> Finding:
    """Where the best learning rate lies, by number of workers."""
    plan, texts = sensitivity.Plan(), []
    results = ev.results("sensitivity.jsonl")
    for task in UNITS:
        *_, by_workers = sensitivity.measure(task, sensitivity.recall(results, task), plan)
        found = []
        for name in sensitivity.FOLLOWED:
            points = [sensitivity.by_rate(by_workers, name, n) for n in plan.workers]
            best = [sensitivity.vertex(one, task) for one in points]
            shown = ", ".join(f"{rate:.1e}{' (edge)' * edge}" for rate, edge in best)
            found.append(f"{name} {shown}")
        texts.append(f"{task}: " + "; ".join(found))
    return "measured", (
        f"Best learning rate at n = {', '.join(map(str, plan.workers))}. " + ".<br>".join(texts)
    )


def stated(word: str, text: str) -> Find:
    """What tests or other pages hold."""
    return lambda ev: (word, text)


COMPRESSED = ("TernGrad", "GradDrop", "DGC")
PAPER: list[tuple[str, Find, str]] = [
    ("The majority is on par with full-precision Lion", stands(MAJORITY, LION, on_par),
     COMPARE),
    ("The average is slightly below full-precision Lion, and on par with AdamW",
     all_of(stands(AVERAGE, LION, surely("behind")), stands(AVERAGE, ADAMW, on_par)), COMPARE),
    ("Both votes are far ahead of TernGrad, GradDrop and DGC",
     all_of(*(ahead_of(x, COMPRESSED, far=True) for x in (MAJORITY, AVERAGE))), COMPARE),
    ("The SIGNUM forms are below the Lion forms",
     all_of(stands("D-SIGNUM majority", MAJORITY, surely("behind")),
            stands("D-SIGNUM average", AVERAGE, surely("behind"))), COMPARE),
    ("Every method gets worse with more workers", worse_with_workers, COMPARE),
    ("The average is better on images, the majority on text", by_task, COMPARE),
    ("One bit up; one bit down (majority) or log2(n) (average)", own_bits,
     "`python -m benchmarks.compute.wire_table`; tests count them in compiled programs"),
    ("Phase I: the box of size 1/weight_decay draws in, whatever the gradients",
     stated("holds", "A property test over any gradients, both aggregations"),
     "`pytest tests/test_properties.py -k box`"),
    ("Phase II: the floor of the KKT score falls with n for the majority (Theorem 3.6: as "
     "1/sqrt(n)), and does not for the average (3.8)", phase_two,
     "`python -m benchmarks.quality.theory`"),
    ("ImageNet, OpenWebText and LLaMA-7B",
     stated("not run", "No accelerator and no such data here. `--size paper` has the paper's "
            "vision transformer and steps; CIFAR-10's files, and OpenWebText in tokens as nanoGPT "
            "keeps it, are read"),
     "`python -m benchmarks.quality.compare --size paper --images-dir CIFAR --corpus TOKENS`"),
]  # fmt: skip
OBJECTIONS: list[tuple[str, Find, str]] = [
    ("Is it compatible with all-reduce?",
     stated("yes", "`two_phase` scales as one does, counted in compiled programs and on real links "
            "at n = 2, 4, 8"), "README, On the wire; On slow links"),
    ("What does packing cost?", stated("see", "The update beside `optax.lion`'s, and each stage "
     "beside memory bandwidth"), "`python -m benchmarks.compute.update`, `codec`"),
    ("End-to-end throughput, wall-clock time",
     stated("see", "Real processes on shaped links, beside PyTorch's; loss beside wall time"),
     "`sudo python -m benchmarks.network.run --peers`, `python examples/train.py`"),
    ("QSGD and signSGD are missing",
     all_of(*(ahead_of(MAJORITY, (x,)) for x in ("QSGD", "signSGD majority"))), COMPARE),
    ("(ours) And with error feedback, low rank, or AdamW behind the compressor?",
     all_of(*(ahead_of(MAJORITY, (x,)) for x in (
         "EF-signSGD", "PowerSGD", "QSGD + AdamW", "TernGrad + AdamW", "PowerSGD + AdamW"))),
     COMPARE),
    ("(ours) And beside AdamW in full precision?", stands(MAJORITY, ADAMW, on_par), COMPARE),
    ("(ours) What closes the gap to Lion?", gap,
     '`python -m benchmarks.quality.compare '
     '--out runs/compare/gap --task text --workers 8 --seeds 42 52 62 72 82 92 '
     '--budget 6 --methods '
     '"D-Lion majority" "D-Lion majority, coin" "D-Lion majority, ternary" "D-Lion majority, vote '
     'EMA 0.9" "D-Lion majority, sync 16" Lion AdamW '
     '--start-from benchmarks/results/compare.jsonl`'),
    ("(ours) Do longer runs close it?", longer,
     '`python -m benchmarks.quality.compare '
     '--out runs/compare/long --task text --steps 4000 --workers 8 --budget 5 '
     '--methods "D-Lion majority" Lion '
     'AdamW --start-from benchmarks/results/compare.jsonl`'),
    ("Are settings fair?",
     stated("see", "Every method has a search of its own, of the same number of trials; rates at "
            "an edge of it are marked"), COMPARE),
    ("How sensitive is it to hyperparameters?", hyperparameters,
     "`python -m benchmarks.quality.sensitivity --steps 500`; README, What to tune"),
    ("The CIFAR-10 figures look low",
     stated("open", "CIFAR-10 cannot be had offline: its files are read, and Fashion-MNIST stands "
            "in, in short runs. Compare orders, not levels"), COMPARE),
    ("What are sign(0) and ties?", all_of(ties, rare),
     '`python -m benchmarks.quality.compare '
     '--methods "D-Lion majority" "D-Lion majority, coin" "D-Lion majority, ties -1" '
     '"D-Lion majority, ties and zeros -1" "D-Lion majority, ties and zeros +1" --workers 4 8 '
     '--search-workers 4 --budget 6 --start-from benchmarks/results/compare.jsonl`, n = 4 also '
     'with `--seeds 72 82 92 102 112 122`, `python -m benchmarks.quality.rare_rows`'),
    ("Non-i.i.d. and federated data", unlike,
     '`python -m benchmarks.quality.compare '
     '--splits 100 0.25 0.05 --workers 10 --search-workers 10 --budget 6 --methods '
     '"D-Lion majority" "D-Lion average" "D-Lion majority, noise 2" "D-Lion majority, sync 16" '
     '"D-Lion majority, noise 2, sync 16" Lion AdamW EF-signSGD '
     '--start-from benchmarks/results/compare.jsonl`'),
    ("(ours) And on text, where works are a natural split?", works,
     '`python -m benchmarks.quality.compare '
     '--task text --splits groups --workers 10 --search-workers 10 --budget 6 '
     '--methods "D-Lion majority" "D-Lion average" "D-Lion majority, sync 16" "D-Lion majority, '
     'noise 2, sync 16" Lion AdamW --start-from benchmarks/results/compare.jsonl`'),
    ("There is no code", stated("yes", "This repository"), "README"),
]  # fmt: skip


FOUR = (ADAMW, LION, MAJORITY, MUON)
METHODS = " ".join(f'"{name}"' for name in (OURS, MUON, ADAMW, MAJORITY, LION))


def searched(rest: str, out: str) -> str:
    """The command of a comparison in which betas are searched too."""
    return (
        f"`python -m benchmarks.quality.compare --betas --methods {METHODS} {rest} --out "
        f"runs/{out}`"
    )


AGAIN = "--start-from benchmarks/results/headline.jsonl"
ADDED: list[tuple[str, Find, str]] = [
    ("Ahead of the majority of plain signs", ours(HEADLINE, [MAJORITY], tuple(UNITS)),
     searched("--budget 32 --workers 2 4 8 16 32 --seeds 42 52 62 72 82 92 --start-from "
              "benchmarks/results/compare.jsonl", "headline")),
    ("Ahead of Lion in full precision", ours(HEADLINE, [LION], tuple(UNITS)), "the same"),
    ("Ahead of AdamW in full precision, betas searched", ours(HEADLINE, [ADAMW], tuple(UNITS)),
     "the same"),
    ("On par with Muon in full precision", stands(OURS, MUON, on_par, HEADLINE), "the same"),
    ("And in 4,000 steps?", ours("headline_4000.jsonl", FOUR),
     searched(f"--task text --steps 4000 --workers 8 --budget 5 {AGAIN}", "4000")),
    ("And in 16,000?", ours("headline_16000.jsonl", FOUR),
     searched("--task text --steps 16000 --workers 8 --budget 1 --start-from "
              "benchmarks/results/headline_4000.jsonl", "16000")),
    ("On another corpus?", ours("headline_kjv.jsonl", FOUR),
     "`python -m benchmarks.tasks.kjv`, then "
     + searched(f"--task text --corpus runs/kjv.txt.gz --workers 8 --budget 5 {AGAIN}", "kjv")),
    ("With a model of 0.4 M parameters?", ours("headline_example.jsonl", FOUR),
     searched(f"--task text --size example --workers 8 --budget 9 {AGAIN}", "example")),
    ("With a model of 1.6 M parameters?", ours("headline_wide.jsonl", (ADAMW, MUON)),
     searched(f"--task text --size wide --workers 8 --budget 5 {AGAIN}", "wide")),
    ("What does it cost to orthogonalise less, or to toss coins at ties?",
     variants("D-Muon majority, coin", "D-Muon majority, 3 steps", "D-Muon majority, bfloat16",
              "D-Muon majority, period 2", "D-Muon majority, period 4"),
     f"the same methods' variants, `--budget 5 --workers 8 {AGAIN}`"),
    ("What else was tried?",
     variants("D-SignMuon majority", "D-Muon average", "D-Muon majority, cautious",
              "D-Muon majority, error feedback", "D-Muon majority, blocks", "D-Muon owner"),
     "the same; benchmarks/quality/trials.py"),
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

Written by `python -m benchmarks.report.claims` from [benchmarks/results](../benchmarks/results).
Images: a small vision transformer on Fashion-MNIST, 500 steps. Text: a small transformer on
Shakespeare's characters, 1,000 steps. Each method runs at the best rates of its own search
(`python -m benchmarks.quality.compare`: on images 12 trials, `--task images`; on text 20, `--task
text --budget 20 --start-from benchmarks/results/compare_short.jsonl`). These are short runs of
small models: they tell how methods rank there, and not at the paper's scale.

Figures are gains, above 0 where the first method is better, over pairs of the same seed and number
of workers, with 95 % intervals over seeds (Student's t; the luck of a search, and of which rows are
held out, is not in them). The first figure is over the seeds that all numbers of workers have, the
others over all that one has. Level: surely within {MARGIN["images"]} points of accuracy or
{MARGIN["text"]} nats. Ahead or behind: surely on that side of 0; by a large margin: by
{FAR * MARGIN["images"]:g} points or {FAR * MARGIN["text"]:g} nats. Undecided: neither. A method is
on par with another where it is surely not behind by more than the first margin. Of some two hundred
intervals, about one in twenty will miss by chance.

## Claims of the paper

{table(head, lines(PAPER))}

![KKT score against workers, with the paper's 1/sqrt(n)](theory.png)

## Objections of its reviewers

{table(head, lines(OBJECTIONS))}

## What orthogonalised ballots add

Here every method searched its betas as well, with the same number of trials. "In part" is on one
of the two tasks, or beside some of the others.

{table(head, lines(ADDED))}
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = command_line(__doc__)
    p.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    p.add_argument("--out", type=Path, default=ROOT / "docs/claims.md")
    return p.parse_args(argv)


def run(args: argparse.Namespace) -> str:
    """Writes the page."""
    args.out.write_text(page(Evidence(args.results)))
    return f"{args.out} written"


if __name__ == "__main__":
    sys.exit(guarded(run, parse(None)))
