# SPDX-License-Identifier: Apache-2.0
"""The README says what is so: its code runs, its wire table is the ledger's."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import benchmark

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_run():
    scope: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert float(scope["loss"]) == 1.0


@pytest.mark.parametrize("page", ["checkpoints", "sharded", "steps"])
def test_guides_run(page):
    """In a process of their own, as a reader would: they begin with the number of devices."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.S)
    program = "\n".join([*blocks, "assert int(metrics.health[0].voters) in (4, 8)"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wire_table_is_the_ledgers():
    command = [sys.executable, "-m", "benchmarks.compute.wire_table"]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert table.strip() in README


def test_network_tables_are_of_the_results_in_the_repository():
    command = ["-m", "benchmarks.report.network_summary", "benchmarks/results/network.jsonl"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    parts = done.stdout.strip().split("\n\n")
    assert len(parts) == 7, done.stderr
    for part in parts:
        assert part in README


def test_commands_are_complete():
    for name in ("main", "test"):
        (command,) = re.findall(rf"<!-- {name} command -->\n```bash\n(.*?)\n```", README, re.S)
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")


def test_pages_of_results_are_of_the_results_in_the_repository():
    report = benchmark("report.compare")
    pages = {page.parent.name: page for page in (ROOT / "docs").glob("*/results.md")}
    sensitivity = pages.pop("sensitivity")
    assert pages
    for name, page in pages.items():
        rows = report.read(ROOT / f"benchmarks/results/{name}.jsonl")
        assert page.read_text() == report.tables(rows) + "\n"
    report = benchmark("report.sensitivity")
    results = report.Results(ROOT / "benchmarks/results/sensitivity.jsonl")
    assert sensitivity.read_text() == report.tables(results, report.Plan()) + "\n"


def test_tables_of_training_are_of_the_results_in_the_repository(tmp_path):
    readme = benchmark("report.readme")
    ev = readme.Evidence(ROOT / "benchmarks/results")
    for page in readme.pages():
        assert readme.fill(page.read_text(), ev) == page.read_text()
    stale = "<!-- results: NAME -->\nold\n<!-- end of results -->"
    with pytest.raises(readme.UsageError, match="there is no table 'NAME'; known: headline, head"):
        readme.fill(stale, ev)
    with pytest.raises(readme.UsageError, match=r"'rare rows': rare_rows\.json is missing in "):
        readme.fill(stale.replace("NAME", "rare rows"), readme.Evidence(ROOT))
    (tmp_path / "compare.jsonl").touch()
    with pytest.raises(readme.UsageError, match=r"'compare': a run of compare\.jsonl is missing"):
        readme.fill(stale.replace("NAME", "compare"), readme.Evidence(tmp_path))
