"""Trains a model with a table of many gigabytes, interrupts and resumes it, and records its host memory.

Three trainings run one after the other, each as a process of its own: the same model with a small table, for
the time of a step; the large one, which is stopped by SIGTERM after some steps; and the same again, which
resumes. Resident memory is read from the system once a second, saving included. The report has the times of
the steps and the highest memory, the figure has its curve. The same command continues what was interrupted.

    python launch.py large_table --dataset=enwik8 --path=enwik8.gz
"""

import json
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

from absl import flags
from tqdm import tqdm

from experiments.common import figures, report
from ultramem_jax.errors import Stopped, UserError, require
from ultramem_jax.reporting import markdown
from ultramem_jax.reporting.environment import describe_environment, read_system_file
from ultramem_jax.reporting.folders import make_folder
from ultramem_jax.training.checkpoint_reading import load_meta
from ultramem_jax.tree_types import JsonDict

RUN = flags.DEFINE_string(
    "run", "experiments/configs/slots_100m.py", "config of the run with the large table"
)
DATASET = flags.DEFINE_string("dataset", "", "data.dataset of the runs; empty: that of the config")
PATH = flags.DEFINE_string("path", "", "data.path of the runs; empty: that of the config")
SMALL = flags.DEFINE_integer("small", 1000, "keys per side of the small table", lower_bound=1)
SMALL_STEPS = flags.DEFINE_integer("small_steps", 60, "steps with the small table", lower_bound=20)
STOP_AT = flags.DEFINE_integer("stop_at", 150, "step after which the large run is stopped", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", "", "folder of the runs; empty: runs/NAME, as the config's file")
RESULTS = flags.DEFINE_string(
    "results", "", "folder of table and figure; empty: experiments/results/NAME, as the config's file"
)

_POLL_SECONDS = 1.0
"""Time between two readings of resident memory."""
_LINES_OF_WARM_UP = 2
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


def main() -> None:
    """Runs the trainings, and writes their report and the curve of memory."""
    environment, name = describe_environment(), pathlib.Path(RUN.value).stem
    require(pathlib.Path(RUN.value).is_file(), "run", RUN.value, "must be a config file")
    folder = make_folder(RESULTS.value or f"experiments/results/{name}", "results")
    work = pathlib.Path(WORKDIR.value or f"runs/{name}")
    small = [f"--config.model.memory.num_keys={SMALL.value}", f"--config.train.steps={SMALL_STEPS.value}"]
    readings = _train("small table", work / "small", small)
    readings += _train("until it is stopped", work / "large", [], stop_at=STOP_AT.value)
    readings += _train("resumed", work / "large", [])
    report.write_csv([reading._asdict() for reading in readings], folder / "memory.csv")
    metrics = (work / "large" / "metrics.jsonl").read_text(encoding="utf-8")
    (folder / "metrics.jsonl").write_text(metrics, encoding="utf-8")
    plot(readings, folder / "memory.png")
    text, _ = report.write_table(
        rows(readings, _seconds(work / "small"), _seconds(work / "large")),
        folder / name,
        "A language model with a large table: host memory and time",
        environment,
        [
            f"Config: `{RUN.value}`. The large run is stopped by SIGTERM after step {STOP_AT.value}, saves, "
            f"and resumes. The small table has {SMALL.value**2:,} slots. Resident memory is that of the "
            f"training's process, read every {_POLL_SECONDS:g} s; its highest value is the system's count. "
            "Times of steps are medians over the lines of metrics, without the first "
            f"{_LINES_OF_WARM_UP} after each start and those in which a checkpoint was written or an "
            "evaluation ran."
        ],
        figures={"resident memory against time": "memory.png"},
    )
    print(f"\n{text.read_text()}")


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
        is_small = part == of_part[0].part == readings[0].part
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


def _train(part: str, workdir: pathlib.Path, options: list[str], stop_at: int | None = None) -> list[Reading]:
    """Runs a training to its end, or to a step at which it is stopped, and returns readings of its memory.

    Raises:
        UserError: the training failed; it has said why.
    """
    of_data = {"dataset": DATASET.value, "path": PATH.value}
    options = [*options, *(f"--config.data.{name}={value}" for name, value in of_data.items() if value)]
    command = [
        sys.executable,
        "launch.py",
        "train",
        f"--config={RUN.value}",
        f"--workdir={workdir}",
        *options,
    ]
    readings: list[Reading] = []
    with subprocess.Popen(command) as process, tqdm(desc=part, unit="s", file=sys.stderr) as bar:
        try:
            start = time.perf_counter()
            while process.poll() is None:
                reading = _reading(process.pid, part, time.perf_counter() - start, workdir)
                readings += [] if reading is None else [reading]
                if stop_at is not None and readings and readings[-1].step >= stop_at:
                    process.send_signal(signal.SIGTERM)
                    stop_at = None
                time.sleep(_POLL_SECONDS)
                bar.update()
        except BaseException:
            process.send_signal(signal.SIGTERM)
            raise
    if process.returncode not in (0, Stopped.STATUS):
        raise UserError(f"run = {RUN.value!r}: the training with the {part} ended with {process.returncode}")
    return readings


def _reading(pid: int, part: str, seconds: float, workdir: pathlib.Path) -> Reading | None:
    """Returns the memory of a process; None if it has just ended."""
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


def _seconds(workdir: pathlib.Path) -> list[float]:
    """Returns the times of steps of a run, but for those that did something else, too."""
    config = _config(workdir)
    tokens = config["train"]["batch_size"] * config["data"]["seq_len"]
    every = [config["train"][name] for name in ("checkpoint_every", "eval_every")]
    counted, since_start, before = [], 0, 0.0
    for line in _metrics(workdir):
        since_start = since_start + 1 if line["tokens_per_second"] and before else 0
        before = line["tokens_per_second"]
        # A line stands for the steps since the last one. After a multiple of `every`, something else ran.
        plain = all((line["step"] - config["train"]["log_every"]) % n for n in every)
        if since_start >= _LINES_OF_WARM_UP and plain:
            counted.append(tokens / line["tokens_per_second"])
    return counted
