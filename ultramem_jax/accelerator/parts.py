"""Runs the parts that find out about an accelerator, each in a process of its own and under a limit.

A part writes its records after every line of its table, and the report is written after every part. So what
was found by then is never lost, whatever ends a part.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax

from ultramem_jax.accelerator.equality import compare
from ultramem_jax.accelerator.host_tables import WAYS, try_host_table
from ultramem_jax.accelerator.probe import probe
from ultramem_jax.accelerator.speed import train_speeds
from ultramem_jax.files import replace_text
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
    """Its limit, of 420 seconds for all parts."""
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


class Outcome(NamedTuple):
    """Says how a part ended."""

    status: int | None
    """Exit status; None if its time was over."""
    seconds: float


def records_of(name: str, small: bool) -> Iterable[NamedTuple]:
    """Returns what a part of the library finds, one record after the other.

    Args:
        name: name of the part.
        small: small sizes, to try the parts on a CPU.
    """
    if name == "probe":
        return probe(256 if small else 1)
    if name == "equality":
        return compare(("ultramem-tiny",), "gpu") if small else compare()
    if name == "speed":
        return train_speeds(("ultramem-demo",), 2, 64, "float32") if small else train_speeds()
    return [try_host_table(name.removeprefix("host_"), 1 << (14 if small else 20))]


def run_part(name: str, folder: pathlib.Path, small: bool) -> None:
    """Runs a part of the library in this process, and writes `NAME.json` after every record."""
    found: list[markdown.Row] = []
    for record in records_of(name, small):
        found.append(record._asdict())
        print("  ".join(markdown.cell(value) for value in record if value not in (None, "")), flush=True)
        replace_text(folder / f"{name}.json", json.dumps(found, indent=1) + "\n")


def run_all(folder: pathlib.Path, seconds: float, again: Callable[[str], Sequence[str]], small: bool) -> bool:
    """Runs the parts while there is time, and writes `README.md` after each.

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
    for part in PARTS:
        left = seconds - (time.monotonic() - start)
        limit = min(part.seconds * seconds / 420, left)
        if part.arguments and (small or not launch.is_file()):
            continue  # benchmarks are programs of a clone
        if limit < min(5, seconds / 100):
            outcomes[part.name] = None
        else:
            print(f"== {part.title} (at most {limit:.0f} s)", flush=True)
            results = f"--results={folder / part.name}"
            command = (
                [sys.executable, str(launch), *part.arguments, results]
                if part.arguments
                else again(part.name)
            )
            outcomes[part.name] = _run(command, folder / f"{part.name}.log", limit)
            print(_tail(folder / f"{part.name}.log"), flush=True)
        replace_text(folder / "README.md", report(folder, outcomes))
    return all(outcome is not None and outcome.status == 0 for outcome in outcomes.values())


def _run(command: Sequence[str], log: pathlib.Path, limit: float) -> Outcome:
    start = time.monotonic()
    with log.open("wb") as output:
        # A group of its own, so that whatever the part starts ends with it.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
            _end(process, signal.SIGTERM)
        finally:
            _end(process, signal.SIGKILL)
    return Outcome(status, time.monotonic() - start)


def _end(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)


def _tail(log: pathlib.Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"   {line[:160]}" for line in lines[-_TAIL_LINES:])


def report(folder: pathlib.Path, outcomes: dict[str, Outcome | None]) -> str:
    """Returns the report of what was found so far, in Markdown."""
    device = jax.devices()[0]
    environment = describe_environment()
    parts = [f"# Accelerator: {device.device_kind}"]
    parts.append(markdown.table([{"": name, "value": value} for name, value in environment.items()]))
    rows: list[markdown.Row] = []
    for part in PARTS:
        if part.name in outcomes:
            outcome = outcomes[part.name]
            ended = "no time left" if outcome is None else _in_words(outcome.status)
            rows.append(
                {"part": part.title, "ended": ended, "seconds": round(outcome.seconds) if outcome else None}
            )
    parts.append(markdown.table(rows))
    for part in PARTS:
        records = folder / f"{part.name}.json"
        if records.is_file():
            parts += [f"## {part.title}", markdown.table(json.loads(records.read_text(encoding="utf-8")))]
        elif part.arguments and part.name in outcomes:
            parts += [f"## {part.title}", f"Tables and figures are in `{part.name}/`."]
    return "\n\n".join(parts) + "\n"


def _in_words(status: int | None) -> str:
    if status is None:
        return "its time was over"
    return "well" if status == 0 else f"with status {status}"
