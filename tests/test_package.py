"""The package: what it asks for is written once, and what is built of it runs by itself."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

import ultramem_jax
from tests.support.imports import imported_packages
from ultramem_jax.commands import COMMANDS

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


CHEX = "chex>=0.1.90,<0.3"
"""In requirements.txt, though only tests import it: whoever installs that file has it."""

IMPORTED_AS = {
    "absl-py": "absl",
    "orbax-checkpoint": "orbax",
    "lm-eval": "lm_eval",
    "pyyaml": "yaml",
    "tensorflow-datasets": "tensorflow_datasets",
}
NOT_IMPORTED = {"array_record", "importlib_resources"}
"""Requirements that only TFDS imports."""


def _listed(name):
    lines = (ROOT / name).read_text().splitlines()
    return sorted(line for line in lines if line and not line.startswith(("#", "-r")))


def test_requirements_are_those_of_the_package_and_its_extras():
    everything = PROJECT["dependencies"] + EXTRAS["tfds"] + EXTRAS["tensorboard"] + EXTRAS["gguf"]
    assert _listed("requirements.txt") == sorted([*everything, CHEX])
    # `-r requirements.txt` brings what the extra `dev` gets from the other extras, and chex.
    runtime = {"ultramem_jax[tfds,tensorboard,gguf]", CHEX}
    assert runtime <= set(EXTRAS["dev"])
    assert "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text().splitlines()
    assert _listed("requirements-dev.txt") == sorted(set(EXTRAS["dev"]) - runtime)
    assert _listed("requirements-docs.txt") == sorted(EXTRAS["docs"])


def test_extras_are_named_as_every_pip_knows_them():
    # A pip before 23.3 compares what is asked for as it is written with the normalised name in the package:
    # it installs nothing for `[lm_eval]`, and says nothing.
    assert all(re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", name) for name in EXTRAS)
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "ultramem_jax").rglob("*.py")]
    text = "".join(file.read_text() for file in files)
    named = ",".join(re.findall(r"""(?:ultramem_jax|["']\.)\[([\w,-]+)\]["']""", text)).split(",")
    assert set(named) == {"tfds", "tensorboard", "gguf", "lm-eval", "tokamax"} <= set(EXTRAS)


def test_the_library_imports_what_it_requires():
    imported = set().union(*map(imported_packages, (ROOT / "ultramem_jax").rglob("*.py")))
    imported -= {*sys.stdlib_module_names, "ultramem_jax", "_typeshed"}  # only mypy reads `_typeshed`
    extras = [EXTRAS[name] for name in ("tfds", "tensorboard", "gguf", "lm-eval")]
    required = sum(extras, PROJECT["dependencies"])
    names = {re.match(r"[\w-]+", line)[0] for line in required} - NOT_IMPORTED
    assert imported == {IMPORTED_AS.get(name, name) for name in names}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel installed in it, and nothing of the repository."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"  # a build leaves files beside what it builds
    shutil.copytree(
        ROOT / "ultramem_jax", source / "ultramem_jax", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", f"--outdir={folder / 'dist'}"]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (wheel,) = (folder / "dist").iterdir()
    site = folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", f"--target={site}"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    return site


def _run(site, folder, *command):
    environment = os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_has_types_and_recipes(installed):
    package = installed / "ultramem_jax"
    assert (package / "py.typed").exists() and (package / "recipes" / "demo.py").exists()
    assert (package / "inspection" / "page" / "page.js").exists()
    assert not (installed / "experiments").exists() and not (installed / "tests").exists()


def test_the_command_says_its_version_and_lists_its_commands(installed, tmp_path):
    done = _run(installed, tmp_path, sys.executable, str(installed / "bin" / "ultramem"), "--version")
    assert re.match(rf"ultramem_jax {re.escape(ultramem_jax.__version__)} \(jax \d", done.stdout), done.stderr
    listed = _run(installed, tmp_path, sys.executable, "-m", "ultramem_jax").stdout
    commands = re.findall(r"^  (\w+) ", listed, re.MULTILINE)
    assert commands == list(COMMANDS) and {"train", "evaluate", "inspect"} < set(commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_only_what_is_installed(installed, tmp_path, command):
    done = _run(installed, tmp_path, sys.executable, "-m", "ultramem_jax", command, "--help")
    assert done.returncode == 0 and f"    ultramem {command} --" in done.stdout, done.stderr
    assert not re.search(r"launch\.py|experiments[/.]|ultramem_jax/", done.stdout)


def test_the_demo_trains_without_the_repository(installed, tmp_path):
    (tmp_path / "text.txt").write_text("the slot of a key is read by a query\n" * 200)
    short = ["--config.train.steps=2", "--config.train.eval_batches=1", "--config.data.seq_len=16"]
    small = ["--config.model.memory.num_keys=32", "--config.model.num_layers=2"]
    data = ["--config.data.dataset=text", "--config.data.path=text.txt", "--config.data.cache_dir=cache"]
    flags = ["--config=demo", "--config.model.memory.placement=1:2", *short, *small, *data]
    done = _run(installed, tmp_path, sys.executable, "-m", "ultramem_jax", "train", *flags)
    assert done.returncode == 0, done.stderr
    assert "ultramem evaluate --workdir=runs/demo" in done.stdout
    assert (tmp_path / "runs" / "demo" / "loss_curve.png").exists()
