"""Sums arrays over equal rows, such as the reads of a slot or the tokens of an id.

On accelerators it uses no scatter. There a scatter-add of floats is made of atomic additions, in an order
that changes from run to run, or of a loop. Here the reads are sorted by row. Groups of 128 of them are summed
by a matrix product each, and a row that spans several groups gets the rest from a sum over groups. The order
of the additions is always the same.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ultramem_jax.ops.algorithms import algorithms
from ultramem_jax.ops.sorting import sort_with_order

_GROUP = 128
"""Reads of a group: the side of a TPU's matrix unit."""


class SortedRows(NamedTuple):
    """Lists the distinct rows of n reads, sorted, and maps the reads to them; all are int32."""

    rows: jax.Array
    """(U,), the distinct rows, strictly increasing. Padding at the end is N and more."""
    counts: jax.Array
    """(U,), the reads of each; zero for padding."""
    order: jax.Array
    """(n,), the reads, sorted by row; those of a row in their order."""
    row_of_read: jax.Array
    """(n,) in [0, U), index in `rows` of each read, in sorted order."""


def sorted_rows(rows: jax.Array, num_rows: int) -> SortedRows:
    """Sorts reads by row.

    Args:
        rows: (n,) int32 in [0, N).
        num_rows: N.

    Returns:
        U = min(n, N) rows, padding included.
    """
    ordered, order = sort_with_order(rows, num_rows)
    past_the_end = num_rows + jnp.arange(min(rows.size, num_rows), dtype=jnp.int32)
    found = runs_of(ordered, past_the_end)
    return SortedRows(found.values, found.counts, order, found.run_of_entry)


class Runs(NamedTuple):
    """Lists the distinct values of a sorted array; all are int32."""

    values: jax.Array
    """(U,), the distinct values, rising, then padding."""
    counts: jax.Array
    """(U,), how often each occurs; zero for padding."""
    run_of_entry: jax.Array
    """(n,) in [0, U), index in `values` of each entry."""


def runs_of(ordered: jax.Array, padding: jax.Array) -> Runs:
    """Finds the distinct values of a sorted array.

    Args:
        ordered: (n,) int32, never decreasing, with at most U distinct values.
        padding: (U,) int32, U <= n, values for the unused entries at the end.
    """
    count, most = ordered.size, padding.size
    first = jnp.concatenate([jnp.ones((1,), bool), ordered[1:] != ordered[:-1]])
    run_of_entry = jnp.cumsum(first.astype(jnp.int32)) - 1
    if algorithms().sums_by_row == "scatter":
        counts = jax.ops.segment_sum(jnp.ones_like(run_of_entry), run_of_entry, most, indices_are_sorted=True)
        return Runs(padding.at[run_of_entry].set(ordered), counts, run_of_entry)
    # A second sort puts the first entries of all runs to the front, in their order.
    position = jnp.arange(count, dtype=jnp.int32)
    starts, values = jax.lax.sort_key_val(jnp.where(first, position, position + count), ordered)
    ends = jnp.minimum(jnp.concatenate([starts[1:], jnp.full((1,), count, jnp.int32)]), count)[:most]
    starts, values = starts[:most], values[:most]
    found = starts < count
    return Runs(jnp.where(found, values, padding), jnp.where(found, ends - starts, 0), run_of_entry)


def sums_of_rows(reads: jax.Array, row_of_read: jax.Array, counts: jax.Array) -> jax.Array:
    """Returns the sum of every row's reads, (U, d) float32; zero for padding.

    Args:
        reads: (n, d) float32, sorted by row.
        row_of_read: (n,) int32 in [0, U), never decreasing; every row up to the last one has a read.
        counts: (U,) int32, reads of each row.
    """
    if algorithms().sums_by_row == "scatter":
        return jax.ops.segment_sum(reads, row_of_read, counts.shape[0], indices_are_sorted=True)
    return _sums_by_groups(reads, row_of_read, counts)


def _sums_by_groups(reads: jax.Array, row_of_read: jax.Array, counts: jax.Array) -> jax.Array:
    count, width = reads.shape
    groups = -(-count // _GROUP)
    # Padding belongs to the last read's row, and adds zero to it.
    reads = jnp.pad(reads, ((0, groups * _GROUP - count), (0, 0)))
    row = jnp.pad(row_of_read, (0, groups * _GROUP - count), mode="edge").reshape(groups, _GROUP)
    local = row - row[:, :1]
    # Zeros and ones: each sum is exact but for its own rounding.
    belongs = (local[:, None, :] == jnp.arange(_GROUP, dtype=jnp.int32)[None, :, None]).astype(jnp.float32)
    partial = jnp.einsum(
        "gij,gjd->gid", belongs, reads.reshape(groups, _GROUP, width), precision=jax.lax.Precision.HIGHEST
    )
    # What the group and those after it add to the row of the group's first read.
    is_whole = row[:, 0] == row[:, -1]
    goes_on = jnp.concatenate([is_whole[:-1] & (row[1:, 0] == row[:-1, 0]), jnp.zeros((1,), bool)])
    onwards = _suffix_sums(partial[:, 0], goes_on)
    ends = jnp.cumsum(counts)
    starts = ends - counts
    group = jnp.minimum(starts // _GROUP, groups - 1)
    last = jnp.maximum(ends - 1, 0) // _GROUP
    own = jnp.arange(counts.shape[0], dtype=jnp.int32) - row[:, 0].at[group].get(mode="promise_in_bounds")
    flat = group * _GROUP + jnp.clip(own, 0, _GROUP - 1)
    sums = partial.reshape(-1, width).at[flat].get(mode="promise_in_bounds")
    following = onwards.at[jnp.minimum(group + 1, groups - 1)].get(mode="promise_in_bounds")
    sums = sums + jnp.where((last > group)[:, None], following, 0)
    return jnp.where((counts > 0)[:, None], sums, 0)


def _suffix_sums(values: jax.Array, goes_on: jax.Array) -> jax.Array:
    """Sums values (G, d) from each group on, through all next ones that `goes_on` (G,) joins to it."""

    def combine(
        later: tuple[jax.Array, jax.Array], earlier: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        (value, joins), (own, goes_on) = later, earlier
        return jnp.where(goes_on[:, None], own + value, own), joins & goes_on

    return jax.lax.associative_scan(combine, (values, goes_on), reverse=True)[0]


def counted(values: jax.Array, num_values: int) -> jax.Array:
    """Returns how often each of [0, num_values) occurs among int32 values of any shape, int32."""
    flat = values.reshape(-1)
    if algorithms().sums_by_row == "scatter":
        return jnp.zeros((num_values,), jnp.int32).at[flat].add(1)
    return (flat[:, None] == jnp.arange(num_values, dtype=jnp.int32)[None]).sum(0, dtype=jnp.int32)
