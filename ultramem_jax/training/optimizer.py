"""The optimizers of a run: optax for the dense parameters, rows or optax for the value tables."""

from typing import Any, NamedTuple

import jax
import optax

from ultramem_jax.config import RunConfig, TrainConfig
from ultramem_jax.training.row_sparse import RowSparseTransformation, row_sparse_adamw
from ultramem_jax.training.schedules import learning_rate, value_learning_rate


class Optimizers(NamedTuple):
    """One of `rows` and `tables` trains the value tables, as `TrainConfig.table_gradient` says."""

    params: optax.GradientTransformation
    rows: RowSparseTransformation
    tables: optax.GradientTransformation
    """The plain way: any optax optimizer on a gradient of the table's size. The oracle of `rows`."""


def make_optimizers(config: RunConfig) -> Optimizers:
    """AdamW with clipping for the parameters, AdamW at the tables' own rate for the tables."""
    train = config.train
    clip = optax.clip_by_global_norm(train.clip_norm) if train.clip_norm else optax.identity()
    table_rate = table_learning_rate(config)
    return Optimizers(
        params=optax.chain(clip, _adamw(train, learning_rate(train), mask=_matrices)),
        rows=row_sparse_adamw(
            table_rate,
            train.b1,
            train.b2,
            train.eps,
            train.weight_decay,
            moment_dtype=train.row_moment_dtype,
            second_moment=train.row_second_moment,
            rounding=train.row_rounding,
        ),
        tables=_adamw(train, table_rate, mask=None),
    )


def table_learning_rate(config: RunConfig) -> optax.Schedule:
    """The learning rate of the value tables."""
    multiple = config.model.memory.value_lr_multiple if config.model.memory else 1.0
    return value_learning_rate(config.train, multiple)


def _adamw(train: TrainConfig, rate: optax.Schedule, mask: Any) -> optax.GradientTransformation:
    return optax.adamw(
        rate, b1=train.b1, b2=train.b2, eps=train.eps, weight_decay=train.weight_decay, mask=mask
    )


def _matrices(params: Any) -> Any:
    """What decays: everything but gains, which are vectors."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)
