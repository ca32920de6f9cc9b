# SPDX-License-Identifier: Apache-2.0
"""What train.py leaves behind: a table in Markdown, the numbers as JSON, a plot as PNG."""

import dataclasses
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

import distlion_jax
from benchmarks.demo.config import Config
from benchmarks.demo.loop import Comparison, Run

mpl.use("Agg")  # writes files, needs no display
import matplotlib.pyplot as plt

NAMES = {
    "muon": "D-Muon, majority",
    "majority": "D-Lion, majority",
    "average": "D-Lion, average",
    "lion": "Lion, full precision",
    "adamw": "AdamW, full precision",
}
COLOURS = {
    "muon": "#cc79a7", "majority": "#0072b2", "average": "#009e73", "lion": "#d55e00",
    "adamw": "#7f7f7f",
}  # fmt: skip
MARKERS = {"muon": "P", "majority": "o", "average": "^", "lion": "s", "adamw": "D"}


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Of everything the numbers depend on."""
    names = {name: version(name) for name in ("jax", "jaxlib", "optax", "flax")}
    return {"python": platform.python_version(), **names, "distlion_jax": distlion_jax.__version__}


def table(config: Config, comparison: Comparison) -> str:
    """The result in Markdown: a row for each method, then what it was measured on."""
    images = config.task == "images"
    head = ["method", f"validation loss (nats/{comparison.unit[:-1]})"]
    head += ["accuracy (%)"] * images
    head += ["bits per parameter per step", "sent per worker (MB)", "wall time (s)"]
    rows = [head]
    for run in comparison.runs:
        last = run.evaluations[-1]
        row = [NAMES[run.name], f"{last['loss']:.3f}"]
        row += [f"{100 * last['accuracy']:.1f}"] * images
        row += [f"{run.bits_per_parameter:.2f}", f"{run.bytes_sent / 1e6:,.1f}"]
        rows.append([*row, f"{run.seconds:.0f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    rows.insert(1, rule)
    pad = lambda i, cell: cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i])  # noqa: E731
    lines = ["| " + " | ".join(pad(i, cell) for i, cell in enumerate(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n\n" + _footnote(config, comparison)


def _footnote(config: Config, comparison: Comparison) -> str:
    taken = f"{config.steps:,} steps"
    if comparison.interrupted:
        taken = f"interrupted after {len(comparison.runs[0].losses):,} of {taken}"
    unit = "sequences" if config.task == "text" else "images"
    per_worker = f"{comparison.workers} workers x {config.batch} {unit}"
    lines = [
        f"{comparison.parameters:,} parameters, {per_worker}, {taken}, seed {config.seed}. "
        f"Data: {comparison.data}.",
        "Wall time is that of the training steps, which the methods took in turns, without "
        "compiling and evaluation. "
        f"{comparison.device}, {cores()} cores; "
        + ", ".join(f"{name} {number}" for name, number in versions().items()) + ".",
    ]  # fmt: skip
    for run in comparison.runs:
        if run.health:
            lines.append(
                f"{NAMES[run.name]}: {run.transport}; in the last vote {run.health['tied']:.0%} of "
                f"the coordinates tied, mean margin {run.health['margin']:.2f}."
            )
    return "\n".join(lines)


def _smooth(losses: list[float], window: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of so many steps each, and the steps that they end at."""
    whole = len(losses) // window * window
    means = np.asarray(losses[:whole]).reshape(-1, window).mean(1)
    return (np.arange(len(means)) + 1) * window, means


def _draw(axes: Any, run: Run, window: int, by_bytes: bool) -> None:
    colour, seen = COLOURS[run.name], run.evaluations
    steps, means = _smooth(run.losses, window)
    # A line from the untrained model's loss would cut the curve's corner: the training loss has it.
    seen = [e for e in seen if e["step"] > 0]
    x = [e["bytes_sent"] / 1e6 if by_bytes else e["step"] for e in seen]
    y = [e["loss"] for e in seen]
    trained = run.sent(steps) / 1e6 if by_bytes else steps
    axes.plot(trained, means, color=colour, alpha=0.35, linewidth=1)
    if seen:
        label = f"{NAMES[run.name]}: {y[-1]:.3f}"
        axes.plot(x, y, color=colour, marker=MARKERS[run.name], linewidth=1.8, label=label)


def plot(config: Config, comparison: Comparison, path: Path) -> None:
    """Loss against steps, and against megabytes sent by a worker on a logarithmic axis."""
    window = max(1, config.steps // 100)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for run in comparison.runs:
        _draw(left, run, window, by_bytes=False)
        if run.bytes_sent:
            _draw(right, run, window, by_bytes=True)
    left.set_xlabel("training steps")
    left.set_ylabel(f"loss (nats per {comparison.unit[:-1]})")
    right.set_xlabel("sent by each worker (MB, logarithmic)")
    if any(run.bytes_sent for run in comparison.runs):
        right.set_xscale("log")
        right.xaxis.set_major_formatter("{x:,g}")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if left.get_legend_handles_labels()[0]:
        left.legend(title="validation, at the end (pale: training)", frameon=False)
    what = comparison.data.split(" (CRC")[0]
    figure.suptitle(f"{what}: {comparison.workers} workers, {comparison.parameters:,} parameters")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(config: Config, comparison: Comparison) -> str:
    """Writes table, numbers and plot to the output folder; returns the table."""
    text = table(config, comparison)
    (config.out / "results.md").write_text(text + "\n")
    options = {name: str(x) if isinstance(x, Path) else x for name, x in vars(config).items()}
    numbers = {"config": options, "versions": versions(), "cores": cores()}
    numbers |= dataclasses.asdict(comparison)
    (config.out / "results.json").write_text(json.dumps(numbers, indent=1) + "\n")
    plot(config, comparison, config.out / "loss.png")
    return text
