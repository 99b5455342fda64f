"""Reads a corpus once and keeps what can be shown of it: counts of reads, and contexts of chosen slots.

What is kept grows with a table only by a count per slot. Everything else has a fixed size: k contexts, and a
number of n-grams, of each chosen slot. The slots that are read most are not known before the end. So the pass
also follows the slots that lead at the time, several times as many as it returns; the contexts and n-grams of
a slot that begins to lead late are those from then on.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.config.model import table_readers
from ultramem_jax.errors import at_least, require
from ultramem_jax.inspection.contexts import Contexts, Found
from ultramem_jax.inspection.names import order_of_reads, require_memories, slots_by_table
from ultramem_jax.inspection.ngrams import SharedRows
from ultramem_jax.inspection.tracing import Reads, reads_of
from ultramem_jax.inspection.usage import most_read
from ultramem_jax.tree_types import Variables

_LEADERS_PER_MOST_READ = 8
"""Leading slots whose contexts are kept, for each slot that is returned as one of those read most."""


@dataclass(frozen=True)
class TableReads:
    """Holds how a corpus reads one table."""

    counts: np.ndarray
    """(N,) int64, reads of every slot."""
    contexts: Contexts
    """Strongest reads of the chosen slots, and of those that lead at the end."""
    ngrams: SharedRows | None
    """N-grams of the slots that `contexts` has, if tokens address the table."""
    memories: tuple[str, ...]
    """Names of the memories that read the table, to which `contexts.memories` refers."""
    most_read: np.ndarray
    """(m,) slots that are read most, most first."""


@dataclass(frozen=True)
class CorpusReads:
    """Holds how a corpus reads all tables of a model."""

    tables: dict[str, TableReads]
    num_tokens: int
    """Tokens that were read, without padding."""


def corpus_pass(
    config: ModelConfig,
    variables: Variables,
    batches: Iterable[np.ndarray],
    slots: Mapping[str, Iterable[int]] | None = None,
    k: int = 6,
    *,
    most: int = 16,
    ngrams: int = 24,
    before: int = 48,
    after: int = 24,
    progress: Callable[[int], object] | None = None,
) -> CorpusReads:
    """Reads a corpus once.

    Args:
        config: the model's config.
        variables: its `params`, `memory` and `buffers`.
        batches: token ids (B, S) int32 of one shape; -1 is padding, after the tokens of a sequence.
        slots: the chosen slots, by the name of a table or of a memory that reads it.
        k: contexts of each slot, those whose reads have the largest absolute mean weight.
        most: slots of each table to return as those that are read most.
        ngrams: most frequent n-grams to return of each slot.
        before: tokens of a context before the one that reads.
        after: tokens of a context after it.
        progress: called with the number of tokens after each batch.

    Raises:
        UserError: the model has no memory, there is no batch, or a slot is in no table.
    """
    require_memories(config)
    at_least(1, k=k, most=most, ngrams=ngrams)
    at_least(0, before=before, after=after)
    readers = table_readers(config)
    given = slots_by_table(config, slots or {})
    chosen = {table: given.get(table, np.empty(0)).astype(np.int64) for table in readers}
    passes = {
        table: _TablePass(sites, chosen[table], k, most, ngrams, (before, after))
        for table, sites in readers.items()
    }
    num_tokens = num_batches = 0
    for batch in batches:
        tokens = np.asarray(batch, np.int32)
        reads = reads_of(config, variables, np.maximum(tokens, 0))
        for table_pass in passes.values():
            table_pass.add(reads, tokens)
        there = int((tokens >= 0).sum())
        num_tokens, num_batches = num_tokens + there, num_batches + 1
        if progress is not None:
            progress(there)
    require(num_batches > 0, "batches", num_batches, "must be at least 1")
    return CorpusReads({table: of.result() for table, of in passes.items()}, num_tokens)


class _TablePass:
    """Collects the reads of one table."""

    def __init__(
        self,
        sites: tuple[MemorySite, ...],
        chosen: np.ndarray,
        k: int,
        most: int,
        ngrams: int,
        around: tuple[int, int],
    ):
        self._sites, self._chosen, self._most = sites, chosen, most
        self._counts = np.zeros(sites[0].num_slots, np.int64)
        self._leaders = np.empty(0, np.int64)
        weights = sites[0].config.address.weights_per_read
        self._contexts = Contexts(chosen, k, *around, weights)
        self._ngrams = SharedRows(chosen, ngrams) if sites[0].config.address.reads_tokens else None

    def add(self, reads: Reads, tokens: np.ndarray) -> None:
        """Adds the reads of a batch (B, S)."""
        there = tokens.reshape(-1) >= 0
        parts = [self._found(reads, number, there) for number in range(len(self._sites))]
        found = Found(*map(np.concatenate, zip(*parts, strict=True)))
        self._count(found.slots)
        tracked = np.union1d(self._chosen, self._leaders)
        self._contexts.track(tracked)
        self._contexts.add(found, tokens)
        if self._ngrams is not None:
            self._ngrams.track(tracked)
            for site, part in zip(self._sites, parts, strict=True):
                self._ngrams.add(part, order_of_reads(site), tokens)

    def _found(self, reads: Reads, number: int, there: np.ndarray) -> Found:
        """Returns the reads of one memory by the tokens (T,) that are no padding."""
        of_memory = reads[self._sites[number].name]
        slots, blocks, weights = (np.asarray(of_memory[name]) for name in ("slots", "blocks", "weights"))
        (positions,) = np.nonzero(there)
        per_token = slots.shape[1]
        weights = weights[there].reshape(-1, weights.shape[2]).astype(np.float32)
        return Found(
            slots=slots[there].reshape(-1).astype(np.int64),
            scores=weights.mean(1),
            positions=np.repeat(positions, per_token),
            memories=np.full(len(weights), number, np.int32),
            reads=np.tile(np.arange(per_token, dtype=np.int32), len(positions)),
            blocks=blocks[there].reshape(-1).astype(np.int32),
            weights=weights,
        )

    def _count(self, slots: np.ndarray) -> None:
        """Counts reads, and finds the slots that lead: only a slot that was read can overtake another."""
        read, times = np.unique(slots, return_counts=True)
        self._counts[read] += times
        candidates = np.union1d(self._leaders, read)
        leading = most_read(self._counts[candidates], _LEADERS_PER_MOST_READ * self._most)
        self._leaders = np.sort(candidates[leading])

    def result(self) -> TableReads:
        """Returns what was collected."""
        names = tuple(site.name for site in self._sites)
        order = most_read(self._counts[self._leaders], self._most)
        return TableReads(self._counts, self._contexts, self._ngrams, names, self._leaders[order])
