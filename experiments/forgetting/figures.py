"""Draws what models forget: what is kept against what is learned, and what is left of earlier tasks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from experiments.common import figures
from experiments.forgetting.records import FineTuning, Study, TaskSequence

COLOURS = {
    "sparse memory, AdamW": figures.BLUE,
    "sparse memory, SGD": figures.SKY,
    "full memory": figures.GREEN,
    "LoRA": figures.ORANGE,
    "full fine-tuning": figures.VERMILION,
}
PUBLISHED = {"sparse memory, SGD": 0.11, "LoRA": 0.71, "full fine-tuning": 0.89}
"""Published drops of F1 on another task (arXiv 2510.15103, Memory+ of 1.3 B parameters), by method."""


def plot_comparison(study: Study, path: Path) -> Path:
    """Draws, for each system, what is kept against what is learned: a line and its end for each run."""
    systems = list(dict.fromkeys(run.system for run in study.runs))
    figure = figures.new_figure(4.2 * len(systems) + 1.6, 8.0)
    panels = figure.subplots(2, len(systems), squeeze=False)
    for column, system in enumerate(systems):
        runs = [run for run in study.runs if run.system == system]
        above, below = panels[0][column], panels[1][column]
        figures.set_title(above, system)
        for run in runs:
            _draw(above, run, [point.kept for point in run.points])
            _draw(below, run, [point.bits_per_byte for point in run.points])
        before = [run.points[0].kept for run in runs]
        _mark_published(above, float(np.mean(before)))
        above.set_ylim(-0.03, 1.03)
        for axes in (above, below):
            axes.set_xlim(-0.03, 1.03)
            axes.set_xlabel("new facts learned")
            figures.set_plain(axes)
    panels[0][0].set_ylabel("facts taught before that are kept")
    panels[1][0].set_ylabel("bits per byte of enwik8")
    handles, labels = panels[0][0].get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=3, frameon=False)
    return figures.save(figure, path)


def _draw(axes: Axes, run: FineTuning, values: Sequence[float]) -> None:
    learned, colour = [point.learned for point in run.points], COLOURS.get(run.method, figures.GREY)
    axes.plot(learned, values, color=colour, linewidth=1.0, alpha=0.45)
    axes.plot(learned[-1:], values[-1:], "o", color=colour, markeredgecolor="white", label=run.method)


def _mark_published(axes: Axes, before: float) -> None:
    """Marks on the right what would be kept if as much were lost as was published."""
    for method, drop in PUBLISHED.items():
        at = before * (1 - drop)
        axes.plot([1.03], [at], "<", color=COLOURS[method], markersize=7, clip_on=False)
        axes.annotate(f"−{drop:.0%}", (1.05, at), color=COLOURS[method], va="center", annotation_clip=False)


def plot_sequence(study: Study, path: Path) -> Path:
    """Draws, for each system, what is left of each task after the last one."""
    systems = list(dict.fromkeys(sequence.system for sequence in study.sequences if sequence.left))
    figure = figures.new_figure(4.2 * len(systems) + 1.6, 4.4)
    panels = figure.subplots(1, len(systems), squeeze=False)[0]
    for axes, system in zip(panels, systems, strict=True):
        figures.set_title(axes, system)
        of_system = [one for one in study.sequences if one.system == system and one.left]
        for method in dict.fromkeys(sequence.method for sequence in of_system):
            _draw_left(axes, [sequence for sequence in of_system if sequence.method == method])
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("task")
        figures.set_plain(axes)
    panels[0].set_ylabel("facts of the task left after the last one")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figures.save(figure, path)


def _draw_left(axes: Axes, sequences: Sequence[TaskSequence]) -> None:
    """Draws the mean over the sequences that reached as many tasks as the longest."""
    method, most = sequences[0].method, max(len(sequence.left) for sequence in sequences)
    left = np.mean([sequence.left[-1] for sequence in sequences if len(sequence.left) == most], axis=0)
    colour = COLOURS.get(method, figures.GREY)
    axes.plot(np.arange(1, most + 1), left, "o-", color=colour, markersize=4, linewidth=1.4, label=method)
