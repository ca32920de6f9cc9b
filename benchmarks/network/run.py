# SPDX-License-Identifier: Apache-2.0
"""Steps per second and bytes of real processes over real links of several speeds.

    sudo python -m benchmarks.network.run               # about 20 minutes
    sudo python -m benchmarks.network.run --workloads linear --processes 2 --peers
    python -m benchmarks.network.run --loopback         # no root: one fast link, no byte counts

Every process has a network namespace of its own, whose link to a bridge is shaped by tc's tbf.
Within a round the methods take a step each, so that they are compared on the same machine at the
same time; bytes are the interface's own counters, TCP's overhead included. Workloads: `exchange`
(25.2 M parameters, update and exchange alone), `linear` (the gradient of 24 linear layers of
1024 x 1024 and one example a worker, and the update), `small` and `large` (of a transformer of
0.4 M and 25.3 M parameters, 4 x 64 characters a worker). --peers adds PyTorch's
DistributedDataParallel to `linear`. In `sharded`, which is `linear` otherwise, a process has four
devices, a quarter of every matrix on each: they share the process's link. What they send to one
another goes over loopback, neither shaped nor counted. Methods that know no shards are left out.

Results are kept (one JSON line a cell and method) and not measured again; --fresh forgets them.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import sys
import uuid
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.cli import command_line
from benchmarks.compute import timing
from benchmarks.network import netns
from benchmarks.network.group import Group
from benchmarks.network.methods import METHODS, PEERS, SHARDED, SLICES
from benchmarks.report import network as report

RATES = {"unshaped": None, "10gbit": "10gbit", "1gbit": "1gbit", "100mbit": "100mbit",
         "10mbit": "10mbit"}  # fmt: skip
WORKLOADS = ("exchange", "linear", "small", "large", "sharded")
PORT = 7777  # nobody else is in the namespace

Row = dict[str, Any]


class Job(NamedTuple):
    """What one group of processes has to measure."""

    workload: str
    processes: int
    module: str  # of each process
    cells: dict[str, list[str]]  # methods by rate

    @property
    def methods(self) -> list[str]:
        """All of its methods, each once."""
        return list(dict.fromkeys(itertools.chain(*self.cells.values())))


def plan(args: argparse.Namespace, known: list[Row]) -> list[Job]:
    """The jobs for what is asked for and not known yet."""
    have = {(r["workload"], r["processes"], r["rate"], r["method"]) for r in known}
    jobs = []
    for workload, n in itertools.product(args.workloads, args.processes):
        able = SHARDED if workload in SLICES else METHODS
        modules = {"benchmarks.network.worker": [m for m in args.methods if m in able]}
        if args.peers and workload == "linear":
            modules["benchmarks.network.torch_worker"] = list(PEERS)
        for module, methods in modules.items():
            cells = {
                rate: [m for m in methods if (workload, n, rate, m) not in have]
                for rate in args.rates
            }
            if any(cells.values()):
                jobs.append(Job(workload, n, module, {k: v for k, v in cells.items() if v}))
    return jobs


def merge(cell: Row, rows: list[list[Row]]) -> list[Row]:
    """One result a method: seconds of the slowest process in each round, bytes of the mean one."""
    out = []
    for same in zip(*rows, strict=True):
        seconds = [max(t) for t in zip(*(row["seconds"] for row in same), strict=True)]
        mean = {
            way: sum(sum(row[way]) for row in same) / len(same) / len(seconds)
            for way in ("received", "sent")
        }
        out.append(cell | same[0] | mean | {"seconds": seconds, "machine": timing.machine()})
    return out


def run(job: Job, hosts: list[netns.Host] | None, args: argparse.Namespace, file: Path) -> None:
    """Measures a job, rate by rate, and adds its rows to the file."""
    task = {
        "workload": job.workload,
        "processes": job.processes,
        "methods": job.methods,
        "interface": netns.INTERFACE if hosts else "lo",
        "coordinator": f"{hosts[0].address if hosts else '127.0.0.1'}:{PORT}",
    }
    cell = {"rounds": args.rounds, "least": args.least, "budget": args.budget}
    if hosts:
        netns.shape(hosts, None)  # the job before may have left them slow
    with contextlib.closing(Group(job.module, hosts, task)) as group:
        group.measure(cell | {"methods": []}, args.limit)  # they warm up before links are slow
        for rate, methods in job.cells.items():
            if hosts:
                netns.shape(hosts, RATES[rate])
            rows = group.measure(cell | {"methods": methods}, args.limit)
            what = {"workload": job.workload, "processes": job.processes, "rate": rate}
            what["run"] = uuid.uuid4().hex  # rounds are pairs within a run only
            with open(file, "a") as out:
                for row in merge(what, rows):
                    row |= {} if hosts else {"received": None, "sent": None}
                    out.write(json.dumps(row) + "\n")
            tqdm.write(f"{job.workload}, {job.processes} processes, {rate}: {', '.join(methods)}")


def measure(args: argparse.Namespace, file: Path) -> None:
    """Fills the file with what it lacks; all jobs of as many processes share their links."""
    jobs = plan(args, report.read(file))
    with tqdm(total=len(jobs), unit="job", disable=not sys.stderr.isatty()) as bar:
        for (_, n), some in itertools.groupby(jobs, key=lambda job: (job.workload, job.processes)):
            with contextlib.nullcontext() if args.loopback else netns.network(n) as hosts:
                for job in some:
                    run(job, hosts, args, file)
                    bar.update()


def has_torch() -> bool:
    """Whether PyTorch can be imported."""
    return importlib.util.find_spec("torch") is not None


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = command_line(__doc__)
    p.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["exchange", "small"])
    p.add_argument("--processes", nargs="+", type=int, default=[2, 4], metavar="N")
    p.add_argument("--rates", nargs="+", choices=RATES, default=["unshaped", "1gbit", "100mbit"])
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    p.add_argument("--peers", action="store_true", help="PyTorch DDP too, in `linear`")
    p.add_argument("--rounds", type=int, default=10, help="timed rounds of a cell")
    p.add_argument("--budget", type=float, default=90, help="seconds of a cell, then it ends")
    p.add_argument("--least", type=int, default=3, help="rounds that it has in any case")
    p.add_argument("--limit", type=float, default=3600, help="seconds after which a cell failed")
    p.add_argument("--out", type=Path, default=Path("runs/network"), help="folder of the results")
    p.add_argument("--fresh", action="store_true", help="forget the results that are there")
    p.add_argument("--loopback", action="store_true", help="no namespaces: loopback, no root")
    args = p.parse_args(argv)
    if min(args.processes) < 2:
        p.error("--processes: at least 2, or there is no network")
    if min(args.rounds, args.least) < 1:
        p.error("--rounds and --least: at least 1")
    if args.peers and not has_torch():
        p.error("--peers needs PyTorch: pip install torch (a build for CPU is enough)")
    if args.peers and "linear" not in args.workloads:
        p.error("--peers measures the workload `linear` only: add it to --workloads")
    if args.loopback:
        args.rates = ["loopback"]
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    args = parse(argv)
    try:
        if not args.loopback:
            netns.check()
        args.out.mkdir(parents=True, exist_ok=True)
        file = args.out / "results.jsonl"
        if args.fresh:
            file.unlink(missing_ok=True)
        measure(args, file)
    except netns.Unavailable as error:
        print(f"benchmarks.network: {error}; --loopback needs none of it", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks.network: interrupted; what was measured is kept", file=sys.stderr)
        return 130
    print(report.write(file, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
