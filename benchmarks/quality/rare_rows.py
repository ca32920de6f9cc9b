# SPDX-License-Identifier: Apache-2.0
"""What zeros and ties do to rows of an embedding that training rarely or never sees.

    python -m benchmarks.quality.rare_rows

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

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.cli import UsageError, command_line, guarded, progress
from benchmarks.quality.methods import METHODS, Method, warmup_cosine
from benchmarks.quality.runs import versions
from benchmarks.quality.training import Task, Trainer
from benchmarks.report.rare_rows import SEEN, as_table, draw
from benchmarks.rows import Job, listed
from benchmarks.tasks import CORPUS, models
from benchmarks.tasks import data as sources

RULES: dict[str, Method] = {
    "D-Lion majority": METHODS["D-Lion majority"],
    "D-Lion majority, ternary ballot": METHODS["D-Lion majority, ternary"],
    "ties and zeros -1": METHODS["D-Lion majority, ties and zeros -1"],
    "ties and zeros +1": METHODS["D-Lion majority, ties and zeros +1"],
    "Lion, full precision": METHODS["Lion"],
}
TOKEN = re.compile(r"[A-Za-z']+|[^\sA-Za-z']|\n")


def words(path: Path, size: int, eval_rows: int) -> sources.Data:
    """A corpus in words and signs: the most frequent ones by rank, from 1; all others are 0."""
    works = [TOKEN.findall(work) for work in sources.read_corpus(path)]
    counts = collections.Counter(token for work in works for token in work)
    rank = {token: i + 1 for i, (token, _) in enumerate(counts.most_common(size - 1))}
    ids = [np.array([rank.get(token, 0) for token in work], np.int32) for work in works]
    parts = sources.cut(ids, eval_rows)
    if parts is None:
        raise UsageError(f"--corpus {path} is too short: {sum(map(len, ids)):,} words")
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
            job = Job("run", "iid", name, args.workers, seed, args.learning_rate, 0.0)
            params, _ = trainer.train(job, lambda steps: bar.update(steps * args.workers))
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
    schedule = warmup_cosine(args.learning_rate, args.steps)
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
