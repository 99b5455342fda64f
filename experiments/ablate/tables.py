"""Chooses the models of the ablation, and makes its tables: our differences beside the published ones.

A difference is taken seed by seed between runs on the same batches, so that the effect of a seed on both runs
cancels. ± is the standard deviation of a difference over the seeds.
"""

import dataclasses
import itertools
import math
import pathlib
import statistics
from collections.abc import Sequence
from decimal import Decimal

import numpy as np

from experiments.ablate import figures
from experiments.common import report
from experiments.common.seeds import (
    Result,
    common_environment,
    deviation,
    final_bits,
    median_speed,
    paired_differences,
    training_in_words,
)
from ultramem_jax import ModelConfig, RunConfig
from ultramem_jax.accounting import count_parameters, flops_per_token
from ultramem_jax.cli.arguments import check_names
from ultramem_jax.data import Corpus
from ultramem_jax.presets.ladder import GRID, GRID_PARTS, LADDER, RUNGS, grid, ladder
from ultramem_jax.presets.published import PUBLISHED, TABLE_3
from ultramem_jax.reporting import markdown

PARTS = ("ladder", *GRID_PARTS)


@dataclasses.dataclass(frozen=True)
class Study:
    """Holds the models of some parts; equal models share one name, under which they are trained once."""

    parts: tuple[str, ...]
    models: dict[str, ModelConfig]
    """All models of the parts, and those that they are compared with, by name."""
    trained_as: dict[str, str]
    """Name of the run of each model, by name of the model."""

    @property
    def trained(self) -> dict[str, ModelConfig]:
        """Returns the models to train by name of the run, each once."""
        return {name: self.models[name] for name in dict.fromkeys(self.trained_as.values())}


@dataclasses.dataclass(frozen=True)
class Difference:
    """Holds a change of the loss: ours of each seed (bits per byte), and the published (nats per token)."""

    label: str
    ours: list[float]
    published: Decimal | None
    """Published difference, with its printed digits; None if there is none."""

    @property
    def mean(self) -> float:
        """Returns the mean of our differences over the seeds, in bits per byte."""
        return statistics.fmean(self.ours)


def make_study(scale: str, parts: Sequence[str]) -> Study:
    """Chooses the models to train for some parts.

    Args:
        scale: a scale of `ultramem_jax.presets.ladder`.
        parts: some of `PARTS`.

    Raises:
        UserError: no part, or an unknown one.
    """
    check_names("parts", parts, PARTS)
    models = ladder(scale) | grid(scale)
    # A run has the first name of its model, whichever parts are trained, so that other parts can reuse it.
    first: dict[ModelConfig, str] = {}
    for name, model in models.items():
        first.setdefault(model, name)
    names = list(RUNGS) if "ladder" in parts else []
    for point in GRID:
        if point.part in parts:
            names += [point.base, point.name]
    # Keeps the order of `models`, in which the name of a run precedes all other names of its model.
    wanted = {first[models[name]] for name in names} | set(names)
    kept = {name: model for name, model in models.items() if name in wanted}
    return Study(tuple(parts), kept, {name: first[model] for name, model in kept.items()})


def write(
    study: Study, results: dict[str, list[Result]], folder: str | pathlib.Path, notes: Sequence[str]
) -> list[pathlib.Path]:
    """Writes table and figure of the ladder, and one table and one figure of all grids.

    Args:
        study: the models that were trained.
        results: results of the runs, by the names of `study.trained`.
        folder: folder of the files `ladder` and `grids`.
        notes: paragraphs below each table, on the training.

    Returns:
        The Markdown files and the figures.
    """
    folder = pathlib.Path(folder)
    runs = {name: results[trained] for name, trained in study.trained_as.items()}
    environment = common_environment(results)
    written = []
    if "ladder" in study.parts:
        steps = _ladder_differences(runs)
        table, _ = report.write_table(
            _ladder_rows(study, runs, steps),
            folder / "ladder",
            _LADDER_TITLE,
            environment,
            notes,
            {_COMPARED: [_order_in_words(runs), *in_words(steps)]},
            {"loss along the ladder, here and in the paper": "ladder.png"},
        )
        whole = [
            _difference(runs, rung.name, RUNGS[0], rung.change, _loss_between(RUNGS[0], rung.name))
            for rung in LADDER
        ]
        written += [table, figures.plot_ladder(_points(whole), folder / "ladder.png")]
    grids = {
        point.name: _difference(runs, point.name, point.base, point.name, TABLE_3.get(point.name))
        for point in GRID
        if point.part in study.parts
    }
    if grids:
        table, _ = report.write_table(
            _grid_rows(study, runs, grids),
            folder / "grids",
            _GRIDS_TITLE,
            environment,
            notes,
            {_COMPARED: in_words(list(grids.values()))},
            {"change of the loss along the grids of E, r and h, here and in the paper": "grids.png"},
        )
        panels = {
            part: _points([grids[point.name] for point in GRID if point.part == part])
            for part in GRID_PARTS
            if part in study.parts
        }
        written += [table, figures.plot_grids(panels, folder / "grids.png")]
    return written


def training_notes(study: Study, base: RunConfig, corpus: Corpus, seeds: int) -> list[str]:
    """Explains how all runs were trained, and how to read the columns."""
    model = next(iter(study.models.values()))
    return [
        f"Models of width {model.embed_dim} with {model.num_layers} layers, "
        f"{training_in_words(base, corpus)} The learning rate is the same for every config.",
        f"Means over {seeds} seeds, ± one standard deviation over them. Δ is taken seed by seed, between "
        "runs on the same batches. Ours in bits per byte of the validation split; the paper's in nats per "
        "token of C4, at 151 M parameters and after far more training: signs and order can be compared, "
        "sizes cannot.",
        "Parameters and FLOPs (forward, per token) as the paper counts them: without embeddings and gains, "
        "two FLOPs per weight that a token is multiplied by.",
        "tokens/s: median training step, on a machine that other work may have shared; not a benchmark.",
    ]


def in_words(differences: Sequence[Difference]) -> list[str]:
    """Says where our differences and the published ones disagree, and how certain ours are.

    All of it is computed; nothing is judged by hand.
    """
    known = [d for d in differences if d.published is not None]
    words = []
    if len(known) > 2:
        rho = rank_correlation([d.mean for d in known], [float(d.published or 0) for d in known])
        words.append(f"Rank correlation (Spearman) of our {len(known)} Δ with the published ones: {rho:.2f}.")
    signed = [d for d in known if d.published]
    opposite = [d for d in signed if d.mean * float(d.published or 0) < 0]
    if signed:
        listed = "; ".join(f"{d.label} ({_signed(d)} here, {d.published:+} published)" for d in opposite)
        words.append(
            f"Their signs differ at {len(opposite)} of {len(signed)}" + (f": {listed}." if listed else ".")
        )
    if zero := [d.label for d in known if d.published == 0]:
        words.append(f"Published as unchanged to three decimals, so without a sign: {', '.join(zero)}.")
    spreads = [deviation(d.ours) for d in differences]
    if all(spread is not None for spread in spreads):
        unsure = [d.label for d, s in zip(differences, spreads, strict=True) if abs(d.mean) <= (s or 0.0)]
        words.append(
            "Our Δ that are no larger than their standard deviation over the seeds, so that their sign is "
            f"open: {', '.join(unsure) or 'none'}."
        )
    return words


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Returns Spearman's rank correlation; equal values share their mean rank.

    It is NaN if all values of one side are equal.
    """
    ranks_x, ranks_y = _ranks(x), _ranks(y)
    if np.ptp(ranks_x) == 0 or np.ptp(ranks_y) == 0:
        return math.nan
    return float(np.corrcoef(ranks_x, ranks_y)[0, 1])


_LADDER_TITLE = "From Product-Key Memory to UltraMem, one change at a time (bits per byte)"
_COMPARED = "Where it differs from the paper"
_GRIDS_TITLE = "How far each change goes (bits per byte)"


def _ranks(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, np.float64)
    return np.array([(array < value).sum() + ((array == value).sum() - 1) / 2 for value in array])


def _points(differences: Sequence[Difference]) -> list[figures.Point]:
    return [(d.label, d.ours, None if d.published is None else float(d.published)) for d in differences]


def _published_loss(rung: str) -> Decimal:
    loss = PUBLISHED[rung].val_loss
    assert loss is not None, "table 2 has a validation loss in every row"
    return loss


def _loss_between(first: str, second: str) -> Decimal:
    """Returns the published loss of the second rung minus that of the first, nats per token."""
    return _published_loss(second) - _published_loss(first)


def _difference(
    runs: dict[str, list[Result]], name: str, base: str, label: str, published: Decimal | None
) -> Difference:
    return Difference(label, paired_differences(runs[name], runs[base]), published)


def _ladder_differences(runs: dict[str, list[Result]]) -> list[Difference]:
    """Returns the difference of each rung to the previous one."""
    return [
        _difference(runs, rung.name, before.name, rung.change, _loss_between(before.name, rung.name))
        for before, rung in itertools.pairwise(LADDER)
    ]


def _order_in_words(runs: dict[str, list[Result]]) -> str:
    ours = [statistics.fmean(final_bits(runs[name])) for name in RUNGS]
    rho = rank_correlation(ours, [float(_published_loss(name)) for name in RUNGS])
    return f"Rank correlation (Spearman) of the {len(ours)} losses with the published ones: {rho:.2f}."


def _signed(difference: Difference) -> str:
    return f"{difference.mean:+.4f}{report.spread(deviation(difference.ours), '.4f')}"


def _ladder_rows(study: Study, runs: dict[str, list[Result]], steps: list[Difference]) -> list[markdown.Row]:
    rows = []
    for rung, step in zip(LADDER, [None, *steps], strict=True):
        row: markdown.Row = {"rung": rung.change if step is None else f"+ {rung.change}"}
        row |= _measured(runs[rung.name], step)
        row |= {"paper val. loss": _published_loss(rung.name), "paper Δ": step.published if step else None}
        rows.append(row | _costs(study.models[rung.name], runs[rung.name]))
    return rows


def _grid_rows(
    study: Study, runs: dict[str, list[Result]], grids: dict[str, Difference]
) -> list[markdown.Row]:
    """Returns the rows of each grid: first the base, then the points that are compared with it."""
    rows = []
    for part in (part for part in GRID_PARTS if part in study.parts):
        points = [point for point in GRID if point.part == part]
        first: markdown.Row = {"grid": part, "config": points[0].base, "compared with": ""}
        first |= _measured(runs[points[0].base], None) | {"paper Δ": None}
        rows.append(first | _costs(study.models[points[0].base], runs[points[0].base]))
        for point in points:
            row: markdown.Row = {"grid": part, "config": point.name, "compared with": point.base}
            row |= _measured(runs[point.name], grids[point.name]) | {"paper Δ": grids[point.name].published}
            rows.append(row | _costs(study.models[point.name], runs[point.name]))
    return rows


def _measured(runs: list[Result], difference: Difference | None) -> markdown.Row:
    bits = final_bits(runs)
    return {
        "validation bits/byte": statistics.fmean(bits),
        "± (val.)": deviation(bits),
        "Δ": difference.mean if difference else None,
        "± (Δ)": deviation(difference.ours) if difference else None,
    }


def _costs(model: ModelConfig, runs: list[Result]) -> markdown.Row:
    parameters = count_parameters(model)
    return {
        "dense parameters": parameters.paper_dense,
        "sparse parameters": parameters.sparse,
        "FLOPs per token": flops_per_token(model).paper,
        "tokens/s": median_speed(runs),
    }
