# SPDX-License-Identifier: Apache-2.0
"""Tables of compare.py's results, in Markdown."""

import math
import statistics

import numpy as np

from benchmarks.report.markdown import table
from benchmarks.rows import BASE, VOTE, Found, names_of, quality, skew_of


def unit(task: str) -> str:
    """What :func:`quality` is of."""
    return "accuracy, %" if task == "images" else "loss, nats a character or token"


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


def seeds_of(found: Found) -> str:
    """The seeds that all have, and who has more."""
    common = set.intersection(*(set(some) for some in found.values()))
    more: dict[tuple[tuple[int, ...], int], list[str]] = {}
    for (name, n), some in found.items():
        if extra := tuple(sorted(set(some) - common)):
            more.setdefault((extra, n), []).append(name)
    parts = [", ".join(map(str, sorted(common)))]
    for (extra, n), names in more.items():
        parts.append(f"at n = {n} also {', '.join(map(str, extra))} for {', '.join(names)}")
    return "; ".join(parts)


def score(found: Found, method: str, n: int, task: str) -> str:
    """Quality of a method at a number of workers: mean and standard deviation over seeds."""
    if (method, n) not in found:
        return "not run"
    return spread([quality(row) for row in found[method, n].values()], figure_form(task))


def qualities(found: Found, task: str, edge: dict[str, set[str]]) -> str:
    """A row a method: bits, chosen rates, and quality by number of workers."""
    ns = sorted({n for _, n in found})
    head = [
        "method",
        *(f"n = {n}" for n in ns),
        *(f"bits, n = {n}" for n in ns[:: len(ns) - 1 or 1]),
    ]
    head += ["learning rate", "weight decay"]
    with_betas = any(row.get("betas") for some in found.values() for row in some.values())
    head += ["betas"] * with_betas

    def line(name: str) -> list[str]:
        cells = [score(found, name, n, task) for n in ns]
        some = {n: next(iter(found[name, n].values())) for n in ns if (name, n) in found}
        bits = [f"{some[n]['bits']:.2f}" if n in some else "" for n in ns[:: len(ns) - 1 or 1]]
        one = next(iter(some.values()))
        at_edge = edge.get(name, set())
        rates = [f"{one[k]:.2g}{' (edge)' * (k in at_edge)}"
                 for k in ("learning_rate", "weight_decay")]  # fmt: skip
        betas = [f"{b:.4g}{' (edge)' * (f'b{i}' in at_edge)}"
                 for i, b in enumerate(one.get("betas") or (), start=1)]  # fmt: skip
        shown = ", ".join(betas) or "published"
        return [name, *cells, *bits, *rates, *[shown] * with_betas]

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


def smooth(curve: np.ndarray) -> np.ndarray:
    """Means of each three neighbours."""
    return np.convolve(np.pad(curve, 1, mode="edge"), np.ones(3) / 3, mode="valid")


def equal_loss(found: Found) -> str:
    """Share of the steps after which a method's training loss stays below a vote's at the end.

    Of smoothed means over the seeds of both; the learning rate's schedule is the whole run's.
    """
    ns = sorted({n for _, n in found if (VOTE, n) in found})

    def curve(name: str, n: int, seeds: set[int]) -> np.ndarray:
        return smooth(np.mean([found[name, n][seed]["curve"] for seed in seeds], axis=0))

    def cell(name: str, n: int) -> str:
        if (name, n) not in found:
            return "not run"
        seeds = {*found[name, n]} & {*found[VOTE, n]}
        if not seeds:
            return "no seed of both"
        mine, end = curve(name, n, seeds), curve(VOTE, n, seeds)[-1]
        above = np.flatnonzero(~(mine <= end))
        steps = above[-1] + 2 if len(above) else 1
        return f"{steps / len(mine):.2f}" if steps <= len(mine) else "never"

    rows = ([name, *(cell(name, n) for n in ns)] for name in names_of(found))
    return table([f"{VOTE}'s at the end", *(f"n = {n}" for n in ns)], rows)


def titled(split: str) -> str:
    """A split in a heading."""
    return split if split in ("iid", "groups") else f"alpha {split}"


def by_split(found: dict[str, Found], task: str, n: int) -> str:
    """Quality of a row a method and a column a split, at one number of workers."""
    splits = sorted(found, key=skew_of)
    names = names_of(key for some in found.values() for key in some)

    head = [f"n = {n}", *map(titled, splits)]
    body = ([name, *(score(found[split], name, n, task) for split in splits)] for name in names)
    return table(head, body)
