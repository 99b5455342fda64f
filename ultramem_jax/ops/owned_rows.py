"""Looks up the rows that a device owns, for the reads of all tokens of its group.

Of T·R reads a device with N/P rows owns T·R/P, if they are spread evenly. The device first lists these, which
takes a few integer operations per read. It then gathers and multiplies rows for the reads on the list, chunk
by chunk; the number of chunks depends on the reads. So a device's work on rows falls with P. The list does
not get shorter with P, nor does the array of sums, which has room for every token of the group. If all reads
fall to one device, nothing is dropped, but that device takes longer.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ultramem_jax.kernels import calls
from ultramem_jax.kernels.dispatch import native_or
from ultramem_jax.ops.algorithms import algorithms
from ultramem_jax.ops.chunks import fold_chunks
from ultramem_jax.ops.lookup import slice_sums, take_weights, weighed_rows
from ultramem_jax.ops.row_sums import runs_of, sums_of_rows
from ultramem_jax.ops.rows import take_rows


def pooled_of_owned(
    table: jax.Array, slots: jax.Array, blocks: jax.Array, scores: jax.Array, first: jax.Array, expansion: int
) -> jax.Array:
    """Returns the part of `lookup.pooled_lookup`'s sums that owned rows contribute.

    Args:
        table: (N/P, d_v), the owned rows.
        slots: (T, R) int32 in [0, N), of all reads.
        blocks: (T, R) int32 in [0, E).
        scores: (T, R, h).
        first: () int32, slot of the first owned row.
        expansion: E.

    Returns:
        (T, E, d_v) in the dtype of the scores, summed in float32. Zeros where a token reads no owned row.
    """
    listed, kernel = partial(_pool_listed, expansion=expansion), partial(calls.pool, expansion=expansion)
    serves = calls.serves_lookup(table, slots, scores)
    return native_or(listed, kernel, serves, table, slots, blocks, scores, first)


def products_of_owned(
    table: jax.Array, slots: jax.Array, blocks: jax.Array, vectors: jax.Array, first: jax.Array, cores: int
) -> jax.Array:
    """Returns `lookup.score_products` (T, R, h) of the reads of owned rows, and zeros for the others.

    Args:
        table: (N/P, d_v), the owned rows.
        slots: (T, R) int32 in [0, N), of all reads.
        blocks: (T, R) int32 in [0, E).
        vectors: (T, E, d_v), whose dtype is that of the result.
        first: () int32, slot of the first owned row.
        cores: h.
    """
    listed, kernel = partial(_multiply_listed, cores=cores), partial(calls.products, cores=cores)
    serves = calls.serves_lookup(table, slots, vectors)
    return native_or(listed, kernel, serves, table, slots, blocks, vectors, first)


class OwnedReads(NamedTuple):
    """Lists the reads that fall into rows [first, first + N/P) of a table."""

    places: jax.Array
    """(T·R,) int32: indices of the owned reads among all reads, rising; then zeros as padding."""
    num_owned: jax.Array
    """() int32: number of owned reads."""
    slots: jax.Array
    """(T·R,) int32: row of each read, counted from `first`; outside [0, N/P) for reads that are not owned."""


def owned_reads(
    slots: jax.Array, first: jax.Array, num_rows: int, order: jax.Array | None = None
) -> OwnedReads:
    """Lists the reads of slots (T, R) int32 that fall into the `num_rows` rows from `first` on.

    Args:
        slots: (T, R) int32.
        first: () int32.
        num_rows: N/P.
        order: (T·R,) int32, at least 0: sort key of the owned reads on accelerators. None keeps their order.
            A CPU ignores it.
    """
    slots = slots.reshape(-1) - first
    owned = (slots >= 0) & (slots < num_rows)
    reads = jnp.arange(slots.size, dtype=jnp.int32)
    num_owned = owned.sum(dtype=jnp.int32)
    if algorithms().sums_by_row == "scatter":
        place = jnp.where(owned, jnp.cumsum(owned, dtype=jnp.int32) - 1, slots.size)
        return OwnedReads(jnp.zeros_like(reads).at[place].set(reads, mode="drop"), num_owned, slots)
    key = jnp.where(owned, reads if order is None else order, jnp.iinfo(jnp.int32).max)
    places = jax.lax.sort_key_val(key, reads)[1]
    return OwnedReads(jnp.where(reads < num_owned, places, 0), num_owned, slots)


def _pool_listed(
    table: jax.Array, slots: jax.Array, blocks: jax.Array, scores: jax.Array, first: jax.Array, expansion: int
) -> jax.Array:
    tokens, reads = scores.shape[:2]
    count = tokens * reads
    target = jnp.arange(count, dtype=jnp.int32) // reads * expansion + blocks.reshape(-1)
    owned = owned_reads(slots, first, table.shape[0], target)

    def add(pooled: jax.Array, number: jax.Array, index: jax.Array) -> jax.Array:
        rows = _owned_rows(table, owned, index, scores.dtype)
        # A chunk can reach beyond the last owned read. The scatter drops what it finds there.
        to = jnp.where(number < owned.num_owned, target[index], len(pooled))
        weighed = weighed_rows(rows, take_weights(scores, index))
        if algorithms().sums_by_row == "scatter":
            return pooled.at[to].add(weighed, mode="drop", indices_are_sorted=expansion == 1)
        runs = runs_of(to, len(pooled) + jnp.arange(to.size, dtype=jnp.int32))
        sums = sums_of_rows(weighed.astype(jnp.float32), runs.run_of_entry, runs.counts)
        return pooled.at[runs.values].add(sums, mode="drop", unique_indices=True, indices_are_sorted=True)

    zeros = jnp.zeros((tokens * expansion, table.shape[1]), jnp.float32)
    numbers = jnp.arange(count, dtype=jnp.int32)
    pooled = fold_chunks(add, zeros, 2 * table.shape[1], numbers, owned.places, up_to=owned.num_owned)
    return pooled.reshape(tokens, expansion, -1).astype(scores.dtype)


def _multiply_listed(
    table: jax.Array, slots: jax.Array, blocks: jax.Array, vectors: jax.Array, first: jax.Array, cores: int
) -> jax.Array:
    owned = owned_reads(slots, first, table.shape[0])
    (tokens, reads), expansion = blocks.shape, vectors.shape[1]
    count = tokens * reads
    blocks, of_blocks = blocks.reshape(-1), vectors.reshape(-1, vectors.shape[-1])

    def put(products: jax.Array, number: jax.Array, index: jax.Array) -> jax.Array:
        rows = _owned_rows(table, owned, index, vectors.dtype)
        of_reads = of_blocks.at[index // reads * expansion + blocks[index]].get(mode="promise_in_bounds")
        target = jnp.where(number < owned.num_owned, index, count + number)
        sums = slice_sums(rows * of_reads, cores)
        if algorithms().layouts == "wide":
            return products.at[:, target].set(sums.T, mode="drop", unique_indices=True)
        return products.at[target].set(sums, mode="drop", unique_indices=True)

    # A TPU would pad the cores, if they were the last axis, to 128.
    is_wide = algorithms().layouts == "wide"
    zeros = jnp.zeros((cores, count) if is_wide else (count, cores), vectors.dtype)
    numbers = jnp.arange(count, dtype=jnp.int32)
    products = fold_chunks(put, zeros, 2 * table.shape[1], numbers, owned.places, up_to=owned.num_owned)
    return (products.T if is_wide else products).reshape(tokens, reads, cores)


def _owned_rows(table: jax.Array, owned: OwnedReads, index: jax.Array, dtype: jnp.dtype) -> jax.Array:
    slots = jnp.clip(owned.slots[index], 0, table.shape[0] - 1)
    return take_rows(table, slots, dtype)
