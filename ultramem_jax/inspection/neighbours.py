"""Finds the slots whose rows are nearest to those of given slots, by cosine, over whole tables."""

from collections.abc import Callable
from functools import partial

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
        zero, and with a row that is not finite -inf. In a table of fewer rows k is smaller.

    Raises:
        UserError: an unknown memory or slot.
    """
    name = table_of(config, memory)
    slots = checked_slots(config, name, np.asarray(slots))
    at_least(1, k=k)
    table, num_slots = variables["memory"][name]["values"], table_readers(config)[name][0].num_slots
    k = min(k, num_slots - 1)
    own = jnp.asarray(slots)
    given = _unit_rows(table, own)
    size = max(min(_CHUNK_NUMBERS // max(given.shape[1], len(slots), 1), num_slots), 1)
    ids, cosines = np.zeros((len(slots), 0), np.int32), np.zeros((len(slots), 0), np.float32)
    for first in range(0, num_slots, size):
        # The last chunk starts early enough to be a whole one, so that one program serves all chunks.
        start = min(first, num_slots - size)
        found = _nearest_of_chunk(table, given, own, start, first, size, min(k, size))
        together = np.concatenate([cosines, found[0]], axis=1)
        which = np.concatenate([ids, found[1]], axis=1)
        order = np.argsort(-together, axis=1, kind="stable")[:, :k]
        ids, cosines = (np.take_along_axis(of, order, axis=1) for of in (which, together))
        if progress is not None:
            progress(min(size, num_slots - first))
    return ids, cosines


@partial(jax.jit, static_argnums=(5, 6))
def _nearest_of_chunk(
    table: jax.Array, given: jax.Array, own: jax.Array, start: jax.Array, first: jax.Array, size: int, k: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the largest cosines (n, k) of rows with those of a chunk, and the slots of these.

    Args:
        table: (N, d) values.
        given: (n, d) float32 rows of length one.
        own: (n,) their slots, whose cosines are -inf.
        start: first slot of the chunk.
        first: first slot that counts; cosines of those before it are -inf.
        size: slots of the chunk.
        k: cosines to return.
    """
    slots = start + jnp.arange(size, dtype=jnp.int32)
    cosines = given @ _unit_rows(table, slots).T
    counts = (slots >= first)[None] & (slots[None] != own[:, None]) & jnp.isfinite(cosines)
    values, places = jax.lax.top_k(jnp.where(counts, cosines, -jnp.inf), k)
    return values, slots[places]


@jax.jit
def _unit_rows(table: jax.Array, slots: jax.Array) -> jax.Array:
    """Returns rows (n, d) in float32 with length one; rows of zeros stay zeros."""
    rows = take_rows(table, slots, jnp.dtype(jnp.float32))
    lengths = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(lengths > 0, lengths, 1)
