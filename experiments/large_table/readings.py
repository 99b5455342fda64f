"""Reads the memory and the times of the trainings of `large_table`, as rows of a table and as a figure."""

import json
import pathlib
import statistics
from typing import NamedTuple

from experiments.common import figures
from ultramem_jax.reporting import markdown
from ultramem_jax.reporting.environment import read_system_file
from ultramem_jax.training.checkpoint_reading import load_meta
from ultramem_jax.tree_types import JsonDict

LINES_OF_WARM_UP = 2
"""First lines of metrics that count for no time: they compile, and touch pages for the first time."""
_GB = 1e9


class Reading(NamedTuple):
    """Holds the resident memory of a training at one time."""

    part: str
    """Which of the trainings it is."""
    seconds: float
    """Time since the training began."""
    step: int
    """Last step that was logged; 0 before the first."""
    resident_bytes: int
    peak_bytes: int
    """Highest resident memory since the training began, as the system counts it."""


def rows(
    readings: list[Reading], small_seconds: list[float], large_seconds: list[float]
) -> list[markdown.Row]:
    """Returns a row for each training: its highest memory, and its time of a step.

    Args:
        readings: readings of all trainings.
        small_seconds: times of steps with the small table.
        large_seconds: times of steps with the large one, before and after it was stopped.
    """
    small, large = statistics.median(small_seconds), statistics.median(large_seconds)
    found = []
    for part in dict.fromkeys(reading.part for reading in readings):
        of_part = [reading for reading in readings if reading.part == part]
        is_small = part == readings[0].part
        found.append(
            {
                "training": part,
                "steps": f"{of_part[0].step}–{of_part[-1].step}",
                "seconds": of_part[-1].seconds,
                "highest resident, GB": max(reading.peak_bytes for reading in of_part) / _GB,
                "ms per step": 1e3 * (small if is_small else large),
                "× small table": None if is_small else large / small,
            }
        )
    return found


def plot(readings: list[Reading], path: pathlib.Path) -> None:
    """Draws resident memory against time, the trainings one after the other."""
    figure = figures.new_figure(8.0, 4.0)
    axes, start = figure.subplots(), 0.0
    for part, colour in zip(
        dict.fromkeys(reading.part for reading in readings),
        (figures.GREY, figures.BLUE, figures.VERMILION),
        strict=True,
    ):
        of_part = [reading for reading in readings if reading.part == part]
        seconds = [start + reading.seconds for reading in of_part]
        axes.plot(seconds, [r.resident_bytes / _GB for r in of_part], color=colour, linewidth=1.6, label=part)
        start = seconds[-1]
    axes.set(xlabel="seconds", ylabel="resident memory, GB", ylim=(0, None))
    figures.set_title(axes, "Host memory of a training with a large table")
    figures.set_plain(axes)
    axes.legend(frameon=False, fontsize=9)
    figures.save(figure, path)


def reading_of(pid: int, part: str, seconds: float, workdir: pathlib.Path) -> Reading | None:
    """Returns the resident memory of a training's process; None if it has just ended.

    Args:
        pid: of the process.
        part: which of the trainings it is.
        seconds: since the training began.
        workdir: folder of the run, whose metrics say how far it is.
    """
    lines = dict(
        line.split(":", 1) for line in read_system_file(f"/proc/{pid}/status").splitlines() if ":" in line
    )
    if "VmRSS" not in lines:
        return None
    resident, peak = (1024 * int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    logged = _metrics(workdir)
    return Reading(part, seconds, int(logged[-1]["step"]) if logged else 0, resident, peak)


def _metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """Returns the lines of training metrics that a run has written so far."""
    try:
        text = (workdir / "metrics.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    # The last line may be half-written.
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    return [line for line in lines if line["split"] == "train"]


def _config(workdir: pathlib.Path) -> JsonDict:
    """Returns the config of a run, which its checkpoints keep."""
    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    return load_meta(workdir / "checkpoints" / str(max(steps))).config


def seconds_of_steps(workdir: pathlib.Path) -> list[float]:
    """Returns the seconds of a step for each line of metrics in which nothing else ran, after warm-up."""
    config = _config(workdir)
    tokens = config["train"]["batch_size"] * config["data"]["seq_len"]
    every = [config["train"][name] for name in ("checkpoint_every", "eval_every")]
    counted, since_start, before = [], 0, 0.0
    for line in _metrics(workdir):
        since_start = since_start + 1 if line["tokens_per_second"] and before else 0
        before = line["tokens_per_second"]
        # A line stands for the steps since the last one. After a multiple of `every`, something else ran.
        plain = all((line["step"] - config["train"]["log_every"]) % n for n in every)
        if since_start >= LINES_OF_WARM_UP and plain:
            counted.append(tokens / line["tokens_per_second"])
    return counted
