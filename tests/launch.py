# SPDX-License-Identifier: Apache-2.0
"""Real processes of a test: started together, waited for, and what each has written."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


def start(worker, file, arguments):
    """A process of a module of the tests, which begins as a user's does."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    command = [sys.executable, "-m", f"tests.{worker}", file, *arguments]
    with open(file.with_suffix(".log"), "wb") as log:
        return subprocess.Popen(
            [*map(str, command)], cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT
        )


def wait(started, seconds, ends_well):
    """Waits until all have ended; False as soon as one has failed, or after so long."""

    def failed(file, process):
        return process.poll() if ends_well else process.poll() is not None and not file.exists()

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(failed(*one) for one in started.items()):
            return False
        if all(p.poll() is not None for p in started.values()):
            return True
        time.sleep(0.1)
    return False


def run(worker, jobs, seconds, ends_well=True):
    """The arrays that each process writes; all are killed, and their output shown, if one fails.

    Args:
      worker: the module; its first argument is a file, in which it leaves its arrays (npz).
      jobs: the other arguments of each process, by its file.
      seconds: for all of them.
      ends_well: whether a process that wrote its file must also end without an error.
    """
    started = {file: start(worker, file, arguments) for file, arguments in jobs.items()}
    try:
        fine = wait(started, seconds, ends_well)
    finally:
        for p in started.values():
            p.kill()
            p.wait()
    if not fine:
        logs = [f"--- {f.stem}\n{f.with_suffix('.log').read_text()[-3000:]}" for f in jobs]
        codes = [p.returncode for p in started.values()]
        pytest.fail(f"exit codes {codes} within {seconds} s\n" + "\n".join(logs), pytrace=False)
    return [dict(np.load(file)) for file in jobs]
