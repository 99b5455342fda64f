"""Makes the tables of `bench_decode`, and the report that contains them and the figures."""

import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from experiments.bench_decode import figures
from experiments.bench_decode.records import DecodeStudy, DecodeTiming
from experiments.common import report as reports
from experiments.common.report import ratio, write_csv
from ultramem_jax.errors import UserError
from ultramem_jax.reporting import markdown
from ultramem_jax.reporting.markdown import Row

TITLE = "Decoding: one token for each sequence"
_NAME = "bench_decode"
_GIGA, _MEGA, _MILLI = 1e9, 1e6, 1e-3

AIM_BATCH = 64
"""Batch of the aims: the one at which the paper has MoE furthest behind UltraMem."""
_BESIDE_DENSE, _BEHIND, _FLAT, _NEAR = 1.15, 6.0, 1.2, 2.0
_FLAT_FROM, _FLAT_TO = 2.0, 32.0
_NEAR_BATCHES = range(1, 17)
_SIZE_TOLERANCE = 1.25
"""Factor within which a size counts as reached: keys and experts come only in whole numbers."""
_MACHINE = ("devices", "cpu", "cores", "memory", "python", "jax", "jaxlib", "flax", "commit", "date")
"""Entries of the machine that the head of the report names; its foot lists all of them."""


def write(study: DecodeStudy, folder: pathlib.Path, beside: Sequence[DecodeStudy] = ()) -> list[pathlib.Path]:
    """Writes the report (`.md`), all numbers (`.csv`), the study (`.json`) and the figures.

    The names of the files contain the name of the device, unless that is a CPU.

    Args:
        study: the measurements.
        folder: folder of the files; it is made.
        beside: studies of other machines, for a section of their own.

    Returns:
        The paths; the report comes first.
    """
    if not study.timings:
        raise UserError("timings: there are none to report")
    stem = file_stem(study)
    drawn = figures.write(study, folder, stem)
    text, numbers = folder / f"{stem}.md", folder / f"{stem}.csv"
    raw = study.save(folder / f"{stem}.json")
    text.write_text(report(study, beside, drawn), encoding="utf-8")
    write_csv(csv_rows(study), numbers)
    return [text, numbers, raw, *drawn.values()]


def file_stem(study: DecodeStudy) -> str:
    """Returns the name of the study's files, without suffix."""
    return reports.file_stem(_NAME, study.device, on_cpu=study.on_cpu)


def report(
    study: DecodeStudy,
    beside: Sequence[DecodeStudy] = (),
    drawn: dict[str, pathlib.Path] | None = None,
) -> str:
    """Returns the report as Markdown.

    A study without measurements has no section. A single missing measurement leaves a blank cell.

    Args:
        study: the measurements.
        beside: studies of other machines.
        drawn: paths of figures in the folder of the report, by caption.
    """
    if not study.timings:
        raise UserError("timings: there are none to report")
    parts = [f"# {TITLE}", _head(study), "## Aims", markdown.table(aim_rows(study), left=_AIM_TEXTS)]
    parts += _AIM_NOTES
    parts += [f"![{caption}]({path.name})" for caption, path in (drawn or {}).items()]
    for dtype in study.dtypes:
        if rows := batch_rows(study, dtype):
            parts += [f"## By batch, {dtype}", markdown.table(rows)]
    for dtype in study.dtypes:
        if rows := part_rows(study, dtype):
            parts += [f"## Parts of a step, {dtype}", markdown.table(rows, left=["system", "part"])]
    for dtype in study.dtypes:
        if rows := sparsity_rows(study, dtype):
            batches = ", ".join(str(b) for b in sorted({t.batch for t in study.of("sparsity", dtype)}))
            parts += [f"## By slots and experts, batch {batches}, {dtype}", markdown.table(rows)]
    if beside:
        parts += ["## On other machines", markdown.table(machine_rows([study, *beside]))]
        parts += [f"{other.device}: {_machine(other)}." for other in beside]
    measured = markdown.listing(study.machine)
    parts += ["## How to read this", *_notes(study, beside), "## Where this was measured", measured]
    return "\n\n".join(parts) + "\n"


def batch_rows(study: DecodeStudy, dtype: str) -> list[Row]:
    """Returns a row per batch and system; ratios are of medians, and blank if one of the two is missing."""
    timings = study.of("batch", dtype)
    rows: list[Row] = []
    for timing in timings:
        row: Row = {"batch": timing.batch, "system": name_of(timing.system), **_time(timing)}
        for other in ("dense", "moe", "ultramem"):
            row[f"× {name_of(other)}"] = _ratio_to(timing, study.beside(timing, other))
        floor = study.floor(timing)
        row |= {
            "MB touched": timing.cost.total.bytes / _MEGA,
            "GB/s": _bandwidth(timing) / _GIGA,
            "% of bandwidth": 100 * _bandwidth(timing) / study.rates.bytes_per_second,
            "floor, ms": floor and floor / _MILLI,
            "× floor": floor and timing.median / floor,
            "tokens/s": timing.tokens_per_second,
        }
        rows.append(row | _chosen(timing))
    return rows


def part_rows(study: DecodeStudy, dtype: str) -> list[Row]:
    """Returns a row per separately timed part, then their sum and the whole step, model by model."""
    rows: list[Row] = []
    for timing in study.of("batch", dtype):
        if timing.parts is None:
            continue
        floors, floor = study.part_floors(timing), study.floor(timing)
        lines = [(part, seconds, floors.get(part)) for part, seconds in timing.parts.items()]
        lines.append(("sum", math.fsum(timing.parts.values()), None))
        lines.append(("whole step", timing.median, floor))
        for part, seconds, least in lines:
            rows.append(
                {
                    "batch": timing.batch,
                    "system": name_of(timing.system),
                    "part": part.replace("_", "-"),
                    "ms": seconds / _MILLI,
                    "% of the step": 100 * seconds / timing.median,
                    "floor, ms": least and least / _MILLI,
                    "× floor": seconds / least if least else None,
                }
            )
    return rows


def sparsity_rows(study: DecodeStudy, dtype: str) -> list[Row]:
    """Returns a row per system and size.

    Ratios compare with the smallest size of the same system, and with the dense model.
    """
    rows: list[Row] = []
    for system, timings in study.by_system("sparsity", dtype).items():
        for timing in timings:
            smallest = next(t for t in timings if _comparable(t, timing))
            rows.append(
                {
                    "system": name_of(system),
                    "sparse/dense": timing.sparse_over_dense,
                    "parameters": timing.parameters,
                    **_time(timing),
                    "× smallest": _ratio_to(timing, smallest),
                    "× dense": _ratio_to(timing, study.beside(timing, "dense")),
                    **_alone(timing),
                    "MB touched": timing.cost.total.bytes / _MEGA,
                    **_chosen(timing),
                }
            )
    return rows


def _alone(timing: DecodeTiming) -> Row:
    parts = timing.parts or {}
    return {
        f"{part.replace('_', '-')} alone, ms": parts[part] / _MILLI if part in parts else None
        for part in ("feed_forward", "memory")
    }


def _chosen(timing: DecodeTiming) -> Row:
    return {"experts": timing.cost.experts or None, "rows": timing.cost.rows or None}


@dataclass(frozen=True)
class _Aim:
    """Holds an aim and the measured figure, which is None if it was not measured."""

    text: str
    dtype: str
    system: str
    limit: float
    at_most: bool
    figure: float | None
    where: str
    at_floor: float | None
    """The same figure for a program that takes exactly its floor."""

    def row(self) -> Row:
        """Returns the row of the aim in the table."""
        verdict = "not measured"
        if self.figure is not None:
            met = self.figure <= self.limit if self.at_most else self.figure >= self.limit
            verdict = "met" if met else "missed"
        return {
            "aim": self.text,
            "dtype": self.dtype,
            "system": name_of(self.system),
            "wanted": f"{'≤' if self.at_most else '≥'} {self.limit:g}",
            "measured": self.figure,
            "at": self.where if self.figure is not None else None,
            "verdict": verdict,
            "at its floor": self.at_floor,
        }


_AIM_TEXTS = ("aim", "dtype", "system", "wanted", "at", "verdict")
_AIM_NOTES = [
    "Ratios of medians. `at its floor` is the same ratio if every model needed exactly its floor on this "
    "machine. What all systems do alike, keys and values of the cache above all, draws their times together.",
]


def aim_rows(study: DecodeStudy) -> list[Row]:
    """Returns aims beside measurements: a row per dtype and aim; the last aim has a row per system."""
    rows: list[Row] = []
    for dtype in study.dtypes:
        near = _pair(study, dtype, "UltraMem is near dense", "ultramem", "dense", _BESIDE_DENSE, at_most=True)
        behind = _pair(study, dtype, "MoE is behind UltraMem", "moe", "ultramem", _BEHIND, at_most=False)
        aims = [near, behind, _flat(study, dtype)]
        aims += [_near(study, dtype, system) for system in study.by_system("batch", dtype)]
        rows += [aim.row() for aim in aims]
    return rows


def machine_rows(studies: Sequence[DecodeStudy]) -> list[Row]:
    """Returns the measured time of every system on every machine, at the batch of the aims."""
    rows: list[Row] = []
    for study in studies:
        for timing in study.of("batch"):
            if timing.batch == AIM_BATCH:
                rows.append(
                    {
                        "machine": study.device,
                        "dtype": timing.dtype,
                        "batch": timing.batch,
                        "cache": timing.cache_length,
                        "system": name_of(timing.system),
                        **_time(timing),
                        "× dense": _ratio_to(timing, study.beside(timing, "dense")),
                        "× UltraMem": _ratio_to(timing, study.beside(timing, "ultramem")),
                    }
                )
    return rows


def csv_rows(study: DecodeStudy) -> list[Row]:
    """Returns all timings in full precision, in seconds and bytes."""
    return [
        {
            "study": timing.study,
            "system": timing.system,
            "preset": timing.preset,
            "dtype": timing.dtype,
            "batch": timing.batch,
            "cache_length": timing.cache_length,
            "sparse_over_dense": timing.sparse_over_dense,
            "parameters": timing.parameters,
            "median_s": timing.median,
            "min_s": min(timing.seconds),
            "max_s": max(timing.seconds),
            "repeats": len(timing.seconds),
            "flops": timing.cost.total.flops,
            "bytes": timing.cost.total.bytes,
            "floor_s": study.floor(timing),
            "bandwidth_floor_s": study.bandwidth_floor(timing),
            **_chosen(timing),
            **{f"{part}_s": seconds for part, seconds in (timing.parts or {}).items()},
        }
        for timing in study.timings
    ]


def name_of(system: str) -> str:
    """Returns the name of a system in tables."""
    return figures.NAMES.get(system, system)


def _pair(
    study: DecodeStudy, dtype: str, text: str, system: str, base: str, limit: float, *, at_most: bool
) -> _Aim:
    """Returns the aim for the time of a system over that of another, at the batch of the aims."""
    one = study.at(dtype, AIM_BATCH, system)
    two = one and study.beside(one, base)
    return _Aim(
        text=text,
        dtype=dtype,
        system=system,
        limit=limit,
        at_most=at_most,
        figure=_ratio_to(one, two),
        where=f"batch {AIM_BATCH}, × {name_of(base)}",
        at_floor=ratio(study.floor(one), study.floor(two)) if one and two else None,
    )


def _flat(study: DecodeStudy, dtype: str) -> _Aim:
    """Returns the aim for the growth of UltraMem's time with its table.

    The figure is the longest time of all sizes from the smallest to the largest, over the time of the
    smallest.
    """
    timings = [t for t in study.of("sparsity", dtype, "ultramem") if t.batch == AIM_BATCH]
    low, high = _FLAT_FROM / _SIZE_TOLERANCE, _FLAT_TO * _SIZE_TOLERANCE
    timings = [t for t in timings if low <= t.sparse_over_dense <= high and _comparable(t, timings[0])]
    sizes = [t.sparse_over_dense for t in timings]
    reaches = bool(sizes) and sizes[0] <= _FLAT_FROM * _SIZE_TOLERANCE
    reaches = reaches and sizes[-1] >= _FLAT_TO / _SIZE_TOLERANCE

    def growth(seconds: Callable[[DecodeTiming], float | None]) -> float | None:
        if not reaches:
            return None
        ratios = [ratio(seconds(t), seconds(timings[0])) for t in timings]
        known = [ratio for ratio in ratios if ratio is not None]
        return max(known, default=None)

    return _Aim(
        text=f"time is flat from {_FLAT_FROM:g}× to {_FLAT_TO:g}× sparse/dense",
        dtype=dtype,
        system="ultramem",
        limit=_FLAT,
        at_most=True,
        figure=growth(lambda timing: timing.median),
        where=f"batch {AIM_BATCH}, longest, × at {sizes[0]:.2g}" if sizes else "",
        at_floor=growth(study.floor),
    )


def _near(study: DecodeStudy, dtype: str, system: str) -> _Aim:
    """Returns the aim for the worst time over the bandwidth floor, at small batches."""
    timings = [t for t in study.of("batch", dtype, system) if t.batch in _NEAR_BATCHES]
    worst = max(timings, key=lambda t: t.median / study.bandwidth_floor(t), default=None)
    least = study.bandwidth_floor(worst) if worst else None
    return _Aim(
        text=f"near the bandwidth floor at batch {_NEAR_BATCHES[0]}–{_NEAR_BATCHES[-1]}",
        dtype=dtype,
        system=system,
        limit=_NEAR,
        at_most=True,
        figure=ratio(worst.median, least) if worst else None,
        where=f"batch {worst.batch}, × floor of bytes" if worst else "",
        at_floor=ratio(study.floor(worst), least) if worst else None,
    )


def _time(timing: DecodeTiming) -> Row:
    low, high = min(timing.seconds) / _MILLI, max(timing.seconds) / _MILLI
    return {"ms per step": timing.median / _MILLI, "min–max": markdown.interval(low, high)}


def _bandwidth(timing: DecodeTiming) -> float:
    """Returns the bytes that a step must touch, per second of the step."""
    return timing.cost.total.bytes / timing.median


def _comparable(one: DecodeTiming, other: DecodeTiming) -> bool:
    return (one.dtype, one.batch, one.cache_length) == (other.dtype, other.batch, other.cache_length)


def _ratio_to(timing: DecodeTiming | None, base: DecodeTiming | None) -> float | None:
    return timing.median / base.median if timing and base else None


def _head(study: DecodeStudy) -> str:
    caches = _listed(sorted({t.cache_length for t in study.timings}))
    repeats = _listed(sorted({len(t.seconds) for t in study.timings}))
    dtypes = " or ".join(sorted({t.cache_dtype for t in study.timings}))
    return (
        f"`{study.machine.get('command', '')}`\n\n"
        "Time of one step that takes one token of each sequence through the model, each attending to "
        f"{caches} positions ({dtypes} keys and values); medians of {repeats} repeats. Measured on "
        f"{_machine(study)}."
    )


def _machine(study: DecodeStudy) -> str:
    # JAX does not know the name of a CPU.
    names = [name for name in _MACHINE if name in study.machine and not (study.on_cpu and name == "devices")]
    words = {"devices": "{}", "cpu": "{}", "cores": "{} cores", "memory": "{}"}
    return ", ".join(words.get(name, f"{name} {{}}").format(study.machine[name]) for name in names)


def _notes(study: DecodeStudy, beside: Sequence[DecodeStudy]) -> list[str]:
    rates = study.rates
    products = ", ".join(f"{flops / _GIGA:.4g} GFLOP/s in {d}" for d, flops in rates.flops_per_second.items())
    notes = [
        "× dense, × MoE and × UltraMem: the time of the system over the time of that one, at the same batch. "
        "× UltraMem of MoE is the paper's comparison: 2 to 6 on an A100 with a cache of 2,048, most at batch "
        "64. The longer the cache, which all systems read alike, the nearer their times. min–max: over the "
        "repeats.",
        "Repeats: models take turns, of each turn some steps in a row count. The tokens of these steps have "
        "gone through the program once before, so that all experts that they choose have been run, and lie "
        "in the processor's cache as far as it reaches.",
        "MB touched: dense weights once, the keys and values of all sequences, and what the tokens chose, "
        "each expert and each row once (`ultramem_jax/accounting/decoding.py`; 10^6 bytes). experts, rows: "
        "different ones that a step read, in a layer and of all tables; measured, means. GB/s: those bytes "
        "over the time.",
        "Floor: for each part FLOPs over the rate of matrix products or bytes over the bandwidth, whichever "
        f"takes longer. Measured here, beside every turn of a model: {products or 'no matrix products'}; "
        f"{rates.bytes_per_second / _GIGA:.3g} GB/s, where a matrix of 2 GiB is read for one vector, "
        "which is what the % of bandwidth are of, and what rows of tables are counted at, too. The bandwidth "
        "floor of the aims leaves FLOPs out.",
    ]
    if any(timing.parts for timing in study.timings):
        notes.append(
            "Parts: each compiled and timed alone, through all layers, attention with its cache, for random "
            "vectors, which choose about as many experts and rows as the tokens of the step. Their sum "
            "is not the step's time: where nothing waits for a part, as for a memory that skips over a "
            "layer, the step can compute it beside the others, and what one part leaves in the processor's "
            "cache the next one finds there."
        )
    if study.of("sparsity"):
        notes.append(
            "sparse/dense: parameters of tables or experts over the weights of the dense model's layers, 12 "
            "for ultramem-151m-x12. × smallest: over the smallest size of the same system. feed-forward or "
            "memory alone: the part of the step that the experts or slots are in."
        )
    if all(one.on_cpu for one in (study, *beside)):
        notes.append("GPU: not measured here.")
    return notes


def _listed(numbers: Iterable[int]) -> str:
    return " or ".join(f"{number:,}" for number in numbers)
