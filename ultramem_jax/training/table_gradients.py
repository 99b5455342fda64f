"""Collects what the gradients of every table's rows are made of: reads, and their cotangents."""

from collections.abc import Collection, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.model import table_readers
from ultramem_jax.ops.lookup import GradientsOfReads, RowsRead, rows_read
from ultramem_jax.ops.sharded_lookup import pooled_shape, products_shape

ArraysOfMemories: TypeAlias = Mapping[str, Mapping[str, jax.Array]]
"""Arrays by memory and kind: what memories sow into `reads`, or the cotangents of `perturbations`."""


def perturbations(
    config: ModelConfig, num_tokens: int, learning: Collection[str]
) -> dict[str, dict[str, jax.Array]]:
    """Returns the zeros that are added to the reads. Their gradients are the cotangents of the reads.

    Args:
        config: the model's config.
        num_tokens: T.
        learning: names of the tables that learn; memories of others get nothing.

    Returns:
        Per memory `pooled` (T, blocks, d_v) and, with pre-values, `products` (T, R), in the model's dtype. On
        a mesh they have the shapes that `ops.sharded_lookup` uses at the owners of the tables.
    """
    dtype = jnp.dtype(config.dtype)
    found = {}
    for site in config.sites:
        if site.table not in learning:
            continue
        memory = site.config
        shape = pooled_shape(num_tokens, memory.num_blocks, memory.table.value_dim)
        found[site.name] = {"pooled": jnp.zeros(shape, dtype)}
        if memory.table.pre_value_dim:
            products = products_shape(num_tokens, memory.reads_per_token)
            found[site.name]["products"] = jnp.zeros(products, dtype)
    return found


def rows_of_tables(config: ModelConfig, reads: ArraysOfMemories) -> dict[str, RowsRead]:
    """Returns the rows of every table that a step read, over all memories that read the table.

    Args:
        config: the model's config.
        reads: what the memories sowed into `reads`.
    """
    return {
        table: rows_read(_together([reads[site.name]["slots"] for site in readers]), readers[0].num_slots)
        for table, readers in table_readers(config).items()
    }


def rows_if(finite: jax.Array, rows: RowsRead) -> RowsRead:
    """Returns the rows, or none of them where a step's loss or gradients are not finite.

    Such a step writes no row.

    Tables are written in place, so every other reader of them must come first. The compiler does not know
    this. It drops barriers on CPU, and would copy a table for a reader that no write depends on. So `finite`
    must depend on every gradient that is computed from rows.
    """
    return rows._replace(slots=slots_if(finite, rows.slots))


def slots_if(finite: jax.Array, slots: jax.Array) -> jax.Array:
    """Returns the slots (U,) of `rows_if`."""
    last = jnp.iinfo(jnp.int32).max
    nowhere = last - jnp.arange(slots.shape[0], 0, -1, dtype=jnp.int32)
    return jnp.where(finite, slots, nowhere)


def table_gradients(
    config: ModelConfig, rows: dict[str, RowsRead], reads: ArraysOfMemories, cotangents: ArraysOfMemories
) -> dict[str, dict[str, GradientsOfReads]]:
    """Returns what the gradients of the rows that were read are made of.

    Args:
        config: the model's config.
        rows: the result of `rows_of_tables`, of the tables that learn.
        reads: what the memories sowed into `reads`.
        cotangents: gradients with respect to `perturbations`.

    Returns:
        Per table, that of `values` and, if it has them, of `pre_values`.
    """
    gradients: dict[str, dict[str, GradientsOfReads]] = {}
    for table, sites in table_readers(config).items():
        if table not in rows:
            continue
        readers = [site.name for site in sites]
        read = {key: _together([reads[name][key] for name in readers]) for key in reads[readers[0]]}
        cotangent = {
            key: _together([cotangents[name][key] for name in readers]) for key in cotangents[readers[0]]
        }
        gradients[table] = {
            "values": GradientsOfReads(rows[table], read["blocks"], read["weights"], cotangent["pooled"])
        }
        if "products" in cotangent:
            gradients[table]["pre_values"] = GradientsOfReads(
                rows[table],
                jnp.zeros_like(read["slots"]),
                cotangent["products"][..., None],
                read["inputs"][:, None],
            )
    return gradients


def _together(of_memories: list[jax.Array]) -> jax.Array:
    """Returns arrays over tokens, concatenated. To a table, M memories are M times as many tokens."""
    return of_memories[0] if len(of_memories) == 1 else jnp.concatenate(of_memories)
