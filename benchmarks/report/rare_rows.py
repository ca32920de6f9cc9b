# SPDX-License-Identifier: Apache-2.0
"""The table and the picture of rare_rows.py's results: how far rows of an embedding moved."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report.figures import pyplot
from benchmarks.report.markdown import table
from benchmarks.report.tables import spread

SEEN = (0, 1, 3, 10, 30, 100, 1000)  # bounds of the groups of words, by how often they were seen


def group_names() -> list[str]:
    """How often the words of each group were seen."""
    ends = [*(b - 1 for b in SEEN[1:]), None]
    return ["never" if a == 0 else f"{a}+" if b is None else f"{a}-{b}"
            for a, b in zip(SEEN, ends, strict=True)]  # fmt: skip


Kind = tuple[int, str]  # width, rule


def of_kinds(figures: dict[str, Any]) -> dict[Kind, list[dict[str, Any]]]:
    """The rows of each width and rule, a seed each."""
    out: dict[Kind, list[dict[str, Any]]] = {}
    for row in figures["rows"]:
        out.setdefault((row["width"], row["rule"]), []).append(row)
    return out


def moved(rows: list[dict[str, Any]], group: int) -> np.ndarray:
    """Quartiles of a group's movement, mean over seeds."""
    return np.array([row["moved"][group] for row in rows]).mean(0)


def as_table(figures: dict[str, Any]) -> str:
    """Movement in sums of the learning rates, and losses."""

    def loss(rows: list[dict[str, Any]], key: str) -> str:
        values = [row[key] for row in rows]
        return "no such word" if None in values else spread(values, ".3f")

    shown, total = (0, 1, 3, 6), figures["learning_rates"]
    body = [
        [rule, str(width), *(f"{moved(rows, k)[1] / total:.2f}" for k in shown),
         loss(rows, "loss"), loss(rows, "loss_after_unseen")]
        for (width, rule), rows in of_kinds(figures).items()
    ]  # fmt: skip
    labels = group_names()
    head = ["rule", "width", *(f"moved, seen {labels[k]}" for k in shown)]
    return table([*head, "held-out loss, nats", "after a word never seen"], body)


def draw(figures: dict[str, Any], file: Path) -> None:
    """Movement against how often a word was seen, for the first width."""
    kinds, total = of_kinds(figures), figures["learning_rates"]
    first = next(iter(kinds))[0]
    drawn = {rule: rows for (width, rule), rows in kinds.items() if width == first}
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for k, (rule, rows) in enumerate(drawn.items()):
        points = np.array([moved(rows, group) for group in range(len(SEEN))])
        x = np.arange(len(SEEN)) + 0.06 * (k - (len(drawn) - 1) / 2)
        errors = np.abs(points[:, [0, 2]] - points[:, [1]]).T
        axes.errorbar(x, points[:, 1], errors, label=rule, marker="o", markersize=4, capsize=2,
                      linewidth=1)  # fmt: skip
    one = next(iter(drawn.values()))[0]
    for height, style, text in ((total, ":", "sum of the learning rates"),
                                (one["size"], "--", "a row's own size at the start")):  # fmt: skip
        axes.axhline(height, color="0.5", linestyle=style, linewidth=1)
        axes.text(len(SEEN) - 0.6, height, text, ha="right", va="bottom", fontsize=8)
    ticks = [f"{a}\n{b:,} words" for a, b in zip(group_names(), one["words"], strict=True)]
    axes.set_xticks(range(len(SEEN)), ticks)
    axes.set_xlabel("times that training saw the word")
    axes.set_ylabel("how far its row moved (root mean square)")
    axes.set_title(f"Rows of an untied embedding, {first} wide: median and quartiles")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.25), frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)
