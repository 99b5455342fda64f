"""Describes the machine and the software of this process, for the foot of a report.

Nothing in it names the host, a user or a folder outside the repository, so results can be published as they
are.
"""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence

import jax

import ultramem_jax
from ultramem_jax.cli import local_processes
from ultramem_jax.kernels import native

_ROOT = pathlib.Path(ultramem_jax.__file__).resolve().parent.parent
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_CODE = ("ultramem_jax", ":(glob)experiments/**/*.py", "launch.py")
"""Files that decide a result; changes in written results or documents do not make a commit dirty."""
_GIT_SECONDS = 10
_GIB = 1 << 30


def describe_environment() -> dict[str, str]:
    """Describes the machine and the software of this process, for the foot of a table.

    Returns:
        Strings by name, in order of display: command, commit (if this is a git checkout), date (UTC), cpu,
        cores (CPU cores), memory (host memory), os, python, the packages that numbers depend on, the
        devices that JAX uses, and whether native kernels compute memory layers.
    """
    found = {"command": _command(sys.argv)}
    if commit := _commit():
        found["commit"] = commit
    found["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    found["cpu"] = _cpu_model()
    found["cores"] = str(cpu_cores())
    if memory := host_memory_bytes():
        found["memory"] = f"{memory / _GIB:.1f} GiB"
    found["os"] = _operating_system()
    found["python"] = platform.python_version()
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    devices = jax.devices()
    found["devices"] = f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform})"
    # Where a build fails, its message may name folders of the user.
    found["memory layers"] = re.sub(r"(?<![\w.])/(?:[^\s/']+/)+", "", str(native.status()))
    return found


def host_memory_bytes() -> int:
    """Returns the host memory that this process may use, in bytes; 0 if it is unknown.

    It is the memory of the machine, or the limit of the container if that is less.
    """
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
    limit = (
        read_system_file("/sys/fs/cgroup/memory.max").strip()
        or read_system_file("/sys/fs/cgroup/memory/memory.limit_in_bytes").strip()
    )
    return min(machine, int(limit)) if limit.isdigit() else machine


def _command(arguments: Sequence[str]) -> str:
    """Returns the command line as typed in the repository's root, without folders outside of it."""
    program, *flags = arguments or [""]
    flags = local_processes.as_given(flags)
    path = pathlib.Path(program)
    if path.name == "ultramem" or path.parts[-2:] == ("ultramem_jax", "__main__.py"):
        words = ["ultramem"]
    else:
        script = str(pathlib.Path(program).resolve()) if os.path.exists(program) else program
        words = ["python", _relative(script)]
    return shlex.join([*words, *(_shorten(flag) for flag in flags)])


def _shorten(flag: str) -> str:
    name, equals, value = flag.partition("=")
    return f"{name}={_relative(value)}" if equals else _relative(name)


def _relative(text: str) -> str:
    """Returns a path relative to the repository; for a path outside of it, only the name."""
    path = pathlib.Path(text)
    if not path.is_absolute() and not text.startswith(("~", "..")):
        return text
    try:
        return str(path.relative_to(_ROOT))
    except ValueError:
        return path.name


def _git(*arguments: str) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def _commit() -> str:
    """Returns the short hash of the commit, marked if the code has changed; blank outside a git checkout."""
    top, head = _git("rev-parse", "--show-toplevel"), _git("rev-parse", "--short=12", "HEAD")
    # An installed package may lie inside the checkout of another project.
    if top is None or top.stdout.strip() != str(_ROOT) or head is None or head.returncode != 0:
        return ""
    changed = _git("status", "--porcelain", "--", *_CODE)
    dirty = changed is not None and bool(changed.stdout.strip())
    return head.stdout.strip() + (" with uncommitted changes" if dirty else "")


def read_system_file(path: str) -> str:
    """Returns the text of a file such as `/proc/meminfo`; blank if it cannot be read."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpu_model() -> str:
    match = re.search(
        r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", read_system_file("/proc/cpuinfo"), re.MULTILINE
    )
    return (match[1].strip() if match else "") or platform.processor() or platform.machine()


def cpu_cores() -> int:
    """Returns the number of CPU cores that this process may use; in a container these can be fewer."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _operating_system() -> str:
    """Returns name and version of the system.

    It uses neither `platform.node()` nor the version of the kernel, because both may contain the name of a
    host.
    """
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()
