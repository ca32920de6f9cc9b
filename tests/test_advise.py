# SPDX-License-Identifier: Apache-2.0
"""The adviser: what it says of a slow and of a fast cluster, and of words it cannot read."""

import subprocess

import pytest

from tests.helpers import benchmark_command

SLOW = ["--parameters", "350m", "--workers", "32", "--bandwidth", "1gbit", "--step-time", "0.4s"]
FAST = ["--parameters", "7b", "--workers", "64", "--per-node", "8", "--bandwidth", "400 Gbit/s",
        "--latency", "10us", "--tokens", "8192"]  # fmt: skip


def advise(*flags, code=0):
    command, options = benchmark_command("network.advise", *flags)
    done = subprocess.run(command, capture_output=True, **options)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def test_worth_it_on_a_slow_link(tmp_path):
    said = advise(*SLOW, "--plot", tmp_path / "new" / "advice.png")
    assert "350 M parameters, 32 workers, 1 on a link of 1 Gbit/s" in said
    assert "| majority, coin ties (two_phase) | 85.5 MB | 684 ms | - | 1.09 s | 10.11 |" in said
    assert "Worth it: 10.11 times" in said
    assert "ahead up to 37.7 Gbit/s" in said
    assert (tmp_path / "new" / "advice.png").stat().st_size > 10_000


def test_not_worth_it_on_a_fast_one():
    said = advise(*FAST)
    assert "Not worth it here: 0.81 times the steps per second, that is fewer." in said
    assert "84.0 GB a worker" in said


def test_orthogonalising_is_arithmetic():
    """30 operations a parameter and side; no byte."""
    said = advise(*SLOW, "--width", 1024, "--flops", "100t")
    assert "| D-Muon majority, coin ties (two_phase) | 85.5 MB | 684 ms | - | 1.19 s |" in said
    assert "Orthogonalising takes 108 ms a step, 27% of the rest" in said


def test_survey():
    said = advise("--survey")
    rows = [line.split("|") for line in said.splitlines() if line.startswith("| ")]
    assert len(rows) == 5
    assert {len(row) for row in rows} == {17}
    assert "no (" in rows[1][4]  # 400 Gbit/s
    assert float(rows[4][-2]) > 10  # 70 B parameters, 1 Gbit/s, 4096 workers


def without(name):
    i = SLOW.index(name)
    return [*SLOW[:i], *SLOW[i + 2 :]]


CASES = {
    "--bandwidth is needed (or --survey)": without("--bandwidth"),
    "either --step-time, which is better, or --tokens is needed": without("--step-time"),
    "--workers: at least 2, or nothing is exchanged": [*SLOW, "--workers", 1],
    "--per-node 5 does not divide --workers 32": [*SLOW, "--per-node", 5],
    "'fast' is not a bandwidth, as 100mbit or 25gbit": [*SLOW, "--bandwidth", "fast"],
    "'0gbit' is not a bandwidth": [*SLOW, "--bandwidth", "0gbit"],
    "'1gbyte' is not a bandwidth": [*SLOW, "--bandwidth", "1gbyte"],
    "'5 minutes' is not a time, as 50us, 3ms or 0.4s": [*SLOW, "--latency", "5 minutes"],
    "'10' is not a time, as 50us": [*SLOW, "--latency", "10"],
    "'0.5' is not a number of at least 1": [*SLOW, "--parameters", "0.5"],
    "--per-node: all workers on one node": [*SLOW, "--per-node", 32],
    "--plot x.txt: a file whose name ends in .png": [*SLOW, "--plot", "x.txt"],
    "--survey has clusters of its own: leave out --workers": ["--survey", "--workers", 8],
    "'-7b' is not a number of at least 1": [*SLOW, "--parameters=-7b"],
    "'1.5' is not in [0, 1]": [*SLOW, "--overlap", "1.5"],
    "'0' is not a positive whole number": [*SLOW, "--workers", "0"],
}


@pytest.mark.parametrize("message", CASES)
def test_what_it_cannot_read(message):
    assert message in advise(*CASES[message], code=2)
