# SPDX-License-Identifier: Apache-2.0
"""The network benchmark: real processes on shaped links, byte counts, and no trace left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None,
    reason="network namespaces need root and iproute2",
)


def start(folder, *flags):
    command = [sys.executable, str(BENCHMARKS / "network.py"), "--out", str(folder)]
    return subprocess.Popen(
        [*command, *map(str, flags)],
        env=os.environ | {"XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rows(folder):
    lines = (folder / "results.jsonl").read_text().splitlines()
    return {(r["rate"], r["method"]): r for r in map(json.loads, lines)}


def links():
    listed = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    names = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    return [line for line in (listed + names).splitlines() if " dl" in f" {line}"]


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
    assert again.communicate(timeout=60)[0] == text.split("measured\n")[-1]


@pytest.mark.slow
@needs_root
def test_interrupted_it_leaves_nothing_behind(tmp_path):
    process = start(tmp_path, *SMALL, "--rates", "1gbit", "--rounds", 100_000, "--budget", 1000)
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


def test_one_process_is_no_network(tmp_path):
    process = start(tmp_path, "--processes", 1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "--processes: at least 2" in errors
