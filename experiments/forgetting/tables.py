"""Makes the report of `forgetting` from its measurements."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from pathlib import Path

from experiments.common.rates import at_an_end
from experiments.common.report import percent, spread, write_csv
from experiments.common.seeds import deviation
from experiments.forgetting import figures
from experiments.forgetting.measurements import Environment, Study
from experiments.forgetting.methods import METHODS, SPARSE, VARIANTS, Method
from experiments.forgetting.records import FineTuning, Point, TaskSequence
from experiments.forgetting.study import best_rate
from ultramem_jax.reporting import markdown
from ultramem_jax.reporting.markdown import Row

NAME = "forgetting"
_PUBLISHED = (
    "Published (arXiv 2510.15103, Memory+ of 1.3 billion parameters, 1,000 facts of TriviaQA): at equal "
    "learning the F1 score on NaturalQuestions drops by 11 % with sparse memory fine-tuning, by 71 % with "
    "LoRA and by 89 % with full fine-tuning: the triangles beside the figure. Questions, models and sizes "
    "are others here, so only the order can be compared."
)
_NEARLY = 0.95
"""Share of what was to be learned from which methods are ranked by what they lose."""
_KEPT = "Runs that an earlier call of the command has kept in its `--workdir` were not repeated."


def write(study: Study, folder: Path) -> list[Path]:
    """Writes the report (`.md`), the measurements (`.csv` and `.json`) and the figures.

    Returns:
        The paths; the report comes first.
    """
    raw = study.save(folder / f"{NAME}.json")
    text, table = folder / f"{NAME}.md", folder / f"{NAME}.csv"
    drawn = []
    if study.runs:
        write_csv(run_rows(study.runs), table)
        drawn += [table, figures.plot_comparison(study, folder / f"{NAME}.png")]
    if study.sequences:
        drawn.append(figures.plot_sequence(study, folder / f"{NAME}_sequence.png"))
    text.write_text(report(study), encoding="utf-8")
    return [text, raw, *drawn]


def report(study: Study) -> str:
    """Returns the report as Markdown; parts that were not measured have no section."""
    parts = ["# What models forget when they learn new facts"]
    if study.setups:
        parts += ["## Systems", _setups(study)]
    if study.runs:
        parts += ["## At equal learning", *_comparison(study)]
    if study.variants:
        parts += ["## Rows and scores", *_variants(study)]
    if study.sequences:
        parts += ["## Tasks one after the other", *_sequence(study)]
    if study.tunings:
        parts += ["## Learning rates", *_tunings(study)]
    if study.speeds:
        parts += ["## What the selection costs", *_speed(study)]
    parts += ["## Where this was measured", *_environments(study.environments), _KEPT]
    return "\n\n".join(parts) + "\n"


def run_rows(runs: Iterable[FineTuning]) -> list[Row]:
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
            "nats, new": point.learned_nats,
            "kept": point.kept,
            "nats, before": point.kept_nats,
            "bits/byte": point.bits_per_byte,
        }
        for run in runs
        for point in run.points
    ]


def _environments(environments: Sequence[Environment]) -> list[str]:
    """Lists what differs between environments for each, and what is the same in all once."""
    if not environments:
        return []
    same = set.intersection(*(set(of.strings.items()) for of in environments))
    shown = []
    for of in environments if len(environments) > 1 else ():
        own = {name: value for name, value in of.strings.items() if (name, value) not in same}
        shown += [f"{'; '.join(of.parts)}:", markdown.listing(own)]
    everywhere = {name: value for name, value in environments[0].strings.items() if (name, value) in same}
    return [*shown, *(["All of it:"] if shown else []), markdown.listing(everywhere)]


def _setups(study: Study) -> str:
    lines = []
    for setup in study.setups:
        of_file = f" SHA-256 of its file: `{setup.sha256}`." if setup.sha256 else ""
        worth = ""
        if setup.without_memory is not None:
            worth = (
                " Its memory, trained alone on enwik8, takes the loss there from "
                f"{setup.without_memory:.3f} to {setup.with_memory:.3f} bits per byte."
            )
        lines.append(f"- {setup.system}: {setup.words}{worth}{of_file}")
    return "\n".join(lines)


def _comparison(study: Study) -> list[str]:
    enough = study.runs[-1].enough
    about = (
        "Each task has people of its own. It ends at the first check at which greedy decoding completes "
        f"{percent(enough)} of the new facts, or after its last step; `enough` counts tasks that got so "
        f"far. All numbers are those at which {percent(enough)} are learned, on the line between the "
        "measurement before and the last one; without that, of the last one. Means, ± one standard deviation "
        "over tasks. `lost` is the net share of the facts known before that greedy decoding does not "
        "complete any more; `risen` is the rise of the loss on the validation split of enwik8, in bits per "
        "byte."
    )
    shown = "\n".join(f"- {line}" for line in in_words(study.runs))
    image = f"![what is kept against what is learned, by system]({NAME}.png)"
    return [about, shown, markdown.table(_rows(study.runs, METHODS)), image, _PUBLISHED]


def in_words(runs: Sequence[FineTuning]) -> list[str]:
    """Says for each system what each method loses at equal learning, least first. All of it is computed."""
    words = []
    for system in _systems(runs):
        of_system = [run for run in runs if run.system == system]
        methods = {run.method: [one for one in of_system if one.method == run.method] for run in of_system}
        equal = {name: of for name, of in methods.items() if _mean_learned(of) >= _NEARLY * of[0].enough}
        order = sorted(equal, key=lambda name: _mean_lost(equal[name]) or 0.0)
        losses = [f"{name} {_loses(equal[name])}" for name in order]
        few = [f"{name} ({percent(_mean_learned(of))})" for name, of in methods.items() if name not in equal]
        if few:
            losses.append(f"too little is learned by {', '.join(few)}")
        words.append(f"{system}: {'; '.join(losses)}.")
    return words


def _loses(runs: Sequence[FineTuning]) -> str:
    risen = [run.risen for run in runs]
    rise = f"the loss rises by {statistics.fmean(risen):z.3f}{spread(deviation(risen), '.3f')}"
    lost = [run.lost for run in runs if run.lost is not None]
    if not lost:
        return f"knew no facts before, and {rise}"
    return f"loses {percent(statistics.fmean(lost), deviation(lost))} of the facts known before, and {rise}"


def _mean_lost(runs: Iterable[FineTuning]) -> float | None:
    shares = [run.lost for run in runs if run.lost is not None]
    return statistics.fmean(shares) if shares else None


def _mean_learned(runs: Sequence[FineTuning]) -> float:
    return _mean([run.end for run in runs], "learned")


def _variants(study: Study) -> list[str]:
    of_sparse = [run for run in study.runs if run.method == SPARSE.name]
    about = (
        f"Variants of `{SPARSE.name}`, at its learning rate: other numbers of rows that a step may change, "
        "and rows chosen by KL divergence, or by their reads without a background. Columns are as above."
    )
    systems = {run.system for run in study.variants}
    beside = [run for run in of_sparse if run.system in systems]
    return [about, markdown.table(_rows([*beside, *study.variants], (SPARSE, *VARIANTS)))]


def _rows(runs: Sequence[FineTuning], methods: Sequence[Method]) -> list[Row]:
    """Returns a row for each system and method that has runs."""
    return [
        _run_row(of)
        for system in _systems(runs)
        for method in methods
        if (of := [run for run in runs if (run.system, run.method) == (system, method.name)])
    ]


def _run_row(runs: Sequence[FineTuning]) -> Row:
    first, last = [run.points[0] for run in runs], [run.end for run in runs]
    lost, risen = [run.lost for run in runs if run.lost is not None], [run.risen for run in runs]
    diverged = sum(run.diverged for run in runs)
    return {
        "system": runs[0].system,
        "method": runs[0].method,
        "rate": Decimal(f"{runs[0].rate:g}"),
        "rows a step": runs[0].slots or None,
        "steps": round(_mean(last, "step")),
        "enough": f"{sum(run.is_enough for run in runs)} of {len(runs)}",
        "diverged": diverged or None,
        "learned": percent(_mean(last, "learned"), deviation([point.learned for point in last])),
        "held-out templates": percent(_mean(last, "learned_held_out")),
        "known before": percent(_mean(first, "kept")),
        "lost": percent(_mean_lost(runs), deviation(lost)),
        "bits/byte before": Decimal(f"{_mean(first, 'bits_per_byte'):.3f}"),
        "risen": f"{statistics.fmean(risen):z.3f}" + spread(deviation(risen), ".3f"),
    }


def _tuning_row(run: FineTuning) -> Row:
    last = run.end
    return {
        "system": run.system,
        "method": run.method,
        "rate": Decimal(f"{run.rate:g}"),
        "steps": last.step,
        "learned": percent(last.learned),
        "lost": percent(run.lost),
        "risen": Decimal(f"{run.risen:z.3f}"),
        "diverged": "yes" if run.diverged else None,
        "seconds": round(run.seconds),
    }


def _tunings(study: Study) -> list[str]:
    groups: dict[tuple[str, str], list[FineTuning]] = {}
    for run in study.tunings:
        groups.setdefault((run.system, run.method), []).append(run)
    ends = [
        f"{method} of {system} ({best_rate(runs):g})"
        for (system, method), runs in groups.items()
        if at_an_end(best_rate(runs), (run.rate for run in runs))
    ]
    about = (
        "One task at each rate, with people whom nothing else teaches. The chosen rate forgets least until "
        "enough is learned; where no rate gets so far, until nearly as much is learned as at the best one. "
        "Further rates were tried where the best was at an end."
    )
    if ends:
        about += f" Best at an end all the same: {', '.join(ends)}."
    return [about, markdown.table([_tuning_row(run) for run in study.tunings])]


def _sequence(study: Study) -> list[str]:
    tasks = " or ".join(map(str, sorted({sequence.tasks for sequence in study.sequences})))
    about = (
        f"One model takes {tasks} tasks, each with other people, and each until enough is learned or "
        "for its last step. `of all tasks` is the share of all facts of all tasks that it completes after "
        "the last one, `of the first` of the first task's. Means, ± one standard deviation over sequences; "
        "those in which a loss became infinite are left out."
    )
    groups: dict[tuple[str, str], list[TaskSequence]] = {}
    for sequence in study.sequences:
        groups.setdefault((sequence.system, sequence.method), []).append(sequence)
    rows = [_sequence_row(of, [one for one in of if one.is_whole]) for of in groups.values()]
    image = f"![what is left of each task after the last one]({NAME}_sequence.png)"
    return [about, markdown.table(rows), image]


def _sequence_row(sequences: Sequence[TaskSequence], whole: Sequence[TaskSequence]) -> Row:
    def share(value: Callable[[TaskSequence], float]) -> str | None:
        values = [value(sequence) for sequence in whole]
        return percent(statistics.fmean(values), deviation(values)) if values else None

    bits = [sequence.bits_per_byte[-1] for sequence in whole]
    return {
        "system": sequences[0].system,
        "method": sequences[0].method,
        "rate": Decimal(f"{sequences[0].rate:g}"),
        "sequences": len(whole),
        "diverged": len(sequences) - len(whole) or None,
        "of all tasks": share(lambda sequence: statistics.fmean(sequence.left[-1])),
        "of the first": share(lambda sequence: sequence.left[-1][0]),
        "of the last": share(lambda sequence: sequence.left[-1][-1]),
        "of the people before": share(lambda sequence: sequence.kept[-1]),
        "bits/byte": Decimal(f"{statistics.fmean(bits):.3f}") if bits else None,
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


def _systems(runs: Iterable[FineTuning]) -> list[str]:
    return list(dict.fromkeys(run.system for run in runs))


def _mean(points: Sequence[Point], field: str) -> float:
    return statistics.fmean(getattr(point, field) for point in points)
