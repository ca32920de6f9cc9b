# SPDX-License-Identifier: Apache-2.0
"""Several slow links on one Linux machine: a network namespace per process, joined by a bridge.

In:  how many hosts. Out: hosts with an address each, in which commands can be started, and whose
links can be given another rate while they run. Everything is taken away at the end, also after
Ctrl-C or SIGTERM.
"""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

INTERFACE = "eth0"  # of every host, as it sees it
_HOSTS = Path("/etc/netns")


class Host(NamedTuple):
    """One namespace."""

    name: str
    address: str
    outside: str  # its link's other end, at the bridge

    def command(self, *command: str) -> list[str]:
        """The command, to be run in this host."""
        return ["ip", "netns", "exec", self.name, *command]


class Unavailable(Exception):
    """Why links cannot be made here, and what to do."""


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"`{' '.join(command)}` failed: {done.stderr.strip()}")


def _quietly(*command: str) -> None:
    subprocess.run(command, capture_output=True, check=False)


def check() -> None:
    """Raises :class:`Unavailable` unless namespaces and shaped links can be made."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise Unavailable(f"{' and '.join(missing)} not found (Debian: apt install iproute2)")
    if os.geteuid() != 0:
        raise Unavailable("network namespaces need root")


def shape(hosts: Sequence[Host], rate: str | None) -> None:
    """Gives every host's link a rate (tc's words, as ``100mbit``) both ways; None: no limit."""
    for host in hosts:
        receives, sends = ["tc"], host.command("tc")
        for tc, device in ((receives, host.outside), (sends, INTERFACE)):
            _quietly(*tc, "qdisc", "del", "dev", device, "root")
            if rate is not None:
                bucket = ("tbf", "rate", rate, "burst", "256kb", "latency", "400ms")
                _run(*tc, "qdisc", "add", "dev", device, "root", *bucket)


def _make(host: Host, bridge: str) -> None:
    _run("ip", "netns", "add", host.name)
    _run("ip", "link", "add", host.outside, "type", "veth", "peer", "name", INTERFACE,
         "netns", host.name)  # fmt: skip
    _run("ip", "link", "set", host.outside, "master", bridge, "up")
    inside = host.command()
    _run(*inside, "ip", "addr", "add", f"{host.address}/24", "dev", INTERFACE)
    _run(*inside, "ip", "link", "set", INTERFACE, "up")
    _run(*inside, "ip", "link", "set", "lo", "up")
    folder = _HOSTS / host.name  # gloo binds the address of the machine's name
    folder.mkdir(parents=True, exist_ok=True)
    name = os.uname().nodename
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{host.address} {name}\n")


@contextlib.contextmanager
def network(n: int) -> Iterator[list[Host]]:
    """``n`` hosts on one bridge, each with a link as fast as the machine can (see ``shape``)."""
    check()
    bridge = f"dl{os.getpid() % 10**6}"
    hosts = [Host(f"{bridge}-{i}", f"10.77.0.{i + 1}", f"{bridge}v{i}") for i in range(n)]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "link", "set", bridge, "up")
        for host in hosts:
            _make(host, bridge)
        yield hosts
    finally:
        for host in hosts:
            _quietly("ip", "netns", "del", host.name)
            shutil.rmtree(_HOSTS / host.name, ignore_errors=True)
            _quietly("ip", "link", "del", host.outside)
        _quietly("ip", "link", "del", bridge)
        with contextlib.suppress(OSError):
            _HOSTS.rmdir()  # only where nothing else is in it
        signal.signal(signal.SIGTERM, before)


def counters(interface: str = INTERFACE) -> tuple[int, int]:
    """Bytes that an interface of this process's network has received and sent so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, fields = line.partition(":")
        if name.strip() == interface:
            numbers = fields.split()
            return int(numbers[0]), int(numbers[8])
    raise Unavailable(f"no interface {interface!r} here")
