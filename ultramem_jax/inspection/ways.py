"""Chooses the slots of a text that a page looks into, and finds the read whose direction each card shows."""

import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.config.model import table_readers
from ultramem_jax.inspection.corpus import CorpusReads, TableReads
from ultramem_jax.inspection.names import site_of
from ultramem_jax.inspection.tracing import Trace
from ultramem_jax.ops.rows import take_rows
from ultramem_jax.tree_types import Variables


class Way(NamedTuple):
    """Says how a slot is read: what its row is weighed by, and which matrix it goes through."""

    memory: str
    """Name of the memory that reads it."""
    block: int
    """Block into which the row is summed."""
    weights: np.ndarray | None
    """(h,) weights of the read; None, which stands for ones, if no read of the slot is known."""


def strengths(config: ModelConfig, variables: Variables, trace: Trace) -> dict[str, np.ndarray]:
    """Returns a number (S, R) for each read of a text, by memory: its mean weight.

    Where reads have no weights, because rows are concatenated as they are, it is the length of the row.
    """
    found = {}
    for name, of in trace.memories.items():
        found[name] = of.scores
        if not site_of(config, name).config.varying_weights:
            table, slots = variables["memory"][of.table]["values"], jnp.asarray(of.slots)
            rows = np.asarray(take_rows(table, slots, jnp.dtype(jnp.float32)))
            with np.errstate(over="ignore"):  # a row of huge numbers is as long as one that is not finite
                found[name] = np.linalg.norm(rows, axis=-1)
    return found


def strongest_slots(trace: Trace, by: Mapping[str, np.ndarray], most: int) -> dict[str, list[int]]:
    """Returns up to `most` slots that a text reads, by table: those of the strongest reads.

    The strongest read of every token, memory and head comes before any second one. Memories take turns,
    because their strengths do not compare: some are weights, and some lengths of rows.

    Args:
        trace: the trace of the text.
        by: the result of `strengths`.
        most: number of slots.
    """
    found: dict[str, dict[int, None]] = {of.table: {} for of in trace.memories.values()}
    tables = [of.table for of in trace.memories.values()]
    by_rank = [_slots_by_rank(of.slots, by[name], len(of.heads)) for name, of in trace.memories.items()]
    number = 0
    for ranks in itertools.zip_longest(*by_rank, fillvalue=()):
        for turn in itertools.zip_longest(*ranks):
            for table, slot in zip(tables, turn, strict=True):
                if slot is None or slot in found[table]:
                    continue
                if number == most:
                    return {table: list(slots) for table, slots in found.items()}
                found[table][slot] = None
                number += 1
    return {table: list(slots) for table, slots in found.items()}


def _slots_by_rank(slots: np.ndarray, by: np.ndarray, heads: int) -> list[list[int]]:
    """Returns the slots (S, R) of a memory by their rank within token and head, the strongest first."""
    strength = strength_of(by).reshape(len(by), heads, -1)
    ranks = np.argsort(np.argsort(-strength, axis=2, kind="stable"), axis=2)
    order = np.lexsort((-strength.reshape(-1), ranks.reshape(-1)))
    by_rank: list[list[int]] = slots.reshape(-1)[order].reshape(strength.shape[2], -1).tolist()
    return by_rank


def strength_of(by: np.ndarray) -> np.ndarray:
    """Returns absolute strengths, by which reads are sorted; what is not a number counts as infinite."""
    return np.nan_to_num(np.abs(by), nan=np.inf, posinf=np.inf)


def strongest_reads(
    config: ModelConfig, trace: Trace, by: Mapping[str, np.ndarray]
) -> dict[str, dict[int, Way]]:
    """Returns the strongest read of every slot that a text reads, over all memories, by table.

    Args:
        config: the model's config.
        trace: the trace of the text.
        by: the result of `strengths`.
    """
    found = {}
    for table, readers in table_readers(config).items():
        parts = [trace.memories[site.name] for site in readers]
        names = np.repeat([site.name for site in readers], [of.slots.size for of in parts])
        slots = np.concatenate([of.slots.reshape(-1) for of in parts])
        blocks = np.concatenate([of.blocks.reshape(-1) for of in parts])
        weights = np.concatenate([of.weights.reshape(of.slots.size, -1) for of in parts])
        strength = strength_of(np.concatenate([by[site.name].reshape(-1) for site in readers]))
        order = np.argsort(-strength, kind="stable")
        read, first = np.unique(slots[order], return_index=True)
        found[table] = {
            slot: Way(str(names[i]), int(blocks[i]), weights[i])
            for slot, i in zip(read.tolist(), order[first], strict=True)
        }
    return found


def ways_of(
    config: ModelConfig,
    slots: Mapping[str, Iterable[int]],
    in_text: Mapping[str, Mapping[int, Way]],
    corpus: CorpusReads | None,
) -> dict[str, dict[int, Way | None]]:
    """Returns how each of some slots is read, by table.

    It is the strongest read by the text, else that by the corpus, else the only way in which the slot can be
    read, with weights of ones. It is None if there are several ways and none is known.

    Args:
        config: the model's config.
        slots: slots of each table.
        in_text: the result of `strongest_reads`.
        corpus: the result of `corpus_pass`; None without a corpus.
    """
    readers = table_readers(config)
    found: dict[str, dict[int, Way | None]] = {}
    for table, of_table in slots.items():
        reads = corpus.tables[table] if corpus is not None else None
        found[table] = {
            slot: in_text[table].get(slot) or _way_in_corpus(reads, slot) or _only_way(readers[table], slot)
            for slot in of_table
        }
    return found


def _way_in_corpus(reads: TableReads | None, slot: int) -> Way | None:
    """Returns the strongest read of a slot by a corpus; None if its contexts have none."""
    if reads is None:
        return None
    kept = reads.contexts
    row = kept.row_of(slot)
    if row is None or not kept.counts[row]:
        return None
    return Way(reads.memories[kept.memories[row, 0]], int(kept.blocks[row, 0]), kept.weights[row, 0])


def _only_way(sites: tuple[MemorySite, ...], slot: int) -> Way | None:
    """Returns how the first memory whose window holds a slot reads it; None if its block is not known."""
    for site in sites:
        if (slot - site.window.first) % site.num_slots < site.window.size:
            block = only_block(site, slot)
            return None if block is None else Way(site.name, block, None)
    return None


def only_block(site: MemorySite, slot: int) -> int | None:
    """Returns the block in which a memory reads a slot, if it reads it in a single one; else None."""
    if site.config.num_blocks == 1:
        return 0
    # Where reads stay apart, each one has rows of its own.
    head_rows = getattr(site.config.address, "head_rows", None)
    if not site.config.reads_apart or head_rows is None:
        return None
    rows = head_rows(site)
    block = int(np.searchsorted(np.cumsum(rows), slot, side="right"))
    return block if block < len(rows) else None
