"""Applies a rule to the rows of a table that were read, in place, behind an interface like optax's.

optax cannot express a gradient that is zero almost everywhere. This pair (init, update) takes the gradient as
`RowGradients`. It touches only those rows of the table and of its state: rows that were not read keep their
values and state to the bit. A `RowRule` decides how a row changes. This module reads the rows chunk by chunk,
records, rounds and writes them, in the same way for every rule.

With twenty million rows, the state matters as much as the table. It can be kept in bfloat16 like the table,
rounded stochastically.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ultramem_jax.config.exchange_purposes import MEANS_OVER_COLUMNS
from ultramem_jax.kernels import calls
from ultramem_jax.kernels.dispatch import native_or
from ultramem_jax.ops.algorithms import algorithms
from ultramem_jax.ops.chunks import fold_chunks
from ultramem_jax.ops.exchanges import named_exchange
from ultramem_jax.ops.hashing import mix
from ultramem_jax.ops.lookup import GradientsOfReads, RowGradients, row_gradients
from ultramem_jax.ops.rounding import stochastic_round
from ultramem_jax.ops.rows import (
    put_stored_rows,
    stored_dtype,
    take_sorted_rows,
    take_sorted_stored_rows,
    to_stored,
)
from ultramem_jax.training.row_rules import RowRule, RowStep
from ultramem_jax.tree_types import ArrayTree


class RowUpdate(NamedTuple):
    """Holds what a step makes of a table."""

    table: jax.Array
    moments: ArrayTree
    """State of the rule, structured as `RowRule.init` makes it."""
    norm: jax.Array
    """() float32, the norm of the new rows before rounding. It is not finite if any value written is not."""
    before: tuple[jax.Array, ArrayTree] | None
    """The overwritten rows (U, ...) of the table and of its state; None unless `record` was set."""


class TablePart(NamedTuple):
    """Says which part of a table an update works on."""

    first_slot: jax.Array | int = 0
    first_column: jax.Array | int = 0
    width_axes: tuple[str, ...] = ()
    """Mesh axes over which the other columns of these rows are split, within a `jax.shard_map`."""


class _Carry(NamedTuple):
    """Holds what goes from one chunk of rows to the next."""

    arrays: tuple[jax.Array, ArrayTree]
    """The table and the state of its rule."""
    norm: jax.Array
    """() float32, the sum of the squares of the rows written so far."""
    log: tuple[jax.Array, ArrayTree] | None
    """The rows overwritten so far, (U, ...) each; None unless they are recorded."""
    kept: jax.Array | None
    """The rows written to the table so far, (U, d); None unless they are kept."""


class RowSparseTransformation(NamedTuple):
    """Plays the role of `optax.GradientTransformation` for tables whose gradient comes by rows."""

    init: Callable[[jax.Array], ArrayTree]
    """table (N, d_v) -> moments, the state of the rule."""
    update: Callable[..., Any]
    """(gradients, moments, table, step from 0, seed () uint32, record=False, part=TablePart(), keep=False) ->
    `RowUpdate`. Compile it with table and moments donated. The seed is for rounding, and differs for every
    array and step. With `record`, the result includes the rows that were overwritten. With `keep`, it is a
    pair: the `RowUpdate`, and the rows (U, d) that were written, as the table stores them. For a part of a
    table, slots count from the first slot of the part."""
    update_natively: Callable[..., Any]
    """Does what `update` does by a native kernel, and takes `GradientsOfReads` in place of the gradients."""
    serves: Callable[[GradientsOfReads, ArrayTree, jax.Array], bool]
    """(gradients, moments, table) -> whether `update_natively` can update this table."""


def row_sparse(
    rule: RowRule, learning_rate: optax.Schedule, *, rounding: str = "stochastic"
) -> RowSparseTransformation:
    """Returns the optimizer that applies a rule to the rows that were read.

    Args:
        rule: a rule of `row_rules`.
        learning_rate: the learning rate as a function of the step.
        rounding: rounding of what is kept in bfloat16, `stochastic` or `nearest`.
    """

    def rounded(
        x: jax.Array, stored: jnp.dtype, slots: jax.Array, seed: jax.Array, part: TablePart
    ) -> jax.Array:
        if stored == stored_dtype("bfloat16") and rounding == "stochastic":
            return stochastic_round(x, slots + part.first_slot, seed, part.first_column)
        return x

    def update(
        gradients: RowGradients,
        moments: ArrayTree,
        table: jax.Array,
        step: jax.Array,
        seed: jax.Array,
        record: bool = False,
        part: TablePart = TablePart(),  # noqa: B008
        keep: bool = False,
    ) -> RowUpdate | tuple[RowUpdate, jax.Array]:
        num_rows = gradients.slots.shape[0]
        at = RowStep(step, learning_rate(step), functools.partial(_mean_over_row, axes=part.width_axes))

        def update_rows(carry: _Carry, place: jax.Array, slots: jax.Array, gradients: jax.Array) -> _Carry:
            arrays, norm, log, kept = carry
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
            new = [
                to_stored(rounded(new, array.dtype, slots, mix(jnp.uint32(i), seed), part), array.dtype)
                for i, (array, new) in enumerate(zip(leaves, jax.tree.leaves(after), strict=True))
            ]
            written = [put_stored_rows(array, slots, rows) for array, rows in zip(leaves, new, strict=True)]
            if kept is not None:
                kept = jax.lax.dynamic_update_slice_in_dim(kept, new[0], place[0], 0)
            padding = slots[:, None] >= table.shape[0]
            norm = norm + jnp.sum(jnp.where(padding, 0.0, after[0] ** 2))
            return _Carry(jax.tree.unflatten(structure, written), norm, log, kept)

        # Chunk by chunk, so that a row stays in the CPU's cache while it is read, updated and written, and no
        # temporary array has the size of all rows.
        arrays, log = (table, moments), None
        if record:
            log = jax.tree.map(lambda a: jnp.zeros((num_rows, *a.shape[1:]), a.dtype), arrays)
        places = jnp.arange(num_rows, dtype=jnp.int32)
        kept = jnp.zeros((num_rows, table.shape[1]), table.dtype) if keep else None
        start = _Carry(arrays, jnp.zeros((), jnp.float32), log, kept)
        # Padding comes last. Where tokens read the same rows, as in a trained model, there is much padding.
        num_read = None
        if algorithms().loops == "as_needed":
            num_read = jnp.sum(gradients.slots < table.shape[0], dtype=jnp.int32)
        (table, moments), norm, log, kept = fold_chunks(
            update_rows, start, ROW_ARRAYS * table.shape[1], places, *gradients, up_to=num_read
        )
        done = RowUpdate(table, moments, jnp.sqrt(norm), log)
        return done if kept is None else (done, kept)

    def serves(reads: GradientsOfReads, moments: ArrayTree, table: jax.Array) -> bool:
        arrays = jax.tree.leaves((table, moments))
        return rule.kernel is not None and calls.serves_update(arrays, reads.scores, reads.cotangent)

    def update_natively(
        reads: GradientsOfReads,
        moments: ArrayTree,
        table: jax.Array,
        step: jax.Array,
        seed: jax.Array,
        record: bool = False,
        part: TablePart = TablePart(),  # noqa: B008
        keep: bool = False,
    ) -> RowUpdate | tuple[RowUpdate, jax.Array]:
        assert rule.kernel is not None
        rows, *of_reads = reads
        described = (rows.slots, rows.order, rows.row_of_read, *of_reads)
        means = None
        if part.width_axes and rule.kernel.one_per_row:
            with named_exchange(MEANS_OVER_COLUMNS):
                means = calls.row_mean_squares(described, table.shape[0])
                means = jax.lax.pmean(means, part.width_axes)
        arrays, structure = jax.tree.flatten((table, moments))
        written, squares, before = calls.update_rows(
            rule.kernel,
            arrays,
            described,
            learning_rate(step),
            step,
            seed,
            stochastic=rounding == "stochastic",
            record=record,
            first=(part.first_slot, part.first_column),
            means=means,
        )
        table, moments = jax.tree.unflatten(structure, written)
        overwritten = jax.tree.unflatten(structure, before) if record else None
        done = RowUpdate(table, moments, jnp.sqrt(squares), overwritten)
        # The table is in this CPU's own memory: to read the rows once more costs little.
        return (done, take_sorted_stored_rows(table, rows.slots)) if keep else done

    return RowSparseTransformation(rule.init, update, update_natively, serves)


def update_by_reads(
    optimizer: RowSparseTransformation,
    reads: GradientsOfReads,
    moments: ArrayTree,
    table: jax.Array,
    step: jax.Array,
    seed: jax.Array,
    record: bool = False,
    keep: bool = False,
) -> Any:
    """Updates the rows that were read, from what their gradients are made of.

    The arguments are those of `RowSparseTransformation.update`. The native kernel forms a row's gradient when
    it updates the row. JAX forms the gradients of all rows first.
    """

    def plain(reads: GradientsOfReads, *arguments: ArrayTree) -> Any:
        return optimizer.update(row_gradients(reads), *arguments, record, keep=keep)

    def native(reads: GradientsOfReads, *arguments: ArrayTree) -> Any:
        return optimizer.update_natively(reads, *arguments, record, keep=keep)

    serves = optimizer.serves(reads, moments, table)
    return native_or(plain, native, serves, reads, moments, table, step, seed)


def _mean_over_row(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns the means (U, 1) of x (U, d) over all columns of a row, of which d are on this device."""
    mean = x.mean(1, keepdims=True)
    with named_exchange(MEANS_OVER_COLUMNS):
        return jax.lax.pmean(mean, axes) if axes else mean


def _in_float32(rows: jax.Array) -> jax.Array:
    """Returns rows in float32.

    Integers stay as they are: they are counts, and float32 cannot hold them beyond 2²⁴.
    """
    return rows if jnp.issubdtype(rows.dtype, jnp.integer) else rows.astype(jnp.float32)


ROW_ARRAYS = 16
"""Number of arrays as wide as the rows that an update may hold at a time. It is twice the eight that are
needed, and makes chunks of 2,048 rows of 128. Larger chunks are no faster."""
