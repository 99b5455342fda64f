"""Draws the facts that models hold against their parameters."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from experiments.common import figures
from experiments.recall.records import Run, Study
from experiments.recall.systems import DENSE

_COLOURS = figures.COLOURS | {"engram": figures.ORANGE}


def plot(study: Study, path: Path) -> Path:
    """Draws bits held, and bits per parameter, against all parameters: a line for each system.

    A line is the mean over the seeds, in a band from the least to the largest value.
    """
    figure = figures.new_figure(11.0, 5.0)
    held, per_parameter = figure.subplots(1, 2)
    _draw(held, study, lambda run: run.statements.stored_bits / 1e3)
    _draw(per_parameter, study, lambda run: run.bits_per_parameter)
    held.axhline(study.all_bits / 1e3, color="black", linewidth=1.0, linestyle="--", label="all bits")
    held.set_ylim(0, 1.06 * study.all_bits / 1e3)
    figures.set_title(held, f"What is held of {study.people:,} people")
    held.set_ylabel("bits, in thousands")
    figures.set_title(per_parameter, "Capacity that is used")
    per_parameter.set_ylabel("bits per parameter")
    if any(run.bits_per_parameter > 0 for run in study.runs):
        figures.set_log(per_parameter.yaxis)
    for axes in (held, per_parameter):
        axes.set_xlabel("parameters, in thousands, with embeddings")
        figures.set_log(axes.xaxis)
        figures.set_plain(axes)
    handles, labels = held.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    return figures.save(figure, path)


def _draw(axes: Axes, study: Study, value: Callable[[Run], float]) -> None:
    for system in dict.fromkeys(run.system for run in study.runs):
        of_system = [run for run in study.runs if run.system == system]
        sizes = sorted({run.size for run in of_system})
        points = [[run for run in of_system if run.size == size] for size in sizes]
        places = [runs[0].parameters / 1e3 for runs in points]
        values = [[value(run) for run in runs] for runs in points]
        means = [sum(of) / len(of) for of in values]
        colour = _COLOURS[system]
        if system == DENSE:
            _draw_point(axes, places[0], values[0], colour)
            continue
        axes.plot(places, means, "o-", color=colour, linewidth=1.6, markersize=4, label=system)
        if len(values[0]) > 1:
            low, high = list(map(min, values)), list(map(max, values))
            axes.fill_between(places, low, high, color=colour, alpha=figures.BAND_OPACITY, linewidth=0)


def _draw_point(axes: Axes, place: float, values: Sequence[float], colour: str) -> None:
    """Draws the dense model, from its least to its largest value, and its mean over the whole width."""
    mean = sum(values) / len(values)
    below, above = mean - min(values), max(values) - mean
    axes.errorbar(
        [place], [mean], yerr=[[below], [above]], fmt="D", color=colour, capsize=4, markersize=6, label=DENSE
    )
    axes.axhline(mean, color=colour, linewidth=0.8, linestyle=":", zorder=0)
