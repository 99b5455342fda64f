"""Decides whether this process uses the native kernels, loads them, and says so once in the log."""

import contextlib
import ctypes
import functools
import logging
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import jax

from ultramem_jax.kernels import build
from ultramem_jax.kernels.compiler import BuildError, compiler_command, compiler_version
from ultramem_jax.kernels.targets import NAMES, target

VARIABLE = "ULTRAMEM_NATIVE"
"""Environment variable that turns the kernels off if it is 0."""

log = logging.getLogger(__name__)
_LOCK = threading.RLock()
_TURNED_OFF: ContextVar[bool] = ContextVar("turned_off", default=False)


@dataclass(frozen=True)
class Status:
    """Tells whether the kernels are used, and why or how."""

    on: bool
    about: str
    """One line: how they were built, or why they are not used."""

    def __str__(self) -> str:
        return f"native kernels ({self.about})" if self.on else f"JAX, without native kernels ({self.about})"


def is_on() -> bool:
    """Tells whether a function that is traced here takes kernels: see `status`."""
    return not _TURNED_OFF.get() and status().on


@contextlib.contextmanager
def turned_off() -> Iterator[None]:
    """Makes functions that are traced within it, and for the first time, compute without kernels."""
    token = _TURNED_OFF.set(True)
    try:
        yield
    finally:
        _TURNED_OFF.reset(token)


def status() -> Status:
    """Returns whether this process uses kernels; the first call builds and loads the library."""
    with _LOCK:
        return _status()


@functools.cache
def _status() -> Status:
    found = _found()
    log.info("memory layers: %s", found)
    return found


def _found() -> Status:
    if os.environ.get(VARIABLE, "1") == "0":
        return Status(False, f"{VARIABLE}=0")
    # A library that does not fit would keep the CPU's backend from starting. Afterwards it only fails.
    backend = jax.default_backend()
    if backend != "cpu":
        return Status(False, f"the backend is {backend}")
    try:
        library = build.built_library()
        register(library)
        return Status(True, f"{instruction_set(library)}, {compiler_version(compiler_command())}")
    except BuildError as error:
        return Status(False, str(error))
    except Exception as error:  # whatever is wrong with a library, there is another way
        return Status(False, f"the library cannot be used: {str(error).partition(chr(10))[0]}")


def register(library: Path) -> None:
    """Makes XLA know the kernels of a library.

    Raises:
        OSError: it cannot be loaded.
        AttributeError: it lacks a kernel.
    """
    loaded = ctypes.CDLL(str(library))
    for name in NAMES:
        function = getattr(loaded, target(name))
        jax.ffi.register_ffi_target(target(name), jax.ffi.pycapsule(function), platform="cpu")


def instruction_set(library: Path) -> str:
    """Returns the name of the vector instructions that a library was compiled for."""
    function = ctypes.CDLL(str(library)).ultramem_instruction_set
    function.restype = ctypes.c_char_p
    return function().decode()
