"""The update of a table on a mesh: by each device for the rows and columns that it owns.

Every device sees the reads of all tokens, sorts those of its own rows to the front, and moves these rows on,
chunk by chunk. So it sorts T·R integers, T the tokens of all devices, but forms the gradients of its own
reads alone, T·R/P if reads are spread evenly over the P parts that rows are cut into, a chunk at a time. What
it holds of all tokens is integers, scores, and cotangents of E·d_v values.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ultramem_jax.config import exchange_purposes as purposes
from ultramem_jax.ops.chunks import chunk_tokens
from ultramem_jax.ops.exchanges import named_exchange
from ultramem_jax.ops.lookup import RowGradients, RowsRead, read_gradients, rows_read
from ultramem_jax.ops.on_mesh import MeshAxes, island
from ultramem_jax.ops.sharded_lookup import first_slot, narrow_blocks, own_cores
from ultramem_jax.parallel.rules import table_specs
from ultramem_jax.training.row_sparse import ROW_ARRAYS, RowSparseTransformation, TablePart
from ultramem_jax.training.slot_usage import SlotUsage, record_reads
from ultramem_jax.training.table_gradients import slots_if

_TOKEN_AXIS = {"slots": 1, "blocks": 1, "weights": 1, "inputs": 1, "pooled": 2, "products": 3}
"""Where T is in what the memories leave, behind an axis of micro-batches; shapes: `ops.sharded_lookup`."""


class OwnedTable:
    """A table in parts on a mesh."""

    def __init__(self, axes: MeshAxes):
        self._axes = axes

    def update(
        self,
        optimizer: RowSparseTransformation,
        parts: dict[str, jax.Array],
        moments: dict[str, Any],
        usage: SlotUsage,
        reads: dict[str, dict[str, jax.Array]],
        cotangents: dict[str, dict[str, jax.Array]],
        of_step: tuple[jax.Array, jax.Array, dict[str, jax.Array]],
    ) -> tuple[Any, ...]:
        """Moves on the rows that were read.

        Args:
            optimizer: of the rows.
            parts: the table's arrays.
            moments: of each of them.
            usage: before the step.
            reads: per memory that reads the table, what it sowed, behind an axis of micro-batches.
            cotangents: per memory, those of its perturbations, likewise.
            of_step: whether to write at all, () bool; the step; a seed for every array.

        Returns:
            Arrays, their moments, usage and metrics after the step.
        """
        axes = self._axes
        num_blocks = next(iter(cotangents.values()))["pooled"].shape[3]
        reads = {name: _narrow(of, num_blocks) for name, of in reads.items()}
        in_parts = (*(table_specs(tree, axes) for tree in (parts, moments)), table_specs(usage, axes))

        def local(parts: Any, moments: Any, usage: Any, reads: Any, cotangents: Any, of_step: Any) -> Any:
            with named_exchange(purposes.READS_AND_COTANGENTS_TO_REPLICAS):
                read, cotangent = self._of_all_tokens(reads), self._of_all_tokens(cotangents)
            rows, usage, metrics = self._recorded(usage, read["slots"])
            gradients = self._gradients_of_reads(read, cotangent)
            parts, moments, squares = self._moved_on(optimizer, parts, moments, rows, gradients, of_step)
            if axes.owners:
                with named_exchange(purposes.LOSSES_AND_METRICS):
                    squares = jax.lax.psum(squares, axes.owners)
            return parts, moments, usage, metrics | {"row_norm": jnp.sqrt(squares)}

        specs = (*in_parts, self._specs(reads), self._specs(cotangents), P())
        update = island(axes, local, specs, (*in_parts, P()))
        return update(parts, moments, usage, reads, cotangents, of_step)

    def record(
        self, usage: SlotUsage, reads: dict[str, dict[str, jax.Array]]
    ) -> tuple[SlotUsage, dict[str, jax.Array]]:
        """The usage of the table after the step, and its metrics; arguments as for `update`."""
        slots = {name: {"slots": of["slots"]} for name, of in reads.items()}

        def local(usage: Any, reads: Any) -> Any:
            with named_exchange(purposes.READS_TO_REPLICAS):
                read = self._of_all_tokens(reads)
            return self._recorded(usage, read["slots"])[1:]

        spec = table_specs(usage, self._axes)
        return island(self._axes, local, (spec, self._specs(slots)), (spec, P()))(usage, slots)

    def _specs(self, of_memories: dict[str, dict[str, jax.Array]]) -> dict[str, dict[str, P]]:
        axes = self._axes
        specs = {
            "inputs": P(None, axes.replicas, axes.width),
            "pooled": P(None, axes.slots, axes.replicas, None, axes.width),
            "products": P(None, axes.slots, axes.width, axes.replicas),
        }
        plain = P(None, axes.replicas)
        return {name: {kind: specs.get(kind, plain) for kind in of} for name, of in of_memories.items()}

    def _of_all_tokens(self, of_memories: dict[str, dict[str, jax.Array]]) -> dict[str, jax.Array]:
        """Arrays (T, ...) of all devices, micro-batches and memories, one behind the other.

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
        """The rows here among all reads, counted from the first; the usage and metrics of the table."""
        num_slots = usage.seen.shape[0]
        slots = slots - first_slot(self._axes, num_slots)
        # One more row stands for all that others own; it is sorted behind those that are here.
        slots = jnp.where((slots >= 0) & (slots < num_slots), slots, num_slots)
        rows = rows_read(slots, num_slots + 1)
        rows = rows._replace(counts=jnp.where(rows.slots < num_slots, rows.counts, 0))
        return rows, *record_reads(usage, rows, slots.size, self._axes.slots)

    def _gradients_of_reads(
        self, read: dict[str, jax.Array], cotangent: dict[str, jax.Array]
    ) -> dict[str, Callable[[jax.Array], jax.Array]]:
        """Per array of the table, from numbers of reads (C,) to what these send to its rows, (C, d)."""
        reads_of_token = read["slots"].shape[1]
        blocks = read["blocks"].reshape(-1).astype(jnp.int32) if "blocks" in read else None
        weights = own_cores(self._axes, read["weights"])
        weights = weights.reshape(-1, weights.shape[-1])

        def of_values(index: jax.Array) -> jax.Array:
            block = 0 if blocks is None else blocks[index]
            vectors = cotangent["pooled"][index // reads_of_token, block]
            return read_gradients(vectors, weights[index])

        def of_pre_values(index: jax.Array) -> jax.Array:
            products = cotangent["products"].reshape(-1, 1)[index]
            return read_gradients(read["inputs"][index // reads_of_token], products)

        return {"values": of_values, "pre_values": of_pre_values}

    def _moved_on(
        self,
        optimizer: RowSparseTransformation,
        parts: dict[str, jax.Array],
        moments: dict[str, Any],
        rows: RowsRead,
        gradients: dict[str, Callable[[jax.Array], jax.Array]],
        of_step: tuple[jax.Array, jax.Array, dict[str, jax.Array]],
    ) -> tuple[Any, Any, jax.Array]:
        """The table's arrays, their moments, and the sum of the squares of the rows written.

        Chunks are of reads, in the order of their rows. The last row of a chunk may go on in the next one:
        its sum so far is carried over, and it is written there.
        """
        finite, step, seeds = of_step
        num_slots = next(iter(parts.values())).shape[0]
        num_reads = rows.counts.sum(dtype=jnp.int32)
        size = min(chunk_tokens(ROW_ARRAYS * max(a.shape[1] for a in parts.values())), rows.order.size)
        number = jnp.arange(size, dtype=jnp.int32)
        nowhere = num_slots + 1 + number

        def row_at(place: jax.Array) -> jax.Array:
            return rows.row_of_read.at[place].get(mode="clip")

        def body(chunk: jax.Array, carry: Any) -> Any:
            parts, moments, squares, carried = carry
            place = chunk * size + number
            end = (chunk + 1) * size
            here = place < num_reads
            row = jnp.where(here, row_at(place) - row_at(place[0]), size)  # not here: past all rows, dropped
            last = jnp.max(jnp.where(here, row, 0))
            slots = nowhere.at[row].set(rows.slots.at[row_at(place)].get(mode="clip"), mode="drop")
            goes_on = (end < num_reads) & (row_at(end) == row_at(end - 1))
            slots = jnp.where(goes_on & (number == last), nowhere, slots)
            index = rows.order.at[place].get(mode="clip")
            after: tuple[dict[str, Any], ...] = ({}, {}, {})
            for name, array in parts.items():
                sums = jnp.zeros((size, array.shape[1]), jnp.float32)
                sums = sums.at[row].add(gradients[name](index), mode="drop", indices_are_sorted=True)
                sums = sums.at[0].add(carried[name])
                update = optimizer.update(
                    RowGradients(slots_if(finite, slots), sums),
                    moments[name],
                    array,
                    step,
                    seeds[name],
                    part=self._part(array),
                )
                squares = squares + update.norm**2
                waiting = jnp.where(goes_on, sums[last], 0.0)
                for trees, result in zip(after, (update.table, update.moments, waiting), strict=True):
                    trees[name] = result
            return *after[:2], squares, after[2]

        carried = {name: jnp.zeros((a.shape[1],), jnp.float32) for name, a in parts.items()}
        start = parts, moments, jnp.zeros((), jnp.float32), carried
        parts, moments, squares, _ = jax.lax.fori_loop(0, -(-num_reads // size), body, start)
        return parts, moments, squares

    def _part(self, array: jax.Array) -> TablePart:
        axes, (num_rows, width) = self._axes, array.shape
        column = jax.lax.axis_index(axes.width) * width if axes.width else 0
        return TablePart(first_slot(axes, num_rows), column, axes.width)


def _narrow(reads: dict[str, jax.Array], num_blocks: int) -> dict[str, jax.Array]:
    """What was read, blocks as small as they can travel: not at all if there is one."""
    blocks = {"blocks": narrow_blocks(reads["blocks"], num_blocks)} if num_blocks > 1 else {}
    return {name: x for name, x in reads.items() if name != "blocks"} | blocks
