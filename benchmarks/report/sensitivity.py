# SPDX-License-Identifier: Apache-2.0
"""What sensitivity.py runs, and the tables and plots of what came out.

In:  rows by place on the heat maps, and rows by number of workers and learning rate. Out: a figure
of heat maps, one of quality against learning rate, and a table of each. The places stand here and
not with the trainer, so that a page can look its rows up without one.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cli import UsageError
from benchmarks.report.evidence import Missing
from benchmarks.report.figures import pyplot
from benchmarks.report.markdown import table
from benchmarks.report.tables import figure_form, spread, unit
from benchmarks.rows import SEARCH_SEEDS, Job, Results, Row, badness, listed, quality

FAMILY = (  # Lion and its votes, ties broken in three ways
    "Lion",
    "D-Lion majority",
    "D-Lion majority, coin",
    "D-Lion majority, ties -1",
    "D-Lion average",
)
RATES = {"images": (3e-4, 1e-3, 3e-3, 1e-2), "text": (1.5e-3, 5e-3, 1.5e-2, 5e-2)}
DECAYS = (0.1, 0.4, 1.6, 6.4)
BETAS = ((0.9, 0.99), (0.95, 0.98), (0.8, 0.95))  # the first is the default
AROUND = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the best learning rate
FOLLOWED = ("Lion", "D-Lion majority", "D-Lion average")  # by number of workers


def named(method: str, b1: float, b2: float) -> str:
    """A member of the family, for the results file."""
    return f"{method}, b1 {b1:g}, b2 {b2:g}"


class Plan(NamedTuple):
    """What is run: the defaults are those of the page."""

    task: Sequence[str] = ("images", "text")
    heat_workers: int = 4  # of the heat maps
    workers: Sequence[int] = (2, 8, 32)  # for which the best learning rate is looked for
    seeds: Sequence[int] = (42, 52)


class Cell(NamedTuple):
    """A place on the heat maps."""

    method: str
    b1: float
    b2: float
    rate: float
    decay: float


Heat = dict[Cell, Row]
Chosen = dict[Cell, list[Row]]  # a row a seed


def best(heat: Heat, method: str, betas: tuple[float, float] | None = None) -> Cell:
    """The best place of a method, with given (b1, b2) or any."""
    mine = [c for c in heat if c.method == method and betas in (None, (c.b1, c.b2))]
    return min(mine, key=lambda c: badness(heat[c]))


def picks(heat: Heat, method: str) -> tuple[Cell, Cell, Cell]:
    """A method's best place with the usual (b1, b2), its best of all, and Lion's usual best."""
    usual = betas_of(heat)[0]
    of_lion = best(heat, "Lion", usual)
    return best(heat, method, usual), best(heat, method), of_lion._replace(method=method)


def axis(heat: Heat, name: str) -> list[Any]:
    """What was tried of a field of :class:`Cell`, in the order of the runs."""
    return list(dict.fromkeys(getattr(cell, name) for cell in heat))


def betas_of(heat: Heat) -> list[tuple[float, float]]:
    """All pairs (b1, b2); the first is the default."""
    return list(dict.fromkeys((cell.b1, cell.b2) for cell in heat))


def _panel(axes: Any, heat: Heat, task: str, ends: tuple[float, float]) -> Any:
    """The heat map of one method and (b1, b2), with its numbers, the best in bold."""
    rates, decays = axis(heat, "rate"), axis(heat, "decay")
    (name,), (betas,) = axis(heat, "method"), betas_of(heat)
    grid = [[quality(heat[Cell(name, *betas, r, d)]) for r in rates] for d in decays]
    colours = pyplot().colormaps["viridis" if task == "images" else "viridis_r"]
    image = axes.imshow(
        grid, colours.with_extremes(bad="white"), vmin=min(ends), vmax=max(ends), origin="lower",
        aspect="auto",
    )  # fmt: skip
    place = best(heat, name)
    for (y, d), (x, r) in itertools.product(enumerate(decays), enumerate(rates)):
        red, green, blue, _ = image.to_rgba(grid[y][x])
        axes.text(x, y, format(grid[y][x], figure_form(task)), ha="center", va="center", fontsize=7,
                  weight="bold" if (r, d) == (place.rate, place.decay) else "normal",
                  color="black" if red + green + blue > 1.4 else "white")  # fmt: skip
    axes.set_xticks(range(len(rates)), [f"{r:g}" for r in rates], fontsize=7)
    axes.set_yticks(range(len(decays)), [f"{d:g}" for d in decays], fontsize=7)
    return image


def draw_heat(heat: Heat, task: str, n: int, file: Path) -> None:
    """A panel a method and (b1, b2): learning rate across, weight decay up, quality in colour."""
    names, pairs = axis(heat, "method"), betas_of(heat)
    finite = [v for v in map(quality, heat.values()) if math.isfinite(v)]
    ends = (max if task == "images" else min)(finite), statistics.median(finite)
    plt = pyplot()
    figure, panels = plt.subplots(
        len(pairs), len(names), figsize=(2.6 * len(names), 2.1 * len(pairs)), layout="constrained",
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    image = None
    for i, j in np.ndindex(panels.shape):
        mine = {c: row for c, row in heat.items() if c[:3] == (names[j], *pairs[i])}
        image = _panel(panels[i, j], mine, task, ends)
    assert image is not None
    for axes, name in zip(panels[0], names, strict=True):
        axes.set_title(name, fontsize=9)
    for axes, betas in zip(panels[:, 0], pairs, strict=True):
        axes.set_ylabel(f"b1 {betas[0]:g}, b2 {betas[1]:g}\nweight decay", fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("learning rate", fontsize=8)
    figure.colorbar(image, ax=panels, label=unit(task), shrink=0.6, extend="both")
    figure.suptitle(f"{task}, {n} workers, one seed (bold: the best of a panel)", fontsize=10)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def by_rate(rows: list[Row], name: str, n: int) -> dict[float, list[float]]:
    """Quality of each seed, by learning rate."""
    out: dict[float, list[float]] = {}
    for row in rows:
        if (row["method"], row["workers"]) == (name, n):
            out.setdefault(row["learning_rate"], []).append(quality(row))
    return dict(sorted(out.items()))


def vertex(points: dict[float, list[float]], task: str) -> tuple[float, bool]:
    """Learning rate where a parabola through the best mean and its neighbours is best.

    Over its logarithm; and whether the best lies at an end of what was tried.
    """
    rates = np.array(list(points))
    sign = -1.0 if task == "images" else 1.0
    means = np.array([sign * np.mean(v) for v in points.values()])
    means = np.where(np.isfinite(means), means, np.inf)
    i = int(np.argmin(means))
    if i in (0, len(rates) - 1) or not np.isfinite(means[i - 1 : i + 2]).all():
        return float(rates[i]), i in (0, len(rates) - 1)
    a, b, _ = np.polyfit(np.log(rates[i - 1 : i + 2]), means[i - 1 : i + 2], 2)
    return float(np.exp(-b / (2 * a))), False


def draw_rates(rows: list[Row], task: str, file: Path) -> None:
    """A panel a method: quality against learning rate, a line a number of workers."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    ns = sorted({row["workers"] for row in rows})
    plt = pyplot()
    figure, panels = plt.subplots(
        1,
        len(names),
        figsize=(4 * len(names), 3.4),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axes, name in zip(panels[0], names, strict=True):
        for k, n in enumerate(ns):
            points = by_rate(rows, name, n)
            colour = plt.colormaps["viridis"](0.9 * k / max(1, len(ns) - 1))
            means = [np.mean(v) for v in points.values()]
            errors = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in points.values()]
            axes.errorbar(list(points), means, errors, label=f"n = {n}", color=colour, capsize=2,
                          marker="o", markersize=3)  # fmt: skip
            at, _ = vertex(points, task)
            axes.axvline(at, color=colour, linestyle=":", linewidth=1)
        axes.set_xscale("log")
        tried = sorted({row["learning_rate"] for row in rows if row["method"] == name})
        axes.set_xticks(tried, [f"{rate:.2g}" for rate in tried], fontsize=8)
        axes.minorticks_off()
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("learning rate (dotted: the best)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel(unit(task))
    panels[0, -1].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def heat_table(heat: Heat, chosen: Chosen, task: str) -> str:
    """What each method gets at the best settings of its map, and at settings it might be given.

    Quality is of runs that chose nothing; how flat the map is, of the map itself.
    """
    form, slack = figure_form(task), 1.0 if task == "images" else 0.05
    usual = betas_of(heat)[0]

    def figure(cell: Cell) -> str:
        return spread([quality(row) for row in chosen[cell]], form)

    def line(name: str) -> list[str]:
        place, anywhere, lions = picks(heat, name)
        mine = [quality(row) for c, row in heat.items() if c[:3] == (name, *usual)]
        near = sum(abs(value - quality(heat[place])) <= slack for value in mine)
        return [
            name,
            f"{figure(place)} ({place.rate:g}, {place.decay:g})",
            f"{figure(anywhere)} ({', '.join(f'{x:g}' for x in anywhere[1:])})",
            figure(lions),
            f"{near} of {len(mine)}",
        ]

    head = [
        f"b1 {usual[0]:g}, b2 {usual[1]:g}",
        "best (learning rate, weight decay)",
        "best of all (b1, b2, learning rate, weight decay)",
        "at Lion's best rates",
        f"of its map within {slack:g} of the best",
    ]
    return table(head, map(line, axis(heat, "method")))


def rate_table(rows: list[Row], task: str) -> str:
    """The best learning rate by number of workers, and the quality at the nearest that was run."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    ns = sorted({row["workers"] for row in rows})

    def cell(name: str, n: int) -> str:
        points = by_rate(rows, name, n)
        at, edge = vertex(points, task)
        near = min(points, key=lambda rate: abs(math.log(rate / at)))
        return f"{at:.1e}{' (edge)' * edge}: {spread(points[near], figure_form(task))}"

    body = ([name, *(cell(name, n) for n in ns)] for name in names)
    return table(["best learning rate: quality", *(f"n = {n}" for n in ns)], body)


def heat_cells(task: str) -> list[Cell]:
    """All places, in an order that compiles each program once."""
    grid = itertools.product(FAMILY, BETAS, RATES[task], DECAYS)
    return [Cell(name, *betas, rate, decay) for name, betas, rate, decay in grid]


def measure(task: str, row_of: Callable[[Job], Row], plan: Plan) -> tuple[Heat, Chosen, list[Row]]:
    """Rows of the heat maps, of their best places, and by number of workers.

    ``row_of`` trains, or looks up.
    """

    def do(kind: str, cell: Cell, n: int, seed: int) -> Row:
        name = named(cell.method, cell.b1, cell.b2)
        return row_of(Job(kind, "iid", name, n, seed, cell.rate, cell.decay))

    n = plan.heat_workers
    heat = {cell: do("trial", cell, n, SEARCH_SEEDS[0]) for cell in heat_cells(task)}
    of_interest = dict.fromkeys(cell for name in FAMILY for cell in picks(heat, name))
    chosen = {cell: [do("run", cell, n, seed) for seed in plan.seeds] for cell in of_interest}
    rows = []
    for n, name in itertools.product(plan.workers, FOLLOWED):
        start = best(heat, name, BETAS[0])
        for factor in AROUND:
            cell = start._replace(rate=start.rate * factor)
            rows += [do("run", cell, n, seed) | {"method": name} for seed in plan.seeds]
    return heat, chosen, rows


def recall(results: Results, task: str) -> Callable[[Job], Row]:
    """Looks rows up, without training; refuses a file of several settings or versions."""
    rows = [row for row in results.rows if row["task"] == task]
    for name in ("setting", "versions"):
        if len(found := {str(row[name]) for row in rows}) > 1:
            raise UsageError(f"{results.file}: {task} was run with {len(found)} {name}")

    def row_of(job: Job) -> Row:
        if row := results.find(job, task):
            return row
        raise Missing(str(job))

    return row_of


def tables(results: Results, plan: Plan) -> str:
    """What came out of all tasks."""
    parts = []
    for task in plan.task:
        heat, chosen, rows = measure(task, recall(results, task), plan)
        head = f"{rows[0]['setting']}. Seeds {', '.join(map(str, plan.seeds))}"
        parts += [
            f"## {task}: {unit(task)}",
            f"{head}; the heat maps, which choose the best settings, have one of their own and "
            f"other held-out rows. {listed(rows[0]['versions'])}.",
            f"{plan.heat_workers} workers:",
            heat_table(heat, chosen, task),
            rate_table(rows, task),
        ]
    return "\n\n".join(parts)
