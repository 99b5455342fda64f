"""Builds the library of kernels with the system's C++ compiler, once for each machine and version.

The library lies in the user's cache folder, under a hash of all that it depends on: sources, compiler, flags,
the CPU and the version of jaxlib. It is checked in a process of its own, because one that crashes would take
the user's process with it. Build and check take four to ten seconds. A file beside the library holds the hash
of what has passed. A library that differs from it, as after a full disk, is built again. Processes build in
turn.
"""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ultramem_jax.files import cache_folder, locked, replace_text, sync_folder
from ultramem_jax.kernels.compiler import (
    BuildError,
    Programs,
    compiler_command,
    compiler_version,
    include_flags,
    machine_flags,
)

_SOURCES = Path(__file__).with_name("sources")
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden")
_SECONDS = 60
"""Longest time that a build may take, its check included."""
_UNFINISHED = "build-"
"""Start of the names of folders in which libraries are built."""
_HOUR, _MONTH = 3600, 30 * 24 * 3600
"""Seconds after which a build removes folders of other builds, and other libraries. Who needs one of these
builds it again."""


def built_library() -> Path:
    """Returns the library of kernels for this machine, and builds and checks it if it is not there.

    Raises:
        BuildError: there is no compiler, it failed, it made a wrong library, or the cache cannot be written.
    """
    compiler = compiler_command()
    try:
        folder = cache_folder() / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / f"{_key(compiler)}.so"
        if not _has_passed(library):
            with locked(folder / "lock"):
                if not _has_passed(library):
                    _tidy(folder)
                    _build(compiler, library)
    except OSError as error:
        raise BuildError(f"{error.strerror}: {error.filename or folder}") from error
    return library


def sources() -> list[Path]:
    """Returns the C++ files of the library, without their headers."""
    return sorted(_SOURCES.glob("*.cc"))


def _key(compiler: tuple[str, ...]) -> str:
    """Returns a hash of all that the library depends on."""
    key = hashlib.sha256()
    for path in sorted(_SOURCES.iterdir()):
        key.update(path.name.encode() + path.read_bytes())
    parts = (*_FLAGS, *machine_flags(), *compiler, compiler_version(compiler), _cpu())
    for part in (*parts, importlib.metadata.version("jaxlib")):
        key.update(part.encode() + b"\0")
    return key.hexdigest()[:32]


def _cpu() -> str:
    """Returns what identifies the CPU and its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _passed(library: Path) -> Path:
    """Returns the file that holds the hash of a library that has passed its check."""
    return library.with_suffix(".passed")


def _hash(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _has_passed(library: Path) -> bool:
    """Tells whether a library is there as it was when it passed its check."""
    try:
        return _passed(library).read_bytes() == _hash(library).encode()
    except FileNotFoundError:
        return False


def _build(compiler: tuple[str, ...], library: Path) -> None:
    """Compiles the sources in parallel, links them, and checks the library before anyone finds it."""
    flags = [*_FLAGS, *machine_flags(), *include_flags()]
    with (
        tempfile.TemporaryDirectory(dir=library.parent, prefix=_UNFINISHED) as name,
        ThreadPoolExecutor(os.cpu_count()) as threads,
        Programs(_SECONDS) as programs,
    ):
        folder = Path(name)

        def compiled(source: Path) -> str:
            target = str(folder / f"{source.stem}.o")
            programs.run([*compiler, *flags, "-c", source.name, "-o", target], _SOURCES)
            return target

        objects = list(threads.map(compiled, sources()))
        linked = folder / library.name
        programs.run([*compiler, "-shared", *objects, "-o", str(linked)], _SOURCES)
        _check(linked, programs)
        # On disk before they get their names: a machine that stops leaves the whole library, or none.
        sync_folder(folder)
        passed = _hash(linked)
        linked.replace(library)
    replace_text(_passed(library), passed)


def _check(library: Path, programs: Programs) -> None:
    """Checks a library in a process of its own.

    Raises:
        BuildError: it crashes, or a kernel computes something else than it should.
    """
    # The process finds the modules that this one has found. -P keeps the working folder out of its path.
    paths = os.pathsep.join(map(os.path.abspath, sys.path))
    command = [sys.executable, "-P", "-m", "ultramem_jax.kernels.self_check", str(library)]
    try:
        programs.run(command, JAX_PLATFORMS="cpu", PYTHONPATH=paths)
    except BuildError as error:
        raise BuildError(f"the library does not pass its check: {error}") from error


def _tidy(folder: Path) -> None:
    """Removes what killed builds have left, and old libraries."""
    # The lock may not reach other machines that share the folder, so a young folder may be in use.
    for unfinished in folder.glob(f"{_UNFINISHED}*"):
        if _age(unfinished) > _HOUR:
            shutil.rmtree(unfinished, ignore_errors=True)
    for library in folder.glob("*.so"):
        if _age(library) > _MONTH:
            library.unlink(missing_ok=True)
            _passed(library).unlink(missing_ok=True)


def _age(path: Path) -> float:
    """Returns the seconds since a file or folder was changed; 0 if it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
