# SPDX-License-Identifier: Apache-2.0
"""Real processes over a real network stack (gloo on loopback) equal one process, bit for bit."""

import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.helpers import free_port
from tests.process_worker import ABSENT, RUNS, SICK, STEPS, initial_params

ROOT = pathlib.Path(__file__).parent.parent
TIMEOUT = 120  # seconds for all processes of a run


def start(folder, workers, process, port):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    name = f"{workers}-{process}"
    command = [sys.executable, "-m", "tests.process_worker", folder / f"{name}.npz"]
    with open(folder / f"{name}.log", "wb") as log:
        return subprocess.Popen(
            [*map(str, command), str(workers), str(process), str(port)],
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def wait(started, deadline):
    """Waits until all have ended well; False as soon as one has not, or at the deadline."""
    while time.monotonic() < deadline:
        codes = [p.poll() for p in started]
        if any(codes):
            return False
        if None not in codes:
            return True
        time.sleep(0.1)
    return False


def run(folder, workers, processes):
    """The results of each process; all are killed, and their output shown, if one fails."""
    port = free_port()
    started = [start(folder, workers, p, port) for p in processes]
    try:
        fine = wait(started, time.monotonic() + TIMEOUT)
    finally:
        for p in started:
            p.kill()
            p.wait()
    if not fine:
        logs = [f"--- {f.name}\n{f.read_text()}" for f in sorted(folder.glob("*.log"))]
        codes = [p.returncode for p in started]
        pytest.fail(f"exit codes {codes} within {TIMEOUT} s\n" + "\n".join(logs), pytrace=False)
    return [dict(np.load(folder / f"{workers}-{p}.npz")) for p in processes]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def results(request, tmp_path_factory):
    """Of ``n`` processes with a device each, and of one process with ``n`` devices."""
    folder, n = tmp_path_factory.mktemp("processes"), request.param
    return run(folder, n, list(range(n))), run(folder, n, ["all"])[0]


def assert_same_bits(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", RUNS)
def test_parameters_are_the_same_everywhere(results, name):
    separate, together = results
    for key in ("w", "b", "u"):
        want = together[f"{name}/params/{key}"]
        assert np.isfinite(want).all()
        assert (want != initial_params()[key]).any()
        for mine in separate:
            assert_same_bits(mine[f"{name}/params/{key}"], want)


@pytest.mark.parametrize("name", RUNS)
def test_momentum_is_each_worker_s_own(results, name):
    separate, together = results
    for key in ("w", "b", "u"):
        want = together[f"{name}/mu/{key}"]
        assert len(want) == len(separate)
        for worker, mine in enumerate(separate):
            assert_same_bits(mine[f"{name}/mu/{key}"], want[worker : worker + 1])
    w = together[f"{name}/mu/w"]
    assert (w[0] != w[1]).any()


@pytest.mark.parametrize("name", RUNS)
def test_a_sick_worker_sits_out_and_nobody_hangs(results, name):
    separate, together = results
    n = len(separate)
    absent = {SICK, ABSENT} if name == "average" else {SICK}
    voted = np.ones((n, STEPS), bool)
    for step, worker in absent:
        voted[worker, step] = False
    np.testing.assert_array_equal(together[f"{name}/voted"], voted)
    for mine in separate:
        np.testing.assert_array_equal(mine[f"{name}/voted"], voted)
        np.testing.assert_array_equal(mine[f"{name}/voters"], voted.sum(axis=0))
        np.testing.assert_allclose(mine[f"{name}/loss"], together[f"{name}/loss"], rtol=1e-5)
