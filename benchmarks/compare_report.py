# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of compare.py's results, or of a file of them.

    python benchmarks/compare_report.py benchmarks/results/compare.jsonl --out DIR

In:  the runs of one comparison. Out: ``results.md``, and for each task ``TASK_workers.png``,
``TASK_bits.png`` and ``TASK_bytes.png`` (``TASK_SPLIT_...`` where rows are not i.i.d.).
"""

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from compare_methods import METHODS
from compare_runs import Row, guarded, read

mpl.use("Agg")
import matplotlib.pyplot as plt

Found = dict[tuple[str, int], dict[int, Row]]  # by method and workers, then by seed
BASE = "Lion"  # what differences are taken to, seed by seed
VOTE = "D-Lion majority"  # whose loss the others are followed to
COLOURS = {
    "vote": "Blues",
    "constants": "Greens",
    "full precision": "Greys",
    "compressed": "Oranges",
}
MARKERS = "os^Dv<>Pp*Xhd"


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


def _names(found: dict[tuple[str, int], Any]) -> list[str]:
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

    return table(head, (line(name) for name in _names(found)))


def differences(found: Found, task: str) -> str:
    """Quality less full-precision Lion's, seed by seed."""
    ns = sorted({n for _, n in found})

    def cell(name: str, n: int) -> str:
        mine, base = found.get((name, n), {}), found.get((BASE, n), {})
        pairs = [quality(mine[s]) - quality(base[s]) for s in mine if s in base]
        return spread(pairs, "+" + figure_form(task)).replace("± +", "± ") if pairs else ""

    rows = ([name, *(cell(name, n) for n in ns)] for name in _names(found) if name != BASE)
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

    rows = ([name, *(cell(name, n) for n in ns)] for name in _names(found))
    return table([f"to {VOTE}'s loss", *(f"n = {n}" for n in ns)], rows)


def _styles(names: list[str]) -> dict[str, dict[str, Any]]:
    """A hue a group, a marker a method."""
    out = {}
    for group, colours in COLOURS.items():
        mine = [name for name in names if METHODS[name].group == group]
        for i, name in enumerate(mine):
            shade = 0.45 + 0.5 * (i + 1) / len(mine)
            out[name] = {"color": mpl.colormaps[colours](shade), "marker": MARKERS[i % 13]}
    return out


def _figure(title: str, draw: Callable[[Any], None], file: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    draw(axes)
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _points(some: dict[int, Row]) -> tuple[float, float]:
    values = np.array([quality(row) for row in some.values()])
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


def plots(found: Found, task: str, out: Path, stem: str) -> None:
    """The three plots of a task and split."""
    names, ns = _names(found), sorted({n for _, n in found})
    styles = _styles(names)

    def by_workers(axes: Any) -> None:
        for name in names:
            mine = [n for n in ns if (name, n) in found]
            points = [_points(found[name, n]) for n in mine]
            means, errors = zip(*points, strict=True)
            axes.errorbar(mine, means, errors, label=name, capsize=2, linewidth=1.2, **styles[name])
        axes.set_xscale("log", base=2)
        axes.set_xticks(ns, [str(n) for n in ns])
        axes.set_xlabel("workers (each with its own batch)")
        axes.set_ylabel(unit(task))

    def by_bits(axes: Any) -> None:
        for name in names:
            if (name, ns[-1]) not in found:
                continue
            some = found[name, ns[-1]]
            mean, error = _points(some)
            bits = next(iter(some.values()))["bits"]
            axes.errorbar(bits, mean, error, label=name, capsize=2, linestyle="", **styles[name])
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("bits received by each worker, a parameter and step")
        axes.set_ylabel(unit(task))

    def by_bytes(axes: Any) -> None:
        n = 8 if 8 in ns else ns[0]
        for name in names:
            some = list(found.get((name, n), {}).values())
            if not some:
                continue
            whole = min(len(row["curve"]) for row in some)
            curve = np.mean([row["curve"][:whole] for row in some], axis=0)
            steps = some[0]["steps"] * (np.arange(whole) + 1) / len(some[0]["curve"])
            style = {"color": styles[name]["color"], "marker": styles[name]["marker"]}
            axes.plot(steps * some[0]["bytes"] / 1e6, curve, label=name, markevery=10, **style)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(f"received by each of {n} workers, MB")
        axes.set_ylabel("training loss, nats")

    what = "Images" if task == "images" else "Text"
    _figure(f"{what}: quality against workers", by_workers, out / f"{stem}_workers.png")
    _figure(f"{what}: {ns[-1]} workers", by_bits, out / f"{stem}_bits.png")
    _figure(f"{what}: training against bytes", by_bytes, out / f"{stem}_bytes.png")


def sections(rows: list[Row]) -> Iterator[tuple[str, str, Found]]:
    """Each task and split that has runs."""
    done = [row for row in rows if row["kind"] == "run"]
    for task, split in sorted({(row["task"], row["split"]) for row in done}):
        yield task, split, runs(done, task, split)


def tables(rows: list[Row]) -> str:
    """All tables, in Markdown."""
    parts = []
    for task, split, found in sections(rows):
        one = next(iter(next(iter(found.values())).values()))
        seeds = sorted({seed for some in found.values() for seed in some})
        versions = ", ".join(f"{k} {v}" for k, v in one["versions"].items())
        parts += [
            f"## {task}, {split}: {unit(task)}",
            f"{one['parameters']:,} parameters; {setting(one['setting'])}. Seeds "
            + ", ".join(map(str, seeds))
            + f": mean ± standard deviation; every other held-out row chose the rates, the others "
            f"are reported. {versions}.",
            qualities(found, task),
            f"Paired by seed:\n\n{differences(found, task)}",
            f"Share of the steps to the same training loss:\n\n{equal_loss(found)}",
        ]
    return "\n\n".join(parts) or "no runs yet"


def write(rows: list[Row], out: Path) -> str:
    """Writes tables and plots to the folder; returns the tables."""
    for task, split, found in sections(rows):
        plots(found, task, out, task if split == "iid" else f"{task}_{split}")
    text = tables(rows)
    (out / "results.md").write_text(text + "\n")
    return text


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    p.add_argument("results", type=Path, nargs="+", help="compare.py's results.jsonl")
    p.add_argument("--out", type=Path, help="folder of results.md and plots (none: print only)")
    return p.parse_args(argv)


def run(args: argparse.Namespace) -> str:
    """The tables of all files together."""
    rows = [row for file in args.results for row in read(file)]
    if args.out is None:
        return tables(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    return write(rows, args.out)


if __name__ == "__main__":
    sys.exit(guarded(run, parse(None)))
