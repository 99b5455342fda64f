"""Makes the report of `recall` from its measurements."""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path

from experiments.common import report
from experiments.common.rates import at_an_end
from experiments.recall import figures
from experiments.recall.records import Run, Study
from experiments.recall.systems import DENSE
from experiments.recall.trials import best_rate
from ultramem_jax.reporting import markdown
from ultramem_jax.reporting.markdown import Row, significant

NAME = "recall"
_FLAT = 0.01
"""Share of all bits below which a doubling of the sparse parameters counts as no gain, on average."""


def write(study: Study, folder: Path) -> list[Path]:
    """Writes the report (`.md`), its table (`.csv`), the measurements (`.json`) and the figure.

    Returns:
        The paths; the report comes first.
    """
    raw = study.save(folder / f"{NAME}.json")
    text, table = report.write_table(
        [row(study, runs) for runs in groups(study.runs)],
        folder / NAME,
        "Facts held at equal compute, against sparse parameters",
        study.environment,
        notes(study),
        {
            "What it shows": in_words(study),
            "Learning rates": [_tuning_note(study), markdown.table(tuning_rows(study))],
        },
        {"bits held against parameters, by system": f"{NAME}.png"},
    )
    return [text, table, raw, figures.plot(study, folder / f"{NAME}.png")]


def groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Returns the runs of each system and size together: systems as they come, sizes in increasing order."""
    systems = {run.system: number for number, run in reversed(list(enumerate(runs)))}
    ordered = sorted(runs, key=lambda run: (systems[run.system], run.size, run.seed))
    return [list(of) for _, of in itertools.groupby(ordered, key=lambda run: (run.system, run.size))]


def row(study: Study, runs: Sequence[Run]) -> Row:
    """Returns the row of a system of one size: counts, and means over its runs."""
    first, share = runs[0], [study.share(run) for run in runs]
    speeds = [run.tokens_per_second for run in runs if run.tokens_per_second is not None]
    losses = [run.validation_bits for run in runs if run.validation_bits is not None]
    return {
        "system": first.system,
        "size": f"{first.size}×" if first.size else "",
        "shape": first.shape,
        "parameters": first.parameters,
        "sparse parameters": first.sparse_parameters,
        "FLOPs per token": first.flops,
        "rate": _plain(first.rate),
        "statements": _mean(runs, lambda run: run.statements.greedy),
        "held-out statements": _mean(runs, lambda run: run.held_out.greedy),
        "questions": _mean(runs, lambda run: run.questions.greedy),
        "bits/byte": statistics.fmean(losses) if losses else None,
        "bits": _mean(runs, lambda run: run.statements.stored_bits),
        "share of all bits": statistics.fmean(share),
        "± (share)": statistics.stdev(share) if len(share) > 1 else None,
        "bits/parameter": _mean(runs, lambda run: run.bits_per_parameter),
        "bits/sparse parameter": _mean(runs, lambda run: run.bits_per_sparse_parameter or 0.0)
        if first.sparse_parameters
        else None,
        "tokens/s": round(statistics.median(speeds)) if speeds else None,
    }


def tuning_rows(study: Study) -> list[Row]:
    """Returns a row for each system: the share of all bits that it holds at each rate, and its best rate."""
    rates, rows = _rates(study), []
    for runs in groups(study.tunings):
        by_rate = {rate: [run for run in runs if run.rate == rate] for rate in rates}
        held = {rate: _share(study, of) for rate, of in by_rate.items() if of}
        found: Row = {"system": runs[0].system, "size": f"{runs[0].size}×" if runs[0].size else ""}
        rows.append(
            found | {f"{rate:g}": held.get(rate) for rate in rates} | {"chosen": _plain(best_rate(runs))}
        )
    return rows


def notes(study: Study) -> list[str]:
    """Explains how all runs were trained, and how to read the columns."""
    seeds = len({run.seed for run in study.runs})
    lost = (
        f" Left out, since the loss became infinite: {'; '.join(study.diverged)}." if study.diverged else ""
    )
    averaged = f"Means over {seeds} seeds, ± one standard deviation" if seeds > 1 else "One seed"
    return [
        study.training,
        f"{study.people:,} people, whose values have {study.all_bits:,.0f} bits. `size`: sparse parameters, "
        "in multiples of the dense model's, without embeddings. All systems have the same FLOPs per token, "
        "within 2 %; attention scores and logits, equal for all, are left out.",
        "`statements`: facts of all people that greedy decoding completes exactly after templates that were "
        "trained; `held-out statements`: after templates that no text has; `questions`: about the people "
        "about whom no text asks a question, in templates that were trained with others.",
        "`bits/byte`: loss on the validation split, biographies in templates that no text has.",
        "`bits`: what the model knows of the values, by the answers after trained templates; a lower bound "
        "(Allen-Zhu and Li, arXiv 2404.05405, without the bits of names). `bits/parameter` counts all "
        "parameters, with embeddings. They find 1 bit per parameter after 100 exposures of a fact, and 2 "
        "after 1,000. With fewer, a model shows what it learns in that time, not what it could hold.",
        "Rows of tables learn at their memory's multiple of the rate, `value_lr_multiple` of the preset; "
        "experts learn at the rate itself.",
        f"A larger size adds something to a smaller one if it holds {100 * _FLAT:.0f} % of all bits more per "
        "doubling between them, and more than the standard error of the difference.",
        "Runs that an earlier call of the command has kept in its `--workdir` were not repeated.",
        f"{averaged}; the same people and batches for every system. tokens/s: median training speed, on a "
        "machine that other work may have shared; not a benchmark." + lost,
    ]


def in_words(study: Study) -> list[str]:
    """Says how much each system holds, and where its curve bends. All of it is computed."""
    by_system: dict[str, dict[int, list[Run]]] = {}
    for runs in groups(study.runs):
        by_system.setdefault(runs[0].system, {})[runs[0].size] = runs
    dense = by_system.pop(DENSE, {}).get(0)
    words = []
    if dense:
        words.append(
            f"The dense model holds {report.percent(_share(study, dense))} of all bits, "
            f"{significant(_mean(dense, lambda run: run.bits_per_parameter), 2)} per parameter."
        )
    for system, sizes in by_system.items():
        words.append(f"{system}: {_of_system(study, sizes)}{_beside(study, sizes, dense)}")
    return words


def bend(shares: dict[int, list[float]]) -> int | None:
    """Returns the smallest size to which no larger one adds anything; None if that is the largest.

    A size adds something to another if its mean is larger by `_FLAT` of all bits per doubling or more, and by
    more than the standard error.

    Args:
        shares: shares of all bits, one of each run, by size, in increasing order.
    """

    def adds(small: int, large: int) -> bool:
        low, high = shares[small], shares[large]
        gain = statistics.fmean(high) - statistics.fmean(low)
        error = math.sqrt(sum(statistics.variance(of) / len(of) for of in (low, high) if len(of) > 1))
        return gain / math.log2(large / small) >= _FLAT and gain > error

    sizes = list(shares)
    flat = (size for size in sizes[:-1] if not any(adds(size, larger) for larger in sizes if larger > size))
    return next(flat, None)


def _of_system(study: Study, sizes: dict[int, list[Run]]) -> str:
    of_runs = {size: [study.share(run) for run in runs] for size, runs in sizes.items()}
    shares = {size: statistics.fmean(of) for size, of in of_runs.items()}
    first, last = min(shares), max(shares)
    most = max(shares, key=lambda size: shares[size])
    if first == last:
        return f"{report.percent(shares[first])} of all bits at {first}×"
    flat = bend(of_runs)
    bends = f"more than {flat}× add nothing beyond the noise" if flat else f"{last}× still add something"
    held = {size: report.percent(share) for size, share in shares.items()}
    return (
        f"{held[first]} of all bits at {first}×, {held[last]} at {last}×, most at {most}× ({held[most]}); "
        f"{bends}"
    )


def _beside(study: Study, sizes: dict[int, list[Run]], dense: Sequence[Run] | None) -> str:
    """Says at how many sizes, and in how many runs of a seed, a system holds more than the dense model."""
    if not dense:
        return "."
    of_seed = {run.seed: study.share(run) for run in dense}
    pairs = [
        study.share(run) > of_seed[run.seed] for runs in sizes.values() for run in runs if run.seed in of_seed
    ]
    return f". It holds more than the dense model of the same seed in {sum(pairs)} of {len(pairs)} runs."


def _tuning_note(study: Study) -> str:
    number = len({run.seed for run in study.tunings})
    seeds = "one run," if number == 1 else f"means over {number} runs"
    edges = [
        f"{runs[0].system} ({best_rate(runs):g})"
        for runs in groups(study.tunings)
        if at_an_end(best_rate(runs), (run.rate for run in runs))
    ]
    return (
        f"Share of all bits at each learning rate, {seeds} with seeds that no other run has. The best "
        "rate of a system is that of all its sizes. Further rates were tried where the best was at an end. A "
        "blank was not tried, or the loss became infinite."
        + (f" Best at an end all the same: {', '.join(edges)}." if edges else "")
    )


def _rates(study: Study) -> list[float]:
    return sorted({run.rate for run in study.tunings})


def _plain(rate: float) -> Decimal:
    """Returns a rate that tables show with its own digits."""
    return Decimal(f"{rate:g}")


def _share(study: Study, runs: Sequence[Run]) -> float:
    return statistics.fmean(study.share(run) for run in runs)


def _mean(runs: Sequence[Run], value: Callable[[Run], float]) -> float:
    return statistics.fmean(map(value, runs))
