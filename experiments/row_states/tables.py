"""Defines the choices of a row's optimizer state, and makes their table and their figure."""

import dataclasses
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence

from experiments.common import figures
from experiments.common.seeds import (
    Result,
    deviation,
    final_bits,
    median_speed,
    paired_differences,
    training_in_words,
)
from ultramem_jax import MemoryConfig, RunConfig, UserError
from ultramem_jax.accounting import RowBytes, row_bytes
from ultramem_jax.config.row_states import row_arrays, takes_means
from ultramem_jax.data import Corpus
from ultramem_jax.presets import families
from ultramem_jax.reporting import markdown


@dataclasses.dataclass(frozen=True)
class Choice:
    """Describes which state of a row is kept, and the rule that updates the row.

    `table_dtype` is the `dtype` of `TableConfig`. The other fields have the names of fields of `TrainConfig`.
    """

    label: str
    table_dtype: str = "float32"
    row_second_moment: str = "element"
    row_moment_dtype: str = "float32"
    row_rounding: str = "stochastic"
    row_optimizer: str = "adamw"

    def config(self, base: RunConfig, memory: MemoryConfig) -> RunConfig:
        """Returns `base` with this choice; `memory` is its memory."""
        fields = dataclasses.asdict(self)
        del fields["label"]
        memory = memory.changed(dtype=fields.pop("table_dtype"))
        model = base.model.with_memory(memory)
        return dataclasses.replace(base, model=model, train=dataclasses.replace(base.train, **fields))

    @property
    def moments(self) -> str:
        """Describes the state beside the table: numbers per value, then numbers per row."""
        kept = row_arrays(self.row_optimizer, self.row_second_moment, self.row_moment_dtype)
        of_values = [array.dtype for array in kept if array.per == "value"]
        words = [f"{len(of_values)} × {of_values[0]}"] if len(of_values) > 1 else of_values
        return ", ".join([*words, *(f"{array.dtype} per row" for array in kept if array.per == "row")])

    @property
    def rounding(self) -> str:
        """Returns how bfloat16 is rounded; blank if nothing is rounded."""
        return self.row_rounding if "bfloat16" in (self.table_dtype, self.row_moment_dtype) else ""


REFERENCE = "full-adam"
_HALVES = "bfloat16 table and moments"
CHOICES = {
    REFERENCE: Choice("full Adam"),
    "row-second-moment": Choice("second moment per row", row_second_moment="row"),
    "bfloat16-moments": Choice("bfloat16 moments", row_moment_dtype="bfloat16"),
    "bfloat16": Choice(_HALVES, "bfloat16", row_moment_dtype="bfloat16"),
    "bfloat16-row": Choice(f"{_HALVES}, second moment per row", "bfloat16", "row", "bfloat16"),
    "bfloat16-row-nearest": Choice(
        f"{_HALVES}, second moment per row, to nearest", "bfloat16", "row", "bfloat16", "nearest"
    ),
    "catch-up": Choice("Adam that catches up on missed decay", row_optimizer="adamw_catch_up"),
    "adagrad": Choice("Adagrad", row_optimizer="adagrad"),
    "adagrad-row": Choice("row-wise Adagrad", row_optimizer="adagrad_row"),
    "sgd-momentum": Choice("SGD with momentum", row_optimizer="sgd_momentum"),
    "sgd": Choice("SGD", row_optimizer="sgd"),
}
"""Choices by name of the run."""

_LARGE = families.ultramem(num_keys=4500, value_dim=128)
"""A memory of a size for which these choices matter."""
_LARGE_SLOTS = _LARGE.address.own_slots
_GB = 1e9


def make_configs(base: RunConfig, names: Sequence[str]) -> dict[str, RunConfig]:
    """Returns the runs of the named choices and of the reference, which comes first.

    Args:
        base: model, data and training of all runs.
        names: names in `CHOICES`.

    Raises:
        UserError: a base without a memory, or one that already makes such a choice.
    """
    memory = base.model.memory
    if memory is None or not base.model.sites:
        raise UserError("model.memory: rows belong to memories; the base must have one")
    chosen = {REFERENCE, *names}
    configs = {name: choice.config(base, memory) for name, choice in CHOICES.items() if name in chosen}
    if configs[REFERENCE] != base:
        raise UserError(
            "config: model.memories.*.table.dtype, train.row_optimizer, train.row_second_moment, "
            "train.row_moment_dtype and train.row_rounding are what --choices varies; leave them at their "
            "defaults"
        )
    return configs


def rows(configs: Mapping[str, RunConfig], results: Mapping[str, list[Result]]) -> list[markdown.Row]:
    """Returns a row per choice: its memory, and its loss beside that of the reference."""
    return [_row(CHOICES[name], config, results, name) for name, config in configs.items()]


def notes(base: RunConfig, corpus: Corpus, seeds: int) -> list[str]:
    """Explains how all choices were trained, and how to read the columns."""
    return [
        f"One model of width {base.model.embed_dim} with {base.model.num_layers} layers and "
        f"{len(base.model.sites)} memories, {training_in_words(base, corpus)}",
        "Bytes per slot: its row of the table and the optimizer's state of it. `2 × float32`: a first and a "
        "second moment for every value; `float32 per row`: the second one, or Adagrad's sum, is of means "
        "over the values of a row; `int32 per row`: the last step that read it. "
        f"GB: table and moments of {_LARGE_SLOTS:,} slots with values {_LARGE.table.value_dim} wide, "
        "10⁹ bytes.",
        "Rounding: of what is kept in bfloat16. To nearest, an update below half of a value's last bit is "
        "lost; stochastically it arrives on average.",
        "Every choice has the learning rate of full Adam. SGD and Adagrad would each need their own: of "
        "these the loss says what changing the rule does, not what the rule can do.",
        f"Means over {seeds} seeds, ± one standard deviation over them; Δ, to full Adam, is taken seed by "
        "seed between runs on the same batches. The runs are short: what small updates lose in a long run "
        "with a low learning rate at its end, these cannot show.",
        "tokens/s: median training step, on a machine that other work may have shared; not a benchmark.",
    ]


def plot(
    configs: Mapping[str, RunConfig], results: Mapping[str, list[Result]], path: str | os.PathLike[str]
) -> pathlib.Path:
    """Draws the difference of each choice to the reference against its bytes per slot; returns the path.

    Choices with almost equal bytes are moved apart, so that no point hides another.
    """
    sizes = {name: _bytes_of(config).total for name, config in configs.items()}
    figure = figures.new_figure(7.2, 5.6)
    axes = figure.subplots()
    for name, place in _moved_apart(sizes).items():
        choice, differences = CHOICES[name], _differences(results, name)
        per_row = takes_means(configs[name].train.row_arrays)
        axes.errorbar(
            place,
            statistics.fmean(differences),
            yerr=deviation(differences) or 0.0,
            fmt=_marker(choice, per_row),
            color=_colour(choice),
            markerfacecolor="white" if per_row else None,
            markersize=7,
            capsize=4,
            linestyle="none",
            label=f"{choice.label}: {sizes[name]} bytes",
        )
    figures.mark_zero(axes)
    axes.set_xlim(0, 1.08 * max(sizes.values()))
    seeds = len(results[REFERENCE])
    about = figures.seeds_in_words(seeds)
    axes.set(
        xlabel="bytes per slot, table and moments",
        ylabel=f"validation bits per byte, Δ to full Adam\n({about})",
    )
    figures.set_title(axes, "What is kept of a row in training: memory and loss")
    figures.set_plain(axes)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    return figures.save(figure, path)


def _row(choice: Choice, config: RunConfig, results: Mapping[str, list[Result]], name: str) -> markdown.Row:
    of_slot = _bytes_of(config)
    large = row_bytes(_LARGE.changed(dtype=choice.table_dtype).table, config.train)
    bits = final_bits(results[name])
    differences = _differences(results, name) if name != REFERENCE else None
    return {
        "choice": choice.label,
        "table": choice.table_dtype,
        "moments": choice.moments,
        "rounding": choice.rounding,
        "table bytes/slot": of_slot.table,
        "moment bytes/slot": of_slot.moments,
        "bytes/slot": of_slot.total,
        f"GB of {_LARGE_SLOTS:,} × {_LARGE.table.value_dim}": large.total * _LARGE_SLOTS / _GB,
        "validation bits/byte": statistics.fmean(bits),
        "± (val.)": deviation(bits),
        "Δ": statistics.fmean(differences) if differences else None,
        "± (Δ)": deviation(differences) if differences else None,
        "tokens/s": median_speed(results[name]),
    }


def _bytes_of(config: RunConfig) -> RowBytes:
    assert config.model.memory is not None, "make_configs has refused models without one"
    return row_bytes(config.model.memory.table, config.train)


def _differences(results: Mapping[str, list[Result]], name: str) -> list[float]:
    """Returns the differences of a choice to the reference, seed by seed."""
    return paired_differences(results[name], results[REFERENCE])


def _marker(choice: Choice, per_row: bool) -> str:
    of_rules = {"adamw_catch_up": "^", "adagrad": "s", "adagrad_row": "s", "sgd": "v", "sgd_momentum": "P"}
    return of_rules.get(choice.row_optimizer, "D" if per_row else "o")


def _colour(choice: Choice) -> str:
    if not choice.rounding:
        return figures.GREY
    if choice.row_rounding == "nearest":
        return figures.VERMILION
    return figures.GREEN if choice.table_dtype == "float32" else figures.BLUE


def _moved_apart(sizes: Mapping[str, int]) -> dict[str, float]:
    """Returns positions on the axis of bytes that are at least the width of a point apart."""
    width = 0.025 * max(sizes.values())
    groups: list[list[str]] = []
    for name in sorted(sizes, key=lambda name: sizes[name]):
        if groups and sizes[name] - sizes[groups[-1][-1]] < width:
            groups[-1].append(name)
        else:
            groups.append([name])
    places = {
        name: statistics.fmean(sizes[other] for other in group) + width * (i - (len(group) - 1) / 2)
        for group in groups
        for i, name in enumerate(group)
    }
    return {name: places[name] for name in sizes}
