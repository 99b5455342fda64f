"""Makes the optimizers of a run: optax for the dense parameters, rows or optax for the value tables."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.tree_util import KeyPath

from ultramem_jax.config import ModelConfig, RunConfig, TrainConfig
from ultramem_jax.training.row_rules import inverse_root, row_rule
from ultramem_jax.training.row_sparse import RowSparseTransformation, row_sparse
from ultramem_jax.training.schedules import learning_rate, value_learning_rate
from ultramem_jax.tree_types import ArrayTree

Mask: TypeAlias = Callable[[ArrayTree], ArrayTree]
"""Function from parameters to a tree of booleans, true where weight decay applies."""

_MATRICES_OF_LAYERS = ("w_query", "w_key", "w_value", "w_out", "w_in", "w_gate", "router")
MUON_MOMENTUM = 0.95
"""Muon's own default momentum, with Nesterov's correction."""
_MUON_RMS = 0.2
"""Root mean square of Muon's steps at a learning rate of one. It is about that of AdamW's steps, so that both
can use the same learning rate and weight decay (Moonlight, arXiv 2502.16982)."""


class Optimizers(NamedTuple):
    """Holds the optimizers of a run. Either `rows` or `tables` trains the value tables.

    `TrainConfig.table_gradient` says which.
    """

    params: optax.GradientTransformation
    rows: Mapping[str, RowSparseTransformation]
    """Row optimizers, by the name of the table."""
    tables: optax.GradientTransformation
    """The dense way: an optax optimizer on a gradient of the table's size. Tests compare `rows` with it."""


def make_optimizers(config: RunConfig) -> Optimizers:
    """Makes the optimizers that the config names for parameters and tables.

    Parameters get `train.optimizer`, with clipping; tables get `train.row_optimizer`.
    """
    train = config.train
    clip = optax.clip_by_global_norm(train.clip_norm) if train.clip_norm else optax.identity()
    rates = table_learning_rates(config)
    groups = {site.table: site.group for site in config.model.sites}
    kinds: dict[str, Callable[..., optax.GradientTransformation]] = {
        "adamw": _adamw,
        "muon": partial(_muon, config.model),
        "lion": _lion,
    }
    of_params = kinds[train.optimizer]

    def decayed(group: str) -> TrainConfig:
        """Returns the training settings of a group's rows, which say whether the rows decay."""
        decays = config.model.memories[group].decay_values
        return train if decays else dataclasses.replace(train, weight_decay=0.0)

    def rows(group: str) -> RowSparseTransformation:
        return row_sparse(row_rule(decayed(group)), rates[group], rounding=train.row_rounding)

    def of_tables(group: str) -> optax.GradientTransformation:
        return _of_tables(decayed(group), rates[group])

    return Optimizers(
        params=optax.chain(clip, of_params(train, learning_rate(train), mask=_matrices)),
        rows={table: rows(group) for table, group in groups.items()},
        tables=_per_group(of_tables, groups),
    )


def table_learning_rates(config: RunConfig) -> dict[str, optax.Schedule]:
    """Returns the learning rate of the tables of every memory, by its name in `ModelConfig.memories`."""
    return {
        name: value_learning_rate(config.train, memory.value_lr_multiple, memory.value_lr_final_multiple)
        for name, memory in config.model.memories.items()
    }


def _per_group(
    of_group: Callable[[str], optax.GradientTransformation], groups: Mapping[str, str]
) -> optax.GradientTransformation:
    """Returns one transformation of all tables, which applies the optimizer of each table's group."""
    distinct = list(dict.fromkeys(groups.values()))
    if len(distinct) == 1:
        return of_group(distinct[0])

    def labels(tables: Mapping[str, ArrayTree]) -> dict[str, str]:
        return {table: groups[table] for table in tables}

    return (
        optax.partition({group: of_group(group) for group in distinct}, labels)
        if distinct
        else optax.identity()
    )


def _adamw(train: TrainConfig, rate: optax.Schedule, mask: Mask | None) -> optax.GradientTransformation:
    return optax.adamw(
        rate, b1=train.b1, b2=train.b2, eps=train.eps, weight_decay=train.weight_decay, mask=mask
    )


def _lion(train: TrainConfig, rate: optax.Schedule, mask: Mask | None) -> optax.GradientTransformation:
    """Returns Lion (arXiv 2302.06675). Its learning rate should be 3 to 10 times below AdamW's."""
    return optax.lion(rate, b1=train.b1, b2=train.b2, weight_decay=train.weight_decay, mask=mask)


def _muon(
    model: ModelConfig, train: TrainConfig, rate: optax.Schedule, mask: Mask | None
) -> optax.GradientTransformation:
    """Returns Muon (Jordan et al., kellerjordan.github.io/posts/muon) on `muon_matrices`, AdamW on the rest.

    It does not use `optax.contrib.muon`, whose AdamW would use Nesterov's correction and decay gains.
    """
    matrices = muon_matrices(model)

    def labels(params: ArrayTree) -> ArrayTree:
        """Returns, per parameter, the optimizer that takes it: `muon` or `adamw`."""

        def label(path: KeyPath, _: jax.Array) -> str:
            names = tuple(key.key for key in path)
            return "muon" if names[-1:] in matrices or names[-2:] in matrices else "adamw"

        return jax.tree_util.tree_map_with_path(label, params)

    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=MUON_MOMENTUM, weight_dimension_numbers=_of_last_axes),
        optax.stateless_with_tree_map(lambda step, _: step * (_MUON_RMS * max(step.shape[-2:]) ** 0.5)),
        optax.add_decayed_weights(train.weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    return optax.partition({"muon": muon, "adamw": _adamw(train, rate, mask)}, labels)


def _matrices(params: ArrayTree) -> ArrayTree:
    """Says which parameters decay: all except gains, which are vectors."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def muon_matrices(model: ModelConfig) -> frozenset[tuple[str, ...]]:
    """Returns the parameters that Muon orthogonalizes, by the end of their path.

    They are weights of matrix products: (in, out), or (X, in, out) with an axis of experts. Those of layers
    are listed by name, those of memories by module and name. Embedding and output stay with AdamW, as Muon's
    author advises. So does what memories do not call a matrix: keys and cores, which meet scores, and
    convolutions.
    """
    of_memories = {
        (site.name, name)
        for site in model.sites
        for name, parameter in site.parameters.items()
        if parameter.role == "matrix"
    }
    return frozenset({(name,) for name in _MATRICES_OF_LAYERS} | of_memories)


def _of_last_axes(matrices: ArrayTree) -> ArrayTree:
    """Says which axes make a matrix: the last two, so that each expert has its own matrix."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), matrices)


def _of_tables(train: TrainConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Returns optax's equivalent of a row rule, for gradients that are zero where nothing was read."""
    scaled: dict[str, optax.GradientTransformation] = {
        "adagrad": optax.scale_by_rss(0.0, train.eps**2),
        "adagrad_row": scale_by_row_rss(train.eps),
        "sgd": optax.identity(),
        "sgd_momentum": optax.trace(train.momentum),
    }
    if train.row_optimizer not in scaled:  # catching up has no dense equivalent, and the config refuses it
        return _adamw(train, rate, mask=None)
    decay = optax.add_decayed_weights(train.weight_decay)
    return optax.chain(scaled[train.row_optimizer], decay, optax.scale_by_learning_rate(rate))


class RowRssState(NamedTuple):
    """Holds the state of `scale_by_row_rss`."""

    sum_of_squares: ArrayTree
    """Sums (N, 1) float32, per table."""


def scale_by_row_rss(eps: float) -> optax.GradientTransformation:
    """Returns `optax.scale_by_rss` with one sum per row, of the means of squared gradients.

    It is the dense equivalent of `row_rules.adagrad_row`.

    Args:
        eps: its square is added inside the root.
    """

    def init(tables: ArrayTree) -> RowRssState:
        return RowRssState(jax.tree.map(lambda table: jnp.zeros((table.shape[0], 1), jnp.float32), tables))

    def update(
        gradients: ArrayTree, state: RowRssState, tables: ArrayTree | None = None
    ) -> tuple[ArrayTree, RowRssState]:
        del tables
        squares = jax.tree.map(
            lambda g, s: s + (g**2).mean(1, keepdims=True), gradients, state.sum_of_squares
        )
        return jax.tree.map(lambda g, s: g * inverse_root(s, eps), gradients, squares), RowRssState(squares)

    return optax.GradientTransformation(init, update)
