"""Finds the slots whose rows are nearest to those of given slots, by cosine, over whole tables."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.model import table_readers
from ultramem_jax.errors import at_least
from ultramem_jax.inspection.names import checked_slots, table_of
from ultramem_jax.ops.rows import take_rows
from ultramem_jax.tree_types import Variables

_CHUNK_NUMBERS = 1 << 22
"""Most float32 numbers of a chunk of rows, or of its cosines with all given slots: 16 MiB."""


def nearest_slots(
    config: ModelConfig,
    variables: Variables,
    memory: str,
    slots: np.ndarray | list[int],
    k: int = 8,
    *,
    progress: Callable[[int], object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k slots whose values have the largest cosine with those of each given slot.

    The table is read once, in chunks: only a chunk is decoded to float32 at a time.

    Args:
        config: the model's config.
        variables: its `params`, `memory` and `buffers`.
        memory: name of a table, or of a memory that reads it.
        slots: (n,) rows of the table.
        k: neighbours of each slot, which is none of its own.
        progress: called with the number of rows after each chunk.

    Returns:
        Slots (n, k) int32, nearest first, and their cosines (n, k) float32. The cosine with a row of zeros is
        zero. In a table of fewer rows k is smaller.

    Raises:
        UserError: an unknown memory or slot.
    """
    name = table_of(config, memory)
    slots = checked_slots(config, name, np.asarray(slots))
    at_least(1, k=k)
    table, num_slots = variables["memory"][name]["values"], table_readers(config)[name][0].num_slots
    k = min(k, num_slots - 1)
    given = _unit(np.asarray(_chunk(table, jnp.asarray(slots))))
    size = max(min(_CHUNK_NUMBERS // max(given.shape[1], len(slots), 1), num_slots), 1)
    ids = np.full((len(slots), k), -1, np.int32)
    cosines = np.full((len(slots), k), -np.inf, np.float32)
    for first in range(0, num_slots, size):
        # The last chunk starts early enough to be a whole one, so that one program serves all chunks.
        start = min(first, num_slots - size)
        rows = np.asarray(_chunk(table, start + jnp.arange(size, dtype=jnp.int32)))[first - start :]
        found = given @ _unit(rows).T  # (n, chunk)
        for of_slot, slot in enumerate(slots):
            near = np.flatnonzero(found[of_slot] > cosines[of_slot, -1]) if k else np.empty(0, np.int64)
            near = near[near + first != slot]
            if len(near) > k:
                near = np.sort(near[np.argpartition(-found[of_slot, near], k - 1)[:k]])
            together = np.concatenate([cosines[of_slot], found[of_slot, near]])
            which = np.concatenate([ids[of_slot], (near + first).astype(np.int32)])
            order = np.argsort(-together, kind="stable")[:k]
            ids[of_slot], cosines[of_slot] = which[order], together[order]
        if progress is not None:
            progress(len(rows))
    return ids, cosines


@jax.jit
def _chunk(table: jax.Array, slots: jax.Array) -> jax.Array:
    return take_rows(table, slots, jnp.dtype(jnp.float32))


def _unit(rows: np.ndarray) -> np.ndarray:
    """Returns rows (n, d) float32 with length one; rows of zeros stay zeros."""
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]
    unit: np.ndarray = rows / np.where(lengths > 0, lengths, np.float32(1))
    return unit
