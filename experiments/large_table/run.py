"""Trains a model with a table of many gigabytes, interrupts and resumes it, and records its host memory.

Three trainings run one after the other, each as a process of its own: the same model with a small table, for
the time of a step; the large one, which is stopped by SIGTERM after some steps; and the same again, which
resumes. Resident memory is read from the system once a second, saving included. The report has the times of
the steps and the highest memory, the figure has its curve. The same command continues what was interrupted.

    python launch.py large_table --dataset=enwik8 --path=enwik8.gz
"""

import pathlib
import signal
import subprocess
import sys
import time

from absl import flags
from tqdm import tqdm

from experiments.common import report
from experiments.large_table.readings import (
    LINES_OF_WARM_UP,
    Reading,
    plot,
    reading_of,
    rows,
    seconds_of_steps,
)
from ultramem_jax.errors import Stopped, UserError, require
from ultramem_jax.reporting.environment import describe_environment
from ultramem_jax.reporting.folders import make_folder

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
        rows(readings, seconds_of_steps(work / "small"), seconds_of_steps(work / "large")),
        folder / name,
        "A language model with a large table: host memory and time",
        environment,
        [
            f"Config: `{RUN.value}`. The large run is stopped by SIGTERM after step {STOP_AT.value}, saves, "
            f"and resumes. The small table has {SMALL.value**2:,} slots. Resident memory is that of the "
            f"training's process, read every {_POLL_SECONDS:g} s; its highest value is the system's count. "
            "Times of steps are medians over the lines of metrics, without the first "
            f"{LINES_OF_WARM_UP} after each start and those in which a checkpoint was written or an "
            "evaluation ran."
        ],
        figures={"resident memory against time": "memory.png"},
    )
    print(f"\n{text.read_text()}")


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
                reading = reading_of(process.pid, part, time.perf_counter() - start, workdir)
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
