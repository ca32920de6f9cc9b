# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, small: their figures mean nothing here."""

import json
import subprocess

import pytest

from tests.helpers import benchmark_command

SMALL = {
    "update": ["--millions", 1.1, "--rounds", 2],
    "codec": ["--millions", 1.1, "--counting-millions", 0.1, "--rounds", 2],
    "memory": ["--millions", 2.1],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_runs_and_writes_its_figures(tmp_path, name):
    out = tmp_path / "figures.json"
    command, options = benchmark_command(f"compute.{name}", *SMALL[name], "--out", out)
    done = subprocess.run(command, capture_output=True, **options)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert figures["results"]
    assert "jax" in figures["machine"]
    if name == "codec":
        stages = figures["results"]["stages"]
        assert {"copy", "cast", "count, n=8", "apply", "momentum", "exchange"} < set(stages)
        assert all(stage["ms"] > 0 for stage in stages.values())
