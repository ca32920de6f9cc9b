# SPDX-License-Identifier: Apache-2.0
"""How the benchmarks and examples are built: wings, commands, pages that load no trainer."""

import ast
import subprocess
import sys

import pytest

from tests.helpers import BENCHMARKS, benchmark, benchmark_command
from tests.test_structure import imports

EXAMPLES = BENCHMARKS.parent / "examples"
MODULES = {
    ".".join(path.relative_to(BENCHMARKS).with_suffix("").parts): ast.parse(path.read_text())
    for path in sorted(BENCHMARKS.rglob("*.py"))
}
# What each wing may import of the others.
WINGS = {
    "cli": set(),
    "rows": {"cli"},
    "tasks": {"cli"},
    "report": {"cli", "rows", "network.methods"},
    "compute": {"cli", "report", "tasks"},
    "network": {"cli", "compute.timing", "report", "tasks"},
    "quality": {"cli", "report", "rows", "tasks"},
    "demo": {"cli", "tasks"},
}
TRAINERS = {"jax", "jaxlib", "flax", "optax", "distlion_jax"}
COMMANDS = [
    name
    for name, tree in MODULES.items()
    if any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)
]
WORKERS = ["network.torch_worker", "network.worker"]  # they are started by network.run


def within(tree):
    """Modules of the benchmarks that a module imports."""
    names = [n.split(".")[1:] for n in imports(tree) if n.split(".")[0] == "benchmarks"]
    for parts in names:
        whole = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
        yield next((n for n in whole if n in MODULES), whole[-1])


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])
def test_wings_import_in_one_direction(module):
    wing = module.split(".")[0]
    for other in within(MODULES[module]):
        allowed = other in WINGS[wing] or other.split(".")[0] in WINGS[wing] | {wing}
        assert allowed, f"{module} imports {other}"


@pytest.mark.parametrize("module", ["rows", "cli"])
def test_rows_need_the_standard_library_only(module):
    for node in MODULES[module].body:  # a progress bar is loaded where one is drawn
        roots = {name.split(".")[0] for name in imports(ast.Module([node], []))}
        if not isinstance(node, ast.FunctionDef):
            assert roots <= {"benchmarks"} | sys.stdlib_module_names


def test_no_page_or_table_loads_a_trainer():
    """A picture does not either, and only a picture loads matplotlib."""
    names = [name for name in MODULES if name.startswith("report.") and "__init__" not in name]
    program = (
        f"import sys, {', '.join(f'benchmarks.{name}' for name in names)}\n"
        "from benchmarks.report import claims, readme\n"
        "ev = claims.Evidence(claims.ROOT / 'benchmarks/results')\n"
        "assert '| Lion |' in readme.fill((claims.ROOT / 'README.md').read_text(), ev)\n"
        "assert 'D-Lion' in claims.page(ev)\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    _, options = benchmark_command("report.claims")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, **options)
    assert done.returncode == 0, done.stderr
    assert not {*TRAINERS, "matplotlib", "tqdm"} & set(done.stdout.split())


def test_methods_are_those_that_the_tables_know_in_their_order():
    assert list(benchmark("quality.methods").METHODS) == list(benchmark("rows").GROUPS)
    assert list(benchmark("quality.methods").LION) != []
    assert set(benchmark("quality.methods").LION) == set(benchmark("report.sensitivity").FAMILY)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(COMMANDS) - set(WORKERS)))
def test_every_command_has_help(name):
    command, options = benchmark_command(name, "--help")
    done = subprocess.run(command, capture_output=True, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert "--help" in done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_single_short_files(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 120
    neighbours = {other.stem for other in EXAMPLES.glob("*.py")}
    assert not {name.split(".")[0] for name in imports(ast.parse(text))} & neighbours
