# SPDX-License-Identifier: Apache-2.0
"""The training loop of train.py: the methods take turns, on the same batches.

In: a :class:`config.Config` and its data. Out: a :class:`Comparison`, for report.py.
"""

import contextlib
import dataclasses
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

import distlion_jax
from benchmarks.cli import UsageError
from benchmarks.demo.config import CPU_WORKERS, Config
from benchmarks.demo.methods import Method, check_bytes, make_method
from benchmarks.tasks.data import Data
from benchmarks.tasks.models import initial_params, make_evaluation, make_loss, make_model
from distlion_jax import join, vote_health, worker_mesh

# Steps that a method takes before it is the next one's turn.
TURN = 8


@dataclasses.dataclass
class Run:
    """What one method did."""

    name: str
    transport: str
    bytes_per_step: int  # sent by each worker, by the ledger
    dense_bytes: int  # on top, in each of the first dense_steps
    dense_steps: int
    ledger_agrees: bool | None = None
    losses: list[float] = dataclasses.field(default_factory=list)  # training, one a step
    evaluations: list[dict[str, float]] = dataclasses.field(default_factory=list)
    bytes_sent: int = 0  # by each worker, in all
    bits_per_parameter: float = 0.0  # per step
    seconds: float = 0.0  # of training steps; compiling and evaluation left out
    health: dict[str, float] | None = None  # of the last vote

    def sent(self, steps: Any) -> Any:
        """Bytes that each worker has sent after so many steps (an integer, or an array)."""
        dense = self.dense_bytes * np.minimum(steps, self.dense_steps)
        return self.bytes_per_step * steps + dense


@dataclasses.dataclass
class Comparison:
    """All runs, and what they ran on."""

    data: str
    unit: str  # of the data: "images", ...
    device: str
    workers: int
    parameters: int
    runs: list[Run]
    interrupted: bool
    reports: bool  # one of several processes does


@dataclasses.dataclass
class Stop:
    """Whether Ctrl-C was pressed."""

    asked: bool = False


def agreed(stop: Stop) -> bool:
    """Whether Ctrl-C was pressed in any process: all must stop after the same step."""
    if jax.process_count() > 1:
        stop.asked = bool(multihost_utils.process_allgather(np.array(stop.asked)).any())
    return stop.asked


@contextlib.contextmanager
def until_interrupted() -> Iterator[Stop]:
    """Turns the first Ctrl-C into a request that the loop sees between steps; a second one is real.

    An exception in the middle of a step would lose the parameters, whose buffers are donated to it.
    """
    stop = Stop()

    def ask(*_: Any) -> None:
        stop.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def find_others(config: Config) -> None:
    """Joins the other processes, if there are any; all must run the same code and options."""
    if not config.several:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    same = dataclasses.replace(config, process=None, coordinator=None)
    here = Path(__file__).parent
    folders = here, here.parent / "tasks", Path(distlion_jax.__file__).parent
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    code = b"".join(path.read_bytes() for path in files)
    program = hashlib.sha256(code + repr(same).encode()).hexdigest()[:16]
    try:
        join(config.coordinator, config.processes, config.process, program=program)
    except (RuntimeError, ValueError) as error:
        hint = "JAX finds no other processes here: " if config.distributed else ""
        raise UsageError(f"{hint}{str(error).splitlines()[0]}") from error


def make_mesh(config: Config) -> Mesh:
    """A mesh of real devices, or of virtual ones where there is only a CPU; call it first."""
    workers, processes = config.workers, config.processes or 1
    if (workers or CPU_WORKERS) % processes:
        raise UsageError(f"{processes} processes cannot share {workers or CPU_WORKERS} workers")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", (workers or CPU_WORKERS) // processes)
    find_others(config)
    try:
        devices = jax.devices()
    except RuntimeError as error:  # JAX_PLATFORMS names what is not there
        raise UsageError(str(error).splitlines()[0]) from error
    if workers is None and devices[0].platform == "cpu" and not config.distributed:
        workers = CPU_WORKERS
    workers = workers or len(devices)
    if workers > len(devices):
        raise UsageError(
            f"{workers} workers need a device each; JAX has {len(devices)} ({devices[0].platform})"
        )
    if workers == 1:
        print("one worker: nobody to vote with, so that majority and average are Lion; "
              f"JAX_PLATFORMS=cpu gives {CPU_WORKERS} virtual ones", file=sys.stderr)  # fmt: skip
    return worker_mesh(workers)


def health_of(state: Any) -> dict[str, float] | None:
    """The last vote's health from an optimizer's state; None for one that holds no votes."""
    votes = vote_health(state)
    if not votes:
        return None
    here = [x.addressable_shards[0].data for x in (votes[0].tied, votes[0].margin)]
    tied, margin = (float(np.ravel(x)[0]) for x in here)
    return {"tied": tied, "margin": margin}


def say(text: str) -> None:
    """Prints, in one of several processes only."""
    if jax.process_index() == 0:
        print(text, flush=True)


class Training:
    """One method at work."""

    def __init__(
        self, method: Method, data: Data, config: Config, evaluate: Callable[..., Any]
    ) -> None:
        self.method, self.data, self.config, self.evaluate = method, data, config, evaluate
        self.params, self.state = method.params, method.state
        self.rng = np.random.default_rng(config.seed)  # every method draws the same batches
        self.rows = config.batch * method.workers
        self.done = 0
        self.run = Run(
            method.name,
            method.cost.transport,
            method.cost.bytes_received,
            method.dense.bytes_received if method.dense else 0,
            method.dense_steps,
        )

    def check(self) -> None:
        """Says whether the ledger's bytes are those of the compiled step."""
        batch = self.data.draw(np.random.default_rng(0), self.rows)
        self.run.ledger_agrees, line = check_bytes(self.method, self.method.place(batch))
        say(line)

    def advance(self, until: int) -> None:
        """Trains until so many steps are done, and waits for them."""
        began, losses = time.perf_counter(), []
        for _ in range(self.done, until):
            batch = self.method.place(self.data.draw(self.rng, self.rows))
            self.params, self.state, metrics = self.method.step(self.params, self.state, batch)
            losses.append(metrics.loss)
        self.run.losses += [float(x) for x in losses]
        if self.done:  # the first step compiles
            self.run.seconds += time.perf_counter() - began
        self.done = until

    def progress(self) -> str:
        """Loss, speed and bytes, for the progress line."""
        units = self.data.per_row * self.rows * (self.done - 1)
        rate = units / self.run.seconds if self.run.seconds else 0.0
        sent = self.run.sent(self.done) - self.run.sent(self.done - 1)
        figures = f"{rate:,.0f} {self.data.unit}/s, {sent / 1e3:,.0f} kB/step"
        return f"{self.run.name}: loss {self.run.losses[-1]:.3f}, {figures}"

    def look(self) -> None:
        """Evaluates on the held-out data."""
        one = self.config.mode == "pmap"  # pmap's parameters carry a worker axis
        params = jax.tree.map(lambda x: np.asarray(x[0]), self.params) if one else self.params
        loss, accuracy = self.evaluate(params)
        sent = int(self.run.sent(self.done))
        self.run.evaluations.append(
            {"step": self.done, "loss": loss, "accuracy": accuracy, "bytes_sent": sent}
        )

    def finish(self) -> Run:
        """The run, with its last evaluation and its sums."""
        if self.run.evaluations[-1]["step"] < self.done:
            self.look()
        self.run.bytes_sent = int(self.run.sent(self.done))
        bits = 8 * self.run.bytes_sent
        self.run.bits_per_parameter = bits / max(1, self.method.cost.parameters * self.done)
        self.run.health = health_of(self.state) if self.done else None
        return self.run


def train(trainings: list[Training], config: Config, stop: Stop) -> list[Run]:
    """Trains all methods, to the end or until asked to stop.

    They take turns, a few steps each, so that whatever else the machine does slows all alike.
    """
    for training in trainings:
        training.check()
        training.look()
    done = 0
    quiet = jax.process_index() != 0
    with tqdm(total=config.steps, unit="step", dynamic_ncols=True, disable=quiet) as bar:
        while done < config.steps and not agreed(stop):
            stops = [(done // k + 1) * k for k in (TURN, config.eval_every)]
            done = min(*stops, config.steps) if done else 1
            for training in trainings:
                training.advance(done)
            bar.set_postfix_str("; ".join(t.progress() for t in trainings), refresh=False)
            bar.update(done - bar.n)
            if done % config.eval_every == 0:
                for training in trainings:
                    training.look()
    return [training.finish() for training in trainings]


def compare(config: Config, data: Data) -> Comparison:
    """Trains with every method, from the same weights and on the same batches."""
    mesh = make_mesh(config)
    model = make_model(config.task, data)
    loss = make_loss(model)
    params = jax.device_get(initial_params(model, data, config.seed))
    device = mesh.devices.flat[0]
    kind = f"{device.platform} ({device.device_kind})"
    parameters = sum(x.size for x in jax.tree.leaves(params))
    say(f"data: {data.description}")
    where = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    say(f"{parameters:,} parameters, {mesh.size} workers on {kind}{where}")
    methods = [make_method(name, config, loss, params, mesh) for name in config.methods]
    evaluate = make_evaluation(model, data.held_out, mesh, rows=32)
    with until_interrupted() as stop:
        runs = train([Training(m, data, config, evaluate) for m in methods], config, stop)
    return Comparison(
        data.description,
        data.unit,
        kind,
        mesh.size,
        parameters,
        runs,
        stop.asked,
        jax.process_index() == 0,
    )
