"""The library is built once. Whatever is missing or goes wrong, JAX computes instead, and a line says why."""

import logging
import os
import shutil
import stat
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from ultramem_jax.kernels import build, native, self_check
from ultramem_jax.kernels.build import BuildError

COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
TURNED_OFF = os.environ.get(native.VARIABLE) == "0"
needs_compiler = pytest.mark.skipif(not native.status().on, reason=str(native.status()))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ULTRAMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(native.VARIABLE, raising=False)
    monkeypatch.setattr(native, "register", lambda library: None)  # this process has done that
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def a_build(monkeypatch):
    """Stands for the build, which takes seconds."""
    monkeypatch.setattr(build, "_build", lambda compiler, library: library.write_bytes(b"library"))


def _compiler(tmp_path, monkeypatch, script):
    path = tmp_path / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("CXX", str(path))


@pytest.mark.skipif(TURNED_OFF or not COMPILER, reason="no C++ compiler, or kernels are turned off")
def test_with_a_compiler_there_are_kernels():
    assert native.status().on, native.status()


@needs_compiler
def test_two_processes_build_one_library(cache):
    command = [sys.executable, "-c", "from ultramem_jax.kernels import build; print(build.built_library())"]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert found[0] == found[1] == f"{build.built_library()}\n"
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".so"]


@needs_compiler
def test_a_library_is_for_one_cpu_one_compiler_and_its_sources(cache, a_build, monkeypatch):
    libraries = [build.built_library()]
    assert build.built_library() == libraries[0]
    for name, value in {
        "_cpu": lambda: "another",
        "_FLAGS": ("-O1",),
        "machine_flags": lambda: ["-march=x"],
    }.items():
        monkeypatch.setattr(build, name, value)
        libraries.append(build.built_library())
    monkeypatch.setattr(build, "compiler_version", lambda compiler: "another")
    libraries.append(build.built_library())
    monkeypatch.setattr(build.importlib.metadata, "version", lambda package: "0.0")
    libraries.append(build.built_library())
    assert len(set(libraries)) == 6


@needs_compiler
def test_a_build_that_fails_leaves_nothing_and_says_why(cache, tmp_path, monkeypatch):
    _compiler(
        tmp_path, monkeypatch, '[ "$1" = --version ] && echo 1.0 && exit; echo "a.cc: error: no" >&2; exit 1'
    )
    with pytest.raises(BuildError, match=r"^compiler failed: a.cc: error: no$"):
        build.built_library()
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert native._found() == native.Status(False, "compiler failed: a.cc: error: no")


def test_without_a_compiler_jax_computes(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert native._found() == native.Status(False, "no C++ compiler (c++, g++, clang++)")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native._found() == native.Status(False, "no C++ compiler (no-such-compiler)")


def test_a_variable_turns_kernels_off(monkeypatch):
    monkeypatch.setenv("ULTRAMEM_NATIVE", "0")
    assert str(native._found()) == "JAX, without native kernels (ULTRAMEM_NATIVE=0)"


def test_kernels_are_for_the_cpu(monkeypatch):
    monkeypatch.setattr(native.jax, "default_backend", lambda: "gpu")
    assert native._found() == native.Status(False, "the backend is gpu")


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ULTRAMEM_CACHE", str(tmp_path / "file"))
    assert native._found() == native.Status(False, f"Not a directory: {tmp_path / 'file' / 'kernels'}")


@needs_compiler
def test_a_library_that_cannot_be_loaded_is_not_used(a_build, monkeypatch):
    monkeypatch.undo()  # `register` is the real one; the cache and the build are set again
    monkeypatch.setattr(build, "built_library", lambda: ROOT / "README.md")
    assert native._found().about.startswith("the library cannot be used: ")


@needs_compiler
def test_a_library_with_wrong_results_is_not_used_and_checked_again(cache, a_build, monkeypatch):
    monkeypatch.setattr(native, "instruction_set", lambda library: "AVX")
    answers = [["keys", "rows"], []]
    monkeypatch.setattr(self_check, "wrong_kernels", lambda: answers.pop(0))
    assert native._found() == native.Status(False, "wrong results of keys, rows")
    assert native._found().on
    assert native._found().on  # what has passed once is not checked again
    assert not answers


def test_self_check_finds_what_is_wrong(monkeypatch):
    if not native.status().on:
        pytest.skip(str(native.status()))
    assert self_check.wrong_kernels() == []
    monkeypatch.setattr(self_check.calls, "pool", lambda table, *_, expansion: table)
    assert self_check.wrong_kernels() == ["rows"]


def test_the_log_says_once_which_way_computes(monkeypatch, caplog):
    monkeypatch.setenv("ULTRAMEM_NATIVE", "0")
    with caplog.at_level(logging.INFO):
        native._status.__wrapped__()
    assert [r.getMessage() for r in caplog.records if r.name.startswith("ultramem_jax")] == [
        "memory layers: JAX, without native kernels (ULTRAMEM_NATIVE=0)"
    ]


def test_no_compiler_is_needed_where_kernels_are_off():
    code = "from ultramem_jax.kernels import native; import sys; sys.exit(native.status().on)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PATH": ""}, check=False)
    assert done.returncode == 0
