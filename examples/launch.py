# SPDX-License-Identifier: Apache-2.0
"""Starts several processes of a program on this machine, and ends them all when one fails.

    python examples/launch.py -n 2 examples/train.py --task images

The program is given --coordinator, --processes and --process. On a cluster its scheduler does this
(README, "Several processes and machines").
"""

import argparse
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

GRACE = 10.0  # seconds that the others have to end by themselves, once one has failed


def free_port() -> int:
    """A TCP port of loopback that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(program: Sequence[str], n: int) -> list[subprocess.Popen[bytes]]:
    """Process 0 in the foreground; of the others only what goes wrong is shown."""
    where = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(n), "--process"]
    return [
        subprocess.Popen(
            [sys.executable, *program, *where, str(i)],
            stdout=None if i == 0 else subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C comes here, and goes to all at once
        )
        for i in range(n)
    ]


def wait(running: list[subprocess.Popen[bytes]]) -> int:
    """Waits for all; returns the first code that is not 0."""
    worst, deadline = 0, float("inf")
    while any(p.poll() is None for p in running) and time.monotonic() < deadline:
        failed = [p.returncode for p in running if p.returncode]
        if failed and not worst:
            worst, deadline = failed[0], time.monotonic() + GRACE
        time.sleep(0.1)
    for i, p in enumerate(running):
        if p.poll() is None:
            print(f"launch.py: process {i} still ran {GRACE:g} s after another had failed; "
                  "killed", file=sys.stderr)  # fmt: skip
            p.kill()
            p.wait()
    return worst or next((p.returncode for p in running if p.returncode), 0)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="launch.py", description=__doc__.splitlines()[0]  # type: ignore[union-attr]
    )  # fmt: skip
    parser.add_argument("-n", type=int, default=2, metavar="N", help="processes (default: 2)")
    parser.add_argument("program", nargs=argparse.REMAINDER, help="a Python file and its options")
    args = parser.parse_args(argv)
    if args.n < 1 or not args.program:
        parser.error("a positive -n and a program are needed: launch.py -n 2 train.py")
    running = start(args.program, args.n)

    def forward(number: int, _: object) -> None:
        for p in running:
            if p.poll() is None:
                p.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    code = wait(running)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    raise SystemExit(main())
