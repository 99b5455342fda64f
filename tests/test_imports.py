"""Imports run one way, only the registry resolves kinds of memories, and counting needs no JAX."""

import ast
import pathlib
import subprocess
import sys

import pytest

from tests.conftest import FLAGS_OF_IMPORTS
from tests.support.imports import import_statements, imported_packages
from ultramem_jax.config.memory_kinds import ADDRESSERS, READOUTS

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "ultramem_jax"
MEMORY = PACKAGE / "layers" / "memory"


def _imports(path):
    """Modules that a file imports; a name that is taken from a module may be one."""
    for module, names in import_statements(path):
        yield module
        yield from (f"{module}.{name}" for name in names)


FLOORS = (
    # A module imports from floors below its own, and from its own room.
    (
        "ultramem_jax.errors",
        "ultramem_jax.files",
        "ultramem_jax.memory_spaces",
        "ultramem_jax.nested",
        "ultramem_jax.platforms",
        "ultramem_jax.tree_types",
    ),
    ("ultramem_jax.gguf_files", "ultramem_jax.registry"),
    ("ultramem_jax.config",),
    ("ultramem_jax",),
    ("ultramem_jax.accounting", "ultramem_jax.kernels", "ultramem_jax.presets"),
    ("ultramem_jax.ops",),
    ("ultramem_jax.baselines", "ultramem_jax.layers", "ultramem_jax.parallel", "ultramem_jax.recipes"),
    ("ultramem_jax.cli", "ultramem_jax.data"),
    ("ultramem_jax.models", "ultramem_jax.reporting"),
    ("ultramem_jax.interop",),
    ("ultramem_jax.training",),
    ("ultramem_jax.inspection",),
    ("ultramem_jax.planning",),
    ("ultramem_jax.accelerator",),
    ("ultramem_jax.commands",),
    ("ultramem_jax.__main__", "experiments", "experiments.configs"),
    ("experiments.common",),
    tuple(
        f"experiments.{name}"
        for name in (
            "ablate",
            "bench_decode",
            "bench_owner",
            "bench_step",
            "bench_train",
            "compare",
            "forgetting",
            "large_table",
            "open_models",
            "recall",
            "row_states",
        )
    ),
    ("launch",),
)
HEIGHT = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def _module(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module):
    """The longest name in `FLOORS` that a module is, or lies in."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in names if name in HEIGHT), None)


MODULES = {_module(path): path for top in (PACKAGE, ROOT / "experiments") for path in top.rglob("*.py")}
MODULES["launch"] = ROOT / "launch.py"


def test_every_module_lies_in_a_room():
    own = {"ultramem_jax", "experiments"}
    lost = [module for module in MODULES if module not in own and _room(module) in own]
    assert not lost


def test_no_import_runs_upward():
    upward = []
    for module, path in MODULES.items():
        own = _room(module)
        for imported in set(_imports(path)) & MODULES.keys():
            room = _room(imported)
            if room != own and HEIGHT[room] >= HEIGHT[own]:
                upward.append(f"{module} imports {imported}")
    assert not upward


def test_the_library_imports_nothing_else_of_the_repository():
    """The library runs without the rest, so no name at the root but its own is imported: known or unknown."""
    others = {path.stem for path in ROOT.iterdir()} - {"ultramem_jax"}
    found = []
    for module, path in MODULES.items():
        if module.partition(".")[0] == "ultramem_jax":
            tops = imported_packages(path) & (others | {"launch"})
            found += [f"{module} imports {top}" for top in sorted(tops)]
    assert {"tests", "experiments", "launch"} <= others
    assert not found


def test_imports_of_the_library_and_experiments_exist():
    own = ("ultramem_jax", "experiments", "launch")
    # Folders of experiments are packages without an `__init__.py`.
    known = MODULES.keys() | {module.rpartition(".")[0] for module in MODULES}
    lost = []
    for module, path in MODULES.items():
        names = [name for name, _ in import_statements(path) if name.partition(".")[0] in own]
        lost += [f"{module} imports {name}" for name in names if name not in known]
    assert not lost


def test_tests_import_nothing_that_defines_flags(request):
    """A process has one set of flags: two programs define `--workdir`, and tests are imported together."""
    assert request.config.stash[FLAGS_OF_IMPORTS] == []


def _of_kinds():
    """Modules of the kinds: those in the registries, and those that only they import."""
    modules = {*ADDRESSERS._modules.values(), *READOUTS._modules.values()}
    shared = ("addresser", "memory", "table", "__init__")
    return modules | {
        f"ultramem_jax.layers.memory.{p.stem}" for p in MEMORY.glob("*.py") if p.stem not in shared
    }


KINDS = _of_kinds()
OTHERS = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if f"ultramem_jax.layers.memory.{path.stem}" not in KINDS or path.parent != MEMORY
)
ALLOWED = {
    # The authors' state dicts are those of product keys.
    "interop/hyper.py": {"ultramem_jax.layers.memory.product_keys"},
}


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nobody_imports_a_kind_of_memory(path):
    found = {module for module in _imports(path) if module in KINDS}
    assert found <= ALLOWED.get(str(path.relative_to(PACKAGE)), set())


CONFIGS = ("data", "mesh", "model", "run", "train", "trees", "exchange_shapes")
ASKING = (
    *("accounting", "baselines", "parallel", "models", "planning", "training", "inspection"),
    *(f"config/{name}.py" for name in CONFIGS),
    "layers/memory/memory.py",
)


@pytest.mark.parametrize("name", ASKING)
def test_nobody_names_a_field_of_a_kind(name):
    """No attribute of an address or a readout is read but those of the contract."""
    own = set()
    for registry in (ADDRESSERS, READOUTS):
        for kind in registry.kinds():
            cls = registry[kind]
            base = cls.__mro__[1]
            own |= {field for field in cls.__dataclass_fields__ if not hasattr(base, field)} - {"kind"}
    # Names that other things have, too.
    own -= {"seed", "num_heads", "pad_id", "init"}
    paths = [PACKAGE / name] if name.endswith(".py") else sorted((PACKAGE / name).rglob("*.py"))
    for path in paths:
        read = {
            node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
        }
        assert not read & own, path


def test_counting_a_model_of_every_kind_needs_no_jax():
    code = """
import sys
from ultramem_jax.accounting import count_parameters, flops_per_token
from ultramem_jax.presets import PRESETS
for model in PRESETS.values():
    count_parameters(model), flops_per_token(model)
sys.exit("jax" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
