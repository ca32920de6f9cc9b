# SPDX-License-Identifier: Apache-2.0
"""The network benchmark: real processes on shaped links, byte counts, and no trace left behind."""

import json
import os
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import distlion_jax as dl
from tests.helpers import benchmark, benchmark_command

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None,
    reason="network namespaces need root and iproute2",
)


def start(folder, *flags):
    command, options = benchmark_command("network.run", "--out", folder, *flags)
    options["env"]["XLA_FLAGS"] = ""
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def rows(folder):
    lines = (folder / "results.jsonl").read_text().splitlines()
    return {(r["rate"], r["method"]): r for r in map(json.loads, lines)}


def links():
    listed = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    names = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    return [line for line in (listed + names).splitlines() if " dl" in f" {line}"]


RATE = {True: ["--rates", "1gbit"], False: []}
SMALL = ["--workloads", "small", "--processes", 2, "--rounds", 3]


@pytest.mark.slow
@needs_root
def test_counts_what_the_ledger_predicts_on_a_slow_link(tmp_path):
    methods = ["--methods", "local", "lion fp32", "majority"]
    process = start(tmp_path, *SMALL, "--rates", "10mbit", *methods)
    text, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "| small | 2 | 10mbit | majority |" in text
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    assert (tmp_path / "bytes.png").stat().st_size > 10_000
    found = rows(tmp_path)
    for method in ("lion fp32", "majority"):
        row = found["10mbit", method]
        assert row["predicted"] < row["received"] < 1.05 * row["predicted"] + 4096
        least = 8 * row["predicted"] / 10e6  # seconds that the link needs
        assert min(row["seconds"]) > 0.6 * least  # the bucket holds some of it
    assert found["10mbit", "local"]["received"] < 4096
    assert not links()

    again = start(tmp_path, *SMALL, "--rates", "10mbit", *methods)  # nothing is left to measure
    assert again.communicate(timeout=60)[0] == text[text.index("| workload |") :]


@pytest.mark.slow
@needs_root
def test_interrupted_it_leaves_nothing_behind(tmp_path):
    # Tests that a shell runs in the background ignore interrupts, and so would what they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(tmp_path, *SMALL, "--rates", "1gbit", "--rounds", 100_000, "--budget", 1000)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 60
    while len(links()) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(links()) >= 4
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; what was measured is kept" in errors
    assert not links()


@pytest.mark.slow
def test_loopback_needs_no_root(tmp_path):
    flags = [*SMALL, "--loopback", "--methods", "local", "majority"]
    process = start(tmp_path, *flags)
    text, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "not counted" in text
    assert set(rows(tmp_path)) == {("loopback", "local"), ("loopback", "majority")}


@pytest.mark.slow
def test_devices_of_a_process_share_its_link(tmp_path):
    """Every one of them exchanges its shards; methods that know none are left out."""
    root = os.geteuid() == 0
    flags = ["--workloads", "sharded", "--processes", 2, "--rounds", 3]
    methods = ["--methods", "lion fp32", "majority", "qsgd"]
    process = start(tmp_path, *flags, *methods, *([] if root else ["--loopback"]), *RATE[root])
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    found = {method: row for (_, method), row in rows(tmp_path).items()}
    assert set(found) == {"lion fp32", "majority"}
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    matrix = jax.ShapeDtypeStruct(
        (1024, 1024), np.float32, sharding=NamedSharding(mesh, P("fsdp", "tensor"))
    )
    device = dl.wire_cost([matrix] * 24, 2, axis_name="data").bytes_received
    assert found["majority"]["predicted"] == 4 * device
    assert found["lion fp32"]["predicted"] == 4 * found["lion fp32"]["parameters"]
    if root:
        for row in found.values():
            assert row["predicted"] < row["received"] < 1.05 * row["predicted"]


@pytest.mark.slow
def test_peers_of_pytorch(tmp_path):
    """DDP sends 32 bits a parameter, its hooks less; needs PyTorch, which .ci/run installs."""
    pytest.importorskip("torch")
    flags = ["--workloads", "linear", "--processes", 2, "--rounds", 3, "--methods", "local"]
    root = os.geteuid() == 0
    process = start(tmp_path, *flags, "--peers", *([] if root else ["--loopback"]), *RATE[root])
    text, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    for method in ("torch local", "torch ddp", "torch ddp fp16", "torch ddp powersgd"):
        assert f"| {method} |" in text
    if root:
        bits = {m: 8 * r["received"] / r["parameters"] for (_, m), r in rows(tmp_path).items()}
        assert 32 < bits["torch ddp"] < 33.6
        assert 16 < bits["torch ddp fp16"] < 16.8
        assert bits["torch ddp powersgd"] < 0.1


def refused(monkeypatch, capsys, *flags, torch=True):
    """What network.run says of a command line that it does not take."""
    network = benchmark("network.run")
    monkeypatch.setattr(network, "has_torch", lambda: torch)
    with pytest.raises(SystemExit, match="2"):
        network.parse(list(flags))
    return capsys.readouterr().err


def test_one_process_is_no_network(monkeypatch, capsys):
    assert "--processes: at least 2" in refused(monkeypatch, capsys, "--processes", "1")


def test_peers_need_pytorch_and_their_workload(monkeypatch, capsys):
    said = refused(monkeypatch, capsys, "--peers", torch=False)
    assert "--peers needs PyTorch: pip install torch" in said
    said = refused(monkeypatch, capsys, "--peers")
    assert "--peers measures the workload `linear` only: add it to --workloads" in said


def test_crossovers_are_found_between_two_rates():
    report = benchmark("report.network")

    def rows(**seconds):
        return {rate: {"seconds": [s]} for rate, s in seconds.items()}

    rates = {"100mbit": 1.0, "10gbit": 1.0}
    assert report.crossover(rows(**rates), rows(**{"100mbit": 2.0, "10gbit": 0.5})) == 1e9
    assert report.crossover(rows(**rates), rows(**{"100mbit": 2.0, "10gbit": 1.5})) is None
    assert report.crossover(rows(**rates), rows(**{"100mbit": 0.2, "10gbit": 0.5})) is None
