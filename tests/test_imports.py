"""Who imports whom: kinds of memories are resolved by the registry alone, and counting needs no JAX."""

import ast
import pathlib
import subprocess
import sys

import pytest

from ultramem_jax.memory_kinds import ADDRESSERS, READOUTS

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "ultramem_jax"
MEMORY = PACKAGE / "layers" / "memory"


def _imports(path):
    """Modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


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


FOLDERS = ("accounting", "parallel", "models", "training")
FILES = (
    "config",
    "exchange_shapes",
    "step_costs",
    "rivals",
    "matching",
    "allocation",
    "layers/memory/memory",
)
ASKING = (*FOLDERS, "layers/memory/memory.py", *(f"{name}.py" for name in FILES))


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
