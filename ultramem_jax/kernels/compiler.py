"""Finds the system's C++ compiler, and runs it."""

import contextlib
import functools
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType

import jax

_ERROR = re.compile(r"(\S+: )?(fatal )?error: ")
"""Start of the line in which a compiler or a linker says what is wrong."""


class BuildError(Exception):
    """Says in one line why there is no library."""


def compiler_command() -> tuple[str, ...]:
    """Returns the C++ compiler: the words of `$CXX`, such as `ccache g++`, else c++, g++ or clang++.

    The first word is the path of a program that was found in the `PATH`.

    Raises:
        BuildError: there is none.
    """
    variable = os.environ.get("CXX", "")
    try:
        wanted = shlex.split(variable)
    except ValueError as error:
        raise BuildError(f"CXX={variable!r}: {error}") from error
    programs = (wanted[0],) if wanted else ("c++", "g++", "clang++")
    for program in programs:
        if found := shutil.which(program):
            return (os.path.abspath(found), *wanted[1:])
    raise BuildError(f"no C++ compiler ({', '.join(programs)})")


@functools.cache
def compiler_version(compiler: tuple[str, ...]) -> str:
    """Returns the first line of what a compiler says of its version.

    Raises:
        BuildError: it cannot be run.
    """
    with Programs(seconds=10) as programs:
        return programs.run([*compiler, "--version"]).partition("\n")[0]


def include_flags() -> list[str]:
    """Returns the flags that find XLA's header of foreign functions."""
    return ["-isystem", jax.ffi.include_dir()]


def machine_flags() -> list[str]:
    """Returns the flags that make code for exactly this CPU."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        # GCC's tuning for AMD's first Zen halves vectors of 256 bits: 70 ms of a step instead of 59.
        return ["-march=native", "-mtune=haswell"]
    return ["-mcpu=native"]


class Programs:
    """Runs programs, also from several threads, that share a time limit.

    When its `with` block ends, also by an interrupt, those that still run are killed with all that they have
    started.
    """

    def __init__(self, seconds: float):
        """Starts the clock: all programs together may take `seconds`."""
        self._seconds, self._end = seconds, time.monotonic() + seconds
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._is_over = False

    def __enter__(self) -> "Programs":
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kills what still runs. A later `run` fails."""
        with self._lock:
            self._is_over = True
            for process in self._running:
                _kill(process)

    def run(self, command: list[str], folder: Path | None = None, **environment: str) -> str:
        """Returns what a program prints.

        Args:
            command: the program and its arguments.
            folder: where it runs.
            **environment: variables of its environment that differ from this one's.

        Raises:
            BuildError: it cannot be run, fails, or does not end in time.
        """
        name = Path(command[0]).name
        with self._lock:
            if self._is_over:
                raise BuildError(f"{name} was not run: the build is over")
            process = _started(command, folder, environment)
            self._running.add(process)
        with process:
            try:
                printed, errors = process.communicate(timeout=max(self._end - time.monotonic(), 0))
            except subprocess.TimeoutExpired as error:
                _kill(process)
                raise BuildError(f"{name} did not end within {self._seconds:g} s") from error
            finally:
                with self._lock:
                    self._running.discard(process)
        if process.returncode < 0:
            raise BuildError(f"{name} ended by a signal: {signal.strsignal(-process.returncode)}")
        if process.returncode:
            raise BuildError(f"{name} failed: {_reason(errors) or f'exit status {process.returncode}'}")
        return printed


def _started(command: list[str], folder: Path | None, environment: dict[str, str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"LC_ALL": "C"} | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # a group of processes that can be killed together
        )
    except OSError as error:
        raise BuildError(f"{Path(command[0]).name} cannot be run: {error.strerror}") from error


def _kill(process: subprocess.Popen[str]) -> None:
    """Kills a program, and all that it has started, unless it has ended and was waited for."""
    # `poll` also returns None while another thread is just learning that the process has ended.
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _reason(errors: str) -> str:
    """Returns the line that says what is wrong: a compiler's first error, else the last line."""
    lines = [line for line in errors.splitlines() if line.strip()]
    return next(filter(_ERROR.match, lines), lines[-1] if lines else "")
