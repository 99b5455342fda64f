"""Finds the system's C++ compiler, and runs it."""

import contextlib
import functools
import os
import platform
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import jax


class BuildError(Exception):
    """Says in one line why there is no library."""


def compiler_command() -> tuple[str, ...]:
    """Returns the C++ compiler: the words of `$CXX`, such as `ccache g++`, else c++, g++ or clang++.

    The first word is the path of a program that was found in the `PATH`.

    Raises:
        BuildError: there is none.
    """
    try:
        wanted = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"CXX={os.environ['CXX']}: {error}") from error
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
    return run([*compiler, "--version"], seconds=10).partition("\n")[0]


def include_flags() -> list[str]:
    """Returns the flags that find XLA's header of foreign functions."""
    return ["-isystem", jax.ffi.include_dir()]


def machine_flags() -> list[str]:
    """Returns the flags that make code for exactly this CPU."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        # GCC's tuning for AMD's first Zen halves vectors of 256 bits: 70 ms of a step instead of 59.
        return ["-march=native", "-mtune=haswell"]
    return ["-mcpu=native"]


def run(command: list[str], seconds: float, folder: Path | None = None, **environment: str) -> str:
    """Returns what a command prints.

    Args:
        command: the program and its arguments.
        seconds: longest time that it may take. Then it is killed, with all programs that it has started.
        folder: where it runs.
        **environment: variables of its environment that differ from this one's.

    Raises:
        BuildError: it cannot be run, takes too long, or fails.
    """
    name = Path(command[0]).name
    variables = os.environ | {"LC_ALL": "C"} | environment
    try:
        # A session of its own is a group of processes that can be killed together.
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise BuildError(f"{name} cannot be run: {error.strerror}") from error
    with process:
        try:
            printed, errors = process.communicate(timeout=seconds)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):  # an interrupt may come when it has just ended
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise BuildError(f"{name} took longer than {seconds:.2g} s") from error
            raise
    if process.returncode < 0:
        raise BuildError(f"{name} was ended by {signal.Signals(-process.returncode).name}")
    if process.returncode:
        lines = errors.splitlines() or [f"exit status {process.returncode}"]
        # A compiler names its first error first. An exception of Python is on the last line.
        raise BuildError(f"{name} failed: {next((line for line in lines if 'error' in line), lines[-1])}")
    return printed
