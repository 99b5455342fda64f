"""Makes the report of `forgetting` from its measurements."""

import statistics
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path

from experiments.common.report import write_csv
from experiments.forgetting import figures
from experiments.forgetting.methods import METHODS, SPARSE, VARIANTS, Method
from experiments.forgetting.records import Point, Sequel, Study, Teaching
from ultramem_jax.reporting import markdown
from ultramem_jax.reporting.markdown import Row

NAME = "forgetting"
_PUBLISHED = (
    "Published (arXiv 2510.15103, Memory+ of 1.3 billion parameters, 1,000 facts of TriviaQA): at equal "
    "learning the F1 score on NaturalQuestions drops by 11 % with sparse memory fine-tuning, by 71 % with "
    "LoRA and by 89 % with full fine-tuning. Questions, models and sizes are others here, so only the order "
    "can be compared."
)


def write(study: Study, folder: Path) -> list[Path]:
    """Writes the report (`.md`), the measurements (`.csv` and `.json`) and the figures.

    Returns:
        The paths; the report comes first.
    """
    raw = study.save(folder / f"{NAME}.json")
    text, table = folder / f"{NAME}.md", folder / f"{NAME}.csv"
    drawn = []
    if study.teachings:
        write_csv(teaching_rows(study.teachings), table)
        drawn += [table, figures.plot_teaching(study, folder / f"{NAME}.png")]
    if study.sequels:
        drawn.append(figures.plot_sequence(study, folder / f"{NAME}_sequence.png"))
    text.write_text(report(study), encoding="utf-8")
    return [text, raw, *drawn]


def report(study: Study) -> str:
    """Returns the report as Markdown; parts that were not measured have no section."""
    parts = ["# What models forget when they learn new facts"]
    if study.teachings:
        parts += ["## At equal learning", *_teaching(study)]
    if study.variants:
        parts += ["## Rows and scores", *_variants(study)]
    if study.sequels:
        parts += ["## Lessons one after the other", *_sequence(study)]
    if study.tunings:
        parts += ["## Learning rates", "Each rate, on people whom nothing else teaches; one lesson."]
        parts.append(markdown.table([_tuning_row(run) for run in study.tunings]))
    if study.speeds:
        parts += ["## What the selection costs", *_speed(study)]
    parts += ["## Where this was measured", markdown.listing(study.environment)]
    return "\n\n".join(parts) + "\n"


def teaching_rows(teachings: Iterable[Teaching]) -> list[Row]:
    """Returns a row for each measurement of each run, unrounded."""
    return [
        {
            "system": run.system,
            "method": run.method,
            "learning rate": run.rate,
            "rows a step": run.slots,
            "seed": run.seed,
            "step": point.step,
            "learned": point.learned,
            "learned, held-out templates": point.learned_held_out,
            "learned, by likelihood": point.learned_by_likelihood,
            "nats, new": point.learned_nats,
            "kept": point.kept,
            "nats, before": point.kept_nats,
            "bits/byte": point.bits_per_byte,
        }
        for run in teachings
        for point in run.points
    ]


def lost(run: Teaching) -> float:
    """Returns the share of the facts known before that a lesson has cost, in [0, 1]."""
    before, after = run.points[0].kept, run.points[-1].kept
    return 1 - after / before if before else 0.0


def _teaching(study: Study) -> list[str]:
    rows = _rows(study.teachings, METHODS)
    seeds = len({run.seed for run in study.teachings})
    about = (
        f"Means over {seeds} lessons with other people each, and the standard deviation of what is lost. A "
        "lesson ends at the first measurement at which greedy decoding completes 70 % of the new facts, or "
        "after its last step. `lost` is the share of the facts known before that greedy decoding does not "
        "complete any more; bits per byte are on the validation split of enwik8."
    )
    image = f"![what is kept against what is learned, by system]({NAME}.png)"
    shown = "\n".join(f"- {line}" for line in in_words(study.teachings))
    return [about, shown, markdown.table(rows), image, _PUBLISHED]


def in_words(teachings: Sequence[Teaching]) -> list[str]:
    """Says for each system what each method loses, least first. All of it is computed."""
    words = []
    for system in _systems(teachings):
        of_system = [run for run in teachings if run.system == system]
        methods = {run.method: [one for one in of_system if one.method == run.method] for run in of_system}
        order = sorted(methods, key=lambda method: statistics.fmean(map(lost, methods[method])))
        losses = "; ".join(f"{method} {_loses(methods[method])}" for method in order)
        words.append(f"{system}: {losses}.")
    return words


def _loses(runs: Sequence[Teaching]) -> str:
    last = [run.points[-1] for run in runs]
    more = statistics.fmean(run.points[-1].bits_per_byte - run.points[0].bits_per_byte for run in runs)
    learned = _percent(_mean(last, "learned"))
    gone = _percent(statistics.fmean(map(lost, runs)))
    return f"loses {gone} of the facts known before and {more:.3f} bits per byte for {learned} of new ones"


def _variants(study: Study) -> list[str]:
    of_sparse = [run for run in study.teachings if run.method == SPARSE.name]
    about = (
        f"Variants of `{SPARSE.name}`, at its learning rate: other numbers of rows that a step may change, "
        "and rows chosen by KL divergence, or by their reads alone."
    )
    systems = {run.system for run in study.variants}
    beside = [run for run in of_sparse if run.system in systems]
    return [about, markdown.table(_rows([*beside, *study.variants], (SPARSE, *VARIANTS)))]


def _rows(runs: Sequence[Teaching], methods: Sequence[Method]) -> list[Row]:
    """Returns a row for each system and method that has runs."""
    return [
        _teaching_row(of)
        for system in _systems(runs)
        for method in methods
        if (of := [run for run in runs if (run.system, run.method) == (system, method.name)])
    ]


def _teaching_row(runs: Sequence[Teaching]) -> Row:
    first, last = [run.points[0] for run in runs], [run.points[-1] for run in runs]
    return {
        "system": runs[0].system,
        "method": runs[0].method,
        "rate": runs[0].rate,
        "rows a step": runs[0].slots or None,
        "steps": _mean(last, "step"),
        "learned": _percent(_mean(last, "learned")),
        "held-out templates": _percent(_mean(last, "learned_held_out")),
        "known before": _percent(_mean(first, "kept")),
        "lost": _percent(statistics.fmean(map(lost, runs)), _deviation([lost(run) for run in runs])),
        "bits/byte before": Decimal(f"{_mean(first, 'bits_per_byte'):.3f}"),
        "after": Decimal(f"{_mean(last, 'bits_per_byte'):.3f}"),
    }


def _tuning_row(run: Teaching) -> Row:
    last = run.points[-1]
    return {
        "system": run.system,
        "method": run.method,
        "rate": run.rate,
        "steps": last.step,
        "learned": _percent(last.learned),
        "lost": _percent(lost(run)),
        "bits/byte": Decimal(f"{last.bits_per_byte:.3f}"),
        "seconds": round(run.seconds),
    }


def _sequence(study: Study) -> list[str]:
    rows = [_sequence_row(sequel) for sequel in study.sequels]
    lessons = max(len(sequel.left) for sequel in study.sequels)
    about = (
        f"One model takes {lessons} lessons, each with other people. `of all lessons` is the share of all "
        "facts of all lessons that it completes after the last one, `of the first` of the first lesson's."
    )
    image = f"![what is left of each lesson after the last one]({NAME}_sequence.png)"
    return [about, markdown.table(rows), image]


def _sequence_row(sequel: Sequel) -> Row:
    left = sequel.left[-1]
    return {
        "system": sequel.system,
        "method": sequel.method,
        "of all lessons": _percent(statistics.fmean(left)),
        "of the first": _percent(left[0]),
        "of the last": _percent(left[-1]),
        "of the people before": _percent(sequel.kept[-1]),
        "bits/byte": Decimal(f"{sequel.bits_per_byte[-1]:.3f}"),
    }


def _speed(study: Study) -> list[str]:
    rows = [
        {
            "slots": speed.slots,
            "rows that change": speed.selection,
            "ms": speed.ms,
            "ratio": speed.ratio,
            "temporaries, MB": None if speed.temporary_bytes is None else speed.temporary_bytes / 1e6,
        }
        for speed in study.speeds
    ]
    about = (
        "A training step of a small language model with one memory, whose rows alone learn; 2,048 tokens "
        "with 64 reads each. Steps of a table's size take turns. `ratio` is the median ratio to the step "
        "that changes all rows that it read."
    )
    return [about, markdown.table(rows)]


def _systems(teachings: Iterable[Teaching]) -> list[str]:
    return list(dict.fromkeys(run.system for run in teachings))


def _mean(points: Sequence[Point], field: str) -> float:
    return statistics.fmean(getattr(point, field) for point in points)


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _percent(share: float, deviation: float | None = None) -> str:
    spread = "" if deviation is None else f" ± {100 * deviation:.0f}"
    return f"{100 * share:.0f}{spread} %"
