# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, small: their figures mean nothing here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "update.py": ["--millions", 1.1, "--rounds", 2],
    "codec.py": ["--millions", 1.1, "--counting-millions", 0.1, "--rounds", 2],
    "memory.py": ["--millions", 2.1],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_runs_and_writes_its_figures(tmp_path, name):
    out = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, SMALL[name])]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert figures["results"]
    assert "jax" in figures["machine"]
    if name == "codec.py":
        stages = figures["results"]["stages"]
        assert {"copy", "cast", "count, n=8", "apply", "momentum", "exchange"} < set(stages)
        assert all(stage["ms"] > 0 for stage in stages.values())
