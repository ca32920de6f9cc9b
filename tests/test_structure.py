# SPDX-License-Identifier: Apache-2.0
"""How the package is built: imports in one direction, small pieces, documented names."""

import ast
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import distlion_jax

ROOT = Path(distlion_jax.__file__).parent
PATHS = {  # "lion", "baselines.qsgd", "baselines.__init__"
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
}
MODULES = {name: ast.parse(path.read_text()) for name, path in PATHS.items()}

# Each may import those before it.
ORDER = [
    "rules",
    "words",
    "ballot",
    "wire",
    "tally",
    "ledger",
    "forecast",
    "vote",
    "health",
    "checks",
    "noise",
    "lion",
    "dense",
    "policy",
    "sync",
    "baselines.compress",
    "baselines.ef_sign",
    "baselines.power_sgd",
    "baselines.qsgd",
    "baselines.signs",
    "baselines.terngrad",
    "baselines.top_k",
    "baselines.__init__",
    "step_checks",
    "mesh",
    "metrics",
    "audit",
    "train",
    "rendezvous",
    "__init__",
]
OUTSIDE = {"jax", "jaxlib", "numpy", "optax"}


def imports(tree):
    """Dotted names of everything a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def siblings(tree):
    """Modules of the package that a module imports."""
    ours = [name.split(".")[1:] for name in imports(tree) if name.split(".")[0] == "distlion_jax"]
    inside = [name[:2] if name[:1] == ["baselines"] else name[:1] for name in ours]
    return {".".join(name) or "__init__" for name in inside}


def code_lines(source, node):
    """Lines of a function; its docstring, blank lines and inner functions are taken off.

    Inner functions are counted by themselves: Optax's factories are made of two.
    """
    inner = [x for x in ast.walk(node) if isinstance(x, ast.FunctionDef) and x is not node]
    if ast.get_docstring(node, clean=False) is not None:
        inner.append(node.body[0])
    apart = {i for x in inner for i in range(x.lineno, x.end_lineno + 1)}
    lines = range(node.lineno, node.end_lineno + 1)
    return sum(1 for i in lines if i not in apart and source[i - 1].strip())


def test_the_order_names_every_module():
    assert set(ORDER) | {"reference"} == set(MODULES)


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_in_one_direction(module):
    above = set(ORDER[: ORDER.index(module)])
    assert siblings(MODULES[module]) <= above


def test_reference_shares_no_code_with_the_package():
    assert siblings(MODULES["reference"]) == set()
    assert {name.split(".")[0] for name in imports(MODULES["reference"])} <= {
        "numpy",
        *sys.stdlib_module_names,
    }
    assert not any("reference" in siblings(tree) for tree in MODULES.values())


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_declared_dependencies(module):
    roots = {name.split(".")[0] for name in imports(MODULES[module])}
    assert roots <= OUTSIDE | {"distlion_jax"} | sys.stdlib_module_names


@pytest.mark.parametrize("module", MODULES)
def test_private_names_of_dependencies_stay_in_wire(module):
    private = [
        name
        for name in imports(MODULES[module])
        if name.split(".")[0] in OUTSIDE and any(part.startswith("_") for part in name.split("."))
    ]
    assert not private or module == "wire", private


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_small_and_open_with_a_licence_and_a_docstring(module):
    text = PATHS[module].read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(MODULES[module])
    assert len(text.splitlines()) <= 300


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module):
    source = PATHS[module].read_text().splitlines()
    sizes = {
        node.name: code_lines(source, node)
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: size for name, size in sizes.items() if size > 50} == {}


def test_import_starts_no_backend():
    """The number of CPU devices can be chosen only before a backend starts, hence any array."""
    modules = ", ".join(f"distlion_jax.{m}" for m in MODULES if "__init__" not in m)
    program = (
        f"import distlion_jax, {modules}\n"
        "import jax\n"
        "jax.config.update('jax_platforms', 'cpu')\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "print(jax.device_count())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3"]


PUBLIC = [
    alias.asname
    for node in MODULES["__init__"].body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
]


def test_init_holds_the_public_names_and_the_version_only():
    for node in MODULES["__init__"].body[1:]:
        if isinstance(node, ast.ImportFrom):
            assert [alias.name for alias in node.names] == [alias.asname for alias in node.names]
        else:
            assert ast.unparse(node.targets[0]) == "__version__"
    assert len(set(PUBLIC)) == len(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    value = getattr(distlion_jax, name)
    if isinstance(value, tuple):
        assert all(isinstance(choice, str) for choice in value)  # a constant has no docstring
        return
    assert not name.startswith("_")
    written = value.__doc__ or ""
    # A NamedTuple without one is given "Name(field, ...)".
    assert written
    assert not written.startswith(f"{name}(")


@pytest.mark.parametrize(
    "name", [n for n in PUBLIC if inspect.isfunction(getattr(distlion_jax, n))]
)
def test_public_functions_show_an_example(name):
    written = inspect.getdoc(getattr(distlion_jax, name))
    assert "Examples:" in written
    assert ">>> " in written


def test_version_is_the_installed_one():
    assert distlion_jax.__version__ == importlib.metadata.version("distlion_jax")
