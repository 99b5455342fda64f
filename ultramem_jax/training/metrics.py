"""Records what a run measures: JSON lines on disk, TensorBoard beside them, and a loss curve drawn from them.

`metrics.jsonl` holds one object per line, strict JSON, flat:

    {"step": 250, "split": "train", "bits_per_byte": 3.12, "memory_0/slots_read_share": 0.41}

A number that JSON cannot express is written as a string, "NaN", "Infinity" or "-Infinity". `read_metrics`
turns it back into a float, so that a diverged run shows as diverged and not as a gap.

A log never stops a run. Lines that are no records are skipped, and a failed write is reported once.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

from ultramem_jax.errors import UserError
from ultramem_jax.files import replace_text
from ultramem_jax.tree_types import JsonDict

if TYPE_CHECKING:  # both are slow to import, and most runs do not need them
    import tensorboardX
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)

Scalars: TypeAlias = Mapping[str, object]
"""Numbers, arrays of one element, or dicts of them in any nesting, by name."""

METRICS_FILE = "metrics.jsonl"
LOSS = "bits_per_byte"
"""Name of the loss that is comparable across tokenizers, and the default of the curve."""

_NOT_IN_JSON = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

Record: TypeAlias = JsonDict
"""One line of `metrics.jsonl`: `step`, `split` and numbers by name."""


def _summary_writer() -> "type[tensorboardX.SummaryWriter]":
    """Returns the class that writes event files. It is slow to import, and most runs do not need it."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        needs = 'needs tensorboardX: pip install "ultramem_jax[tensorboard]"'
        raise UserError(f"train.tensorboard = True: {needs} ({error})") from error
    return SummaryWriter


class MetricWriter:
    """Appends records to `<workdir>/metrics.jsonl`. Each is on disk when `write` returns.

    A killed process loses at most the line that it was writing. Use it as a context manager.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        tensorboard: bool = False,
        resume_step: int | None = None,
        without_validation: bool = False,
    ):
        """Opens the file for appending.

        Args:
            workdir: created if it does not exist.
            tensorboard: also write event files to `<workdir>/tensorboard`.
            resume_step: the step from which the run resumes. Records of later steps, and a half-written last
                line, are dropped, so that no step appears twice. None means a new run, and drops all records.
            without_validation: also drop validation records of that step, because it is evaluated again.

        Raises:
            OSError: the file cannot be read or written.
            UserError: event files are asked for, and the package that writes them is not installed.
        """
        summary_writer = _summary_writer() if tensorboard else None
        Path(workdir).mkdir(parents=True, exist_ok=True)
        self.path = Path(workdir) / METRICS_FILE
        kept = [] if resume_step is None else records_until(self.path, resume_step)
        if without_validation:
            kept = [r for r in kept if (r["step"], r.get("split")) != (resume_step, "validation")]
        replace_text(self.path, "".join(map(_line, kept)))
        self._file = self.path.open("ab", buffering=0)
        self._waiting = b""
        self._failed = False
        self._events: tensorboardX.SummaryWriter | None = None
        if summary_writer:
            # TensorBoard hides what earlier event files say about steps from `purge_step` on.
            purge_step = None if resume_step is None else resume_step + 1
            self._events = summary_writer(str(Path(workdir) / "tensorboard"), purge_step=purge_step)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, step: int, split: str, scalars: Scalars) -> None:
        """Writes one record.

        Args:
            step: optimizer steps done.
            split: `train`, `validation` or `test`; the first part of the names in TensorBoard.
            scalars: numbers or arrays of one element, in any nesting of dicts; see `flatten`.

        Raises:
            ValueError: a name is `step` or `split`, or a value is not a scalar.
        """
        flat = flatten(scalars)
        if reserved := flat.keys() & {"step", "split"}:
            raise ValueError(f"metric names {sorted(reserved)} are taken")
        self._waiting += _line({"step": int(step), "split": split, **flat}).encode()
        self._write_what_waits()
        if self._events is not None:
            for name, value in flat.items():
                self._events.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Closes the files."""
        self._write_what_waits()
        self._file.close()
        if self._events is not None:
            self._events.close()

    def _write_what_waits(self) -> None:
        """Writes what it can. A failure is reported once, and the rest waits for the next record."""
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) or 0 :]
        except OSError as error:
            if not self._failed:
                log.warning("%s: metrics cannot be written: %s", self.path, error.strerror)
            self._failed = True


def flatten(tree: Scalars, prefix: str = "") -> dict[str, int | float]:
    """Flattens nested dicts of scalars: {"memory_0": {"usage": 0.5}} becomes {"memory_0/usage": 0.5}.

    A tuple or list of one element, as Flax's `sow` leaves it, counts as its element.

    Raises:
        ValueError: a leaf is not a scalar, or two leaves get the same name.
    """
    flat: dict[str, int | float] = {}
    for name, value in _leaves(tree, prefix):
        if name in flat:
            raise ValueError(f"two metrics are named {name!r}")
        flat[name] = _scalar(name, value)
    return flat


def read_metrics(path: str | os.PathLike[str]) -> list[Record]:
    """Returns the records of a `metrics.jsonl`, in the order written.

    A line that is no record (cut off by a kill, or zeros after a power loss) is skipped. Unless it is a
    half-written last line, the log says so once.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    *lines, _ = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    records = [_parse(line) for line in lines]
    if bad := [number for number, record in enumerate(records, start=1) if record is None]:
        log.warning("%s: passing over %d lines that are no records, line %d first", path, len(bad), bad[0])
    return [record for record in records if record is not None]


def plot_loss_curve(
    metrics_path: str | os.PathLike[str],
    out_png: str | os.PathLike[str],
    title: str,
    metric: str = LOSS,
    unit: str = "bits per byte",
) -> None:
    """Draws `metric` over steps, training as a line and validation as points: a PNG of 1200 × 750 pixels.

    A training record without the metric, or with one that is not finite, breaks the line.

    Args:
        metrics_path: a `metrics.jsonl`.
        out_png: the file to write; its folders are created.
        title: shown above the axes.
        metric: its name in the records.
        unit: shown on the vertical axis after the word loss.

    Raises:
        ValueError: no record has the metric.
    """
    # `pyplot` would keep the figure, and a backend, for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(metrics_path)
    if not any(metric in record for record in records):
        raise ValueError(f"no record of {metrics_path} has the metric {metric!r}")
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_training(axes, *_curve(records, "train", metric))
    _draw_validation(axes, *_curve(records, "validation", metric), unit)
    _dress(axes, title, unit)
    Path(out_png).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png)


# ---- lines


def _line(record: Record) -> str:
    return json.dumps({name: _to_json(value) for name, value in record.items()}, allow_nan=False) + "\n"


def _to_json(value: object) -> object:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def _parse(line: str) -> Record | None:
    """Returns the record of a line: an object with an integer `step`, a name `split` and numbers.

    Else None.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("split"), str):
        return None
    values = {
        name: _NOT_IN_JSON.get(value, value) if isinstance(value, str) and name != "split" else value
        for name, value in record.items()
    }
    numbers = [value for name, value in values.items() if name != "split"]
    right = type(values.get("step")) is int and all(isinstance(value, int | float) for value in numbers)
    return values if right else None


def records_until(path: Path, step: int) -> list[Record]:
    """Returns the records up to a step, as `read_metrics` reads them; none where there is no file."""
    if not path.exists():
        return []
    return [record for record in read_metrics(path) if record["step"] <= step]


def _leaves(tree: Scalars, prefix: str) -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        name = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from _leaves(value, name)
        else:
            yield name, value


def _scalar(name: str, value: object) -> int | float:
    while isinstance(value, tuple | list) and len(value) == 1:
        value = value[0]
    if getattr(value, "size", 1) == 1 and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, bool | int | float):
        raise ValueError(f"metric {name!r} is not a scalar but {type(value).__name__}")
    return int(value) if isinstance(value, bool) else value


# ---- the curve

_TRAIN_COLOUR, _VALIDATION_COLOUR, _TEXT_COLOUR = "#4c78a8", "#e4572e", "#333333"
_MANY_POINTS = 200
"""Number of points from which the raw training loss is drawn pale, under its running mean."""
_MEAN_SHARE = 50
"""Divisor of the number of points that gives the span of the running mean: 1/50 of them."""


def _curve(records: list[Record], split: str, metric: str) -> tuple[list[int], list[float]]:
    points = [
        (record["step"], float(record[metric]))
        for record in records
        if record.get("split") == split and metric in record
    ]
    finite = [(step, value if math.isfinite(value) else math.nan) for step, value in points]
    return [step for step, _ in finite], [value for _, value in finite]


def _draw_training(axes: "Axes", steps: list[int], losses: list[float]) -> None:
    many = len(steps) >= _MANY_POINTS
    if steps:
        axes.plot(
            steps,
            losses,
            color=_TRAIN_COLOUR,
            linewidth=0.8 if many else 1.6,
            alpha=0.3 if many else 1.0,
            label=None if many else "training",
        )
    if many:
        window = len(steps) // _MEAN_SHARE
        axes.plot(
            steps,
            _running_mean(losses, window),
            color=_TRAIN_COLOUR,
            linewidth=1.8,
            label=f"training (mean of {window} records)",
        )


def _running_mean(values: list[float], window: int) -> list[float]:
    """Returns the mean of the last `window` values, or of fewer at the start. NaNs do not count."""
    means = []
    for end in range(1, len(values) + 1):
        recent = [value for value in values[max(0, end - window) : end] if not math.isnan(value)]
        means.append(sum(recent) / len(recent) if recent else math.nan)
    return means


def _draw_validation(axes: "Axes", steps: list[int], losses: list[float], unit: str) -> None:
    if not steps:
        return
    finite = [loss for loss in losses if not math.isnan(loss)]
    axes.plot(
        steps,
        losses,
        "o",
        color=_VALIDATION_COLOUR,
        markersize=6,
        markeredgecolor="white",
        label=f"validation, best {min(finite):.3f} {unit}" if finite else "validation",
    )


def _dress(axes: "Axes", title: str, unit: str) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_title(title, loc="left", color=_TEXT_COLOUR, fontweight="bold")
    axes.set_xlabel("optimizer steps", color=_TEXT_COLOUR)
    axes.set_ylabel(f"loss ({unit})", color=_TEXT_COLOUR)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
