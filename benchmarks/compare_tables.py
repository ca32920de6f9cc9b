# SPDX-License-Identifier: Apache-2.0
"""Tables of compare.py's results, in Markdown."""

import math
import re
import statistics
from collections.abc import Iterable

import numpy as np
from compare_methods import METHODS
from compare_runs import Row

Found = dict[tuple[str, int], dict[int, Row]]  # by method and workers, then by seed
BASE = "Lion"  # what differences are taken to, seed by seed
VOTE = "D-Lion majority"  # whose loss the others are followed to


def quality(row: Row) -> float:
    """Accuracy in % of images, loss in nats a character of text; nan where a run diverged."""
    return 100 * row["accuracy"] if row["task"] == "images" else row["loss"]


def unit(task: str) -> str:
    """What :func:`quality` is of."""
    return "accuracy, %" if task == "images" else "loss, nats a character"


def runs(rows: Iterable[Row], task: str, split: str) -> Found:
    """The runs of a task and split: by method and workers, then by seed."""
    out: Found = {}
    for row in rows:
        if (row["task"], row["split"]) == (task, split):
            out.setdefault((row["method"], row["workers"]), {})[row["seed"]] = row
    return out


def setting(text: str) -> str:
    """A task's summary on one line: Flax writes a model on several."""
    fields = re.sub(r"\n +(\w+) = (\S+)", r" \1=\2,", text.replace("\n    # attributes", ""))
    return fields.replace("( ", "(").replace(",\n)", ")")


def spread(values: list[float], form: str) -> str:
    """Mean and standard deviation; how many diverged, if any."""
    if diverged := sum(not math.isfinite(x) for x in values):
        return f"diverged ({diverged} of {len(values)})"
    if len(values) < 2:
        return format(values[0], form)
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}"


def figure_form(task: str) -> str:
    """How :func:`quality` is printed."""
    return ".1f" if task == "images" else ".3f"


def table(head: list[str], body: Iterable[list[str]]) -> str:
    """In Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])


def names_of(found: Iterable[tuple[str, int]]) -> list[str]:
    """The methods that ran, in the order of METHODS."""
    have = {method for method, _ in found}
    return [name for name in METHODS if name in have]


def qualities(found: Found, task: str) -> str:
    """A row a method: bits, chosen rates, and quality by number of workers."""
    ns = sorted({n for _, n in found})
    head = [
        "method",
        *(f"n = {n}" for n in ns),
        *(f"bits, n = {n}" for n in ns[:: len(ns) - 1 or 1]),
    ]
    head += ["learning rate", "weight decay"]

    def line(name: str) -> list[str]:
        cells = [
            spread([quality(r) for r in found[name, n].values()], figure_form(task))
            if (name, n) in found else "not run"
            for n in ns
        ]  # fmt: skip
        some = {n: next(iter(found[name, n].values())) for n in ns if (name, n) in found}
        bits = [f"{some[n]['bits']:.2f}" if n in some else "" for n in ns[:: len(ns) - 1 or 1]]
        one = next(iter(some.values()))
        return [name, *cells, *bits, f"{one['learning_rate']:.2g}", f"{one['weight_decay']:.2g}"]

    return table(head, (line(name) for name in names_of(found)))


def differences(found: Found, task: str) -> str:
    """Quality less full-precision Lion's, seed by seed."""
    ns = sorted({n for _, n in found})

    def cell(name: str, n: int) -> str:
        mine, base = found.get((name, n), {}), found.get((BASE, n), {})
        pairs = [quality(mine[s]) - quality(base[s]) for s in mine if s in base]
        return spread(pairs, "+" + figure_form(task)).replace("± +", "± ") if pairs else ""

    rows = ([name, *(cell(name, n) for n in ns)] for name in names_of(found) if name != BASE)
    return table([f"less {BASE}", *(f"n = {n}" for n in ns)], rows)


def equal_loss(found: Found) -> str:
    """Share of the steps after which a method's training loss is what a vote's is at the end."""
    ns = sorted({n for _, n in found if (VOTE, n) in found})

    def curve(name: str, n: int) -> np.ndarray:
        return np.mean([row["curve"] for row in found[name, n].values()], axis=0)

    def cell(name: str, n: int) -> str:
        if (name, n) not in found:
            return "not run"
        mine = curve(name, n)
        reached = np.flatnonzero(mine <= curve(VOTE, n)[-1])
        return f"{(reached[0] + 1) / len(mine):.2f}" if len(reached) else "never"

    rows = ([name, *(cell(name, n) for n in ns)] for name in names_of(found))
    return table([f"to {VOTE}'s loss", *(f"n = {n}" for n in ns)], rows)


def skew_of(split: str) -> float:
    """Where a split stands among others: i.i.d. first, then alphas from large to small."""
    return {"iid": -math.inf, "groups": math.inf}.get(split) or -float(split)


def titled(split: str) -> str:
    """A split in a heading."""
    return split if split in ("iid", "groups") else f"alpha {split}"


def by_split(found: dict[str, Found], task: str, n: int) -> str:
    """Quality of a row a method and a column a split, at one number of workers."""
    splits = sorted(found, key=skew_of)
    names = names_of(key for some in found.values() for key in some)

    def cell(name: str, split: str) -> str:
        if (name, n) not in found[split]:
            return "not run"
        return spread([quality(r) for r in found[split][name, n].values()], figure_form(task))

    head = [f"n = {n}", *map(titled, splits)]
    return table(head, ([name, *(cell(name, split) for split in splits)] for name in names))
