# SPDX-License-Identifier: Apache-2.0
"""Real processes over a real network stack (gloo on loopback) equal one process, bit for bit."""

import numpy as np
import pytest

from tests import launch
from tests.helpers import free_port
from tests.process_worker import ABSENT, RUNS, SICK, STEPS, initial_params


def run(folder, workers, processes):
    """The results of these processes, of so many workers in all."""
    port = free_port()
    jobs = {folder / f"{workers}-{p}.npz": (workers, p, port) for p in processes}
    return launch.run("process_worker", jobs, 120)


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
