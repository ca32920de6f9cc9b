# SPDX-License-Identifier: Apache-2.0
"""Steps per second and bytes of real processes over real links of several speeds.

    sudo python benchmarks/network.py                       # about 20 minutes
    sudo python benchmarks/network.py --workloads exchange --processes 2 --rates 100mbit
    python benchmarks/network.py --loopback                 # no root: one fast link, no byte counts

Every process has a network namespace of its own, whose link to a bridge is shaped by tc's tbf.
Within a round the methods take a step each, so that they are compared on the same machine at the
same time; bytes are the interface's own counters, TCP's overhead included. Workloads: `exchange`
(25.2 M parameters, update and exchange alone), `small` and `large` (the gradient of a transformer
of 0.4 M and 25.3 M parameters, 4 x 64 characters a worker, and the update).

Results are kept (one JSON line a cell) and not measured again; --fresh forgets them.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import netns
import network_report
import timing
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
RATES = {"unshaped": None, "10gbit": "10gbit", "1gbit": "1gbit", "100mbit": "100mbit",
         "10mbit": "10mbit"}  # fmt: skip
METHODS = ("local", "lion fp32", "lion bf16", "majority", "majority, coin",
           "majority, all_gather", "average")  # fmt: skip
WORKLOADS = ("exchange", "small", "large")
PORT = 7777  # nobody else is in the namespace


def run(hosts: list[netns.Host] | None, task: dict[str, Any], limit: float) -> list[Any]:
    """The rows of every process; raises if one fails or they take too long."""
    n = task["processes"]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.json" for i in range(n)]
        running = []
        for i, file in enumerate(files):
            mine = json.dumps(task | {"process": i, "out": str(file)})
            command = [sys.executable, str(HERE / "network_worker.py"), mine]
            command = hosts[i].command(*command) if hosts else command
            log = open(file.with_suffix(".log"), "w")  # noqa: SIM115 (closed with the process)
            running.append((subprocess.Popen(command, stdout=log, stderr=log), log))
        try:
            for process, _ in running:
                process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{task['workload']}, {n} processes: over {limit:g} s") from None
        finally:
            for process, log in running:
                process.kill()
                process.wait()
                log.close()
        if any(process.returncode for process, _ in running):
            texts = [file.with_suffix(".log").read_text()[-1500:] for file in files]
            raise RuntimeError("a process failed\n" + "\n---\n".join(texts))
        return [json.loads(file.read_text()) for file in files]


def merge(cell: dict[str, Any], rows: list[Any]) -> list[dict[str, Any]]:
    """One result a method: seconds of the slowest process in each round, bytes of the mean one."""
    out = []
    for same in zip(*rows, strict=True):
        seconds = [max(t) for t in zip(*(row["seconds"] for row in same), strict=True)]
        mean = {
            way: sum(sum(row[way]) for row in same) / len(same) / len(seconds)
            for way in ("received", "sent")
        }
        keep = {k: same[0][k] for k in ("method", "transport", "predicted", "parameters")}
        out.append(cell | keep | mean | {"seconds": seconds, "machine": timing.machine()})
    return out


def measure(args: argparse.Namespace, file: Path) -> None:
    """Fills the file with the cells that it lacks."""
    known = network_report.read(file)
    have = {(r["workload"], r["processes"], r["rate"], r["method"]) for r in known}
    cells = list(itertools.product(args.workloads, args.processes, args.rates))
    for workload, n, rate in tqdm(cells, unit="cell", disable=not sys.stderr.isatty()):
        methods = [m for m in args.methods if (workload, n, rate, m) not in have]
        if not methods:
            continue
        task = {
            "workload": workload,
            "processes": n,
            "methods": methods,
            "rounds": args.rounds,
            "budget": args.budget,
            "interface": "lo" if args.loopback else netns.INTERFACE,
        }
        cell = {"workload": workload, "processes": n, "rate": rate}
        limit = 600 + 4 * args.budget
        if args.loopback:
            rows = run(None, task | {"coordinator": f"127.0.0.1:{PORT}"}, limit)
        else:
            with netns.network(n, RATES[rate]) as hosts:
                coordinator = f"{hosts[0].address}:{PORT}"
                rows = run(hosts, task | {"coordinator": coordinator}, limit)
        with open(file, "a") as out:
            for row in merge(cell, rows):
                row |= {"received": None, "sent": None} if args.loopback else {}
                out.write(json.dumps(row) + "\n")
        tqdm.write(f"{workload}, {n} processes, {rate}: {len(methods)} methods measured")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],  # type: ignore[union-attr]
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["exchange", "small"])
    p.add_argument("--processes", nargs="+", type=int, default=[2, 4], metavar="N")
    p.add_argument("--rates", nargs="+", choices=RATES, default=["unshaped", "1gbit", "100mbit"])
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    p.add_argument("--rounds", type=int, default=10, help="timed rounds of a cell")
    p.add_argument("--budget", type=float, default=90, help="seconds of a cell, after 3 rounds")
    p.add_argument("--out", type=Path, default=Path("runs/network"), help="folder of the results")
    p.add_argument("--fresh", action="store_true", help="forget the results that are there")
    p.add_argument("--loopback", action="store_true", help="no namespaces: loopback, no root")
    args = p.parse_args(argv)
    if min(args.processes) < 2:
        p.error("--processes: at least 2, or there is no network")
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
        print(f"network.py: {error}; --loopback needs none of it", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("network.py: interrupted; what was measured is kept", file=sys.stderr)
        return 130
    print(network_report.write(file, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
