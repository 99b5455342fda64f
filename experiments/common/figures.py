"""Draws figures: curves over several seeds, and the style that all figures share."""

import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullLocator

from ultramem_jax.reporting.markdown import interval, significant

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
SKY, ORANGE = "#56B4E9", "#E69F00"
GREY = "#555555"

COLOURS = {"dense": GREY, "moe": VERMILION, "pkm": GREEN, "ultramem": BLUE, "ultramem-v2": SKY}
"""Colours of systems, the same in all figures."""
_MORE_COLOURS = ("#CC79A7", "#E69F00", "#7A5195", "#8C564B", "#000000")
BAND_OPACITY = 0.18
_DPI = 160

Curve = tuple[Sequence[float], Sequence[float]]
"""Positions (steps, tokens, seconds) and values of one run."""


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of `width` × `height` inches.

    It belongs to no window system, because figures are only written to files.
    """
    return Figure(figsize=(width, height), layout="constrained")


def set_title(axes: Axes, text: str) -> None:
    """Sets the title of a panel."""
    axes.set_title(text, loc="left", fontsize=11, fontweight="bold")


def set_plain(axes: Axes, *, x_grid: bool = True, y_grid: bool = True) -> None:
    """Draws grid lines below the data, and removes the frame at the top and on the right."""
    for axis, on in ((axes.xaxis, x_grid), (axes.yaxis, y_grid)):
        if on:
            axis.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def mark_zero(axes: Axes, *, vertical: bool = False) -> None:
    """Draws a thin line at 0, below the data: horizontal, or `vertical`."""
    draw = axes.axvline if vertical else axes.axhline
    draw(0, color="#999999", linewidth=0.8, zorder=0)


def seeds_in_words(seeds: int) -> str:
    """Explains points with error bars for the label of an axis."""
    return f"mean ± standard deviation, {seeds} seeds" if seeds > 1 else "one seed"


def set_log(axis: Axis, ticks: Sequence[float] | None = None) -> None:
    """Makes an axis logarithmic, with labels that are plain numbers.

    Call it after the data is drawn.

    Args:
        axis: `axes.xaxis` or `axes.yaxis` of some axes.
        ticks: positions of the labels. None puts them at 1, 2 and 5 times powers of ten, and at more
            positions if the axis lies within one power of ten.
    """
    if axis is axis.axes.xaxis:
        axis.axes.set_xscale("log")
    else:
        axis.axes.set_yscale("log")
    if ticks is None:
        low, high = sorted(axis.get_view_interval())
        within_one = high < 10 * low
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if within_one else (1, 2, 5)))
    else:
        axis.set_ticks(list(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_locator(NullLocator())


def save(figure: Figure, path: str | os.PathLike[str]) -> pathlib.Path:
    """Writes a figure to `path`, and makes its folder; the same figure always gives the same file."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Leaves out the date that SVG and PDF files contain, so that files can be compared.
    date = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {})
    figure.savefig(path, dpi=_DPI, metadata=date)
    return path


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
    """Draws one line per system: the mean over seeds, in a band from the least to the largest value.

    Args:
        curves: (positions, values) of each seed, by system. All seeds of a system must have the same
            positions; a run that ended early cuts the others to its length.
        path: path of the figure, with its suffix (`.png`, `.svg`, `.pdf`); folders are made.
        title: title; blank for none.
        xlabel: label of the positions, with its unit.
        ylabel: label of the values, with its unit.
        legend: word before the last mean of each system in the legend.
        log_x: makes positions logarithmic.
        log_y: makes values logarithmic.
        y_limits: the lower and upper end of the vertical axis; None where the data decides.

    Returns:
        The path.

    Raises:
        ValueError: seeds of one system at different positions, or a system without a value.
    """
    figure = new_figure(7.2, 4.5)
    axes = figure.subplots()
    more = iter(_MORE_COLOURS * (1 + len(curves) // len(_MORE_COLOURS)))
    for system, runs in curves.items():
        positions, values = _stack(system, runs)
        mean, low, high = values.mean(0), values.min(0), values.max(0)
        colour = COLOURS.get(system) or next(more)
        # A single point makes no line, so it gets a dot.
        marker = "o" if positions.size == 1 else None
        label = f"{system}: {legend} {significant(float(mean[-1]), 4)}"
        if len(values) > 1:
            spread = interval(float(low[-1]), float(high[-1]))
            label += f" ({spread}, {len(values)} seeds)"
            axes.fill_between(positions, low, high, color=colour, alpha=BAND_OPACITY, linewidth=0)
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
        set_title(axes, title)
    set_plain(axes)
    if curves:
        axes.legend(frameon=False, fontsize=9)
    return save(figure, path)


def _stack(system: str, runs: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Returns positions (points,) and values (seeds, points) of the runs of a system."""
    points = min((min(len(x), len(y)) for x, y in runs), default=0)
    if points == 0:
        raise ValueError(f"{system} has no value to plot")
    positions = np.asarray(runs[0][0][:points], np.float64)
    for seed, (other, _) in enumerate(runs):
        if not np.array_equal(positions, np.asarray(other[:points], np.float64)):
            raise ValueError(f"{system}: seed {seed} was read at other positions than seed 0")
    return positions, np.stack([np.asarray(values[:points], np.float64) for _, values in runs])
