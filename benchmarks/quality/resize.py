# SPDX-License-Identifier: Apache-2.0
"""What it costs to go on with other workers: the held-out loss around a change from 8 to 4 to 12.

    python -m benchmarks.quality.resize

Every seed trains once on 8 workers. From there it goes on with 4, and from there with 12, by each
way to make the momenta of the new workers: ``mean`` and ``rows`` of ``distlion_jax.resize_state``,
and none (``init_state``). ``8 throughout`` has no change. The rate is constant, so that nothing
else changes. Rows are kept as they come: a run that was interrupted goes on.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import distlion_jax as dl
from benchmarks.cli import UsageError, command_line, guarded, progress
from benchmarks.quality.runs import versions
from benchmarks.report.resize import WAYS, as_table
from benchmarks.tasks import CORPUS, models
from benchmarks.tasks import data as sources

AFTER = (0, 1, 2, 5, 10, 25, 50, 100)  # steps after a change at which the loss is taken
RATE, DECAY = 1e-3, 0.1
ROWS = 8  # of a worker and step


class Run:
    """Parameters, state and data of one seed, on as many workers as there are at the moment."""

    def __init__(self, data: sources.Data, model: Any, seed: int) -> None:
        self.data, self.loss = data, models.make_loss(model)
        self.tx = dl.distributed_lion(RATE, weight_decay=DECAY)
        self.rng = np.random.default_rng(seed)
        self.params = jax.tree.map(np.asarray, models.initial_params(model, data, seed))
        self.state: Any = None
        self.evaluate = models.make_evaluation(model, data.held_out, dl.worker_mesh(1), rows=128)
        self.steps: dict[int, Any] = {}

    def on(self, n: int, make_state: Callable[[Any], Any]) -> None:
        """Goes on with n workers, whose state is made on their mesh."""
        mesh = dl.worker_mesh(n)
        self.steps.setdefault(n, dl.make_train_step(self.loss, self.tx, mesh))
        self.step, self.n = self.steps[n], n
        self.params, self.state = dl.replicate(self.params, mesh), make_state(mesh)

    def train(self, steps: int, marks: tuple[int, ...], tell: Callable[[int], Any]) -> list[float]:
        """The held-out loss after each of the marks."""
        found = []
        for i in range(steps + 1):
            if i in marks:
                found.append(self.evaluate(jax.tree.map(np.asarray, self.params))[0])
            if i < steps:
                batch = self.data.draw(self.rng, self.n * ROWS)
                self.params, self.state, _ = self.step(self.params, self.state, batch)
                tell(1)
        return found

    def copy(self) -> tuple[Any, ...]:
        """What it takes to begin here again."""
        kept = jax.tree.map(np.asarray, (self.params, self.state))
        return *kept, self.rng.bit_generator.state

    def back(self, kept: tuple[Any, ...]) -> None:
        """Begins there again."""
        self.params, self.state, self.rng.bit_generator.state = kept


def measure(run: Run, first: int, then: int, tell: Callable[[int], Any]) -> list[dict[str, Any]]:
    """The rows of one seed."""
    run.on(8, lambda mesh: dl.init_state(run.tx, run.params, mesh))
    run.train(first, (), tell)
    start, rows = run.copy(), []
    for way in WAYS:
        run.back(start)
        for n in (4, 12):
            held = run.state

            def state(mesh: Any, held: Any = held, way: str = way) -> Any:
                if way == "none":
                    return dl.init_state(run.tx, run.params, mesh)
                return dl.resize_state(held, mesh, how="rows" if way == "rows" else "mean")

            run.on(8 if way == "8 throughout" else n, state)
            losses = run.train(then, AFTER, tell)
            rows.append({"way": way, "to": n, "after": list(AFTER), "losses": losses})
    return rows


def main(args: argparse.Namespace) -> str:
    """Measures what is missing, and prints the table."""
    done = [json.loads(x) for x in args.out.read_text().splitlines()] if args.out.exists() else []
    data = sources.load_corpus(args.corpus, 512)
    model = models.Transformer(data.classes, args.layers, args.width, 4)
    setting = {
        "setting": f"{args.layers} layers of width {args.width}, {ROWS} rows a worker, "
        f"rate {RATE}, {args.first} steps, then twice {args.then}; {data.description}",
        "versions": versions(),
    }
    if args.then < max(AFTER):
        raise UsageError(f"--then must be at least {max(AFTER)}")
    if any(row["setting"] != setting["setting"] for row in done):
        raise UsageError(f"{args.out} has rows of another setting: use another --out")
    missing = [seed for seed in args.seeds if seed not in {row["seed"] for row in done}]
    with progress(len(missing) * (args.first + 2 * len(WAYS) * args.then), "step") as bar:
        for seed in missing:
            rows = measure(Run(data, model, seed), args.first, args.then, bar.update)
            done += [{"seed": seed, **row, **setting} for row in rows]
            args.out.write_text("".join(json.dumps(row) + "\n" for row in done))
    return as_table(done)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = command_line(__doc__)
    p.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="SEED")
    p.add_argument("--first", type=int, default=300, help="steps before the first change")
    p.add_argument("--then", type=int, default=100, help="steps after each change")
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--corpus", type=Path, default=CORPUS)
    p.add_argument("--out", type=Path, default=Path("benchmarks/results/resize.jsonl"))
    return p.parse_args(argv)


if __name__ == "__main__":
    arguments = parse(None)
    jax.config.update("jax_num_cpu_devices", 12)
    sys.exit(guarded(main, arguments))
