"""Makes the table, the raw numbers and the figure of `bench_step`."""

import math
import pathlib
from collections.abc import Sequence

from matplotlib.ticker import EngFormatter

from experiments.bench_step.lookups import FBGEMM
from experiments.bench_step.memory_step import SEQUENCES, WAYS, XLA_OF
from experiments.bench_step.parts import PARTS, Part
from experiments.bench_step.records import Study
from experiments.bench_step.study import AUTHORS, PartsResult, StepResult
from experiments.common import figures, report
from experiments.common.report import ratio
from experiments.common.timing import WARM_UP, spread
from ultramem_jax.accounting import PartCost, expected_rows
from ultramem_jax.accounting.step_costs import total
from ultramem_jax.reporting import markdown

_COLOURS = {
    "native": figures.BLUE,
    "XLA": figures.SKY,
    "dense": figures.VERMILION,
    "native bf16": figures.GREEN,
    "XLA bf16": figures.GREY,
    AUTHORS: figures.ORANGE,
}
_GIGA = 1e9


def write(study: Study, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the table (`.md`, `.csv`), all raw numbers (`.json`) and the figure; returns their paths.

    The names of the files contain the name of the device, unless that is a CPU.
    """
    table, values, figure = draw(study, folder)
    return [table, values, study.save(table.with_suffix(".json")), figure]


def draw(study: Study, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the table and the figure, but not the raw numbers; returns their paths."""
    path = folder / report.file_stem(study.name, study.device, on_cpu=study.on_cpu)
    table, values = report.write_table(
        step_rows(study, on_cpu=study.on_cpu),
        path,
        study.title,
        study.environment,
        _notes(study),
        _lookup_section(study)
        | {f"Parts, {p.slots:,} slots, {p.way}": _breakdown(study, p) for p in study.parts},
        {"time of a step against slots": f"{path.name}.png"},
    )
    return [table, values, plot(study, folder / f"{path.name}.png")]


def step_rows(study: Study, *, on_cpu: bool) -> list[markdown.Row]:
    """Returns a row per size and way; ratios are of medians, and blank if one of the two is missing.

    Args:
        study: the measurements.
        on_cpu: whether they are of a CPU; adds an empty column for the times of a GPU.
    """
    first, rows = study.steps[0].slots, []
    for step in study.steps:
        median, timing, floor = study.median(step.slots, step.way), step.timing, study.floor_ms(step.cost)
        row: markdown.Row = {
            "slots": step.slots,
            "way": step.way,
            "ms": median,
            "p10–p90": timing and _range(timing.ms),
            "floor, ms": floor,
            "× floor": ratio(median, floor),
            "times as fast as XLA": ratio(study.median(step.slots, XLA_OF.get(step.way, "")), median),
            "as the authors": ratio(study.median(step.slots, AUTHORS), median)
            if step.way in XLA_OF
            else None,
            "× dense": ratio(median, study.median(step.slots, "dense")),
            f"× at {first:,} slots": ratio(median, study.median(first, step.way)),
            "peak, GB": timing and timing.peak_bytes and timing.peak_bytes / _GIGA,
            "temporaries, % of table": timing
            and timing.temporary_bytes
            and 100 * timing.temporary_bytes / step.table_bytes,
        }
        if on_cpu:
            row["GPU, ms"] = None
        rows.append(row | {"note": _remark(study, step)})
    return rows


def part_rows(study: Study, parts: PartsResult) -> list[markdown.Row]:
    """Returns a row per part, then their sum and the whole step of the same way."""
    whole = study.timed(parts.slots, parts.way)
    lines = [(part.name, parts.times.of(part), _cost(parts, part)) for part in PARTS]
    summed = zip(*(parts.times.of(part) for part in PARTS if part.in_sum), strict=True)
    lines.append(("sum, but for ·", [math.fsum(of_round) for of_round in summed], None))
    if whole and whole.timing:
        lines.append(("whole step", whole.timing.ms, whole.cost))
    rows = []
    for name, ms, cost in lines:
        median, floor = spread(ms)[0], None if cost is None else study.floor_ms(cost)
        share = ratio(median, study.median(parts.slots, parts.way))
        rows.append(
            {
                "part": name,
                "ms": median,
                "p10–p90": _range(ms),
                "floor, ms": floor,
                "× floor": ratio(median, floor),
                "% of the step": share and 100 * share,
            }
        )
    return rows


def _cost(parts: PartsResult, part: Part) -> PartCost | None:
    return total({name: parts.costs[name] for name in part.costs}) if part.costs else None


def plot(study: Study, path: pathlib.Path) -> pathlib.Path:
    """Draws time against slots, both logarithmic: medians, the 10th to 90th percentile, and dashed floors."""
    figure = figures.new_figure(7.2, 4.8)
    axes = figure.subplots()
    for way, colour in _COLOURS.items():
        steps = [step for step in study.steps if step.way == way]
        timed = [(step.slots, *spread(step.timing.ms)) for step in steps if step.timing]
        if timed:
            slots, medians, lows, highs = zip(*timed, strict=True)
            axes.fill_between(slots, lows, highs, color=colour, alpha=0.18, linewidth=0)
            axes.plot(slots, medians, "o-", color=colour, linewidth=1.8, markersize=4, label=way)
        floors = [study.floor_ms(step.cost) for step in steps]
        axes.plot([step.slots for step in steps], floors, "--", color=colour, linewidth=1.2)
    axes.plot([], [], "--", color=figures.GREY, linewidth=1.2, label="floor of each on this machine")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="slots of the table", ylabel="ms per step (median, 10th to 90th percentile)")
    figures.set_title(axes, study.title)
    figures.set_plain(axes)
    axes.legend(frameon=False, fontsize=9)
    return figures.save(figure, path)


def _notes(study: Study) -> list[str]:
    rates, field = study.rates, study.memory.value_of
    limit = "no limit" if study.memory_limit is None else f"{study.memory_limit / _GIGA:.1f} GB"
    return [
        f"{study.about}; {study.tokens} tokens a step in {SEQUENCES} sequences, d_k {field('key_dim')}, "
        f"d_v {field('value_dim')}, m {field('top_m')}, H {field('num_heads')}, E {field('expansion')}, "
        f"r {field('tucker_rank')}, h {field('num_cores')}; forward, backward and AdamW. {study.repeats} "
        f"steps of each way after {WARM_UP} of warm-up, in turns, each round on a new random batch. Peak and "
        "temporaries as the compiler planned them; GB are 10^9 bytes.",
        "`native` trains by rows with native kernels, `XLA` by rows without them; both keep table and "
        "moments in float32. With `bf16`, table and first moment are in bfloat16, rounded stochastically, "
        "and a row has one second moment. `dense` is AdamW of optax on a gradient of the table's size, "
        f"without kernels. What does not fit into {limit} by its own count is left out.",
        *_about_authors(study),
        "Floor: FLOPs over the rate of matrix products or bytes over the bandwidth, whichever takes longer "
        "(`ultramem_jax/accounting/step_costs.py`). Measured here: "
        f"{rates.flops_per_second / _GIGA:.4g} GFLOP/s in a "
        f"float32 product, {rates.bytes_per_second / _GIGA:.3g} GB/s, read and written, where an array is "
        "scaled in place. Rows anywhere in the table come more slowly, and the floors count them so: random "
        f"rows of 512 bytes are read and summed at {rates.row_bytes_per_second / _GIGA:.3g} GB/s.",
        "GPU: not measured here." if study.on_cpu else f"Measured on {study.environment['devices']}.",
    ]


def _about_authors(study: Study) -> list[str]:
    if not any(step.way == AUTHORS for step in study.steps):
        return []
    return [
        f"`{AUTHORS}` is the layer of the authors' code with the same shapes, trained by AdamW on gradients "
        "of the table's size. Its lookup for CUDA is replaced by `embedding_bag` and, backward, by "
        "`index_add_`, the fastest of what was tried. `experiments/bench_step/authors.py` lists what differs."
    ]


def lookup_rows(study: Study) -> list[markdown.Row]:
    """Returns a row per size and way of the lookup beside FBGEMM; times are medians."""
    rows = []
    for of in study.lookups:
        both = [f + b for f, b in zip(of.forward_ms, of.backward_ms, strict=True)]
        peer = next(other for other in study.lookups if (other.slots, other.way) == (of.slots, FBGEMM))
        of_peer = [f + b for f, b in zip(peer.forward_ms, peer.backward_ms, strict=True)]
        rows.append(
            {
                "slots": of.slots,
                "way": of.way,
                "forward, ms": spread(of.forward_ms)[0],
                "backward and update, ms": spread(of.backward_ms)[0],
                "both, ms": spread(both)[0],
                "p10–p90": _range(both),
                "times as fast as FBGEMM": ratio(spread(of_peer)[0], spread(both)[0]),
            }
        )
    return rows


def _lookup_section(study: Study) -> dict[str, list[str]]:
    if not study.lookups:
        return {}
    return {
        "Lookup and update beside FBGEMM": [
            markdown.table(lookup_rows(study), left=["way", "p10–p90"]),
            f"{study.tokens} tokens read {study.memory.reads_per_token} rows of "
            f"{study.memory.table.value_dim} float32 each; weighted sums, then the weights' gradient and "
            "row-wise Adagrad on the rows that were read, in turns on the same random reads. FBGEMM's wheel "
            "for CPUs has no threads: it computes on one CPU core, ours on all.",
        ]
    }


def _breakdown(study: Study, parts: PartsResult) -> list[str]:
    rows = sum(parts.times.rows) / len(parts.times.rows)
    uniform = expected_rows(parts.slots, study.tokens * study.memory.reads_per_token)
    return [
        markdown.table(part_rows(study, parts), left=["part", "p10–p90"]),
        "Each compiled and timed alone. The choice makes scores and top-k by chunks of tokens, as the step "
        "does; the lines with · are for all tokens at once, and not in the sum. A step reads "
        f"{round(rows):,} distinct rows; the floors take {round(uniform):,}, those of uniform reads.",
    ]


def _range(ms: Sequence[float]) -> str:
    _, low, high = spread(ms)
    return markdown.interval(low, high)


def _remark(study: Study, step: StepResult) -> str | None:
    if step.timing is None:
        return f"does not fit: {step.need_bytes / _GIGA:.3g} GB"
    apart = [
        way
        for way in (*WAYS, AUTHORS)
        if way not in (step.way, *step.beside) and study.median(step.slots, way)
    ]
    return f"not in turns with {', '.join(apart)}" if apart else None
