"""Applies a rule to the rows of a table that were read, in place, in optax's manner.

optax has no notion of a gradient that is zero almost everywhere. This pair (init, update) takes the gradient
as `RowGradients` and touches those rows of the table and of its state, and nothing else: rows that were
not read keep their values and state to the bit. What becomes of a row is the business of a `RowRule`; here
rows are read, chunk by chunk, recorded, rounded and written, the same for every rule.

Twenty million rows make the state as much of a matter as the table. It can be kept in bfloat16, as the
table can, rounded stochastically.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ultramem_jax.config.exchange_purposes import MEANS_OVER_COLUMNS
from ultramem_jax.ops.chunks import fold_chunks
from ultramem_jax.ops.exchanges import named_exchange
from ultramem_jax.ops.hashing import mix
from ultramem_jax.ops.lookup import RowGradients
from ultramem_jax.ops.rounding import stochastic_round
from ultramem_jax.ops.rows import put_sorted_rows, stored_dtype, take_sorted_rows, to_stored
from ultramem_jax.training.row_rules import RowRule, RowStep


class RowUpdate(NamedTuple):
    """What a step makes of a table."""

    table: jax.Array
    moments: Any
    """The state of the rule, as `RowRule.init` makes it."""
    norm: jax.Array
    """() float32, of the new rows before they are rounded: not finite if any value written is not."""
    before: tuple[jax.Array, Any] | None
    """The rows (U, ...) of the table and of its state that were overwritten, if that was asked for."""


class TablePart(NamedTuple):
    """Which part of a table an update is given."""

    first_slot: jax.Array | int = 0
    first_column: jax.Array | int = 0
    width_axes: tuple[str, ...] = ()
    """Axes of the mesh over which the other columns of these rows are, within a `jax.shard_map`."""


class RowSparseTransformation(NamedTuple):
    """What `optax.GradientTransformation` is for arrays, for tables whose gradient comes by rows."""

    init: Callable[[jax.Array], Any]
    """table (N, d_v) -> moments: the rule's state."""
    update: Callable[..., RowUpdate]
    """(gradients, moments, table, step from 0, seed () uint32, record=False, part=TablePart()). To be
    compiled with table and moments donated. The seed is for rounding, another one for every array and step.
    With `record`, the rows that it overwrites are part of the result. Of a part of a table, slots count from
    the part's first."""


def row_sparse(
    rule: RowRule, learning_rate: optax.Schedule, *, rounding: str = "stochastic"
) -> RowSparseTransformation:
    """Returns the optimizer that applies a rule to the rows read.

    Args:
        rule: of `row_rules`.
        learning_rate: of the step.
        rounding: of what is kept in bfloat16, `stochastic` or `nearest`.
    """

    def rounded(
        x: jax.Array, stored: jnp.dtype, slots: jax.Array, seed: jax.Array, part: TablePart
    ) -> jax.Array:
        if stored == stored_dtype("bfloat16") and rounding == "stochastic":
            return stochastic_round(x, slots + part.first_slot, seed, part.first_column)
        return x

    def update(
        gradients: RowGradients,
        moments: Any,
        table: jax.Array,
        step: jax.Array,
        seed: jax.Array,
        record: bool = False,
        part: TablePart = TablePart(),  # noqa: B008
    ) -> RowUpdate:
        num_rows = gradients.slots.shape[0]
        at = RowStep(step, learning_rate(step), functools.partial(_mean_over_row, axes=part.width_axes))

        def update_rows(carry: Any, place: jax.Array, slots: jax.Array, gradients: jax.Array) -> Any:
            arrays, norm, log = carry
            before = jax.tree.map(lambda a: take_sorted_rows(a, slots), arrays)
            if record:
                log = jax.tree.map(
                    lambda log, rows: jax.lax.dynamic_update_slice_in_dim(
                        log, to_stored(rows, log.dtype), place[0], 0
                    ),
                    log,
                    before,
                )
            rows, of_rows = jax.tree.map(_in_float32, before)
            after = rule.apply(at, rows, of_rows, gradients)
            leaves, structure = jax.tree.flatten(arrays)
            written = [
                put_sorted_rows(
                    array, slots, rounded(new, array.dtype, slots, mix(jnp.uint32(i), seed), part)
                )
                for i, (array, new) in enumerate(zip(leaves, jax.tree.leaves(after), strict=True))
            ]
            padding = slots[:, None] >= table.shape[0]
            norm = norm + jnp.sum(jnp.where(padding, 0.0, after[0] ** 2))
            return jax.tree.unflatten(structure, written), norm, log

        # Chunk by chunk, so that a row's three visits to the memory, read, updated, written, find it in the
        # cache, and nothing of the size of all rows is made in between.
        arrays, log = (table, moments), None
        if record:
            log = jax.tree.map(lambda a: jnp.zeros((num_rows, *a.shape[1:]), a.dtype), arrays)
        places = jnp.arange(num_rows, dtype=jnp.int32)
        start = arrays, jnp.zeros((), jnp.float32), log
        # The padding is last. Where tokens read the same rows, as in a trained model, there is much of it.
        num_read = jnp.sum(gradients.slots < table.shape[0], dtype=jnp.int32)
        (table, moments), norm, log = fold_chunks(
            update_rows, start, ROW_ARRAYS * table.shape[1], places, *gradients, up_to=num_read
        )
        return RowUpdate(table, moments, jnp.sqrt(norm), log)

    return RowSparseTransformation(rule.init, update)


def _mean_over_row(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns the means (U, 1) of x (U, d) over all columns of a row, d of which are here."""
    mean = x.mean(1, keepdims=True)
    with named_exchange(MEANS_OVER_COLUMNS):
        return jax.lax.pmean(mean, axes) if axes else mean


def _in_float32(rows: jax.Array) -> jax.Array:
    """Returns rows to compute with; integers are counts, which float32 cannot hold beyond 2²⁴."""
    return rows if jnp.issubdtype(rows.dtype, jnp.integer) else rows.astype(jnp.float32)


ROW_ARRAYS = 16
"""Arrays as wide as the rows that an update holds at a time: twice the eight that it needs, which makes
chunks of 2,048 rows of 128. Larger ones are no faster."""
