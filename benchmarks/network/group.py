# SPDX-License-Identifier: Apache-2.0
"""The processes of one framework, warmed up, that measure a cell whenever they are told to.

In:  a worker module and its task; then cells (rounds.py says what one is).
Out: every process's rows of each cell.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.network import netns

ROOT = Path(__file__).resolve().parents[2]


class Group:
    """Processes 0 to n-1 of a module, each in its own host where there are hosts."""

    def __init__(self, module: str, hosts: list[netns.Host] | None, task: dict[str, Any]) -> None:
        self.folder, self.cells = tempfile.TemporaryDirectory(), 0
        self.running: list[subprocess.Popen[bytes]] = []
        try:
            for i in range(task["processes"]):
                self._start(i, module, hosts, task)
        except BaseException:  # also Ctrl-C
            self.close()
            raise

    def _start(
        self, i: int, module: str, hosts: list[netns.Host] | None, task: dict[str, Any]
    ) -> None:
        command = [sys.executable, "-m", module, json.dumps(task | {"process": i})]
        command = hosts[i].command(*command) if hosts else command
        with open(self._log(i), "w") as log:
            pipes = dict(stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=ROOT)
            self.running.append(subprocess.Popen(command, **pipes))  # type: ignore[call-overload]

    def _log(self, i: int) -> Path:
        return Path(self.folder.name, f"{i}.log")

    def measure(self, cell: dict[str, Any], limit: float) -> list[list[dict[str, Any]]]:
        """The rows of every process; raises if one fails, or all take longer than the limit."""
        self.cells += 1
        files = [Path(self.folder.name, f"{self.cells}-{i}.json") for i in range(len(self.running))]
        for process, file in zip(self.running, files, strict=True):
            with contextlib.suppress(BrokenPipeError):  # it has failed, as is seen below
                assert process.stdin is not None
                process.stdin.write(json.dumps(cell | {"out": str(file)}).encode() + b"\n")
                process.stdin.flush()
        deadline = time.monotonic() + limit
        while not all(file.exists() for file in files):
            if any(process.poll() is not None for process in self.running):
                time.sleep(1.0)  # for what the others say
                ends = [self._log(i).read_text()[-1500:] for i in range(len(files))]
                raise RuntimeError("a process failed\n" + "\n---\n".join(ends))
            if time.monotonic() > deadline:
                raise RuntimeError(f"{len(files)} processes took over {limit:g} s for {cell}")
            time.sleep(0.05)
        return [json.loads(file.read_text()) for file in files]

    def close(self) -> None:
        """Ends the processes, and forgets what they wrote."""
        for process in self.running:
            process.kill()
            process.communicate()
        self.folder.cleanup()
