# SPDX-License-Identifier: Apache-2.0
"""What zeros and ties do to rows of an embedding that training rarely or never sees.

    python benchmarks/rare_rows.py

A language model of words with an untied embedding trains under each rule, without weight decay. A
row whose word does not occur in the batches has a gradient of exactly zero, so that a rule under
which zeros abstain leaves it where it was, and one under which a zero votes -1 or +1 moves it by
the sum of the learning rates. A binary ballot counts presence by blocks of 128 coordinates: a row
of 128 is a block, and two rows of 64 share one. Writes rare_rows.json (all figures), rare_rows.md
and rare_rows.png (of the first width).
"""

import argparse
import collections
import json
import re
import sys
from pathlib import Path
from typing import Any

import compare_train
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from compare_methods import METHODS, Method
from compare_runs import command_line, guarded, progress, versions
from compare_tables import listed, spread
from compare_train import Task, Trainer, models, sources
from config import CORPUS
from md_table import table

mpl.use("Agg")
import matplotlib.pyplot as plt

RULES: dict[str, Method] = {
    "D-Lion majority": METHODS["D-Lion majority"],
    "D-Lion majority, ternary ballot": METHODS["D-Lion majority, ternary"],
    "ties and zeros -1": METHODS["D-Lion majority, ties and zeros -1"],
    "ties and zeros +1": METHODS["D-Lion majority, ties and zeros +1"],
    "Lion, full precision": METHODS["Lion"],
}
SEEN = (0, 1, 3, 10, 30, 100, 1000)  # bounds of the groups of words, by how often they were seen
TOKEN = re.compile(r"[A-Za-z']+|[^\sA-Za-z']|\n")


def words(path: Path, size: int, eval_rows: int) -> sources.Data:
    """A corpus in words and signs: the most frequent ones by rank, from 1; all others are 0."""
    works = [TOKEN.findall(work) for work in sources.read_corpus(path)]
    counts = collections.Counter(token for work in works for token in work)
    rank = {token: i + 1 for i, (token, _) in enumerate(counts.most_common(size - 1))}
    ids = [np.array([rank.get(token, 0) for token in work], np.int32) for work in works]
    parts = sources.cut(ids, eval_rows)
    if parts is None:
        raise sources.UsageError(f"--corpus {path} is too short: {sum(map(len, ids)):,} words")
    groups, pick, held_out = parts
    description = f"{path.name}: {sum(map(len, ids)):,} words, of which the {size - 1:,} commonest"
    return sources.Data(description, "words", sources.CONTEXT, size, groups, pick, held_out)


def embedding(params: Any) -> np.ndarray:
    """The rows, float32[words, width]."""
    return np.asarray(params["Embed_0"]["embedding"], np.float32)


def held_out_losses(task: Task, params: Any) -> np.ndarray:
    """Of every held-out word, float64[windows, context], in nats."""

    @jax.jit
    def losses(x: Any, y: Any) -> Any:
        logits: Any = task.model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    data = task.data.held_out
    pieces = [losses(x, y) for x, y in zip(data["x"][:, None], data["y"][:, None], strict=True)]
    return np.asarray(jnp.concatenate(pieces), np.float64)


def times_seen(task: Task, n: int, seed: int) -> np.ndarray:
    """How often each word was an input of any worker in training, int[words]."""
    rng = np.random.default_rng(seed)
    batches = [task.data.draw(rng, n * task.batch)["x"] for _ in range(task.steps)]
    return np.bincount(np.concatenate(batches).ravel(), minlength=task.data.classes)


def groups_of(seen: np.ndarray) -> np.ndarray:
    """The group of each word in SEEN: the last bound that its count reaches."""
    return np.searchsorted(SEEN, seen, side="right") - 1


def measure(task: Task, width: int, args: argparse.Namespace, bar: Any) -> list[dict[str, Any]]:
    """A row a rule and seed: how far rows moved, by group, and held-out losses."""
    rows = []
    for name, method in RULES.items():
        trainer = Trainer(task, method, args.workers)
        for seed in args.seeds:
            before = embedding(models.initial_params(task.model, task.data, seed))
            params, _ = trainer.train(
                seed, args.learning_rate, 0.0, tell=lambda k: bar.update(k * args.workers)
            )
            far = np.sqrt(np.mean((embedding(params) - before) ** 2, axis=1))
            seen = times_seen(task, args.workers, seed)
            losses, inputs = held_out_losses(task, params), task.data.held_out["x"]
            group = groups_of(seen)
            rows.append({
                "rule": name,
                "width": width,
                "seed": seed,
                "words": [int(np.sum(group == k)) for k in range(len(SEEN))],
                "moved": [quartiles(far[group == k]) for k in range(len(SEEN))],
                "size": float(np.sqrt(np.mean(before**2))),
                "loss": float(losses.mean()),
                "loss_after_unseen": mean(losses[seen[inputs] == 0]),
                "unseen_inputs": int(np.sum(seen[inputs] == 0)),
            })  # fmt: skip
    return rows


def mean(values: np.ndarray) -> float | None:
    """None of nothing."""
    return float(values.mean()) if len(values) else None


def quartiles(values: np.ndarray) -> list[float]:
    """Quarter, half and three quarters; nan of nothing."""
    return np.quantile(values, (0.25, 0.5, 0.75)).tolist() if len(values) else [float("nan")] * 3


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


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = command_line(__doc__)
    p.add_argument("--corpus", type=Path, default=CORPUS, help="text; form feeds between works")
    p.add_argument("--widths", nargs="+", type=int, default=[128, 64], help="of a row; by heads: 4")
    p.add_argument("--vocabulary", type=int, default=8192, help="words, the rest is one")
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--workers", type=int, default=8)
    p.add_argument("--batch", type=int, default=2, help="windows a worker and step")
    p.add_argument("--learning-rate", type=float, default=3e-3)
    p.add_argument("--seeds", nargs="+", type=int, default=[42, 52, 62])
    p.add_argument("--eval-rows", type=int, default=512)
    p.add_argument("--out", type=Path, default=Path("runs/rare_rows"))
    args = p.parse_args(argv)
    for name in ("vocabulary", "workers", "steps", "batch", "eval_rows"):
        got, least = getattr(args, name), 2 if name in ("vocabulary", "workers") else 1
        if got < least:
            p.error(f"--{name.replace('_', '-')} must be at least {least}; got {got}")
    if not args.learning_rate > 0:
        p.error(f"--learning-rate must be above 0; got {args.learning_rate}")
    if min(args.widths) < 4 or any(width % 4 for width in args.widths):
        p.error(f"--widths must be multiples of 4, the heads; got {args.widths}")
    return args


def run(args: argparse.Namespace) -> str:
    """Trains under each rule; the table."""
    args.out.mkdir(parents=True, exist_ok=True)
    data = words(args.corpus, args.vocabulary, args.eval_rows)
    rows = []
    each = len(RULES) * len(args.seeds) * args.steps * args.workers
    with progress(len(args.widths) * each) as bar:
        for width in args.widths:
            model = models.Transformer(data.classes, layers=1, width=width)
            task = Task("words", data, model, {}, args.batch, args.steps)
            rows += measure(task, width, args, bar)
    schedule = compare_train.warmup_cosine(args.learning_rate, args.steps)
    figures = {
        "setting": f"{data.description}; {args.workers} workers x {args.batch} windows of "
        f"{data.per_row} words, {args.steps} steps, peak learning rate {args.learning_rate:g}, no "
        "weight decay; movement in sums of learning rates; seeds "
        f"{', '.join(map(str, args.seeds))}.",
        "learning_rates": float(sum(schedule(jnp.int32(t)) for t in range(args.steps))),
        "rows": rows,
        "versions": versions(),
    }
    (args.out / "rare_rows.json").write_text(json.dumps(figures, indent=1) + "\n")
    draw(figures, args.out / "rare_rows.png")
    text = f"{as_table(figures)}\n\n{figures['setting']} {listed(figures['versions'])}."
    (args.out / "rare_rows.md").write_text(text + "\n")
    return text


if __name__ == "__main__":
    sys.exit(guarded(run, parse(None)))
