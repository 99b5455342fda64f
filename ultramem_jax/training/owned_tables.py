"""Updates a table on a mesh: each device updates only the rows and columns that it owns.

Every device sees the reads of all tokens. It sorts the reads of its own rows to the front, and updates these
rows chunk by chunk. So it sorts T·R integers, where T counts the tokens of all devices. But it forms only the
gradients of its own reads, one chunk at a time. These are T·R/P reads if reads are spread evenly over the P
parts into which rows are split. What it holds of all tokens is integers, scores, and cotangents of E·d_v
values.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ultramem_jax.config import exchange_purposes as purposes
from ultramem_jax.kernels.dispatch import native_or
from ultramem_jax.ops.algorithms import algorithms
from ultramem_jax.ops.chunks import chunk_tokens
from ultramem_jax.ops.exchanges import named_exchange
from ultramem_jax.ops.lookup import (
    GradientsOfReads,
    RowGradients,
    RowsRead,
    read_gradients,
    rows_read,
    take_weights,
)
from ultramem_jax.ops.on_mesh import MeshAxes, island
from ultramem_jax.ops.row_sums import runs_of, sums_of_rows
from ultramem_jax.ops.sharded_lookup import first_slot, narrow_blocks, own_cores
from ultramem_jax.parallel.rules import table_specs
from ultramem_jax.training.row_sparse import ROW_ARRAYS, RowSparseTransformation, TablePart
from ultramem_jax.training.slot_selection import Selection
from ultramem_jax.training.slot_usage import SlotUsage, record_reads
from ultramem_jax.training.table_gradients import ArraysOfMemories, rows_if, slots_if
from ultramem_jax.tree_types import ArrayTree

_TOKEN_AXIS = {"slots": 1, "blocks": 1, "weights": 1, "inputs": 1, "pooled": 2, "products": 3}
"""Axis of T in the arrays that memories leave, behind an axis of micro-batches; shapes:
`ops.sharded_lookup`."""


class OfStep(NamedTuple):
    """Holds what the updates of all tables of a step have in common, and the seeds of one table."""

    finite: jax.Array
    """() bool, whether to write any row."""
    step: jax.Array
    """() int32, the step, counted from 0."""
    seeds: dict[str, jax.Array]
    """Seeds for rounding, () uint32, by array of the table."""


class OwnedTableUpdate(NamedTuple):
    """Holds one table after a step on a mesh."""

    parts: dict[str, jax.Array]
    """The table's arrays, by name."""
    moments: dict[str, ArrayTree]
    """State of the optimizer, by array of the table."""
    usage: SlotUsage
    metrics: dict[str, jax.Array]
    """Metrics of the table: those of `record_reads`, and `row_norm`."""


class _Rows(NamedTuple):
    """Holds the rows of a table during an update and after it."""

    parts: dict[str, jax.Array]
    """The table's arrays, by name."""
    moments: dict[str, ArrayTree]
    """State of the optimizer, by array of the table."""
    squares: jax.Array
    """() float32, the sum of the squares of the rows written so far."""


class _Carry(NamedTuple):
    """Holds what one chunk of reads hands to the next."""

    rows: _Rows
    sums: dict[str, jax.Array]
    """Sums of gradients (d,) float32, by array, for a last row that the next chunk continues; zeros if none
    does."""


class OwnedTable:
    """Updates one table that is split over a mesh."""

    def __init__(self, axes: MeshAxes):
        self._axes = axes

    def update(
        self,
        optimizer: RowSparseTransformation,
        parts: dict[str, jax.Array],
        moments: dict[str, ArrayTree],
        usage: SlotUsage,
        reads: ArraysOfMemories,
        cotangents: ArraysOfMemories,
        of_step: OfStep,
        select: Selection | None = None,
        background: jax.Array | None = None,
    ) -> OwnedTableUpdate:
        """Updates the rows that were read.

        Args:
            optimizer: the optimizer of the rows.
            parts: the table's arrays.
            moments: state of the optimizer, per array.
            usage: usage of the slots before the step.
            reads: per memory that reads the table, what it sowed, with a leading axis of micro-batches.
            cotangents: per memory, the cotangents of its perturbations, with the same axis.
            of_step: whether to write at all, the step, and a seed for every array.
            select: selects the rows to update; None is all that were read.
            background: (N,) float32, what `select` takes from the background, if it does.

        Returns:
            Arrays, their moments, usage and metrics after the step.
        """
        axes = self._axes
        num_blocks = next(iter(cotangents.values()))["pooled"].shape[3]
        reads = {name: _narrow(of, num_blocks) for name, of in reads.items()}
        in_parts = table_specs(parts, axes), table_specs(moments, axes), table_specs(usage, axes)

        def local(
            parts: dict[str, jax.Array],
            moments: dict[str, ArrayTree],
            usage: SlotUsage,
            reads: ArraysOfMemories,
            cotangents: ArraysOfMemories,
            of_step: OfStep,
            background: jax.Array | None,
        ) -> tuple[dict[str, jax.Array], dict[str, ArrayTree], SlotUsage, dict[str, jax.Array]]:
            with named_exchange(purposes.READS_AND_COTANGENTS_TO_REPLICAS):
                read, cotangent = self._of_all_tokens(reads), self._of_all_tokens(cotangents)
            rows, usage, metrics = self._recorded(usage, read["slots"])
            if select is not None:
                num_reads, num_slots = read["slots"].size, len(usage.seen)
                rows, of_selection = select(rows, num_reads, num_slots, background, axes.slots)
                metrics |= of_selection
            of_reads = self._gradients_of_reads(rows, read, cotangent)
            served = (optimizer.serves(of_reads[name], moments[name], array) for name, array in parts.items())
            by_chunks, by_kernel = partial(self._by_chunks, optimizer), partial(self._by_kernel, optimizer)
            parts, moments, squares = native_or(
                by_chunks, by_kernel, all(served), parts, moments, of_reads, of_step
            )
            if axes.owners:
                with named_exchange(purposes.LOSSES_AND_METRICS):
                    squares = jax.lax.psum(squares, axes.owners)
            return parts, moments, usage, metrics | {"row_norm": jnp.sqrt(squares)}

        of_background = table_specs(background, axes)
        specs = (*in_parts, self._specs(reads), self._specs(cotangents), P(), of_background)
        update = island(axes, local, specs, (*in_parts, P()))
        return OwnedTableUpdate(*update(parts, moments, usage, reads, cotangents, of_step, background))

    def record(self, usage: SlotUsage, reads: ArraysOfMemories) -> tuple[SlotUsage, dict[str, jax.Array]]:
        """Returns the usage of the table after the step, and its metrics.

        The arguments are those of `update`.
        """
        slots = {name: {"slots": of["slots"]} for name, of in reads.items()}

        def local(usage: SlotUsage, reads: ArraysOfMemories) -> tuple[SlotUsage, dict[str, jax.Array]]:
            with named_exchange(purposes.READS_TO_REPLICAS):
                read = self._of_all_tokens(reads)
            return self._recorded(usage, read["slots"])[1:]

        spec = table_specs(usage, self._axes)
        return island(self._axes, local, (spec, self._specs(slots)), (spec, P()))(usage, slots)

    def _specs(self, of_memories: ArraysOfMemories) -> dict[str, dict[str, P]]:
        axes = self._axes
        specs = {
            "inputs": P(None, axes.replicas, axes.width),
            "pooled": P(None, axes.slots, axes.replicas, None, axes.width),
            "products": P(None, axes.slots, axes.width, axes.replicas),
        }
        plain = P(None, axes.replicas)
        return {name: {kind: specs.get(kind, plain) for kind in of} for name, of in of_memories.items()}

    def _of_all_tokens(self, of_memories: ArraysOfMemories) -> dict[str, jax.Array]:
        """Returns arrays (T, ...) over all devices, micro-batches and memories, concatenated.

        To a table, M memories are M times as many tokens.
        """
        together = {}
        for kind in next(iter(of_memories.values())):
            gathered = []
            for of in of_memories.values():
                x, place = of[kind], _TOKEN_AXIS[kind]
                if self._axes.replicas:
                    x = jax.lax.all_gather(x, self._axes.replicas, axis=place, tiled=True)
                gathered.append(x.reshape(-1, *x.shape[place + 1 :]))
            together[kind] = gathered[0] if len(gathered) == 1 else jnp.concatenate(gathered)
        return together

    def _recorded(
        self, usage: SlotUsage, slots: jax.Array
    ) -> tuple[RowsRead, SlotUsage, dict[str, jax.Array]]:
        """Returns the rows of this device among all reads, and the table's usage and metrics.

        Rows count from the first row of this device.
        """
        num_slots = usage.seen.shape[0]
        slots = slots - first_slot(self._axes, num_slots)
        # One extra row stands for all rows of other devices. It is sorted behind the rows of this device.
        slots = jnp.where((slots >= 0) & (slots < num_slots), slots, num_slots)
        rows = rows_read(slots, num_slots + 1)
        rows = rows._replace(counts=jnp.where(rows.slots < num_slots, rows.counts, 0))
        return rows, *record_reads(usage, rows, slots.size, self._axes.slots)

    def _gradients_of_reads(
        self, rows: RowsRead, read: dict[str, jax.Array], cotangent: dict[str, jax.Array]
    ) -> dict[str, GradientsOfReads]:
        """Returns, per array of the table, what the gradients of its rows are made of."""
        one_block = jnp.zeros_like(read["slots"])
        blocks = read["blocks"].astype(jnp.int32) if "blocks" in read else one_block
        weights = own_cores(self._axes, read["weights"])
        of_parts = {"values": GradientsOfReads(rows, blocks, weights, cotangent["pooled"])}
        if "products" in cotangent:
            vectors = read["inputs"][:, None]
            of_parts["pre_values"] = GradientsOfReads(
                rows, one_block, cotangent["products"][..., None], vectors
            )
        return of_parts

    def _by_kernel(
        self,
        optimizer: RowSparseTransformation,
        parts: dict[str, jax.Array],
        moments: dict[str, ArrayTree],
        of_reads: dict[str, GradientsOfReads],
        of_step: OfStep,
    ) -> _Rows:
        """Updates the rows that were read, by the kernel."""
        finite, step, seeds = of_step
        updates = {
            name: optimizer.update_natively(
                of_reads[name]._replace(rows=rows_if(finite, of_reads[name].rows)),
                moments[name],
                array,
                step,
                seeds[name],
                part=self._part(array),
            )
            for name, array in parts.items()
        }
        return _Rows(
            {name: update.table for name, update in updates.items()},
            {name: update.moments for name, update in updates.items()},
            sum((update.norm**2 for update in updates.values()), jnp.zeros((), jnp.float32)),
        )

    def _by_chunks(
        self,
        optimizer: RowSparseTransformation,
        parts: dict[str, jax.Array],
        moments: dict[str, ArrayTree],
        of_reads: dict[str, GradientsOfReads],
        of_step: OfStep,
    ) -> _Rows:
        """Updates the rows that were read, chunk by chunk.

        A chunk holds reads, in the order of their rows. The last row of a chunk may continue in the next one.
        Then its sum so far is carried over, and the next chunk writes the row.
        """
        finite, step, seeds = of_step
        rows = next(iter(of_reads.values())).rows
        num_slots = next(iter(parts.values())).shape[0]
        num_reads = rows.counts.sum(dtype=jnp.int32)
        size = min(chunk_tokens(ROW_ARRAYS * max(a.shape[1] for a in parts.values())), rows.order.size)
        number = jnp.arange(size, dtype=jnp.int32)
        nowhere = num_slots + 1 + number

        def row_at(place: jax.Array) -> jax.Array:
            return rows.row_of_read.at[place].get(mode="clip")

        def body(chunk: jax.Array, carry: _Carry) -> _Carry:
            (parts, moments, squares), carried = carry
            place = chunk * size + number
            end = (chunk + 1) * size
            here = place < num_reads
            # Reads of other devices get a row past all rows, and are dropped.
            row = jnp.where(here, row_at(place) - row_at(place[0]), size)
            last = jnp.max(jnp.where(here, row, 0))
            slots = rows.slots.at[row_at(place[0]) + number].get(mode="clip")
            slots = jnp.where(number <= last, slots, nowhere)
            goes_on = (end < num_reads) & (row_at(end) == row_at(end - 1))
            slots = jnp.where(goes_on & (number == last), nowhere, slots)
            index = rows.order.at[place].get(mode="clip")
            after = _Carry(_Rows({}, {}, squares), {})
            for name, array in parts.items():
                of_chunk = _gradients_of(of_reads[name], index)
                if algorithms().sums_by_row == "scatter":
                    sums = jnp.zeros((size, array.shape[1]), jnp.float32)
                    sums = sums.at[row].add(of_chunk, mode="drop", indices_are_sorted=True)
                else:
                    # Reads of other devices come last. They count to the last row, and add nothing.
                    of_chunk = jnp.where(here[:, None], of_chunk, 0)
                    runs = runs_of(jnp.minimum(row, last), number)
                    sums = sums_of_rows(of_chunk, runs.run_of_entry, runs.counts)
                sums = sums.at[0].add(carried[name])
                update = optimizer.update(
                    RowGradients(slots_if(finite, slots), sums),
                    moments[name],
                    array,
                    step,
                    seeds[name],
                    part=self._part(array),
                )
                after.rows.parts[name], after.rows.moments[name] = update.table, update.moments
                after.sums[name] = jnp.where(goes_on, sums[last], 0.0)
                squares = squares + update.norm**2
            return after._replace(rows=after.rows._replace(squares=squares))

        carried = {name: jnp.zeros((a.shape[1],), jnp.float32) for name, a in parts.items()}
        start = _Carry(_Rows(parts, moments, jnp.zeros((), jnp.float32)), carried)
        return jax.lax.fori_loop(0, -(-num_reads // size), body, start).rows

    def _part(self, array: jax.Array) -> TablePart:
        axes, (num_rows, width) = self._axes, array.shape
        column = jax.lax.axis_index(axes.width) * width if axes.width else 0
        return TablePart(first_slot(axes, num_rows), column, axes.width)


def _gradients_of(of_reads: GradientsOfReads, index: jax.Array) -> jax.Array:
    """Returns what each of the reads at `index` (C,) adds to its row's gradient, (C, d)."""
    _, blocks, scores, cotangent = of_reads
    vectors = cotangent[index // blocks.shape[1], blocks.reshape(-1)[index]]
    return read_gradients(vectors, take_weights(scores, index))


def _narrow(reads: Mapping[str, jax.Array], num_blocks: int) -> dict[str, jax.Array]:
    """Returns the reads with blocks in the smallest dtype that holds them. A single block is left out."""
    blocks = {"blocks": narrow_blocks(reads["blocks"], num_blocks)} if num_blocks > 1 else {}
    return {name: x for name, x in reads.items() if name != "blocks"} | blocks
