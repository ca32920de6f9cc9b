# SPDX-License-Identifier: Apache-2.0
"""Plots of compare.py's results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report.figures import pyplot
from benchmarks.report.tables import titled, unit
from benchmarks.rows import GROUPS, Found, Row, names_of, quality, skew_of

COLOURS = {
    "orthogonal": "RdPu",
    "vote": "Blues",
    "constants": "Greens",
    "full precision": "Greys",
    "compressed": "Oranges",
}
MARKERS = "os^Dv<>Pp*Xhd"
THICK = ("D-Muon majority", "D-Lion majority", "D-Lion average")
FEW = (  # what lines are drawn of where all would be too many
    *THICK, "signSGD majority", "Lion", "AdamW", "Muon", "QSGD + AdamW", "EF-signSGD",
    "PowerSGD + AdamW",
)  # fmt: skip


def _styles(names: list[str]) -> dict[str, dict[str, Any]]:
    """A hue a group, a marker a method; Distributed Lion's lines are thick, and lie above."""
    out = {}
    for group, colours in COLOURS.items():
        mine = [name for name in names if GROUPS[name] == group]
        for i, name in enumerate(mine):
            shade = 0.8 - 0.5 * i / len(mine)  # the ends of the maps are black and white
            thick = name in THICK
            out[name] = {
                "color": pyplot().colormaps[colours](shade),
                "marker": MARKERS[i % 13],
                "linewidth": 2.6 if thick else 1.1,
                "markersize": 7 if thick else 5,
                "zorder": 3 if thick else 2,
            }
    return out


def _towards(task: str) -> str:
    """What is drawn, and which way is better."""
    return f"{unit(task)} ({'higher' if task == 'images' else 'lower'} is better)"


def _few(names: list[str]) -> list[str]:
    """All of them, or the chosen ones of many."""
    return names if len(names) <= len(FEW) else [name for name in names if name in FEW]


def _log_x(axes: Any) -> None:
    """Ticks at powers of two, in numbers as people write them."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")


def _figure(title: str, draw: Callable[[Any], None], file: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    draw(axes)
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _points(some: dict[int, Row]) -> tuple[float, float]:
    """Mean and standard deviation; nan, which no plot shows, where a run diverged."""
    values = np.array([quality(row) for row in some.values()])
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _line(axes: Any, name: str, x: list[Any], some: list[dict[int, Row]], **style: Any) -> None:
    """Means with standard deviations; the legend says where a run diverged."""
    points = [_points(one) for one in some]
    lost = sum(not np.isfinite(mean) for mean, _ in points)
    label = f"{name} (diverged: {lost})" if lost else name
    if points:
        means, errors = zip(*points, strict=True)
        axes.errorbar(x, means, errors, label=label, capsize=2, **style)


def plots(found: Found, task: str, out: Path, stem: str) -> None:
    """The three plots of a task and split."""
    names, ns = names_of(found), sorted({n for _, n in found})
    styles = _styles(names)

    def by_workers(axes: Any) -> None:
        for name in _few(names):
            mine = [n for n in ns if (name, n) in found]
            _line(axes, name, mine, [found[name, n] for n in mine], **styles[name])
        _log_x(axes)
        axes.set_xticks(ns)
        axes.set_xlabel("workers (each with its own batch)")
        axes.set_ylabel(_towards(task))

    def by_bits(axes: Any) -> None:
        for name in names:
            if (name, ns[-1]) not in found:
                continue
            some = found[name, ns[-1]]
            bits = next(iter(some.values()))["bits"]
            _line(axes, name, [bits], [some], linestyle="", **styles[name])
        _log_x(axes)
        axes.set_xlabel("bits received by each worker, a parameter and step")
        axes.set_ylabel(_towards(task))

    def by_bytes(axes: Any) -> None:
        n = 8 if 8 in ns else ns[0]
        for name in _few(names):
            some = list(found.get((name, n), {}).values())
            if not some:
                continue
            whole = min(len(row["curve"]) for row in some)
            curve = np.mean([row["curve"][:whole] for row in some], axis=0)
            steps = some[0]["steps"] * (np.arange(whole) + 1) / len(some[0]["curve"])
            received = steps * some[0]["bytes"] / 1e6
            axes.plot(received, curve, label=name, markevery=10, **styles[name])
        _log_x(axes)
        axes.set_xlabel(f"received by each of {n} workers, MB")
        axes.set_ylabel("training loss, nats")

    for title, draw, name in (
        ("quality against workers, mean ± standard deviation of seeds", by_workers, "workers"),
        (f"{ns[-1]} workers, mean ± standard deviation of seeds", by_bits, "bits"),
        ("training against bytes, mean of seeds", by_bytes, "bytes"),
    ):
        _figure(f"{task.capitalize()}: {title}", draw, out / f"{stem}_{name}.png")


def plot_splits(found: dict[str, Found], task: str, n: int, file: Path) -> None:
    """Quality against how unlike the workers' data are, a line a method."""
    splits = sorted(found, key=skew_of)
    names = names_of(key for some in found.values() for key in some)
    styles = _styles(names)

    def draw(axes: Any) -> None:
        for name in names:
            mine = [i for i, split in enumerate(splits) if (name, n) in found[split]]
            _line(axes, name, mine, [found[splits[i]][name, n] for i in mine], **styles[name])
        axes.set_xticks(range(len(splits)), map(titled, splits))
        axes.set_xlabel("mix of labels over workers: the smaller alpha, the more unlike")
        axes.set_ylabel(_towards(task))

    title = f"{n} workers with unlike data, mean ± standard deviation of seeds"
    _figure(f"{task.capitalize()}: {title}", draw, file)
