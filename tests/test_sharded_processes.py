# SPDX-License-Identifier: Apache-2.0
"""Replicas of a sharded model on devices of several real processes equal one process, exactly."""

import numpy as np
import pytest

from tests import launch
from tests.helpers import free_port
from tests.sharded_worker import ABSENT, MESHES, RUNS, SICK, STEPS, initial_params

SHAPES = [(2, 4), (4, 2)]  # processes, devices of each: a replica in one, and one in two


def run(folder, processes, devices):
    """What each process holds at the end, by the places of devices in the mesh."""
    files, port = [folder / f"{processes}-{i}.npz" for i in range(processes)], free_port()
    jobs = {file: (processes, devices, i, port) for i, file in enumerate(files)}
    return launch.run("sharded_worker", jobs, 170, ends_well=processes != 2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Of one process with all devices."""
    return run(tmp_path_factory.mktemp("alone"), 1, 8)[0]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"{shape[0]} processes")
def several(request, tmp_path_factory):
    """Of each of several processes."""
    return run(tmp_path_factory.mktemp("several"), *request.param)


def under(arrays, *path):
    """The arrays whose names begin with these words."""
    prefix = "/".join(path) + "/"
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}


@pytest.mark.parametrize("kind", ["params", "mu"])
@pytest.mark.parametrize("name", RUNS)
def test_every_device_holds_the_same_bits(alone, several, name, kind):
    want = under(alone, name, kind)
    assert {place.split("/")[0] for place in want} == set(initial_params())
    held = [place for mine in several for place in under(mine, name, kind)]
    assert sorted(held) == sorted(want)  # each device is of one process
    for mine in several:
        for place, x in under(mine, name, kind).items():
            assert (x.dtype, x.shape) == (np.float64, want[place].shape)
            assert x.tobytes() == want[place].tobytes(), place


@pytest.mark.parametrize("name", RUNS)
def test_what_is_compared_has_moved(alone, name):
    second = 8 // MESHES[RUNS[name][0]][0]["replica"]  # the first device of the second replica
    for key, before in initial_params().items():
        shard = alone[f"{name}/params/{key}/0"]
        assert np.isfinite(shard).all()
        assert (shard != before[tuple(map(slice, shard.shape))]).any()
        assert shard.tobytes() == alone[f"{name}/params/{key}/{second}"].tobytes()
        assert (alone[f"{name}/mu/{key}/0"] != alone[f"{name}/mu/{key}/{second}"]).any()


@pytest.mark.parametrize("name", RUNS)
def test_a_replica_sits_out_on_all_its_devices(alone, several, name):
    """One with a NaN in its rows, or in one shard of its gradient; and one that was told to."""
    replicas = MESHES[RUNS[name][0]][0]["replica"]
    voted = np.ones((STEPS, replicas), bool)
    for step, replica in {**SICK, ABSENT: 0}.items():
        voted[step, replica] = False
    for mine in (alone, *several):
        np.testing.assert_array_equal(mine[f"{name}/voted"], voted)
        np.testing.assert_array_equal(mine[f"{name}/voters"], voted.sum(1))
        assert mine[f"{name}/tied"].tobytes() == alone[f"{name}/tied"].tobytes()
        np.testing.assert_allclose(mine[f"{name}/loss"], alone[f"{name}/loss"], 1e-6)  # float32


def test_what_differs_by_process_is_refused_in_all(several):
    """Of a shard that most of the devices do not hold, too."""
    processes = len(several)
    for mine in several:
        said = {name: str(x) for name, x in under(mine, "amiss").items()}
        assert (said["agree"], said["differ"]) == ("True", "False")
        assert "`params['up']` differs by process before call 6" in said["bad parameters"]
        if processes == 2:
            assert said["shared rows"] == "nothing"
            assert "`rows` has 3 rows, which cannot be split into the 2 equal" in said["odd rows"]
        else:
            assert "leaves out axes of the mesh" in said["shared rows"]
            assert said["odd rows"] == "nothing"  # all of one part


def test_the_others_are_told_of_a_process_that_raises(several):
    if len(several) == 2:
        first, last = (str(mine["amiss/own rows"]) for mine in several)
        assert last.startswith("ValueError: `batch['apart']` is an array of this process alone")
        assert first.startswith("RuntimeError: process 1 raised in call 6")
        assert last[:60] in first
