"""The optimizers of a run: optax for the dense parameters, rows or optax for the value tables."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from ultramem_jax.config import RunConfig, TrainConfig
from ultramem_jax.training.row_rules import inverse_root, row_rule
from ultramem_jax.training.row_sparse import RowSparseTransformation, row_sparse
from ultramem_jax.training.schedules import learning_rate, value_learning_rate

_IN_LAYERS = ("w_query", "w_key", "w_value", "w_out", "w_in", "w_gate", "router")
_IN_MEMORIES = ("query", "gate", "pre_projection", "projection")
MUON_MATRICES = frozenset((*_IN_LAYERS, *_IN_MEMORIES))
"""Names of the parameters that Muon orthogonalizes: weights of matrix products, (in, out), or (X, in, out)
with an axis of experts. Embedding and output are left to AdamW, as Muon's author advises. So are keys and
cores, which meet scores, and a depthwise convolution, which is no matrix."""
MUON_MOMENTUM = 0.95
"""Muon's own default, with Nesterov's correction."""
_MUON_RMS = 0.2
"""Root mean square of Muon's steps at a learning rate of one: about that of AdamW's, so that learning rate
and weight decay can be the same (Moonlight, arXiv 2502.16982)."""


class Optimizers(NamedTuple):
    """One of `rows` and `tables` trains the value tables, as `TrainConfig.table_gradient` says."""

    params: optax.GradientTransformation
    rows: RowSparseTransformation
    tables: optax.GradientTransformation
    """The plain way: an optax optimizer on a gradient of the table's size. The oracle of `rows`."""


def make_optimizers(config: RunConfig) -> Optimizers:
    """Makes `train.optimizer`, with clipping, for parameters, and `train.row_optimizer` for tables."""
    train = config.train
    clip = optax.clip_by_global_norm(train.clip_norm) if train.clip_norm else optax.identity()
    table_rate = table_learning_rate(config)
    of_params = {"adamw": _adamw, "muon": _muon, "lion": _lion}[train.optimizer]
    return Optimizers(
        params=optax.chain(clip, of_params(train, learning_rate(train), mask=_matrices)),
        rows=row_sparse(row_rule(train), table_rate, rounding=train.row_rounding),
        tables=_of_tables(train, table_rate),
    )


def table_learning_rate(config: RunConfig) -> optax.Schedule:
    """The learning rate of the value tables."""
    multiple = config.model.memory.value_lr_multiple if config.model.memory else 1.0
    return value_learning_rate(config.train, multiple)


def _adamw(train: TrainConfig, rate: optax.Schedule, mask: Any) -> optax.GradientTransformation:
    return optax.adamw(
        rate, b1=train.b1, b2=train.b2, eps=train.eps, weight_decay=train.weight_decay, mask=mask
    )


def _lion(train: TrainConfig, rate: optax.Schedule, mask: Any) -> optax.GradientTransformation:
    """Returns Lion (arXiv 2302.06675). Its learning rate should be 3 to 10 times below AdamW's."""
    return optax.lion(rate, b1=train.b1, b2=train.b2, weight_decay=train.weight_decay, mask=mask)


def _muon(train: TrainConfig, rate: optax.Schedule, mask: Any) -> optax.GradientTransformation:
    """Returns Muon (Jordan et al., kellerjordan.github.io/posts/muon) on `MUON_MATRICES`, AdamW on the rest.

    Not `optax.contrib.muon`, whose AdamW would use Nesterov's correction and decay gains.
    """
    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=MUON_MOMENTUM, weight_dimension_numbers=_of_last_axes),
        optax.stateless_with_tree_map(lambda step, _: step * (_MUON_RMS * max(step.shape[-2:]) ** 0.5)),
        optax.add_decayed_weights(train.weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    return optax.partition({"muon": muon, "adamw": _adamw(train, rate, mask)}, _muon_labels)


def _matrices(params: Any) -> Any:
    """What decays: everything but gains, which are vectors."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def _muon_labels(params: Any) -> Any:
    """Names the optimizer that takes each parameter, `muon` or `adamw`."""

    def label(path: Any, _: Any) -> str:
        return "muon" if path[-1].key in MUON_MATRICES else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)


def _of_last_axes(matrices: Any) -> Any:
    """Says which axes make a matrix: the last two, so that each expert has its own."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), matrices)


def _of_tables(train: TrainConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Returns the optax equal of the rule of rows, for gradients that are zero where nothing was read."""
    scaled: dict[str, optax.GradientTransformation] = {
        "adagrad": optax.scale_by_rss(0.0, train.eps**2),
        "adagrad_row": scale_by_row_rss(train.eps),
        "sgd": optax.identity(),
        "sgd_momentum": optax.trace(train.momentum),
    }
    if train.row_optimizer not in scaled:  # catching up has no dense equal, and the config refuses it
        return _adamw(train, rate, mask=None)
    decay = optax.add_decayed_weights(train.weight_decay)
    return optax.chain(scaled[train.row_optimizer], decay, optax.scale_by_learning_rate(rate))


class RowRssState(NamedTuple):
    """Holds the state of `scale_by_row_rss`."""

    sum_of_squares: Any
    """Per table (N, 1) float32."""


def scale_by_row_rss(eps: float) -> optax.GradientTransformation:
    """Returns `optax.scale_by_rss` with one sum per row, of the means of squared gradients.

    It is the dense equal of `row_rules.adagrad_row`.

    Args:
        eps: its square is added below the root.
    """

    def init(tables: Any) -> RowRssState:
        return RowRssState(jax.tree.map(lambda table: jnp.zeros((table.shape[0], 1), jnp.float32), tables))

    def update(gradients: Any, state: RowRssState, tables: Any = None) -> tuple[Any, RowRssState]:
        del tables
        squares = jax.tree.map(
            lambda g, s: s + (g**2).mean(1, keepdims=True), gradients, state.sum_of_squares
        )
        return jax.tree.map(lambda g, s: g * inverse_root(s, eps), gradients, squares), RowRssState(squares)

    return optax.GradientTransformation(init, update)
