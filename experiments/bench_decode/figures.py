"""Draws the figures of `bench_decode`, like figures 1b, 1c and 6c of UltraMem (arXiv 2411.12364)."""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, LogLocator

from experiments.bench_decode.records import DecodeStudy, DecodeTiming
from experiments.common import figures
from ultramem_jax.accounting import bytes_per_token, decode_cost
from ultramem_jax.config import ModelConfig
from ultramem_jax.presets import PRESETS
from ultramem_jax.reporting.markdown import significant

NAMES = {"dense": "dense", "moe": "MoE", "pkm": "PKM", "ultramem": "UltraMem", "ultramem-v2": "UltraMemV2"}
"""Names of systems in figures and tables."""

PUBLISHED_BAND = (2.0, 6.0)
"""Range of the time of MoE over that of UltraMem in the paper.

The paper measures on an A100 with a cache of 2,048, at equal compute and parameters. The ratio is largest at
batch 64.
"""
PUBLISHED_MEETING = 131_072
"""Batch near which MoE and UltraMem read equally many bytes in the paper."""
_MARKED_BATCHES = (16, 64)
_FAR = 5.0
"""Ratio to the median from which the figure names a repeat.

The band of such a repeat would look like an error of the figure.
"""
_MILLI = 1e-3
_TOUCHED_BATCHES = tuple(sorted({round(2 ** (i / 4)) for i in range(4 * 17 + 1)}))
"""Batches of the figure of bytes, 1 to 131,072."""
_TICKS = (1, 8, 64, 512, 4096, PUBLISHED_MEETING)
_MARKERS = {"dense": "s", "moe": "^", "pkm": "D", "ultramem": "o", "ultramem-v2": "v"}
_PANEL = 5.2
"""Width of a panel in inches."""
_FAINT = "#888888"
_ON_WHITE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.0}
"""Background of words that lie on lines."""
_PUBLISHED = "#c9b458"
"""Colour of the paper's results; no system has it."""
_CLOSE = 1.1
"""Ratio of two times below which their labels would overlap."""


def write(study: DecodeStudy, folder: pathlib.Path, stem: str) -> dict[str, pathlib.Path]:
    """Draws what the study contains: time by batch, bytes by batch, time by sparsity.

    Args:
        study: the measurements.
        folder: folder of the figures; it is made.
        stem: beginning of the names of the files.

    Returns:
        Paths by caption.
    """
    drawn: dict[str, pathlib.Path] = {}
    if study.of("batch"):
        path = folder / f"{stem}_batch.png"
        drawn["time of a step against the batch, by system"] = plot_batches(study, path)
    # A preset that this version does not know cannot be counted.
    configs = {t.system: PRESETS[t.preset] for t in study.of("batch") if t.preset in PRESETS}
    if any(config.moe or config.memory for config in configs.values()):
        path = folder / f"{stem}_bytes.png"
        drawn["parameters that a step reads against the batch, by system"] = plot_touched(configs, path)
    if any(t.sparse_over_dense for t in study.of("sparsity")):
        path = folder / f"{stem}_sparsity.png"
        drawn["time of a step against sparse parameters, by system"] = plot_sparsity(study, path)
    return drawn


def plot_batches(study: DecodeStudy, path: str | os.PathLike[str]) -> pathlib.Path:
    """Draws the time of a step against the batch, with a panel per dtype.

    Lines are medians, in a band of the range of all repeats. Arrows show the ratio of MoE to UltraMem at some
    batches. Another band shows where MoE would be if it took 2 to 6 times as long as our UltraMem, as
    published. Dotted lines are floors.

    Args:
        study: measurements with timings of the study `batch`.
        path: path of the figure; folders are made.

    Returns:
        The path.
    """
    dtypes = [dtype for dtype in study.dtypes if study.of("batch", dtype)]
    figure, panels = _panels(dtypes)
    batches = sorted({t.batch for t in study.of("batch")})
    for axes, dtype in zip(panels, dtypes, strict=True):
        systems = study.by_system("batch", dtype)
        for system, timings in systems.items():
            positions = [t.batch for t in timings]
            _draw_times(axes, system, positions, timings)
            floors = [study.floor(t) for t in timings]
            if None not in floors:
                axes.plot(
                    positions,
                    [floor / _MILLI for floor in floors if floor],
                    ":",
                    color=_colour(system),
                    linewidth=1.2,
                    zorder=1.5,
                )
        if {"moe", "ultramem"} <= systems.keys():
            _mark_published(axes, [t.batch for t in systems["ultramem"]], systems["ultramem"])
            _mark_ratio(axes, systems["moe"], systems["ultramem"])
        lengths = " or ".join(str(n) for n in sorted({t.cache_length for t in study.of("batch", dtype)}))
        axes.set_xlabel(f"sequences in the batch, each with {lengths} tokens in its cache")
        figures.set_title(axes, dtype)
        figures.set_log(axes.xaxis, batches)
    _finish(panels)
    extra: list[Line2D | Patch] = [Line2D([], [], linestyle=":", color=_FAINT, label="floor of each, here")]
    extra.append(_range_patch())
    if any({"moe", "ultramem"} <= study.by_system("batch", d).keys() for d in dtypes):
        extra.append(_published_patch())
    _legend(figure, study.by_system("batch"), extra)
    return figures.save(figure, path)


def plot_touched(configs: Mapping[str, ModelConfig], path: str | os.PathLike[str]) -> pathlib.Path:
    """Draws the parameters that a step reads against its batch, 1 to 131,072 tokens: counted, not measured.

    The left panel shows the experts or rows that tokens choose. Lines are the expected number of distinct
    ones. Dashed lines are the paper's count, which assumes that no two tokens choose the same. The right
    panel adds all other weights. All weights are float32.

    Args:
        configs: models by system; the left panel shows those with experts or memories.
        path: path of the figure; folders are made.

    Returns:
        The path.
    """
    figure = figures.new_figure(2 * _PANEL, 4.6)
    left, right = figure.subplots(1, 2, sharex=True)
    totals: dict[str, float] = {}
    for system, config in configs.items():
        colour = _colour(system)
        chosen = [expected_chosen_bytes(config, batch) for batch in _TOUCHED_BATCHES]
        counts = [bytes_per_token(config, batch) for batch in _TOUCHED_BATCHES]
        if config.moe or config.memory:
            left.plot(_TOUCHED_BATCHES, chosen, color=colour, linewidth=1.8)
            paper = [count.sparse for count in counts]
            left.plot(_TOUCHED_BATCHES, paper, "--", color=colour, linewidth=1.1)
        whole = [count.dense + more for count, more in zip(counts, chosen, strict=True)]
        right.plot(_TOUCHED_BATCHES, whole, color=colour, linewidth=1.8)
        totals[system] = whole[-1]
    figures.set_title(left, "experts or rows alone")
    figures.set_title(right, "all parameters")
    if {"moe", "ultramem"} <= totals.keys():
        share = significant(100 * totals["ultramem"] / totals["moe"], 3)
        note = (
            f"near {PUBLISHED_MEETING:,} MoE and UltraMem\nmeet in the paper; here UltraMem\n"
            f"reads {share} % of all that MoE reads"
        )
        place = {"xytext": (-6, 0), "textcoords": "offset points", "xycoords": ("data", "axes fraction")}
        left.annotate(note, (PUBLISHED_MEETING, 0.15), ha="right", va="center", fontsize=9, **place)
    for axes in (left, right):
        figures.set_log(axes.xaxis, _TICKS)
        figures.set_log(axes.yaxis)
        axes.yaxis.set_major_formatter(EngFormatter("B"))
        figures.set_plain(axes)
        axes.axvline(PUBLISHED_MEETING, color=_FAINT, linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)
        axes.set_xlabel("tokens of a step")
    left.yaxis.set_major_locator(LogLocator())
    left.set_ylabel("read per step (float32)")
    extra = [
        Line2D([], [], color=_FAINT, linewidth=1.8, label="expected, choices uniform"),
        Line2D([], [], color=_FAINT, linewidth=1.1, linestyle="--", label="if no two tokens chose the same"),
    ]
    _legend(figure, {system: [] for system in configs}, extra, markers=False)
    return figures.save(figure, path)


def expected_chosen_bytes(config: ModelConfig, batch: int) -> float:
    """Returns the expected bytes of experts or rows that a step of `batch` tokens reads, float32 weights."""
    cost = decode_cost(config, batch, 1, dtype="float32", cache_dtype="float32")
    experts = config.moe.num_experts if config.moe else 1
    # By the paper's count, as many tokens as there are experts read all experts. The expected share of the
    # experts has that share of the bytes.
    return bytes_per_token(config, experts).experts * cost.experts / experts + cost.memory_rows.bytes


def plot_sparsity(study: DecodeStudy, path: str | os.PathLike[str]) -> pathlib.Path:
    """Draws the time of a step against sparse over dense parameters, with a panel per dtype.

    The dense model is a horizontal line. The band is that of `plot_batches`.

    Args:
        study: measurements with timings of the study `sparsity`, of sparse models.
        path: path of the figure; folders are made.

    Returns:
        The path.
    """
    dtypes = [d for d in study.dtypes if any(t.sparse_over_dense for t in study.of("sparsity", d))]
    figure, panels = _panels(dtypes)
    shown: dict[str, Sequence[DecodeTiming]] = {}
    extra: list[Line2D | Patch] = []
    for axes, dtype in zip(panels, dtypes, strict=True):
        systems = study.by_system("sparsity", dtype)
        systems = {name: timings for name, timings in systems.items() if timings[0].sparse_over_dense}
        for system, timings in systems.items():
            positions = [t.sparse_over_dense for t in timings]
            _draw_times(axes, system, positions, timings)
        _mark_growth(axes, systems)
        if {"moe", "ultramem"} <= systems.keys():
            positions = [t.sparse_over_dense for t in systems["ultramem"]]
            _mark_published(axes, positions, systems["ultramem"])
            extra = [_range_patch(), _published_patch()]
        any_timing = study.of("sparsity", dtype)[0]
        dense = study.beside(any_timing, "dense")
        if dense:
            axes.axhline(dense.median / _MILLI, color=figures.GREY, linewidth=1.5, linestyle="--")
        shown |= systems | ({"dense": [dense]} if dense else {})
        sizes = sorted({t.sparse_over_dense for timings in systems.values() for t in timings})
        axes.set_xlabel("sparse / dense parameters")
        figures.set_title(axes, f"{dtype}, batch {any_timing.batch}")
        figures.set_log(axes.xaxis, _powers(sizes))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axes.set_xlim(sizes[0] / 1.2, sizes[-1] * 2.5)  # leaves room for the labels at the ends of lines
    _finish(panels)
    _legend(figure, shown, extra, level=["dense"])
    return figures.save(figure, path)


def _panels(dtypes: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Returns a figure with a panel per dtype; all panels share one vertical axis."""
    figure = figures.new_figure(max(_PANEL * len(dtypes), 6.4), 4.6)
    return figure, list(figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0])


def _finish(panels: Sequence[Axes]) -> None:
    figures.set_log(panels[0].yaxis)
    panels[0].set_ylabel("ms per step (one token per sequence)")
    for axes in panels:
        figures.set_plain(axes)


def _draw_times(axes: Axes, system: str, positions: Sequence[float], timings: Sequence[DecodeTiming]) -> None:
    """Draws medians, and the range of all repeats as a band."""
    lows = [min(t.seconds) / _MILLI for t in timings]
    highs = [max(t.seconds) / _MILLI for t in timings]
    colour = _colour(system)
    axes.fill_between(positions, lows, highs, color=colour, alpha=figures.BAND_OPACITY, linewidth=0)
    medians = [t.median / _MILLI for t in timings]
    axes.plot(positions, medians, marker=_MARKERS.get(system, "o"), color=colour, linewidth=1.8, markersize=5)
    for position, timing in zip(positions, timings, strict=True):
        _mark_far(axes, position, timing)


def _mark_published(axes: Axes, positions: Sequence[float], ultramem: Sequence[DecodeTiming]) -> None:
    medians = np.array([t.median for t in ultramem]) / _MILLI
    low, high = PUBLISHED_BAND
    axes.fill_between(
        positions,
        low * medians,
        high * medians,
        color=_PUBLISHED,
        alpha=figures.BAND_OPACITY,
        linewidth=0,
        zorder=0.5,
    )


def _published_patch() -> Patch:
    low, high = PUBLISHED_BAND
    label = f"{low:g}–{high:g} × UltraMem: MoE in the paper (A100, cache 2,048)"
    return Patch(facecolor=_PUBLISHED, alpha=figures.BAND_OPACITY, label=label)


def _range_patch() -> Patch:
    return Patch(facecolor=_FAINT, alpha=figures.BAND_OPACITY, label="range of all repeats")


def _mark_ratio(axes: Axes, moe: Sequence[DecodeTiming], ultramem: Sequence[DecodeTiming]) -> None:
    """Draws arrows from UltraMem up to MoE, with the ratio of their medians."""
    medians = [{t.batch: t.median for t in timings} for timings in (ultramem, moe)]
    for batch in _MARKED_BATCHES:
        low, high = (of_batch.get(batch) for of_batch in medians)
        if not low or not high:
            continue
        arrow = {"arrowstyle": "<->", "color": _colour("moe"), "linewidth": 1.0, "shrinkA": 4, "shrinkB": 4}
        axes.annotate("", (batch, high / _MILLI), (batch, low / _MILLI), arrowprops=arrow)
        axes.annotate(
            f"{significant(high / low, 2)} ×",
            (batch, math.sqrt(low * high) / _MILLI),
            xytext=(-5, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=10,
            fontweight="bold",
            color=_colour("moe"),
            bbox=_ON_WHITE,
        )


def _mark_far(axes: Axes, position: float, timing: DecodeTiming) -> None:
    """Writes beside a band how many of its repeats took far longer than the others.

    The reason is not recorded, so the text gives none.
    """
    far = [seconds for seconds in timing.seconds if seconds > _FAR * timing.median]
    if far:
        others = [seconds for seconds in timing.seconds if seconds not in far]
        low, high, longest = (significant(s / _MILLI, 2) for s in (min(others), max(others), max(far)))
        took = "took" if len(far) == 1 else "took up to"
        axes.annotate(
            f"{len(far)} of {len(timing.seconds)} repeats {took} {longest} ms,\nthe others {low} to {high}",
            (position, max(far) / _MILLI),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=8,
            color=_colour(timing.system),
            bbox=_ON_WHITE,
        )


def _mark_growth(axes: Axes, systems: Mapping[str, Sequence[DecodeTiming]]) -> None:
    """Writes at the end of each line how many times as long the largest size takes as the smallest."""
    ends = sorted((timings[-1].median, system) for system, timings in systems.items() if len(timings) > 1)
    for rank, (median, system) in enumerate(ends):
        # Moves apart the labels of lines that end close to each other.
        below = rank + 1 < len(ends) and ends[rank + 1][0] < _CLOSE * median
        above = rank > 0 and median < _CLOSE * ends[rank - 1][0]
        timings = systems[system]
        axes.annotate(
            f"{significant(median / timings[0].median, 3)} × smallest",
            (timings[-1].sparse_over_dense, median / _MILLI),
            xytext=(7, 7 * (above - below)),
            textcoords="offset points",
            color=_colour(system),
            va="center",
            fontsize=9,
        )


def _legend(
    figure: Figure,
    systems: Mapping[str, object],
    extra: Sequence[Line2D | Patch],
    *,
    markers: bool = True,
    level: Sequence[str] = (),
) -> None:
    """Draws one legend for all panels, below them: the systems, then all other marks."""
    handles: list[Line2D | Patch] = [
        Line2D(
            [],
            [],
            color=_colour(system),
            linewidth=1.8,
            linestyle="--" if system in level else "-",
            marker=_MARKERS.get(system, "o") if markers and system not in level else None,
            markersize=5,
            label=NAMES.get(system, system),
        )
        for system in systems
    ]
    handles += extra
    rows = math.ceil(len(handles) / 6 * 2 * _PANEL / figure.get_figwidth())
    columns = math.ceil(len(handles) / rows)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _powers(sizes: Sequence[float]) -> list[float]:
    """Returns the powers of two from the smallest size to the largest."""
    low, high = round(math.log2(sizes[0])), round(math.log2(sizes[-1]))
    return [2.0**i for i in range(low, high + 1)]


def _colour(system: str) -> str:
    return figures.COLOURS.get(system, "black")
