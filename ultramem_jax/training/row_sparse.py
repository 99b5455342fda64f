"""AdamW on the rows of a table that were read, in place, in optax's manner.

optax has no notion of a gradient that is zero almost everywhere. This pair (init, update) takes the gradient
as `RowGradients` and touches those rows of the table and of its two moments, and nothing else: rows that were
not read keep their values and moments to the bit. Where every row is read at every step, it is `optax.adamw`.
Bias correction counts the optimizer's steps, not the reads of a row, as in lazy Adam.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ultramem_jax.ops.lookup import RowGradients


class RowMoments(NamedTuple):
    """Adam's moments of a table."""

    first: jax.Array
    """(N, d_v) float32."""
    second: jax.Array
    """(N, d_v) float32."""


class RowSparseTransformation(NamedTuple):
    """What `optax.GradientTransformation` is for arrays, for tables whose gradient comes by rows."""

    init: Callable[[jax.Array], RowMoments]
    """table (N, d_v) -> moments."""
    update: Callable[
        [RowGradients, RowMoments, jax.Array, jax.Array], tuple[jax.Array, RowMoments, jax.Array]
    ]
    """(gradients, moments, table, step from 0) -> (table, moments, norm () float32 of the rows written). To
    be compiled with table and moments donated. The norm is not finite if any value written is not."""


def row_sparse_adamw(
    learning_rate: optax.Schedule, b1: float, b2: float, eps: float, weight_decay: float
) -> RowSparseTransformation:
    """AdamW (arXiv 1711.05101) with decoupled weight decay, on the rows read."""

    def init(table: jax.Array) -> RowMoments:
        return RowMoments(jnp.zeros(table.shape, jnp.float32), jnp.zeros(table.shape, jnp.float32))

    def update(
        gradients: RowGradients, moments: RowMoments, table: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, RowMoments, jax.Array]:
        count = step.astype(jnp.float32) + 1
        rows = _take(table, gradients.slots).astype(jnp.float32)
        first = b1 * _take(moments.first, gradients.slots) + (1 - b1) * gradients.values
        second = b2 * _take(moments.second, gradients.slots) + (1 - b2) * gradients.values**2
        direction = (first / (1 - b1**count)) / (jnp.sqrt(second / (1 - b2**count)) + eps)
        rows = rows - learning_rate(step) * (direction + weight_decay * rows)
        moments = RowMoments(
            _put(moments.first, gradients.slots, first), _put(moments.second, gradients.slots, second)
        )
        written = gradients.slots[:, None] < table.shape[0]
        norm = jnp.sqrt(jnp.sum(jnp.where(written, rows * rows, 0.0)))
        return _put(table, gradients.slots, rows.astype(table.dtype)), moments, norm

    return RowSparseTransformation(init, update)


def _take(array: jax.Array, slots: jax.Array) -> jax.Array:
    # The padding reads the last row; what comes of it is dropped by `_put`.
    return array.at[slots].get(mode="clip", indices_are_sorted=True)


def _put(array: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
    return array.at[slots].set(rows, mode="drop", unique_indices=True, indices_are_sorted=True)
