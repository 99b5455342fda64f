"""From what a step read, and the cotangents of that, to the tables after it.

On one device, every table's rows are sorted, their gradients summed and handed to the optimizer. On a mesh
each device does that for the rows and columns that it owns, in the reads of all tokens (`owned_tables`).
Reads and cotangents have come to the owners in the forward and the backward pass (`ops.sharded_lookup`), and
are gathered once more from the devices that hold the same part of a table. The gradient of a table is never
summed over devices.
"""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ultramem_jax.config import ModelConfig
from ultramem_jax.models.transformer import table_readers
from ultramem_jax.ops.hashing import mix
from ultramem_jax.ops.lookup import RowsRead
from ultramem_jax.ops.on_mesh import current_axes
from ultramem_jax.training.owned_tables import OfStep, OwnedTable
from ultramem_jax.training.row_sparse import RowSparseTransformation
from ultramem_jax.training.slot_usage import SlotUsage, record_reads
from ultramem_jax.training.state import TrainState
from ultramem_jax.training.table_gradients import ArraysOfMemories, rows_if, rows_of_tables, table_gradients
from ultramem_jax.training.undo_log import RowsBefore, RowsOverwritten
from ultramem_jax.tree_types import ArrayTree


class TableUpdate(NamedTuple):
    """What a step makes of all tables."""

    tables: dict[str, dict[str, jax.Array]]
    """Per table its arrays."""
    table_state: dict[str, dict[str, ArrayTree]]
    """Per table and array of it the optimizer's state."""
    usage: dict[str, SlotUsage]
    metrics: dict[str, dict[str, jax.Array]]
    """Per table those of `record_reads`, and `row_norm`."""
    before: RowsOverwritten | None
    """Per table and array of it `RowsBefore`; None where it was not asked for."""


def update_tables(
    config: ModelConfig,
    optimizers: Mapping[str, RowSparseTransformation],
    state: TrainState,
    reads: ArraysOfMemories,
    cotangents: ArraysOfMemories,
    finite: jax.Array,
    record_before: bool = False,
) -> TableUpdate:
    """Moves on the rows that were read.

    Args:
        config: of the model.
        optimizers: of the rows, by the name of their table.
        state: before the step; its tables and their moments are updated in place.
        reads: what the memories sowed into `reads`, with an axis of micro-batches in front.
        cotangents: gradients with respect to `perturbations`, with the same axis.
        finite: () bool; unless it holds, no row is written. It is to depend on every gradient that is made of
            rows (see `rows_if`).
        record_before: whether to return the rows as they were; on one device alone.
    """
    axes = current_axes()
    if axes is None:
        return _update_on_one_device(config, optimizers, state, reads, cotangents, finite, record_before)
    assert not record_before
    after = TableUpdate({}, {}, {}, {}, None)
    seeds = _seeds(state)
    for table, readers in table_readers(config).items():
        of_table = OwnedTable(axes).update(
            optimizers[table],
            state.tables[table],
            state.table_state[table],
            state.usage[table],
            {site.name: reads[site.name] for site in readers},
            {site.name: cotangents[site.name] for site in readers},
            OfStep(finite, state.step, seeds[table]),
        )
        after.tables[table], after.table_state[table] = of_table.parts, of_table.moments
        after.usage[table], after.metrics[table] = of_table.usage, of_table.metrics
    return after


def record_usage(
    config: ModelConfig, usage: dict[str, SlotUsage], reads: ArraysOfMemories
) -> tuple[dict[str, SlotUsage], dict[str, dict[str, jax.Array]]]:
    """The record of every table after a step that trains tables the dense way, and its metrics."""
    axes = current_axes()
    if axes is None:
        recorded = _record(usage, rows_of_tables(config, _side_by_side(reads)))
    else:
        recorded = {
            table: OwnedTable(axes).record(usage[table], {site.name: reads[site.name] for site in readers})
            for table, readers in table_readers(config).items()
        }
    return {t: u for t, (u, _) in recorded.items()}, {t: m for t, (_, m) in recorded.items()}


# ---- one device


def _update_on_one_device(
    config: ModelConfig,
    optimizers: Mapping[str, RowSparseTransformation],
    state: TrainState,
    reads: ArraysOfMemories,
    cotangents: ArraysOfMemories,
    finite: jax.Array,
    record_before: bool,
) -> TableUpdate:
    reads, cotangents = _side_by_side(reads), _side_by_side(cotangents)
    rows = rows_of_tables(config, reads)
    recorded = _record(state.usage, rows)
    rows = {name: rows_if(finite, rows[name]) for name in rows}
    gradients = table_gradients(config, rows, reads, cotangents)
    seeds = _seeds(state)
    tables: dict[str, dict[str, jax.Array]] = {name: {} for name in state.tables}
    table_state: dict[str, dict[str, ArrayTree]] = {name: {} for name in state.tables}
    overwritten: dict[str, dict[str, RowsBefore]] = {name: {} for name in state.tables}
    norms: dict[str, dict[str, jax.Array]] = {name: {} for name in state.tables}
    for name, parts in state.tables.items():
        for part, table in parts.items():
            of_rows, moments = gradients[name][part], state.table_state[name][part]
            seed = seeds[name][part]
            update = optimizers[name].update(of_rows, moments, table, state.step, seed, record_before)
            tables[name][part], table_state[name][part] = update.table, update.moments
            norms[name][part] = update.norm
            if update.before is not None:
                overwritten[name][part] = RowsBefore(of_rows.slots, update.before)
    return TableUpdate(
        tables,
        table_state,
        {name: usage for name, (usage, _) in recorded.items()},
        {name: of | {"row_norm": optax.tree.norm(norms[name])} for name, (_, of) in recorded.items()},
        overwritten if record_before else None,
    )


def _record(
    usage: dict[str, SlotUsage], rows: dict[str, RowsRead]
) -> dict[str, tuple[SlotUsage, dict[str, jax.Array]]]:
    return {name: record_reads(usage[name], of, of.order.size) for name, of in rows.items()}


def _seeds(state: TrainState) -> dict[str, dict[str, jax.Array]]:
    """Another seed for every array of a table and step, for rounding."""
    of_step = mix(state.step.astype(jnp.uint32), state.seed)
    numbers = itertools.count()
    return {
        name: {part: mix(jnp.uint32(next(numbers)), of_step) for part in parts}
        for name, parts in state.tables.items()
    }


def _side_by_side(tree: ArraysOfMemories) -> ArraysOfMemories:
    """Micro-batches one behind the other: (micro-batches, T, ...) -> (micro-batches·T, ...)."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tree)
