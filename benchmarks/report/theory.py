# SPDX-License-Identifier: Apache-2.0
"""The table and the picture of theory.py's results: the KKT score by number of workers."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report.figures import pyplot
from benchmarks.report.markdown import table
from benchmarks.report.tables import spread


def powers(rows: list[dict[str, Any]], method: str) -> list[float]:
    """The power of n that fits a seed's scores best: -0.5 where S falls as 1 / sqrt(n)."""
    out = []
    for seed in sorted({row["seed"] for row in rows}):
        mine = [r for r in rows if (r["method"], r["seed"]) == (method, seed)]
        ns, scores = np.log([[r["workers"], r["score"]] for r in mine]).T
        out.append(float(np.polyfit(ns, scores, 1)[0]))
    return out


def write(rows: list[dict[str, Any]], setting: str, out: Path) -> str:
    """The table and the picture."""
    ns = sorted({row["workers"] for row in rows})
    found: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        found.setdefault((row["method"], row["workers"]), []).append(row["score"])
    names, plt = list(dict.fromkeys(row["method"] for row in rows)), pyplot()
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    body = []
    for name in names:
        means = np.array([np.mean(found[name, n]) for n in ns])
        power = powers(rows, name)
        axes.plot(ns, means, marker="o", label=f"{name}: n^{np.mean(power):.2f}")
        body.append([name, *(spread(found[name, n], ".4f") for n in ns), spread(power, ".2f")])
    start = np.mean(found[names[0], ns[0]])
    axes.plot(ns, start * (np.array(ns) / ns[0]) ** -0.5, "k:", label="1 / sqrt(n)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ns, [str(n) for n in ns])
    axes.set_xlabel("workers")
    axes.set_ylabel("mean KKT score a coordinate, last quarter")
    axes.set_title(f"A noisy quadratic of {setting.partition(':')[0]}", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(out / "theory.png", dpi=130)
    plt.close(figure)
    text = f"{table(['S', *(f'n = {n}' for n in ns), 'power of n'], body)}\n\n{setting}"
    (out / "theory.md").write_text(text + "\n")
    return text
