"""The library is built once. Whatever is missing or goes wrong, JAX computes instead, and a line says why."""

import logging
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import pytest

from tests.support.paths import ROOT
from ultramem_jax.kernels import build, compiler, native, self_check
from ultramem_jax.kernels.compiler import BuildError

COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
TURNED_OFF = os.environ.get(native.VARIABLE) == "0"
needs_compiler = pytest.mark.skipif(not native.status().on, reason=str(native.status()))
SAYS_VERSION = '[ "$1" = --version ] && echo 1.0 && exit'
MAKES_EMPTY_FILES = 'for last; do :; done; : > "$last"'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ULTRAMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(native.VARIABLE, raising=False)
    monkeypatch.setattr(native, "register", lambda library: None)  # this process has done that
    monkeypatch.setattr(native, "instruction_set", lambda library: "AVX")
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def checks(monkeypatch):
    """Stands for the check, which takes seconds; every one adds the bytes of its library."""
    seen = []
    monkeypatch.setattr(build, "_check", lambda library, programs: seen.append(library.read_bytes()))
    return seen


def _compiler(folder, monkeypatch, *script):
    """Makes a program the compiler that runs these lines."""
    path = folder / "compiler"
    path.write_text("\n".join(("#!/bin/sh", *script)) + "\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("CXX", str(path))


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Stands for the compiler, which takes seconds."""
    _compiler(tmp_path, monkeypatch, SAYS_VERSION, MAKES_EMPTY_FILES, 'echo library > "$last"')


def _names(cache):
    return sorted(path.suffix or path.name for path in cache.iterdir())


@pytest.mark.skipif(TURNED_OFF or not COMPILER, reason="no C++ compiler, or kernels are turned off")
def test_with_a_compiler_there_are_kernels():
    assert native.status().on, native.status()


@needs_compiler
def test_processes_build_one_library_and_mend_it(cache):
    code = "from ultramem_jax.kernels import build, native; print(build.built_library(), native.status().on)"

    def start():
        return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)

    both = [start(), start()]
    found = [process.communicate()[0] for process in both]
    library = build.built_library()
    assert found == [f"{library} True\n"] * 2
    assert _names(cache) == [".passed", ".so", "lock"]
    whole = library.read_bytes()
    library.write_bytes(whole[:5000])  # to load it would end the process
    assert start().communicate()[0] == f"{library} True\n"
    assert library.read_bytes()[:5000] == whole[:5000] and library.stat().st_size == len(whole)


def test_a_library_is_for_one_cpu_one_compiler_and_its_sources(quick, checks, monkeypatch):
    libraries = [build.built_library()]
    assert build.built_library() == libraries[0]
    for name, value in {
        "_cpu": lambda: "another",
        "_FLAGS": ("-O1",),
        "machine_flags": lambda: ["-march=x"],
        "compiler_version": lambda compiler: "another",
    }.items():
        monkeypatch.setattr(build, name, value)
        libraries.append(build.built_library())
    monkeypatch.setenv("CXX", f"{os.environ['CXX']} -m32")
    libraries.append(build.built_library())
    monkeypatch.setattr(build.importlib.metadata, "version", lambda package: "0.0")
    libraries.append(build.built_library())
    assert len(set(libraries)) == len(checks) == 7


@pytest.mark.parametrize("damage", [b"", b"libr", b"another\n", None])
def test_a_library_that_is_not_what_passed_is_built_again(quick, checks, damage):
    library = build.built_library()
    assert build.built_library() == library and checks == [b"library\n"]
    if damage is None:
        library.with_suffix(".passed").unlink()
    else:
        library.write_bytes(damage)
    assert build.built_library() == library
    assert library.read_bytes() == b"library\n" and checks == [b"library\n"] * 2


def test_a_build_removes_what_others_have_left(cache, quick, checks):
    library = build.built_library()
    for name in ("old", "recent"):
        (cache / f"build-{name}").mkdir()
        (cache / f"build-{name}" / "grid.o").touch()
        (cache / f"{name}.so").touch()
        (cache / f"{name}.passed").touch()
    os.utime(cache / "build-old", (0, 0))
    os.utime(cache / "old.so", (0, 0))
    library.unlink()
    assert build.built_library() == library
    left = {path.name for path in cache.iterdir()} - {"lock", library.name, f"{library.stem}.passed"}
    assert left == {"build-recent", "recent.so", "recent.passed"}  # another machine may be at work in it


def test_a_build_that_fails_leaves_nothing_and_says_why(cache, tmp_path, monkeypatch):
    _compiler(tmp_path, monkeypatch, SAYS_VERSION, 'echo "a.cc: error: no" >&2', "exit 1")
    with pytest.raises(BuildError, match=r"^compiler failed: a.cc: error: no$"):
        build.built_library()
    assert _names(cache) == ["lock"]
    assert native._found() == native.Status(False, "compiler failed: a.cc: error: no")


def test_a_compiler_that_makes_nothing_is_found_out(cache, tmp_path, monkeypatch):
    _compiler(tmp_path, monkeypatch, SAYS_VERSION, MAKES_EMPTY_FILES)
    with pytest.raises(
        BuildError, match=r"^the library does not pass its check: \S+ failed: .* file too short"
    ):
        build.built_library()
    assert _names(cache) == ["lock"]


@pytest.mark.parametrize(
    "check, why",
    [
        ("sys.exit('wrong results of keys')", "failed: wrong results of keys"),
        ("os.abort()", "ended by a signal: Aborted"),
    ],
)
def test_a_library_that_does_not_pass_its_check_is_not_used(cache, quick, tmp_path, monkeypatch, check, why):
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!{sys.executable}\nimport os, sys\n{check}\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(build.sys, "executable", str(interpreter))
    status = native._found()
    assert not status.on and status.about.startswith("the library does not pass its check: python")
    assert status.about.endswith(why)
    assert _names(cache) == ["lock"]


def _are_gone(processes):
    """Whether processes have ended, or do so within seconds."""
    stats = [pathlib.Path("/proc") / process / "stat" for process in processes]
    for _ in range(100):
        if not any(stat.exists() and ") Z " not in stat.read_text() for stat in stats):
            return True
        time.sleep(0.1)
    return False


def test_a_compiler_that_hangs_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_SECONDS", 1)
    children = tmp_path / "children"
    _compiler(tmp_path, monkeypatch, SAYS_VERSION, f"sleep 1000 & echo $! >> {children}", "wait")
    assert native._found() == native.Status(False, "compiler did not end within 1 s")
    assert _are_gone(children.read_text().split())


def test_an_interrupt_ends_the_compilers(interruptible, cache, tmp_path, monkeypatch):
    children = tmp_path / "children"
    _compiler(tmp_path, monkeypatch, SAYS_VERSION, f"echo $$ >> {children}", "exec sleep 1000")

    def interrupt():
        while not children.exists():
            time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        build.built_library()
    assert _are_gone(children.read_text().split())
    assert _names(cache) == ["lock"]


def test_a_program_that_another_thread_has_waited_for_is_not_killed(monkeypatch):
    process = subprocess.Popen(["true"], start_new_session=True)
    process.wait()
    monkeypatch.setattr(process, "poll", lambda: None)  # as it returns while another thread waits
    compiler._kill(process)


@pytest.mark.parametrize(
    "reason, others",
    [
        ("a.cc:3:5: error: no", ["In file included from errors/x.h:1:", "{}", "a.cc:4:5: error: more"]),
        ("collect2: error: ld failed", ["cc1plus: warning: -Werror is ignored", "undefined", "{}"]),
        ("wrong results of rows", ["Jax plugin configuration error: none", "{}", ""]),
        ("exit status 3", ["", ""]),
    ],
)
def test_the_reason_of_a_failure_is_the_line_that_says_it(tmp_path, reason, others):
    program = tmp_path / "program"
    lines = "\n".join(f"echo '{line.format(reason)}' >&2" for line in others)
    program.write_text(f"#!/bin/sh\n{lines}\nexit 3\n")
    program.chmod(0o755)
    with compiler.Programs(10) as programs, pytest.raises(BuildError) as raised:
        programs.run([str(program)])
    assert str(raised.value) == f"program failed: {reason}"


def test_the_check_imports_nothing_from_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "queue.py").write_text("raise RuntimeError('a file of the user')\n")
    monkeypatch.chdir(tmp_path)
    with (
        compiler.Programs(60) as programs,
        pytest.raises(BuildError, match=r"OSError: \S+no\.so: cannot open"),
    ):
        build._check(tmp_path / "no.so", programs)


def test_a_compiler_has_arguments(tmp_path, monkeypatch):
    _compiler(tmp_path, monkeypatch, 'echo "$1" "$2"')
    monkeypatch.setenv("CXX", f"{tmp_path / 'compiler'} 'a b'")
    command = compiler.compiler_command()
    assert command == (str(tmp_path / "compiler"), "a b")
    assert compiler.compiler_version(command) == "a b --version"
    monkeypatch.setenv("CXX", "c++ 'a\nb")
    assert native._found() == native.Status(False, 'CXX="c++ \'a\\nb": No closing quotation')


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


def test_a_library_that_cannot_be_loaded_is_not_used(monkeypatch):
    monkeypatch.undo()  # `register` is the real one
    monkeypatch.delenv(native.VARIABLE, raising=False)
    monkeypatch.setattr(build, "built_library", lambda: ROOT / "README.md")
    assert native._found().about.startswith("the library cannot be used: ")


def test_a_library_in_a_cache_that_cannot_be_written_is_used(cache, quick, checks, monkeypatch):
    library = build.built_library()
    monkeypatch.setattr(build, "locked", None)  # what is there needs no lock, which would be a file
    assert build.built_library() == library
    assert native._found().on


def test_self_check_finds_what_is_wrong(monkeypatch):
    if not native.status().on:
        pytest.skip(str(native.status()))
    assert self_check.wrong_kernels() == []
    monkeypatch.setattr(self_check.calls, "pool", lambda table, *_, expansion: table)
    assert self_check.wrong_kernels() == ["rows"]
    monkeypatch.setattr(sys, "argv", ["self_check", "library.so"])
    with pytest.raises(SystemExit, match=r"^wrong results of rows$"):
        self_check.main()
    monkeypatch.setitem(self_check._CHECKS, "rows", lambda: jnp.zeros(2) + jnp.zeros(3))
    with pytest.raises(SystemExit, match=r"^TypeError: add got incompatible shapes[^\n]*$"):
        self_check.main()


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
