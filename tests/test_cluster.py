# SPDX-License-Identifier: Apache-2.0
"""Processes that check in: all start, or all end with the same reason, over real sockets."""

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distlion_jax import cluster
from tests.helpers import free_port

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TIMEOUT = 3.0  # seconds that a check-in may take, where somebody is missing


def check_in(*processes):
    """Each is ``(count, index, program)``; returns what each was told, and the seconds it took."""
    where = f"127.0.0.1:{free_port()}"

    def one(n, index, program="same"):
        try:
            cluster.check_in(where, n, index, program, TIMEOUT)
        except RuntimeError as error:
            return str(error)
        return ""

    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        told = [job.result() for job in [pool.submit(one, *p) for p in processes]]
    return told, time.monotonic() - began


@pytest.mark.parametrize("n", [1, 2, 5])
def test_all_start(n):
    told, seconds = check_in(*[(n, i) for i in reversed(range(n))])
    assert told == [""] * n
    assert seconds < TIMEOUT


@pytest.mark.parametrize(
    ("processes", "reason"),
    [
        ([(3, 0), (3, 2)], "of 3 processes [1] did not check in"),
        ([(2, 0), (3, 1)], "process 1 has processes 3, process 0 has 2"),
        ([(2, 0, "a"), (2, 1, "b")], "process 1 has program 'b', process 0 has 'a'"),
        ([(4, 0), (4, 1), (4, 1)], "two processes say that they are process 1 of 4"),
        ([(2, 0), (4, 3)], "process 3 is not one of 2"),
    ],
    ids=["missing", "count", "code", "twice", "beyond"],
)
def test_all_are_told_what_is_wrong(processes, reason):
    told, seconds = check_in(*processes)
    assert all(reason in text for text in told), told
    assert seconds < 3 * TIMEOUT


def test_strangers_are_not_counted():
    """Something that connects and says nothing of use does not start a process, nor stop one."""
    port = free_port()

    def stranger():
        for _ in range(50):
            try:
                with socket.create_connection(("127.0.0.1", port)) as s:
                    return s.sendall(b"GET / HTTP/1.1\r\n")
            except OSError:
                time.sleep(0.02)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first = pool.submit(cluster.check_in, f"127.0.0.1:{port}", 2, 0, "", 10.0)
        pool.submit(stranger).result()
        second = pool.submit(cluster.check_in, f"127.0.0.1:{port}", 2, 1, "", 10.0)
        assert first.result() is second.result() is None


def launch(folder, *flags):
    command = [sys.executable, str(EXAMPLES / "launch.py"), "-n", "2", str(EXAMPLES / "train.py")]
    return subprocess.Popen(
        [*command, "--quick", "--workers", "4", "--out", str(folder), *flags],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    """The example, from the launcher: the same losses, and one report."""
    steps = ["--steps", "6", "--eval-every", "3"]
    process = launch(tmp_path, *steps)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert "4 workers on cpu (cpu) in 2 processes" in text
    assert text.count("| D-Lion, majority") == 1
    several = json.loads((tmp_path / "results.json").read_text())
    command = [sys.executable, str(EXAMPLES / "train.py"), "--quick", "--workers", "4", *steps]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "one")],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one = json.loads((tmp_path / "one" / "results.json").read_text())
    for a, b in zip(several["runs"], one["runs"], strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-5)
        assert a["bytes_sent"] == b["bytes_sent"]
        assert a["ledger_agrees"]


@pytest.mark.slow
def test_ctrl_c_reaches_all(tmp_path):
    """All stop after the same step, and what there is is written."""
    process = launch(tmp_path, "--steps", "100000", "--methods", "majority")
    text = ""
    while "step/s" not in text.split("ledger checked")[-1]:
        piece = os.read(process.stdout.fileno(), 4096).decode(errors="replace")
        assert piece, text
        text += piece
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text + rest
    assert json.loads((tmp_path / "results.json").read_text())["interrupted"]


@pytest.mark.slow
def test_different_options_do_not_start(tmp_path):
    """Two processes of the same code that were told different things end at once, both."""
    where = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--quick"]
    runs = [
        subprocess.Popen(
            [sys.executable, str(EXAMPLES / "train.py"), *where, "--process", str(i), "--seed", i],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in "01"
    ]
    for run in runs:
        _, text = run.communicate(timeout=100)
        assert run.returncode == 2
        assert "process 1 has program" in text
        assert text.count("\n") == 1, text
