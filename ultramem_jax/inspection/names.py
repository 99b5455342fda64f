"""Finds memories, tables and slots by the names and numbers that a user gives, and names heads."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.config.model import table_readers
from ultramem_jax.errors import require, unknown


class Head(NamedTuple):
    """Describes reads of a token that belong together: those of a head, or of n-grams of one order."""

    name: str
    """Name of the head, for people."""
    order: int
    """n, the number of tokens that decide these reads, the last one included; 0 if h decides them."""


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


def heads(site: MemorySite) -> tuple[Head, ...]:
    """Returns the heads among which the R reads of a token are divided evenly, in their order.

    A memory that tokens address has a head for each order of n-grams: the longest one comes last, and is one
    token longer than what decoding keeps.
    """
    address = site.config.address
    number, *factors = address.reads_in_words.split("·")
    count = int(number) if factors and number.isdecimal() else 1
    count = count if count and address.reads_per_token % count == 0 else 1
    if not address.reads_tokens:
        return tuple(Head(f"head {i + 1}", 0) for i in range(count))
    kept = [shape[0] for shape, _ in address.cache(site).values()]
    longest = 1 + max(kept, default=0)
    orders = [max(longest - count + 1 + i, 1) for i in range(count)]
    return tuple(Head("single tokens" if n == 1 else f"{n}-grams", n) for n in orders)


def order_of_reads(site: MemorySite) -> np.ndarray:
    """Returns the number of tokens that decide each read, (R,) int32; see `Head.order`."""
    found = heads(site)
    return np.repeat([head.order for head in found], site.config.reads_per_token // len(found)).astype(
        np.int32
    )
