"""Draws what models forget: what is kept against what is learned, and what is left of earlier tasks."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common import figures
from experiments.forgetting.measurements import Study
from experiments.forgetting.records import TaskSequence

COLOURS = {
    "sparse memory, AdamW": figures.BLUE,
    "sparse memory, SGD": figures.SKY,
    "full memory": figures.GREEN,
    "LoRA": figures.ORANGE,
    "full fine-tuning": figures.VERMILION,
}
PUBLISHED = {"sparse memory, SGD": 0.11, "LoRA": 0.71, "full fine-tuning": 0.89}
"""Published drops of F1 on another task (arXiv 2510.15103, Memory+ of 1.3 B parameters), by method."""
_TITLE_WIDTH = 30
"""Characters of a title that fit above a panel; more take another line."""


def plot_comparison(study: Study, path: Path) -> Path:
    """Draws, for each system, what is kept against what is learned: a line and its end for each run."""
    systems = list(dict.fromkeys(run.system for run in study.runs))
    figure = figures.new_figure(4.2 * len(systems) + 1.6, 8.0)
    panels = figure.subplots(2, len(systems), squeeze=False)
    for column, system in enumerate(systems):
        runs = [run for run in study.runs if run.system == system]
        above, below = panels[0][column], panels[1][column]
        figures.set_title(above, textwrap.fill(system, _TITLE_WIDTH))
        for run in runs:
            end = run.end
            points = [*(point for point in run.points if point.step < end.step), end]
            learned = [point.learned for point in points]
            _draw(above, run.method, learned, [point.kept for point in points])
            _draw(below, run.method, learned, [point.bits_per_byte for point in points])
        before = [run.points[0].kept for run in runs]
        _mark_published(above, float(np.mean(before)))
        above.set_ylim(-0.03, 1.03)
        for axes in (above, below):
            axes.set_xlim(-0.03, 1.03)
            axes.set_xlabel("new facts learned")
            figures.set_plain(axes)
    panels[0][0].set_ylabel("facts taught before that are kept")
    panels[1][0].set_ylabel("bits per byte of enwik8")
    _set_legend(figure, panels[0])
    return figures.save(figure, path)


def _draw(axes: Axes, method: str, learned: Sequence[float], values: Sequence[float]) -> None:
    colour = COLOURS.get(method, figures.GREY)
    axes.plot(learned, values, color=colour, linewidth=1.0, alpha=0.45)
    axes.plot(learned[-1:], values[-1:], "o", color=colour, markeredgecolor="white", label=method)


def _set_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """Adds a legend of what any of the panels shows, each label once."""
    both = [axes.get_legend_handles_labels() for axes in panels]
    by_label = {
        label: handle for handles, labels in both for handle, label in zip(handles, labels, strict=True)
    }
    figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=3, frameon=False)


def _mark_published(axes: Axes, before: float) -> None:
    """Marks on the right what would be kept if as much were lost as was published."""
    for method, drop in PUBLISHED.items():
        at = before * (1 - drop)
        axes.plot([1.03], [at], "<", color=COLOURS[method], markersize=7, clip_on=False)
        axes.annotate(f"−{drop:.0%}", (1.05, at), color=COLOURS[method], va="center", annotation_clip=False)


def plot_sequence(study: Study, path: Path) -> Path:
    """Draws, for each system, what is left of each task after the last one.

    Sequences in which a loss became infinite are left out.
    """
    systems = list(dict.fromkeys(sequence.system for sequence in study.sequences))
    figure = figures.new_figure(4.2 * len(systems) + 1.6, 4.4)
    panels = figure.subplots(1, len(systems), squeeze=False)[0]
    for axes, system in zip(panels, systems, strict=True):
        figures.set_title(axes, textwrap.fill(system, _TITLE_WIDTH))
        of_system = [one for one in study.sequences if one.system == system and one.is_whole]
        for method in dict.fromkeys(sequence.method for sequence in of_system):
            _draw_left(axes, [sequence for sequence in of_system if sequence.method == method])
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("task")
        figures.set_plain(axes)
    panels[0].set_ylabel("facts of the task left after the last one")
    _set_legend(figure, panels)
    return figures.save(figure, path)


def _draw_left(axes: Axes, whole: Sequence[TaskSequence]) -> None:
    """Draws the mean over sequences of one method and of equally many tasks."""
    left, method = np.mean([sequence.left[-1] for sequence in whole], axis=0), whole[0].method
    colour = COLOURS.get(method, figures.GREY)
    axes.plot(
        np.arange(1, len(left) + 1), left, "o-", color=colour, markersize=4, linewidth=1.4, label=method
    )
