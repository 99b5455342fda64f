"""Builds the library of kernels with the system's C++ compiler, once for each machine and version.

The library lies in the user's cache folder, under a hash of all that it depends on: sources, compiler, flags,
the CPU and the version of jaxlib. A build takes two to four seconds. Two processes do not build at a time.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from ultramem_jax.files import cache_folder

_SOURCES = Path(__file__).with_name("sources")
_SECONDS = 120
"""Longest time that one run of the compiler may take."""
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden")


class BuildError(Exception):
    """Says in one line why there is no library."""


def built_library() -> Path:
    """Returns the library of kernels for this machine, and builds it if it is not there.

    Raises:
        BuildError: there is no compiler, it failed, or the cache folder cannot be written.
    """
    compiler = compiler_command()
    try:
        folder = cache_folder() / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / f"{_key(compiler)}.so"
        if not library.exists():
            with _locked(library.with_suffix(".lock")):
                if not library.exists():
                    _build(compiler, library)
    except OSError as error:
        raise BuildError(f"{error.strerror}: {error.filename}") from error
    return library


def compiler_command() -> str:
    """Returns the path of the C++ compiler: `$CXX`, else c++, g++ or clang++ of the `PATH`.

    Raises:
        BuildError: there is none.
    """
    wanted = os.environ.get("CXX", "")
    names = (wanted,) if wanted else ("c++", "g++", "clang++")
    for name in names:
        if found := shutil.which(name):
            return os.path.abspath(found)
    raise BuildError(f"no C++ compiler ({', '.join(names)})")


def sources() -> list[Path]:
    """Returns the C++ files of the library, without their headers."""
    return sorted(_SOURCES.glob("*.cc"))


def include_flags() -> list[str]:
    """Returns the flags that find XLA's header of foreign functions."""
    return ["-isystem", jax.ffi.include_dir()]


def machine_flags() -> list[str]:
    """Returns the flags that make code for exactly this CPU."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        # GCC's tuning for AMD's first Zen halves vectors of 256 bits: 70 ms of a step instead of 59.
        return ["-march=native", "-mtune=haswell"]
    return ["-mcpu=native"]


def _key(compiler: str) -> str:
    """Returns a hash of all that the library depends on."""
    key = hashlib.sha256()
    for path in sorted(_SOURCES.iterdir()):
        key.update(path.name.encode() + path.read_bytes())
    parts = (*_FLAGS, *machine_flags(), compiler, compiler_version(compiler), _cpu())
    for part in (*parts, importlib.metadata.version("jaxlib")):
        key.update(part.encode() + b"\0")
    return key.hexdigest()[:32]


@functools.cache
def compiler_version(compiler: str) -> str:
    """Returns the first line of what a compiler says of its version.

    Raises:
        BuildError: it cannot be run.
    """
    return _run([compiler, "--version"]).partition("\n")[0]


def _cpu() -> str:
    """Returns what identifies the CPU and its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _build(compiler: str, library: Path) -> None:
    """Compiles the sources in parallel and links them; the library appears whole or not at all."""
    flags = [*_FLAGS, *machine_flags(), *include_flags()]
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:

        def compiled(source: Path) -> str:
            target = str(Path(folder) / f"{source.stem}.o")
            _run([compiler, *flags, "-c", source.name, "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            objects = list(threads.map(compiled, sources()))
        linked = Path(folder) / library.name
        _run([compiler, "-shared", *objects, "-o", str(linked)])
        linked.replace(library)


def _run(command: list[str]) -> str:
    """Returns what a command prints that runs in the folder of the sources.

    Raises:
        BuildError: it fails.
    """
    try:
        done = subprocess.run(
            command, cwd=_SOURCES, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{Path(command[0]).name} cannot be run: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise BuildError(f"{Path(command[0]).name} failed: {lines[0] if lines else done.returncode}")
    return done.stdout


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that the processes of this machine share; the system frees it when a process ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
