"""Draws the figures of the ablation: our differences beside the published ones, each in its own unit."""

import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence

from experiments.common import figures
from experiments.common.seeds import deviation

_OURS, _PAPER = figures.BLUE, figures.VERMILION
_OUR_UNIT = "bits per byte"
_PAPER_UNIT = "nats per token"

Point = tuple[str, Sequence[float], float | None]
"""Label, our differences over the seeds, and the published difference."""


def plot_ladder(points: Sequence[Point], path: str | os.PathLike[str]) -> pathlib.Path:
    """Draws the change of validation loss since the first rung: ours on the left, the paper's on the right.

    Args:
        points: points of the rungs, first to last.
        path: path of the figure; folders are made.

    Returns:
        The path.
    """
    labels, ours = [label for label, _, _ in points], [values for _, values, _ in points]
    published = [value for _, _, value in points]
    figure = figures.new_figure(9.6, 4.6)
    left, right = figure.subplots(1, 2, sharey=True)
    rows = range(len(labels))
    for row, values in zip(rows, ours, strict=True):
        left.plot(values, [row] * len(values), "o", color=_OURS, alpha=0.3, markersize=4, markeredgewidth=0)
    left.errorbar(
        [statistics.fmean(values) for values in ours],
        rows,
        xerr=[deviation(values) or 0.0 for values in ours],
        fmt="o-",
        color=_OURS,
        linewidth=1.4,
        capsize=3,
    )
    right.plot(published, rows, "o-", color=_PAPER, linewidth=1.4)
    left.set_yticks(list(rows), [("" if row == 0 else "+ ") + label for row, label in enumerate(labels)])
    left.invert_yaxis()
    seeds = len(ours[0])
    about = figures.seeds_in_words(seeds)
    left.set_xlabel(f"change since the first rung, {_OUR_UNIT}\n({about})")
    right.set_xlabel(f"change since the first rung, {_PAPER_UNIT}\n(151 M parameters, table 2)")
    figures.set_title(left, "here")
    figures.set_title(right, "UltraMem paper")
    for axes in (left, right):
        figures.set_plain(axes, y_grid=False)
        figures.mark_zero(axes, vertical=True)
    return figures.save(figure, path)


def plot_grids(grids: Mapping[str, Sequence[Point]], path: str | os.PathLike[str]) -> pathlib.Path:
    """Draws the differences of each grid to its base: ours above, and the paper's below if there are any.

    Args:
        grids: points by name of the grid; the labels of points begin or end with it.
        path: path of the figure; folders are made.

    Returns:
        The path.
    """
    figure = figures.new_figure(1.6 + 2.2 * len(grids), 5.2)
    rows = figure.subplots(2, len(grids), squeeze=False)
    for column, (name, points) in enumerate(grids.items()):
        labels = [label.removeprefix(f"{name}-").removesuffix(f"-{name}") for label, _, _ in points]
        places = range(len(points))
        above, below = rows[0][column], rows[1][column]
        above.errorbar(
            places,
            [statistics.fmean(ours) for _, ours, _ in points],
            yerr=[deviation(ours) or 0.0 for _, ours, _ in points],
            fmt="o",
            color=_OURS,
            capsize=3,
        )
        known = [(place, p[2]) for place, p in zip(places, points, strict=True) if p[2] is not None]
        if known:
            below.plot(*zip(*known, strict=True), "o", color=_PAPER)
        figures.set_title(above, name)
        drawn = [above, below] if known else [above]
        below.set_axis_off()
        for axes in drawn:
            axes.set_axis_on()
            axes.set_xticks(list(places), labels)
            axes.set_xlim(-0.5, len(points) - 0.5)
            figures.mark_zero(axes)
            figures.set_plain(axes, x_grid=False)
    rows[0][0].set_ylabel(f"here: Δ, {_OUR_UNIT}")
    rows[1][0].set_ylabel(f"paper: Δ, {_PAPER_UNIT}")
    return figures.save(figure, path)
