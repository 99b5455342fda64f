"""Runs the parts that measure an accelerator, each in a process of its own and under a limit.

Only these processes use the device: a TPU belongs to one at a time. A part of the library writes its records
after every line of its table, a benchmark after every measurement that can stand alone. The report is written
after every part, and when the command is stopped.
"""

import contextlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from ultramem_jax.accelerator.equality import compare, compare_references
from ultramem_jax.accelerator.host_tables import WAYS, try_host_table
from ultramem_jax.accelerator.probe import probe
from ultramem_jax.accelerator.speed import train_speeds
from ultramem_jax.errors import UserError
from ultramem_jax.files import cache_folder, replace_text
from ultramem_jax.reporting import markdown
from ultramem_jax.reporting.environment import describe_environment

_GRACE_SECONDS = 5
_TAIL_LINES = 15


@dataclass(frozen=True)
class Part:
    """Describes one part."""

    name: str
    title: str
    seconds: int
    """Its limit, where all parts have 420 seconds. Most end earlier, so that the limits add up to more."""
    arguments: tuple[str, ...] = ()
    """Command of a clone that it runs; empty for a part of the library."""


PARTS = (
    Part("probe", "Candidates of every operation", 100),
    Part("equality", "Difference from the CPU after three steps, float32", 70),
    Part(
        "step_small",
        "Step of one memory layer",
        45,
        ("bench_step", "--slots=65536,1048576", "--tokens=8192", "--repeats=10"),
    ),
    Part("speed", "Training steps of whole models", 90),
    Part(
        "step_large",
        "Step of one memory layer with large tables",
        60,
        ("bench_step", "--slots=4194304,20250000", "--tokens=8192", "--repeats=10"),
    ),
    Part(
        "decode",
        "Decoding with a cache of 2,048",
        100,
        (
            "bench_decode",
            "--dtypes=bfloat16",
            "--batches=1,16,64,256",
            "--cache_length=2048",
            "--rounds=1",
            "--ratios=",
        ),
    ),
    *(Part(f"host_{way}", f"Table in host memory: {way}", 30) for way in WAYS),
)
"""Parts in order of value."""
_DEVICE = "device.json"
"""File with the device and the environment, which every part of the library writes."""


class Outcome(NamedTuple):
    """Says how a part ended."""

    status: int | None
    """Exit status; None if its time was over, or the command was stopped."""
    seconds: float


def records_of(name: str, small: bool, references: pathlib.Path | None) -> Iterable[NamedTuple]:
    """Returns what a part of the library finds, one record after the other.

    Args:
        name: name of the part.
        small: small sizes, to try the parts on a CPU.
        references: folder of reference vectors (`equality.compare_references`); None for none.
    """
    if name == "probe":
        return probe(256 if small else 1)
    if name == "equality":
        of_models = compare(("ultramem-tiny",), "gpu") if small else compare()
        return itertools.chain(compare_references(references) if references else (), of_models)
    if name == "speed":
        return train_speeds(("ultramem-demo",), 2, 64, "float32") if small else train_speeds()
    return [try_host_table(name.removeprefix("host_"), 1 << (14 if small else 20))]


def run_part(name: str, folder: pathlib.Path, small: bool, references: pathlib.Path | None = None) -> None:
    """Runs a part of the library in this process, and writes `NAME.json` after every record.

    Raises:
        UserError: a record says that something does not hold. All records are written.
    """
    device = {"device": jax.devices()[0].device_kind} | describe_environment()
    _write(folder / _DEVICE, device)
    found: list[markdown.Row] = []
    for record in records_of(name, small, references):
        found.append(record._asdict())
        print("  ".join(markdown.cell(value) for value in record if value not in (None, "")), flush=True)
        _write(folder / f"{name}.json", found)
    failed = [row for row in found if row.get("holds") is False]
    if failed:
        raise UserError(f"--part = {name!r}: {len(failed)} of {len(found)} do not hold; first {failed[0]}")


def _write(path: pathlib.Path, tree: Any) -> None:
    replace_text(path, json.dumps(tree, indent=1) + "\n")


def run_all(folder: pathlib.Path, seconds: float, again: Callable[[str], Sequence[str]], small: bool) -> bool:
    """Runs the parts while there is time, and writes `README.md` after each.

    What an earlier call left in the folder is removed.

    Args:
        folder: folder for records, logs and the report.
        seconds: time for all parts.
        again: the command that runs a part of the library in a process of its own.
        small: small sizes, to try the parts on a CPU.

    Returns:
        Whether all parts ended well.
    """
    start = time.monotonic()
    outcomes: dict[str, Outcome | None] = {}
    launch = pathlib.Path("launch.py")
    _remove_old(folder)
    with _ended_by_sigterm():
        for part in PARTS:
            left = seconds - (time.monotonic() - start)
            limit = min(part.seconds * seconds / 420, left)
            if part.arguments and (small or not launch.is_file()):
                continue  # benchmarks are programs of a clone
            outcomes[part.name] = None
            if limit >= min(5, seconds / 100):
                print(f"== {part.title} (at most {limit:.0f} s)", flush=True)
                command: Sequence[str] = again(part.name)
                if part.arguments:
                    results = f"--results={folder / part.name}"
                    command = [sys.executable, str(launch), *part.arguments, results]
                log = folder / f"{part.name}.log"
                began, status = time.monotonic(), None
                try:
                    status = _run(command, log, limit)
                finally:
                    outcomes[part.name] = Outcome(status, time.monotonic() - began)
                    replace_text(folder / "README.md", report(folder, outcomes))
                print(_tail(log), flush=True)
            replace_text(folder / "README.md", report(folder, outcomes))
    return all(outcome is not None and outcome.status == 0 for outcome in outcomes.values())


def _remove_old(folder: pathlib.Path) -> None:
    (folder / _DEVICE).unlink(missing_ok=True)
    for part in PARTS:
        for name in (f"{part.name}.json", f"{part.name}.log"):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / part.name, ignore_errors=True)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Makes SIGTERM an exit that ends the part which runs, and writes the report."""

    def leave(*_: object) -> None:
        sys.exit(128 + signal.SIGTERM)

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, leave) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _run(command: Sequence[str], log: pathlib.Path, limit: float) -> int | None:
    """Runs a command and ends all that it started; returns its status, or None if its time was over."""
    # What a part compiles is not compiled again in the next call.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(cache_folder() / "accelerator")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=cache | os.environ
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started: SIGTERM, and SIGKILL some seconds later."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: pathlib.Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"   {line[:160]}" for line in lines[-_TAIL_LINES:])


def report(folder: pathlib.Path, outcomes: dict[str, Outcome | None]) -> str:
    """Returns the report of what was found so far, in Markdown."""
    record = folder / _DEVICE
    device = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    parts = [f"# Accelerator: {device.get('device', 'no part has reached it')}"]
    parts.append(markdown.table([{"": name, "value": value} for name, value in device.items()]))
    rows: list[markdown.Row] = []
    for name, outcome in outcomes.items():
        ended = "no time left" if outcome is None else _in_words(outcome.status)
        seconds = round(outcome.seconds) if outcome else None
        rows.append({"part": _title(name), "ended": ended, "seconds": seconds})
    parts.append(markdown.table(rows))
    for name in outcomes:
        records, results = folder / f"{name}.json", folder / name
        if records.is_file():
            table = markdown.table(json.loads(records.read_text(encoding="utf-8")))
            parts += [f"## {_title(name)}", table]
        elif results.is_dir():
            files = ", ".join(f"`{path.name}`" for path in sorted(results.iterdir()))
            parts += [f"## {_title(name)}", f"In `{name}/`: {files or 'nothing'}."]
    return "\n\n".join(parts) + "\n"


def _title(name: str) -> str:
    return next(part.title for part in PARTS if part.name == name)


def _in_words(status: int | None) -> str:
    if status is None:
        return "its time was over"
    return "well" if status == 0 else f"with status {status}"
