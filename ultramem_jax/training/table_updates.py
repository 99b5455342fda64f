"""Updates the tables, from what a step read and the cotangents of that.

An array of a table learns if the optimizer has a state for it; any other stays as it is.

On one device, the rows of every table are sorted, and their gradients are summed and given to the optimizer.
On a mesh, each device does this for the rows and columns that it owns, over the reads of all tokens
(`owned_tables`). The forward and the backward pass bring reads and cotangents to the owners
(`ops.sharded_lookup`). Here they are gathered once more, from the devices that hold the same part of a table.
The gradient of a table is never summed over devices.
"""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.model import table_readers
from ultramem_jax.ops.hashing import mix
from ultramem_jax.ops.lookup import RowsRead
from ultramem_jax.ops.on_mesh import current_axes
from ultramem_jax.training.owned_tables import OfStep, OwnedTable
from ultramem_jax.training.prefetch import RowsWritten, prefetching_sites
from ultramem_jax.training.row_sparse import RowSparseTransformation, update_by_reads
from ultramem_jax.training.slot_selection import Selection
from ultramem_jax.training.slot_usage import SlotUsage, record_reads
from ultramem_jax.training.state import TrainState
from ultramem_jax.training.table_gradients import ArraysOfMemories, rows_if, rows_of_tables, table_gradients
from ultramem_jax.training.undo_log import RowsBefore, RowsOverwritten
from ultramem_jax.tree_types import ArrayTree


class TableUpdate(NamedTuple):
    """Holds what a step makes of all tables."""

    tables: dict[str, dict[str, jax.Array]]
    """Arrays of each table."""
    table_state: dict[str, dict[str, ArrayTree]]
    """State of the optimizer, per table and array of it."""
    usage: dict[str, SlotUsage]
    metrics: dict[str, dict[str, jax.Array]]
    """Metrics per table: those of `record_reads`, and `row_norm`."""
    before: RowsOverwritten | None
    """`RowsBefore` per table and array of it; None unless `record_before` was set."""
    written: RowsWritten
    """What was written to the tables of prefetching memories."""


def update_tables(
    config: ModelConfig,
    optimizers: Mapping[str, RowSparseTransformation],
    state: TrainState,
    reads: ArraysOfMemories,
    cotangents: ArraysOfMemories,
    finite: jax.Array,
    record_before: bool = False,
    select: Selection | None = None,
) -> TableUpdate:
    """Updates the rows that were read.

    Args:
        config: the model's config.
        optimizers: the optimizers of the rows, by the name of their table.
        state: the state before the step. Its tables and their moments are updated in place.
        reads: what the memories sowed into `reads`, with a leading axis of micro-batches.
        cotangents: gradients with respect to `perturbations`, with the same axis. Memories whose tables do
            not learn have none.
        finite: () bool. Unless it holds, no row is written. It must depend on every gradient that is computed
            from rows (see `rows_if`).
        record_before: whether to return the rows as they were. This works only on one device.
        select: selects the rows to update; None is all that were read.
    """
    axes = current_axes()
    if axes is None:
        return _update_on_one_device(
            config, optimizers, state, reads, cotangents, finite, record_before, select
        )
    assert not record_before
    after = TableUpdate({}, {}, {}, {}, None, {})
    seeds = _seeds(state)
    for table, readers in table_readers(config).items():
        parts, moments = state.tables[table], state.table_state[table]
        if not moments:  # the table does not learn
            of = OwnedTable(axes).record(state.usage[table], {s.name: reads[s.name] for s in readers})
            after.tables[table], after.table_state[table], after.usage[table] = parts, moments, of[0]
            after.metrics[table] = of[1] | {"row_norm": jnp.zeros((), jnp.float32)}
            continue
        of_table = OwnedTable(axes).update(
            optimizers[table],
            {part: parts[part] for part in moments},
            moments,
            state.usage[table],
            {site.name: reads[site.name] for site in readers},
            {site.name: cotangents[site.name] for site in readers},
            OfStep(finite, state.step, seeds[table]),
            select,
            state.background.get(table),
        )
        after.tables[table], after.table_state[table] = parts | of_table.parts, of_table.moments
        after.usage[table], after.metrics[table] = of_table.usage, of_table.metrics
    return after


def record_usage(
    config: ModelConfig, usage: dict[str, SlotUsage], reads: ArraysOfMemories
) -> tuple[dict[str, SlotUsage], dict[str, dict[str, jax.Array]]]:
    """Returns the usage of every table after a step that trains tables the dense way, and its metrics."""
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
    select: Selection | None,
) -> TableUpdate:
    reads, cotangents = _side_by_side(reads), _side_by_side(cotangents)
    rows = rows_of_tables(config, reads)
    recorded = _record(state.usage, rows)
    rows = {name: rows[name] for name in rows if state.table_state[name]}
    if select is not None:
        for name, of in rows.items():
            num_slots = len(state.usage[name].seen)
            rows[name], metrics = select(of, of.order.size, num_slots, state.background.get(name))
            recorded[name][1].update(metrics)
    rows = {name: rows_if(finite, of) for name, of in rows.items()}
    gradients = table_gradients(config, rows, reads, cotangents)
    seeds = _seeds(state)
    keeping = {site.table for site in prefetching_sites(config)}
    written: RowsWritten = {}
    tables: dict[str, dict[str, jax.Array]] = {name: {} for name in state.tables}
    table_state: dict[str, dict[str, ArrayTree]] = {name: {} for name in state.tables}
    overwritten: dict[str, dict[str, RowsBefore]] = {name: {} for name in state.tables}
    norms: dict[str, dict[str, jax.Array]] = {name: {} for name in state.tables}
    for name, parts in state.tables.items():
        for part, table in parts.items():
            if part not in state.table_state[name]:  # it does not learn
                tables[name][part] = table
                continue
            of_reads, moments = gradients[name][part], state.table_state[name][part]
            seed = seeds[name][part]
            update = update_by_reads(
                optimizers[name],
                of_reads,
                moments,
                table,
                state.step,
                seed,
                record_before,
                keep=name in keeping and part == "values",
            )
            if name in keeping and part == "values":
                update, rows_written = update
                written[name] = of_reads.rows.slots, rows_written
            tables[name][part], table_state[name][part] = update.table, update.moments
            norms[name][part] = update.norm
            if update.before is not None:
                overwritten[name][part] = RowsBefore(of_reads.rows.slots, update.before)
    return TableUpdate(
        tables,
        table_state,
        {name: usage for name, (usage, _) in recorded.items()},
        {name: of | {"row_norm": _norm(norms[name])} for name, (_, of) in recorded.items()},
        overwritten if record_before else None,
        written,
    )


def _norm(of_parts: dict[str, jax.Array]) -> jax.Array:
    return optax.tree.norm(of_parts) if of_parts else jnp.zeros((), jnp.float32)


def _record(
    usage: dict[str, SlotUsage], rows: dict[str, RowsRead]
) -> dict[str, tuple[SlotUsage, dict[str, jax.Array]]]:
    return {name: record_reads(usage[name], of, of.order.size) for name, of in rows.items()}


def _seeds(state: TrainState) -> dict[str, dict[str, jax.Array]]:
    """Returns a seed for rounding, different for every array of a table and every step."""
    of_step = mix(state.step.astype(jnp.uint32), state.seed)
    numbers = itertools.count()
    return {
        name: {part: mix(jnp.uint32(next(numbers)), of_step) for part in parts}
        for name, parts in state.tables.items()
    }


def _side_by_side(tree: ArraysOfMemories) -> ArraysOfMemories:
    """Concatenates micro-batches: (micro-batches, T, ...) -> (micro-batches·T, ...)."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tree)
