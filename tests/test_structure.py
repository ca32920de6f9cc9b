# SPDX-License-Identifier: Apache-2.0
"""How the package is built: imports in one direction, small pieces, documented names."""

import ast
import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import distlion_jax

ROOT = Path(distlion_jax.__file__).parent
PATHS = {  # "lion", "_vote.words", "baselines.__init__"
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
}
MODULES = {name: ast.parse(path.read_text()) for name, path in PATHS.items()}

# A module may import those of its own layer and of the layers before it; a room's name stands for
# all modules in it.
LAYERS = [
    {"_groups", "_promotion", "_rules", "_version", "exchanges", "cluster"},
    {"_vote"},
    {"_batches", "_checks", "_orthogonal", "_rounds", "accumulate", "finite", "hlo", "ledger"}
    | {"matrices"},
    {"forecast", "lion", "muon", "average", "policy", "sync", "train"},
    {"baselines", "resume"},
    {"__init__", "_old_paths"},
]
OPTIMIZERS = {"lion", "muon", "average", "policy", "sync"}
NEVER = [  # and these never meet, whatever their layers
    ({"train"}, {"baselines"}),
    ({"train"}, OPTIMIZERS),
    ({"_vote"}, {"ledger", "hlo", "forecast"}),
    ({"baselines"}, {"train"}),
    (OPTIMIZERS, {"train"}),
    ({"forecast", "ledger", "hlo"}, OPTIMIZERS | {"train"}),
    ({"cluster"}, {"_rules", "exchanges"}),
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
    """Modules of the package that a module imports, by their names in ``MODULES``."""
    found = set()
    for name in imports(tree):
        parts = name.split(".")
        if parts[0] == "distlion_jax":
            inside = [".".join(parts[1:i]) for i in range(len(parts), 1, -1)]
            whole = [x for x in inside if x in MODULES] + [
                f"{x}.__init__" for x in inside if f"{x}.__init__" in MODULES
            ]
            found.add(whole[0] if whole else "__init__")
    return found


def room(module):
    """The folder that a module lies in, or the module itself."""
    return module.split(".")[0]


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


def test_the_layers_name_every_room():
    assert set().union(*LAYERS) | {"reference"} == {room(module) for module in MODULES}
    assert sum(map(len, LAYERS)) == len(set().union(*LAYERS))


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"reference"}))
def test_imports_go_down_the_layers(module):
    (mine,) = (i for i, layer in enumerate(LAYERS) if room(module) in layer)
    allowed = set().union(*LAYERS[: mine + 1])
    assert {room(other) for other in siblings(MODULES[module])} <= allowed


@pytest.mark.parametrize(("one", "other"), NEVER)
def test_rooms_that_never_meet(one, other):
    for module, tree in MODULES.items():
        if room(module) in one:
            assert not {room(x) for x in siblings(tree)} & other, module


def test_no_import_leads_back():
    """Inside a layer and a room, too."""
    seen, path = set(), []

    def visit(module):
        assert module not in path, [*path, module]
        if module not in seen:
            path.append(module)
            for other in sorted(siblings(MODULES[module])):
                visit(other)
            path.pop()
            seen.add(module)

    for module in MODULES:
        visit(module)


def test_importing_the_package_loads_no_baseline():
    program = (
        "import distlion_jax, sys; assert not [m for m in sys.modules if 'baselines' in m]; "
        "assert 'flax' not in sys.modules and 'matplotlib' not in sys.modules; "
        "distlion_jax.baselines.QSGD"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_collectives_stay_in_wire():
    names = {"psum", "pmean", "pmax", "pmin", "all_gather", "all_to_all", "psum_scatter",
             "ppermute", "axis_index", "axis_size", "pcast", "pvary"}  # fmt: skip
    for module, tree in MODULES.items():
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and "lax" in ast.unparse(node.value).split(".")
        }
        assert module == "_vote.wire" or not used & names, module


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
    assert not private or module in ("_vote.wire", "cluster"), private


@pytest.mark.parametrize("module", MODULES)
def test_modules_open_with_a_licence_and_a_docstring(module):
    text = PATHS[module].read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(MODULES[module])


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


PUBLIC = distlion_jax.__all__


def test_init_holds_the_public_names_and_the_version_only():
    body = MODULES["__init__"].body[1:]
    froms = [node for node in body if isinstance(node, ast.ImportFrom) and node.module != "typing"]
    imported = [alias.name for node in froms for alias in node.names]
    assert sorted(imported) == sorted([*PUBLIC, "_old_paths", "__version__"])
    rest = [node for node in body if not isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node).split("(")[0].split(" = ")[0] for node in rest] == [
        "__all__",
        "_old_paths.install",
        "def __getattr__",
    ]
    assert len(set(PUBLIC)) == len(PUBLIC)


def test_a_star_brings_no_module():
    found = {}
    exec("from distlion_jax import *", found)
    assert set(found) - {"__builtins__"} == set(PUBLIC)
    assert not any(inspect.ismodule(x) for name, x in found.items() if name != "__builtins__")


def test_help_shows_every_name_in_a_line():
    written = distlion_jax.__doc__
    for name in PUBLIC:
        assert re.search(rf"\b{name}\b", written), name
    listed = re.findall(r"^    ((?:\w+(?:, )?)+) {2,}\S", written, re.MULTILINE)
    functions = {n for n in PUBLIC if inspect.isfunction(getattr(distlion_jax, n))}
    assert {name for line in listed for name in line.split(", ")} == functions


OLD = {  # where public names were before modules moved
    "audit": "all_same replicas_agree",
    "dense": "AverageGradientsState ScaleByAveragedLionState average_gradients "
    "scale_by_averaged_lion",
    "forecast": "Forecast Link break_even forecast_all_reduce forecast_vote",
    "health": "VoteHealth",
    "ledger": "Collective WireCost compiled_collectives full_precision_cost wire_cost",
    "lion": "ScaleByDistributedLionState distributed_lion scale_by_distributed_lion",
    "mesh": "ReplicatedState init_state local_value_and_grad replicate replicated stack "
    "state_specs unstack worker_mesh",
    "metrics": "Metrics vote_health",
    "policy": "distributed_lion_by_label wire_cost_by_label",
    "rendezvous": "join",
    "rules": "TRANSPORTS",
    "sync": "SynchronizeMomentumState synchronize_momentum",
    "train": "make_pmap_train_step make_train_step pmap_replicate",
}


@pytest.mark.parametrize("module", OLD)
def test_old_import_paths_of_public_names_work(module):
    for name in OLD[module].split():
        found = {}
        exec(f"from distlion_jax.{module} import {name}", found)
        assert found[name] is getattr(distlion_jax, name)
    assert hasattr(distlion_jax, module)


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
