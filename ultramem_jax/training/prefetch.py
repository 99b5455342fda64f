"""Gathers the rows of the next batch while a step computes, for tables whose addresses follow from tokens.

A table in host memory answers slowly. The rows that tokens address are known before the forward pass, so they
can be gathered one step ahead. Meanwhile the step in between updates some of them: those are taken from what
it wrote. So the numbers are those of the plain way, bit for bit.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.ops.rows import take_stored_rows
from ultramem_jax.tree_types import ArrayTree

Prefetched: TypeAlias = dict[str, dict[str, jax.Array]]
"""Per memory that prefetches, `values` (T·R, d_v): the row of every read of a batch, as the table stores
it."""
RowsWritten: TypeAlias = dict[str, tuple[jax.Array, jax.Array]]
"""Per table, slots (U,) int32, rising, and the rows (U, d_v) that a step wrote there, as the table stores
them."""

_MOST_ONES = 64
"""Bits of the widest word."""


def prefetching_sites(config: ModelConfig) -> tuple[MemorySite, ...]:
    """Returns the memories whose rows are gathered one step ahead."""
    return tuple(site for site in config.sites if site.config.table.prefetch)


def slots_of_tokens(config: ModelConfig, buffers: ArrayTree, tokens: jax.Array) -> dict[str, jax.Array]:
    """Returns the slots (T·R,) that each prefetching memory reads for tokens (B, S + 1)."""
    inputs = tokens[:, :-1]
    found = {}
    for site in prefetching_sites(config):
        addresser = site.config.address.addresser(site)
        nothing = jnp.zeros((*inputs.shape, 1), site.context.dtype)
        held: Any = {"buffers": buffers[site.name]} if site.name in buffers else {}
        reads: Any = addresser.apply(held, nothing, inputs, None)
        found[site.name] = reads.slots.reshape(-1)
    return found


def gather_ahead(config: ModelConfig, tables: ArrayTree, slots: dict[str, jax.Array]) -> Prefetched:
    """Returns the rows of the tables at the slots of `slots_of_tokens`."""
    return {
        site.name: {"values": take_stored_rows(tables[site.table]["values"], slots[site.name])}
        for site in prefetching_sites(config)
    }


def are_read(rows: Prefetched) -> jax.Array:
    """Returns True, () bool, once all values of the rows are there.

    What depends on it follows the gather. The compiler cannot tell that no word has more ones than bits.
    """
    arrays = [values for of_memory in rows.values() for values in of_memory.values()]
    words = [jax.lax.bitcast_convert_type(a, f"uint{8 * a.dtype.itemsize}") for a in arrays]
    ones = [jax.lax.population_count(of_array).max().astype(jnp.int32) for of_array in words]
    return jnp.stack(ones).max() <= _MOST_ONES


def with_rows_written(
    config: ModelConfig, ahead: Prefetched, slots: dict[str, jax.Array], written: RowsWritten
) -> Prefetched:
    """Returns rows gathered before a step, with those that the step wrote in their place.

    Args:
        config: the model's config.
        ahead: the result of `gather_ahead` on the tables before the step.
        slots: the slots of these rows.
        written: what the step wrote.
    """
    fresh: Prefetched = {}
    for site in prefetching_sites(config):
        if site.table not in written:  # the table does not learn
            fresh[site.name] = ahead[site.name]
            continue
        wanted, (at, rows) = slots[site.name], written[site.table]
        place = jnp.minimum(jnp.searchsorted(at, wanted).astype(jnp.int32), at.size - 1)
        is_written = at[place] == wanted
        old = ahead[site.name]["values"]
        fresh[site.name] = {"values": jnp.where(is_written[:, None], rows[place], old)}
    return fresh
