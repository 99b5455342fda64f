"""What every experiment writes: where it ran, a table in Markdown and CSV, and curves over several seeds.

Nothing written names the host, a user or a folder outside the repository: results can be published as they
are.
"""

import csv
import datetime
import importlib.metadata
import math
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

import jax
import matplotlib
import numpy as np

matplotlib.use("Agg")  # figures are files; a laptop's window system, or none, must not matter

from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_CODE = ("ultramem_jax", "experiments/*.py", "experiments/configs", "launch.py")
"""What decides a result: a change in a written result or a document does not make a commit dirty."""
_GIT_SECONDS = 10
_GIB = 1 << 30

_COLOURS = {"dense": "#555555", "moe": "#D55E00", "pkm": "#009E73", "ultramem": "#0072B2"}
"""A system keeps its colour through all figures. Okabe and Ito's palette: distinct for the colour-blind."""
_MORE_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C564B", "#000000")
_BAND_OPACITY = 0.18

Curve = tuple[Sequence[float], Sequence[float]]
"""Positions (steps, tokens, seconds) and values of one run."""


def environment() -> dict[str, str]:
    """Where and with what this process runs, for the foot of a table.

    Returns:
        Strings by name, in order of display: command, commit (if this is a git checkout), date (UTC), cpu,
        cores, memory, os, python, the packages that numbers depend on, and the devices that JAX uses.
    """
    found = {"command": _command(sys.argv)}
    if commit := _commit():
        found["commit"] = commit
    found["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    found["cpu"] = _cpu_model()
    found["cores"] = str(_cores())
    if memory := _memory_bytes():
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
    return found


def write_table(
    rows: Sequence[Mapping[str, object]],
    path_without_suffix: str | os.PathLike[str],
    title: str,
    environment: Mapping[str, str],
    notes: Sequence[str] = (),
) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes a table as `.md` (to read, rounded) and `.csv` (to compute with, as given).

    Args:
        rows: values by column; columns appear in the order in which rows first name them, absent values are
            blank.
        path_without_suffix: folders are made.
        title: heading of the Markdown file; name units in it or in the columns.
        environment: of `environment()`.
        notes: paragraphs between the table and the environment.

    Returns:
        The two paths.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    markdown = _with_suffix(path_without_suffix, ".md")
    lines = [f"# {title}", "", *_markdown_table(rows, columns), ""]
    for note in notes:
        lines += [note, ""]
    lines += ["## Where this was measured", ""]
    lines += [f"- {name}: `{value}`" for name, value in environment.items()]
    markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = _with_suffix(path_without_suffix, ".csv")
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return markdown, table


def plot_curves(
    curves: Mapping[str, Sequence[Curve]],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    xlabel: str = "training step",
    ylabel: str = "validation loss (nats per token)",
    legend: str = "final",
    log_x: bool = False,
    log_y: bool = False,
    y_limits: tuple[float | None, float | None] = (None, None),
) -> pathlib.Path:
    """Draws one line per system: the mean over seeds, in a band from the least to the largest.

    Args:
        curves: (positions, values) of each seed, by system. Seeds of one system are read at the same
            positions; a run that ended early cuts the others to its length.
        path: of the figure, with its suffix (`.png`, `.svg`, `.pdf`); folders are made.
        title: blank for none.
        xlabel: with its unit.
        ylabel: with its unit.
        legend: word before the last mean of each system in the legend.
        log_x: logarithmic positions.
        log_y: logarithmic values.
        y_limits: the lower and upper end of the vertical axis, None where the data decides.

    Returns:
        The path.

    Raises:
        ValueError: seeds of one system at different positions, or a system without a value.
    """
    path = _with_suffix(path, "")
    figure, axes = plt.subplots(figsize=(7.2, 4.5), layout="constrained")
    more = iter(_MORE_COLOURS * (1 + len(curves) // len(_MORE_COLOURS)))
    for system, runs in curves.items():
        positions, values = _stack(system, runs)
        mean, low, high = values.mean(0), values.min(0), values.max(0)
        colour = _COLOURS.get(system) or next(more)
        # A single point has no line, so it gets a dot.
        marker = "o" if positions.size == 1 else None
        label = f"{system}: {legend} {_significant(float(mean[-1]), 4)}"
        if len(values) > 1:
            spread = f"{_significant(float(low[-1]), 4)}–{_significant(float(high[-1]), 4)}"
            label += f" ({spread}, {len(values)} seeds)"
            axes.fill_between(positions, low, high, color=colour, alpha=_BAND_OPACITY, linewidth=0)
        axes.plot(positions, mean, color=colour, linewidth=1.8, marker=marker, label=label)
    if log_x:
        axes.set_xscale("log")
    elif axes.get_xlim()[1] >= 1000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if log_y:
        axes.set_yscale("log")
    axes.set_ylim(*y_limits)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if title:
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if curves:
        axes.legend(frameon=False, fontsize=9)
    # Without the date that PNG, SVG and PDF would carry, the same numbers give the same file.
    date = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {})
    figure.savefig(path, dpi=160, metadata=date)
    plt.close(figure)
    return path


def _with_suffix(path: str | os.PathLike[str], suffix: str) -> pathlib.Path:
    """`path` with a suffix appended (not replaced: a name may have dots), its folder made."""
    path = pathlib.Path(f"{os.fspath(path)}{suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _stack(system: str, runs: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Positions (points,) and values (seeds, points)."""
    points = min((min(len(x), len(y)) for x, y in runs), default=0)
    if points == 0:
        raise ValueError(f"{system} has no value to plot")
    positions = np.asarray(runs[0][0][:points], np.float64)
    for seed, (other, _) in enumerate(runs):
        if not np.array_equal(positions, np.asarray(other[:points], np.float64)):
            raise ValueError(f"{system}: seed {seed} was read at other positions than seed 0")
    return positions, np.stack([np.asarray(values[:points], np.float64) for _, values in runs])


def _markdown_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> list[str]:
    """The lines of a table; columns of numbers are set flush right."""
    if not columns:
        return ["(no rows)"]
    numeric = [
        all(isinstance(row.get(column), int | float | np.number | None) for row in rows) for column in columns
    ]
    lines = [_markdown_line(columns), _markdown_line(["--:" if flush else ":--" for flush in numeric])]
    return lines + [_markdown_line([_cell(row.get(column, "")) for column in columns]) for row in rows]


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"


def _cell(value: object) -> str:
    """A value to read: counts with commas, measurements to four significant digits."""
    if value is None:
        return ""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        return _significant(float(value), 4)
    return str(value)


def _significant(value: float, digits: int) -> str:
    """`value` with `digits` significant digits, written out between 1e-4 and 1e9."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if not -4 <= magnitude < 9:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(digits - 1 - magnitude, 0)}f}"


def _command(arguments: Sequence[str]) -> str:
    """The command line as one types it in the repository's root; no folder outside of it is named."""
    program, *flags = arguments or [""]
    if os.path.exists(program):
        program = str(pathlib.Path(program).resolve())
    return shlex.join(["python", _relative(program), *(_shorten(flag) for flag in flags)])


def _shorten(flag: str) -> str:
    name, equals, value = flag.partition("=")
    return f"{name}={_relative(value)}" if equals else _relative(name)


def _relative(text: str) -> str:
    """A path, relative to the repository; of one outside of it only the name is left."""
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
    """The short hash of the commit, marked if the code has changed since; blank outside a git checkout."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None or head.returncode != 0:
        return ""
    changed = _git("status", "--porcelain", "--", *_CODE)
    dirty = changed is not None and bool(changed.stdout.strip())
    return head.stdout.strip() + (" with uncommitted changes" if dirty else "")


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpu_model() -> str:
    match = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return (match[1].strip() if match else "") or platform.processor() or platform.machine()


def _cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int:
    """Memory that this process may use: the machine's, or its container's limit if less. 0: unknown."""
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
    limit = (
        _read("/sys/fs/cgroup/memory.max").strip()
        or _read("/sys/fs/cgroup/memory/memory.limit_in_bytes").strip()
    )
    return min(machine, int(limit)) if limit.isdigit() else machine


def _operating_system() -> str:
    """Name and version; never `platform.node()`, nor a kernel's version, which may carry a host's name."""
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()
