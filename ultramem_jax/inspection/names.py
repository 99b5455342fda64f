"""Finds memories, tables and slots by the names and numbers that a user gives."""

from collections.abc import Iterable, Mapping

import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.config.model import table_readers
from ultramem_jax.errors import require, unknown


def require_memories(config: ModelConfig) -> None:
    """Refuses a model without memories.

    Raises:
        UserError: the model has none.
    """
    require(bool(config.memories), "model.memories", {}, "must name a memory to look into")


def site_of(config: ModelConfig, name: str) -> MemorySite:
    """Returns the memory of a name, such as `ultramem_0`.

    Raises:
        UserError: the model has no such memory.
    """
    sites = {site.name: site for site in config.sites}
    if name not in sites:
        raise unknown("memory", name, sites)
    return sites[name]


def table_of(config: ModelConfig, name: str) -> str:
    """Returns the name of a table, given its own name or that of a memory that reads it.

    Raises:
        UserError: the model has neither such a memory nor such a table.
    """
    tables = table_readers(config)
    of_sites = {site.name: site.table for site in config.sites}
    if name not in of_sites and name not in tables:
        raise unknown("memory", name, {*of_sites, *tables})
    return of_sites.get(name, name)


def checked_slots(config: ModelConfig, table: str, slots: Iterable[int] | np.ndarray) -> np.ndarray:
    """Returns slots of a table as (n,) int32.

    Args:
        config: the model.
        table: name of the table, as in the collection `memory`.
        slots: numbers of rows.

    Raises:
        UserError: a slot is not a row of the table.
    """
    array = np.asarray(slots if isinstance(slots, np.ndarray) else list(slots), np.int64).reshape(-1)
    rows = table_readers(config)[table][0].num_slots
    for slot in array[(array < 0) | (array >= rows)][:1]:
        require(False, f"slot of {table}", int(slot), f"must be in [0, {rows})")
    return array.astype(np.int32)


def slots_by_table(
    config: ModelConfig, slots: Mapping[str, Iterable[int] | np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the slots of each table that is named, over all memories that read it: (n,) int32, rising.

    Args:
        config: the model.
        slots: rows, by the name of a table or of a memory that reads it.

    Raises:
        UserError: an unknown memory, or a slot that its table does not have.
    """
    found: dict[str, list[np.ndarray]] = {}
    for name, rows in slots.items():
        table = table_of(config, name)
        found.setdefault(table, []).append(checked_slots(config, table, rows))
    return {table: np.unique(np.concatenate(parts)) for table, parts in found.items()}


def order_of_reads(site: MemorySite) -> np.ndarray:
    """Returns the number of tokens that decide each read, (R,) int32; see `Head.order`."""
    orders = np.array([head.order for head in site.config.address.heads], np.int32)
    return np.repeat(orders, site.config.reads_per_token // len(orders))
