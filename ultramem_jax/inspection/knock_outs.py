"""Measures what a text costs a model without some slots: the loss as if their rows were zero.

No table is changed or copied. Where a read takes one of the slots, its weight is set to zero on the way to
the lookup, or its row is set to zero after it where the readout gets every row apart. Either gives the sums
that a table with zeros in these rows gives, if the rows are finite: 0 · NaN stays NaN, and such a row has to
be edited instead. So a knock-out costs one pass over the text, and several knock-outs of the same text are
sequences of one batch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.data import Tokenizer
from ultramem_jax.errors import at_least, require, whole_number
from ultramem_jax.inspection.names import checked_slots, require_memories, slots_by_table, table_of
from ultramem_jax.inspection.tracing import encoded, token_losses
from ultramem_jax.layers.memory.table import Table
from ultramem_jax.models import Transformer
from ultramem_jax.models.scoring import LOGITS_BYTES
from ultramem_jax.tree_types import Variables

_NOWHERE = -1
"""Number that is no slot, and pads shorter lists of slots."""


class KnockOut(NamedTuple):
    """Holds the losses of a text, in nats per token. The first token of a text has none: NaN."""

    ids: np.ndarray
    """(S,) int32, tokens of the text."""
    losses: np.ndarray
    """(S,) float32, losses with all slots."""
    without: np.ndarray
    """(S,) float32, losses without the slots that were knocked out."""
    slots: dict[str, np.ndarray]
    """Table -> slots that were knocked out, rising, of the tables that have some."""

    @property
    def effect(self) -> float:
        """Returns the mean of what the loss of a token rises by without the slots."""
        return float((self.without - self.losses)[1:].mean(dtype=np.float64))

    def in_words(self) -> str:
        """Returns the mean loss with and without the slots, as a phrase."""
        before, after = (float(of[1:].mean(dtype=np.float64)) for of in (self.losses, self.without))
        return change_in_words(before, after)


def change_in_words(before: float, after: float) -> str:
    """Returns two mean losses, in nats per token, as a phrase with their difference."""
    return f"{before:.4f} -> {after:.4f} nats per token ({after - before:+.2g})"


def knock_out(
    config: ModelConfig,
    variables: Variables,
    tokenizer: Tokenizer,
    text: str | bytes,
    slots: Mapping[str, Iterable[int]],
) -> KnockOut:
    """Returns the losses of a text with all slots, and without some of them together.

    Args:
        config: the model's config.
        variables: its `params`, `memory` and `buffers`, which stay as they are.
        tokenizer: its tokenizer.
        text: the text, as for `trace`.
        slots: rows to knock out, by the name of a table or of a memory that reads it. Rows of a shared table
            are missing for all memories that read it.

    Raises:
        UserError: an unknown memory, or a slot that its table does not have; else as `trace`.
    """
    require_memories(config)
    nothing = {site.table: np.empty(0, np.int32) for site in config.sites}
    gone = slots_by_table(config, slots)
    of_tables = nothing | gone
    ids = encoded(config, tokenizer, text)
    # One program serves all lists of slots up to a power of two.
    size = 1 << max(max(map(len, of_tables.values())) - 1, 0).bit_length()
    knocked = {table: np.full((2, size), _NOWHERE, np.int32) for table in of_tables}
    for table, rows in of_tables.items():
        knocked[table][1, : len(rows)] = rows
    losses = np.asarray(_losses_without(config, variables, np.stack([ids, ids]), knocked))
    return KnockOut(ids, losses[0], losses[1], gone)


def knock_out_each(
    config: ModelConfig,
    variables: Variables,
    tokenizer: Tokenizer,
    text: str | bytes,
    slots: Sequence[tuple[str, int]],
    *,
    batch_size: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the losses of a text with all slots, and without each of several ones, one at a time.

    Args:
        config: the model's config.
        variables: its `params`, `memory` and `buffers`, which stay as they are.
        tokenizer: its tokenizer.
        text: the text, as for `trace`.
        slots: table or memory, and row, of each slot.
        batch_size: slots whose losses are computed together; None is 8, or fewer where their logits would
            take more than 256 MiB.
        progress: called with the number of slots after each batch.

    Returns:
        Losses (S,) and (n, S) float32. One program computes both, so that a slot without an effect has none.

    Raises:
        UserError: as for `knock_out`; `batch_size` is below 1.
    """
    require_memories(config)
    if batch_size is not None:
        at_least(1, batch_size=batch_size)
    checked = [
        (table := table_of(config, name), checked_slots(config, table, [row])[0]) for name, row in slots
    ]
    ids = encoded(config, tokenizer, text)
    if batch_size is None:
        batch_size = min(max(LOGITS_BYTES // (4 * config.vocab_size * len(ids)), 1), 8)
    tables = sorted({site.table for site in config.sites})
    tokens = np.broadcast_to(ids, (batch_size, len(ids)))
    # The first sequence has all slots.
    sequences = [(tables[0], _NOWHERE), *checked]
    losses = np.empty((len(sequences), len(ids)), np.float32)
    for first in range(0, len(sequences), batch_size):
        part = sequences[first : first + batch_size]
        knocked = {table: np.full((batch_size, 1), _NOWHERE, np.int32) for table in tables}
        for sequence, (table, row) in enumerate(part):
            knocked[table][sequence] = row
        found = _losses_without(config, variables, tokens, knocked)
        losses[first : first + len(part)] = np.asarray(found)[: len(part)]
        if progress is not None:
            progress(len(part) - (first == 0))
    return losses[0], losses[1:]


@partial(jax.jit, static_argnums=0)
def _losses_without(
    config: ModelConfig, variables: Variables, tokens: jax.Array, knocked: dict[str, jax.Array]
) -> jax.Array:
    """Returns the losses of tokens (B, S), each sequence without its own slots (B, K) of each table."""

    def without(
        next_function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
    ) -> Any:
        table = context.module
        if not isinstance(table, Table) or context.method_name != "__call__":
            return next_function(*args, **kwargs)
        if table.site.table not in knocked:
            return next_function(*args, **kwargs)
        reads, *rest = args
        rows = jnp.repeat(knocked[table.site.table], tokens.shape[1], axis=0)  # (T, K)
        gone = (reads.slots[:, :, None] == rows[:, None, :]).any(-1)
        if table.site.config.reads_apart:
            pooled = next_function(*args, **kwargs)
            return jnp.where(gone[..., None], jnp.zeros((), pooled.dtype), pooled)
        weights = jnp.where(gone[..., None], jnp.zeros((), reads.weights.dtype), reads.weights)
        return next_function(reads._replace(weights=weights), *rest, **kwargs)

    with nn.intercept_methods(without):
        logits: Any = Transformer(config).apply(variables, tokens)
    return token_losses(logits, tokens)


def parse_slots(config: ModelConfig, field: str, entries: Iterable[str]) -> dict[str, list[int]]:
    """Returns table -> slots from entries such as `ultramem_0:123`.

    Args:
        config: the model's config.
        field: name of the flag, for messages.
        entries: memory or table, a colon, and the number of a row.

    Raises:
        UserError: an entry of another form, an unknown memory, or a slot that its table does not have.
    """
    found: dict[str, list[int]] = {}
    for entry in entries:
        name, colon, slot = entry.rpartition(":")
        number = whole_number(slot)
        form = f"must be MEMORY:SLOT, such as {config.sites[0].name}:0"
        require(bool(colon) and number is not None, field, entry, form)
        table = table_of(config, name)
        found.setdefault(table, []).append(int(checked_slots(config, table, [number or 0])[0]))
    return found
