# SPDX-License-Identifier: Apache-2.0
"""One run of compare.py: n workers simulated exactly on one device, by ``jax.vmap``.

In:  a task, a method, a number of workers, a seed, a learning rate and a weight decay.
Out: losses, the held-out quality, seconds. All methods see the same batches and begin with the same
weights at the same seed.
"""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import distlion_jax as dl
from benchmarks.quality.methods import Method, warmup_cosine
from benchmarks.rows import Job
from benchmarks.tasks import CORPUS, models, partition
from benchmarks.tasks import data as sources
from distlion_jax.exchanges import map_fields, roles_of

CHUNK = 25  # steps of one call


class Task(NamedTuple):
    """What is trained: a model on real data."""

    name: str
    data: sources.Data
    model: nn.Module
    evaluate: dict[str, Callable[[Any], tuple[float, float]]]  # by kind of job: loss, accuracy
    batch: int  # rows a worker and step
    steps: int

    @property
    def summary(self) -> str:
        """What results of one file have in common, on one line."""
        model = repr(self.model).replace("\n    # attributes", "")  # Flax writes it on several
        model = re.sub(r"\n +(\w+) = (\S+)", r" \1=\2,", model)
        model = model.replace("( ", "(").replace(",\n)", ")")
        rest = f"{self.batch} rows a worker, {self.steps} steps; {self.data.description}"
        return f"{model}; {rest}"


class Result(NamedTuple):
    """What a run gave."""

    losses: list[float]  # training, mean of all workers, a step each; nan once it has diverged
    loss: float  # held out, nats; nan if it diverged
    accuracy: float  # held out; likewise
    seconds: float  # of training, compiling left out after the first run


def make_task(
    name: str, size: dict[str, Any], folder: Path | None = None, corpus: Path = CORPUS
) -> Task:
    """The task of that name, ``text`` or ``images``, with its data."""
    if name == "text":
        data = sources.load_corpus(corpus, size["eval_rows"])
        shape = size["layers"], size["width"], size.get("heads", 4)
        model: nn.Module = models.Transformer(data.classes, *shape)
    else:
        data = sources.load_images(folder, size["eval_rows"])
        shape = size["layers"], size["width"], size.get("heads", 4)
        model = models.VisionTransformer(data.classes, size["patch"], *shape)
    # Every other held-out row chooses rates, the others are reported.
    halves = {
        kind: {k: v[first::2] for k, v in data.held_out.items()}
        for first, kind in enumerate(("trial", "run"))
    }
    evaluate = {
        kind: models.make_evaluation(model, half, dl.worker_mesh(1), rows=256)
        for kind, half in halves.items()
    }
    return Task(name, data, model, evaluate, size["batch"], size["steps"])


def worker_axes(state: Any) -> Any:
    """Of one worker's state: 0 where workers differ, None for what it declares to be shared."""

    def axes(node: Any) -> Any:
        if (roles := roles_of(node)) is None:
            return 0
        if roles.once:
            return None
        own = lambda field: jax.tree.map(lambda _: 0, field)  # noqa: E731
        each = {"own": own, "shared": lambda field: None, "": worker_axes}
        return map_fields(lambda role, _, field: each[role](field), node, roles)

    return jax.tree.map(axes, state, is_leaf=lambda node: roles_of(node) is not None)


def stacked(state: Any, axes: Any, n: int) -> Any:
    """The state of n workers."""

    def spread(axis: int | None, part: Any) -> Any:
        return part if axis is None else jnp.broadcast_to(part, (n, *part.shape))

    return jax.tree.map(spread, axes, state, is_leaf=lambda axis: axis is None)


def split_rows(data: sources.Data, split: str, n: int, seed: int) -> list[np.ndarray] | None:
    """Rows of each worker: ``iid`` (None: all of all), ``groups``, or an alpha of Dirichlet."""
    if split == "iid":
        return None
    if split == "groups":
        return partition.by_group(data.groups, n)
    return partition.dirichlet(data.groups, n, float(split), seed)


class Trainer:
    """Compiles the steps of one method and number of workers once, for any seed and rates."""

    def __init__(self, task: Task, method: Method, n: int) -> None:
        self.task, self.n = task, n
        self.loss = models.make_loss(task.model)
        self.method = method
        self.chunk = jax.jit(self._chunk, donate_argnums=(1, 2))

    def _tx(self, numbers: Any) -> Any:
        """Of learning rate, weight decay and betas, which may be traced."""
        (rate, decay, *betas), steps = numbers, self.task.steps
        return self.method.make(warmup_cosine(rate, steps), decay, steps, *betas)

    def _chunk(self, numbers: Any, params: Any, state: Any, batches: Any) -> Any:
        tx = self._tx(numbers)

        def worker(params: Any, state: Any, batch: Any) -> Any:
            loss, gradient = jax.value_and_grad(self.loss)(params, batch)
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, loss

        axes = worker_axes(jax.eval_shape(tx.init, params))
        workers = jax.vmap(worker, (None, axes, 0), (None, axes, 0), axis_name="data")

        def step(carry: Any, batch: Any) -> Any:
            params, state, losses = workers(carry[0], carry[1], batch)
            return (params, state), losses.mean()

        (params, state), losses = jax.lax.scan(step, (params, state), batches)
        return params, state, losses

    def _draw(self, rng: np.random.Generator, parts: Sequence[np.ndarray] | None) -> Any:
        """The batch of all workers, one after the other."""
        if parts is None:
            return self.task.data.draw(rng, self.n * self.task.batch)
        rows = [rng.choice(mine, self.task.batch) for mine in parts]
        return self.task.data.pick(rng, np.concatenate(rows))

    def _batches(self, rng: np.random.Generator, steps: int, parts: Any) -> Any:
        rows = [self._draw(rng, parts) for _ in range(steps)]
        shape = (steps, self.n, self.task.batch)
        return {k: np.stack([r[k] for r in rows]).reshape(*shape, *rows[0][k].shape[1:])
                for k in rows[0]}  # fmt: skip

    def train(
        self,
        job: Job,
        tell: Callable[[int], Any] = lambda steps: None,
    ) -> tuple[Any, list[float]]:
        """Parameters and losses from the weights and on the batches of a job's seed.

        ``tell`` hears of steps done.
        """
        parts = split_rows(self.task.data, job.split, self.n, job.seed)
        params = models.initial_params(self.task.model, self.task.data, job.seed)
        given = job.learning_rate, job.weight_decay, *(job.betas or ())
        state = self._tx(given).init(params)
        state = stacked(state, worker_axes(state), self.n)
        rng = np.random.default_rng(job.seed)
        numbers = [jnp.float32(x) for x in given]
        losses: list[float] = []
        while len(losses) < self.task.steps:
            steps = min(CHUNK, self.task.steps - len(losses))
            params, state, some = self.chunk(
                numbers, params, state, self._batches(rng, steps, parts)
            )
            losses += np.asarray(some, np.float64).tolist()
            tell(steps)
            if not all(jnp.isfinite(x).all() for x in jax.tree.leaves(params)):  # for good
                tell(self.task.steps - len(losses))
                losses += [float("nan")] * (self.task.steps - len(losses))
        return params, losses

    def run(self, job: Job, tell: Callable[[int], Any] = lambda steps: None) -> Result:
        """Trains, as :meth:`train`, and evaluates."""
        began = time.perf_counter()
        params, losses = self.train(job, tell)
        seconds = time.perf_counter() - began
        loss, accuracy = self.task.evaluate[job.kind](params)
        if not np.isfinite(loss):
            loss = accuracy = float("nan")  # the first label is the largest of nothing
        return Result(losses, loss, accuracy, seconds)

    def cost(self) -> dl.WireCost:
        """Of one step."""
        params = jax.eval_shape(lambda: models.initial_params(self.task.model, self.task.data, 0))
        return self.method.cost(params, self.n)
