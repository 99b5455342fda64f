"""AdamW on the rows of a table that were read, in place, in optax's manner.

optax has no notion of a gradient that is zero almost everywhere. This pair (init, update) takes the gradient
as `RowGradients` and touches those rows of the table and of its moments, and nothing else: rows that were
not read keep their values and moments to the bit. Where every row is read at every step, it is `optax.adamw`.
Bias correction counts the optimizer's steps, not the reads of a row, as in lazy Adam.

Twenty million rows make the moments as much of a matter as the table. They can be kept in bfloat16, as the
table can, rounded stochastically; and of the second one it can be enough to keep a mean per row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ultramem_jax.ops.chunks import fold_chunks
from ultramem_jax.ops.hashing import mix
from ultramem_jax.ops.lookup import RowGradients
from ultramem_jax.ops.rounding import stochastic_round
from ultramem_jax.ops.rows import put_sorted_rows, stored_dtype, take_sorted_rows, to_stored


class RowMoments(NamedTuple):
    """Adam's moments of a table."""

    first: jax.Array
    """(N, d_v), float32 or bfloat16 as `ultramem_jax.ops.rows` stores it."""
    second: jax.Array
    """(N, d_v) like the first, or (N, 1) float32: the mean over a row's values."""


class RowUpdate(NamedTuple):
    """What a step makes of a table."""

    table: jax.Array
    moments: RowMoments
    norm: jax.Array
    """() float32, of the new rows before they are rounded: not finite if any value written is not."""
    before: tuple[jax.Array, RowMoments] | None
    """The rows (U, ...) of the table and of its moments that were overwritten, if that was asked for."""


class TablePart(NamedTuple):
    """Which part of a table an update is given."""

    first_slot: jax.Array | int = 0
    first_column: jax.Array | int = 0
    width_axes: tuple[str, ...] = ()
    """Axes of the mesh over which the other columns of these rows are, within a `jax.shard_map`."""


class RowSparseTransformation(NamedTuple):
    """What `optax.GradientTransformation` is for arrays, for tables whose gradient comes by rows."""

    init: Callable[[jax.Array], RowMoments]
    """table (N, d_v) -> moments."""
    update: Callable[..., RowUpdate]
    """(gradients, moments, table, step from 0, seed () uint32, record=False, part=TablePart()). To be
    compiled with table and moments donated. The seed is for rounding, another one for every array and step.
    With `record`, the rows that it overwrites are part of the result. Of a part of a table, slots count from
    the part's first."""


def row_sparse_adamw(
    learning_rate: optax.Schedule,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    *,
    moment_dtype: str = "float32",
    second_moment: str = "element",
    rounding: str = "stochastic",
) -> RowSparseTransformation:
    """AdamW (arXiv 1711.05101) with decoupled weight decay, on the rows read.

    Args:
        learning_rate: of the step.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: times the learning rate.
        moment_dtype: of the moments of a row's values, `float32` or `bfloat16`.
        second_moment: `element`, one for every value; or `row`, one float32 for all values of a row, the mean
            of their squares (the blocks of Adam-mini, arXiv 2406.16793).
        rounding: of what is kept in bfloat16, `stochastic` or `nearest`.
    """

    def init(table: jax.Array) -> RowMoments:
        stored = stored_dtype(moment_dtype)
        first = jnp.zeros(table.shape, stored)
        if second_moment == "row":
            return RowMoments(first, jnp.zeros((table.shape[0], 1), jnp.float32))
        return RowMoments(first, jnp.zeros(table.shape, stored))

    def adamw(
        count: jax.Array,
        rate: jax.Array,
        rows: jax.Array,
        moments: RowMoments,
        gradients: jax.Array,
        part: TablePart,
    ) -> tuple[jax.Array, RowMoments]:
        squares = gradients**2
        if second_moment == "row":
            squares = squares.mean(1, keepdims=True)
            if part.width_axes:
                squares = jax.lax.pmean(squares, part.width_axes)
        first = b1 * moments.first + (1 - b1) * gradients
        second = b2 * moments.second + (1 - b2) * squares
        direction = (first / (1 - b1**count)) / (jnp.sqrt(second / (1 - b2**count)) + eps)
        return rows - rate * (direction + weight_decay * rows), RowMoments(first, second)

    def rounded(
        x: jax.Array, stored: jnp.dtype, slots: jax.Array, seed: jax.Array, part: TablePart
    ) -> jax.Array:
        if stored == stored_dtype("bfloat16") and rounding == "stochastic":
            return stochastic_round(x, slots + part.first_slot, seed, part.first_column)
        return x

    def update(
        gradients: RowGradients,
        moments: RowMoments,
        table: jax.Array,
        step: jax.Array,
        seed: jax.Array,
        record: bool = False,
        part: TablePart = TablePart(),  # noqa: B008
    ) -> RowUpdate:
        count, rate = step.astype(jnp.float32) + 1, learning_rate(step)
        num_rows = gradients.slots.shape[0]

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
            rows, of_rows = jax.tree.map(lambda rows: rows.astype(jnp.float32), before)
            after = adamw(count, rate, rows, of_rows, gradients, part)
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

        # Chunk by chunk, so that a row's three visits to the memory, read, moved on, written, find it in the
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

    return RowSparseTransformation(init, update)


ROW_ARRAYS = 16
"""Arrays as wide as the rows that an update holds at a time: twice the eight that it needs, which makes
chunks of 2,048 rows of 128. Larger ones are no faster."""
