"""Draws the speeds of `open_models`."""

import pathlib
import statistics

from matplotlib.axes import Axes

from experiments.common import figures
from experiments.open_models.records import OURS, Study

_COLOURS = {OURS: figures.BLUE, "transformers": figures.VERMILION, "llama.cpp": figures.GREEN}


def plot_speeds(study: Study, path: pathlib.Path) -> pathlib.Path:
    """Draws tokens per second of prefill and decoding: the median, and the range of all rounds.

    Args:
        study: measurements with speeds.
        path: path of the figure; its folder is made.

    Returns:
        The path.
    """
    figure = figures.new_figure(9.6, 0.9 + 0.36 * len(study.speeds))
    prefill, decode = figure.subplots(1, 2, sharey=True)
    _draw(prefill, study, decode=False)
    _draw(decode, study, decode=True)
    prefill.set_yticks(range(len(study.speeds)), [speed.name for speed in study.speeds])
    prefill.set_ylim(len(study.speeds) - 0.5, -0.5)
    settings = study.settings
    figures.set_title(prefill, f"prefill, {settings.prompt_tokens} tokens")
    figures.set_title(decode, f"decoding, {settings.new_tokens} tokens after them")
    return figures.save(figure, path)


def _draw(axes: Axes, study: Study, *, decode: bool) -> None:
    for position, speed in enumerate(study.speeds):
        rates = study.tokens_per_second(speed.decode if decode else speed.prefill, decode)
        colour = _COLOURS.get(speed.program, figures.GREY)
        axes.plot([min(rates), max(rates)], [position] * 2, color=colour, linewidth=3, alpha=0.4)
        median = statistics.median(rates)
        axes.plot([median], [position], "o", color=colour, markersize=6)
        axes.annotate(
            f"{median:,.3g}" if median < 1000 else f"{median:,.0f}",
            (median, position),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.set_xlim(left=0)
    axes.margins(x=0.08)
    axes.set_xlabel("tokens/s: median, range of all rounds")
    figures.set_plain(axes, y_grid=False)
    axes.tick_params(axis="y", length=0)
