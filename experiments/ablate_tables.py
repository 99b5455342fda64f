"""Which models the ablation trains, and its tables: our differences beside the published ones.

A difference is taken seed by seed between runs on the same batches, so that what a seed does to both sides
cancels; ± is the standard deviation of a difference over the seeds.
"""

import dataclasses
import itertools
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import ablate_figures, report
from experiments.seeds import Result, common_environment, deviation, final_bits, median_speed
from ultramem_jax import ModelConfig, RunConfig, UserError
from ultramem_jax.accounting import count_parameters, flops_per_token
from ultramem_jax.data import Corpus
from ultramem_jax.errors import unknown
from ultramem_jax.presets.ladder import GRID, GRID_PARTS, RUNGS, TABLE_2, grid, ladder

PARTS = ("ladder", *GRID_PARTS)


@dataclasses.dataclass(frozen=True)
class Study:
    """The models of some parts. Models that are equal have one name under which they are trained, once."""

    parts: tuple[str, ...]
    models: dict[str, ModelConfig]
    """All of the parts by name, and those that they are compared with."""
    trained_as: dict[str, str]
    """The name of the run, by the name of a model."""

    @property
    def trained(self) -> dict[str, ModelConfig]:
        """The models to train, each once."""
        return {name: self.models[name] for name in dict.fromkeys(self.trained_as.values())}


@dataclasses.dataclass(frozen=True)
class Difference:
    """A change of the loss: ours over the seeds (bits per byte), and the published one (nats per token)."""

    label: str
    ours: list[float]
    published: float | None

    @property
    def mean(self) -> float:
        """Over the seeds, bits per byte."""
        return statistics.fmean(self.ours)


def make_study(scale: str, parts: Sequence[str]) -> Study:
    """What to train for these parts.

    Args:
        scale: of `ultramem_jax.presets.ladder`.
        parts: some of `PARTS`.

    Raises:
        UserError: no part, or an unknown one.
    """
    if not parts:
        raise UserError(f"--parts = '': name at least one of {', '.join(PARTS)}")
    for part in parts:
        if part not in PARTS:
            raise unknown("part", part, PARTS)
    models = ladder(scale) | grid(scale)
    # The first name of a model is its run's, whichever parts are asked for: runs stay recognisable.
    first: dict[ModelConfig, str] = {}
    for name, model in models.items():
        first.setdefault(model, name)
    names = list(RUNGS) if "ladder" in parts else []
    for point in GRID:
        if point.part in parts:
            names += [point.base, point.name]
    # In the order of `models`, where the run's own name precedes all others.
    wanted = {first[models[name]] for name in names} | set(names)
    kept = {name: model for name, model in models.items() if name in wanted}
    return Study(tuple(parts), kept, {name: first[model] for name, model in kept.items()})


def write(
    study: Study, results: dict[str, list[Result]], folder: str | pathlib.Path, notes: Sequence[str]
) -> list[pathlib.Path]:
    """Writes table and figure of the ladder, and one of each for all grids together.

    Args:
        study: what was trained.
        results: of the runs, by `study.trained`'s names.
        folder: of the files `ladder` and `grids`.
        notes: paragraphs below each table, on how it was trained.

    Returns:
        The Markdown files and the figures.
    """
    folder = pathlib.Path(folder)
    runs = {name: results[trained] for name, trained in study.trained_as.items()}
    environment = common_environment(results)
    written = []
    if "ladder" in study.parts:
        steps = _ladder_differences(runs)
        words = [_WORDS_TITLE, _order_in_words(runs), *in_words(steps)]
        table, _ = report.write_table(
            _ladder_rows(study, runs, steps), folder / "ladder", _LADDER_TITLE, environment, [*notes, *words]
        )
        whole = [_difference(runs, r.name, RUNGS[0], r.change, _since_first(r.val_loss)) for r in TABLE_2]
        written += [table, ablate_figures.plot_ladder(_points(whole), folder / "ladder.png")]
    grids = {
        point.name: _difference(runs, point.name, point.base, point.name, point.difference)
        for point in GRID
        if point.part in study.parts
    }
    if grids:
        words = [_WORDS_TITLE, *in_words(list(grids.values()))]
        table, _ = report.write_table(
            _grid_rows(study, runs, grids), folder / "grids", _GRIDS_TITLE, environment, [*notes, *words]
        )
        panels = {
            part: _points([grids[point.name] for point in GRID if point.part == part])
            for part in GRID_PARTS
            if part in study.parts
        }
        written += [table, ablate_figures.plot_grids(panels, folder / "grids.png")]
    return written


def training_notes(study: Study, base: RunConfig, corpus: Corpus, seeds: int) -> list[str]:
    """How all runs were trained, and how the columns are to be read."""
    tokens = base.train.steps * base.train.batch_size * base.data.seq_len
    model = next(iter(study.models.values()))
    return [
        f"Models of width {model.embed_dim} with {model.num_layers} layers, {base.train.steps} steps of "
        f"{base.train.batch_size} × {base.data.seq_len} tokens "
        f"({tokens / 1e6:.2f} M), learning rate {base.train.learning_rate} for every config; corpus "
        f"{base.data.dataset}, {corpus.num_tokens['train'] / 1e6:.2f} M tokens of training, hash "
        f"{corpus.corpus_hash[:12]}.",
        f"Means over {seeds} seeds, ± one standard deviation over them. Δ is taken seed by seed, between "
        "runs on the same batches. Ours in bits per byte of the validation split; the paper's in nats per "
        "token of C4, at 151 M parameters and after far more training: signs and order can be compared, "
        "sizes cannot.",
        "Parameters and FLOPs (forward, per token) as the paper counts them: without embeddings and gains, "
        "two FLOPs per weight that a token is multiplied by.",
        "tokens/s: median training step, on a machine that other work may have shared; not a benchmark.",
    ]


def in_words(differences: Sequence[Difference]) -> list[str]:
    """Where our differences and the published ones disagree, and how sure ours are; computed, not judged."""
    known = [d for d in differences if d.published is not None]
    words = []
    if len(known) > 2:
        rho = rank_correlation([d.mean for d in known], [d.published or 0.0 for d in known])
        words.append(f"Rank correlation (Spearman) of our {len(known)} Δ with the published ones: {rho:.2f}.")
    signed = [d for d in known if d.published]
    opposite = [d for d in signed if d.mean * (d.published or 0.0) < 0]
    if signed:
        listed = "; ".join(f"{d.label} ({_signed(d)} here, {d.published:+.4g} published)" for d in opposite)
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
    """Spearman's: the correlation of ranks, equal values sharing their mean rank. NaN if one side is flat."""
    ranks_x, ranks_y = _ranks(x), _ranks(y)
    if np.ptp(ranks_x) == 0 or np.ptp(ranks_y) == 0:
        return math.nan
    return float(np.corrcoef(ranks_x, ranks_y)[0, 1])


_LADDER_TITLE = "From Product-Key Memory to UltraMem, one change at a time (bits per byte)"
_WORDS_TITLE = "## Where it differs from the paper"
_GRIDS_TITLE = "How far each change goes (bits per byte)"


def _ranks(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, np.float64)
    return np.array([(array < value).sum() + ((array == value).sum() - 1) / 2 for value in array])


def _points(differences: Sequence[Difference]) -> list[ablate_figures.Point]:
    return [(d.label, d.ours, d.published) for d in differences]


def _since_first(loss: float) -> float:
    return round(loss - TABLE_2[0].val_loss, 4)


def _difference(
    runs: dict[str, list[Result]], name: str, base: str, label: str, published: float | None
) -> Difference:
    pairs = zip(final_bits(runs[name]), final_bits(runs[base]), strict=True)
    return Difference(label, [new - old for new, old in pairs], published)


def _ladder_differences(runs: dict[str, list[Result]]) -> list[Difference]:
    """Of each rung but the first to the one before it."""
    return [
        _difference(runs, rung.name, before.name, rung.change, round(rung.val_loss - before.val_loss, 4))
        for before, rung in itertools.pairwise(TABLE_2)
    ]


def _order_in_words(runs: dict[str, list[Result]]) -> str:
    ours = [statistics.fmean(final_bits(runs[name])) for name in RUNGS]
    rho = rank_correlation(ours, [rung.val_loss for rung in TABLE_2])
    return f"Rank correlation (Spearman) of the {len(ours)} losses with the published ones: {rho:.2f}."


def _signed(difference: Difference) -> str:
    spread = deviation(difference.ours)
    return f"{difference.mean:+.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def _ladder_rows(
    study: Study, runs: dict[str, list[Result]], steps: list[Difference]
) -> list[dict[str, Any]]:
    rows = []
    for rung, step in zip(TABLE_2, [None, *steps], strict=True):
        row: dict[str, Any] = {"rung": rung.change if step is None else f"+ {rung.change}"}
        row |= _measured(runs[rung.name], step)
        row |= {"paper val. loss": rung.val_loss, "paper Δ": step.published if step else None}
        rows.append(row | _costs(study.models[rung.name], runs[rung.name]))
    return rows


def _grid_rows(
    study: Study, runs: dict[str, list[Result]], grids: dict[str, Difference]
) -> list[dict[str, Any]]:
    """Each grid's points, below what they are compared with."""
    rows = []
    for part in (part for part in GRID_PARTS if part in study.parts):
        points = [point for point in GRID if point.part == part]
        first: dict[str, Any] = {"grid": part, "config": points[0].base, "compared with": ""}
        first |= _measured(runs[points[0].base], None) | {"paper Δ": None}
        rows.append(first | _costs(study.models[points[0].base], runs[points[0].base]))
        for point in points:
            row: dict[str, Any] = {"grid": part, "config": point.name, "compared with": point.base}
            row |= _measured(runs[point.name], grids[point.name]) | {"paper Δ": point.difference}
            rows.append(row | _costs(study.models[point.name], runs[point.name]))
    return rows


def _measured(runs: list[Result], difference: Difference | None) -> dict[str, Any]:
    bits = final_bits(runs)
    return {
        "validation bits/byte": statistics.fmean(bits),
        "± (val.)": deviation(bits),
        "Δ": difference.mean if difference else None,
        "± (Δ)": deviation(difference.ours) if difference else None,
    }


def _costs(model: ModelConfig, runs: list[Result]) -> dict[str, Any]:
    parameters = count_parameters(model)
    return {
        "dense parameters": parameters.paper_dense,
        "sparse parameters": parameters.sparse,
        "FLOPs per token": flops_per_token(model).paper,
        "tokens/s": median_speed(runs),
    }
