# SPDX-License-Identifier: Apache-2.0
"""What goes wrong between processes is made right, or said in all of them; over real sockets."""

import numpy as np
import pytest

from distlion_jax.train._processes import Watch, Word
from tests import launch
from tests.helpers import free_port

SHAPES = [(2, 4), pytest.param((4, 2), marks=pytest.mark.slow)]  # processes, devices of each


def run(folder, situation, processes, devices):
    """What each process made of a situation."""
    port = free_port()
    files = [folder / f"{situation}-{processes}-{i}.npz" for i in range(processes)]
    jobs = {file: (situation, processes, devices, i, port) for i, file in enumerate(files)}
    return launch.run("company_worker", jobs, 170, ends_well=False)


def test_who_waits_for_long_says_for_whom():
    """Once; and it hears that the other is alive, and in an earlier call."""
    beats = iter(range(100))
    watch = Watch(3, 0, lambda: [Word("alive", 1, 2, str(next(beats)))], 0.0)
    for now in range(5, 60, 5):
        watch.look(float(now))
    with pytest.warns(UserWarning, match=r"for 60 s in call 3 of the step for processes \[1\]"):
        watch.look(60.0)
    watch.look(65.0)


def test_what_others_said_of_earlier_calls_is_no_reason():
    words = [Word("new2", 1, 2, "{}"), Word("ended", 2, 3, ""), Word("raised", 3, 4, "x")]
    words += [Word("raised", 4, 3, "")]  # one that raised, and went on
    watch = Watch(3, 2, lambda: words, 0.0)
    watch.look(5.0)
    watch.look(55.0)


def test_one_that_began_anew_in_an_earlier_call_waits_for_an_answer():
    """On accelerators the wait is for the call before: the others may be a call ahead."""
    watch = Watch(3, 1, lambda: [Word("new2", 1, 2, "{}")], 0.0)
    watch.look(5.0)
    with pytest.raises(RuntimeError, match=r"process 1 was given other shapes.*in call 2; process"):
        watch.look(10.0)


@pytest.mark.parametrize("why", ["raised", "ended"])
def test_the_first_cause_is_named(why):
    """Process 1 was told of process 2, and raised; it is not the one to look at."""
    waited = f"RuntimeError: process 2 {why} in call 3 of the step, and process 1 waits in call 3"
    words = [
        Word("ended", 1, 2, ""),
        Word("raised", 1, 3, waited),
        Word(why, 2, 2, "ValueError: x"),
    ]
    watch = Watch(3, 1, lambda: words, 0.0)
    watch.look(5.0)
    with pytest.raises(RuntimeError, match=f"^process 2 {why} .*ValueError: x"):
        watch.look(10.0)


def test_one_that_goes_on_after_raising_is_no_reason():
    words = [Word("raised", 1, 3, "ValueError: x")]
    watch = Watch(3, 1, lambda: words, 0.0)
    watch.look(5.0)
    words[0] = Word("raised", 1, 3, "")
    watch.look(10.0)


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]} processes")
def shape(request):
    return request.param


def test_several_processes_are_one(shape, tmp_path):
    alone = run(tmp_path, "same_as_one_process", 1, 8)[0]
    assert len(alone) == 6 * 4 + 3
    for results in run(tmp_path, "same_as_one_process", *shape):
        assert results.keys() == alone.keys()
        for name, x in alone.items():
            if name.endswith(("loss", "[1]")):  # float sums, in another order
                np.testing.assert_allclose(results[name], x, rtol=1e-6)
            else:
                assert results[name].tobytes() == x.tobytes(), name
            assert not name.endswith("voted") or results[name].shape == (8,)


def test_what_differs_by_process_is_made_one_or_named(shape, tmp_path):
    first, *others = run(tmp_path, "differs", *shape)
    for results in others:
        for name in (x for x in first if x.startswith("made one")):
            assert results[name].tobytes() == first[name].tobytes(), name
    for results in (first, *others):
        said = {name: str(x) for name, x in results.items() if not name.startswith("made one")}
        assert "`params['w']` differs by process before call 1" in said["own parameters"]
        assert "replicate(" in said["own parameters"]
        for name in ("own rate", "own rate, pmap"):
            assert "the program differs between process" in said[name]
            assert "in call 1 of the step" in said[name]
        assert "`batch` is an array of this process alone" in said["own rows"]
        assert "make_global_batch(rows, mesh)" in said["own rows"]
        assert "`rows` has 7 rows" in said["odd rows"]
        assert "`batch` claims to be the same on several processes" in said["replicated rows"]
        assert "`axis_name` 'data' leaves out axes of the mesh" in said["left out axis"]
        assert "holds no device of this process" in said["no device"]
        assert "pmap takes as many of each process" in said["uneven pmap"]


def test_states_are_resized_in_several_processes(shape, tmp_path):
    alone = run(tmp_path, "resumed", 1, 8)[0]
    for results in run(tmp_path, "resumed", *shape):
        assert results.keys() == alone.keys()
        for name in (x for x in alone if "mu" in x):
            assert results[name].tobytes() == alone[name].tobytes(), name


def test_the_others_are_told_of_a_process_that_raises(shape, tmp_path):
    *others, last = run(tmp_path, "bad_batch", *shape)
    assert "`batch` is an array of this process alone" in str(last["said"]) or "rows" in str(
        last["said"]
    )
    for results in others:
        said = str(results["said"])
        assert said.startswith(f"RuntimeError: process {shape[0] - 1} raised in call 2"), said
        assert "ValueError: `batch`" in said


def test_a_process_that_raised_may_try_again(shape, tmp_path):
    """And one may lower alone; what the processes say does not pile up."""
    *others, last = run(tmp_path, "tries_again", *shape)
    assert str(last["said"]).startswith("ValueError: `batch`")
    for results in (*others, last):
        assert int(results["voters"]) == shape[0] * shape[1]
        assert int(results["cards"]) <= 2 * shape[0]
        assert results["['w']"].tobytes() == last["['w']"].tobytes()


@pytest.mark.parametrize(("situation", "calls"), [("no_batch", 0), ("fewer_batches", 1)])
def test_the_others_are_told_of_a_process_that_ends(situation, calls, shape, tmp_path):
    *others, last = run(tmp_path, situation, *shape)
    assert str(last["said"]) == "nothing"
    for results in others:
        said = str(results["said"])
        assert f"process {shape[0] - 1} ended after {calls} calls of the step" in said, said
        assert "the same number of batches" in said
