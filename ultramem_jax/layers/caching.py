"""Describes new tokens to layers that have earlier tokens in a cache.

A cache has U cache positions per sequence. All sequences of a batch fill them together: a chunk of C tokens
takes the next C cache positions of every sequence, so it is written at once. If a sequence has fewer tokens
than the chunk, the remaining cache positions stay hidden from its attention for good. So a cache position
tells when a token came. It is not the token's position, which each sequence counts for itself.

The layers keep their parts in the collection `cache`. Attention keeps its `keys` and `values` (B·A_kv, U, d)
in the cache's dtype. A memory with a query convolution of w taps keeps the last w - 1 `query_inputs`
(B, w - 1, D) in the computation's dtype. Sequences and heads are one axis, also in products with keys and
values: if the shapes of a write and a product differ, even by an axis B of size one, XLA on CPU copies the
cache four times.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

CACHE = "cache"
"""Name of the collection in which layers keep what they need of earlier tokens."""


class Chunk(NamedTuple):
    """Describes the new tokens (B, C) of a batch: `counts` tokens per sequence, then padding."""

    counts: jax.Array
    """(B,) int32 in [0, C], number of tokens of each sequence; the rest of the chunk is padding."""
    positions: jax.Array
    """(B, C) int32, position of each token in its sequence."""
    first: jax.Array
    """() int32, cache position of the chunk's first token."""
    visible: jax.Array
    """(B, C, U) bool, True at the cache positions that each token sees, its own included."""


def next_chunk(
    visible: jax.Array, lengths: jax.Array, used: jax.Array, counts: jax.Array, size: int
) -> tuple[Chunk, jax.Array]:
    """Returns the next chunk of `size` cache positions, and the cache positions that then hold a token.

    The caller must ensure used + size <= U.

    Args:
        visible: (B, U) bool, cache positions that hold a token so far.
        lengths: (B,) int32, number of tokens of each sequence so far.
        used: () int32, number of cache positions taken so far.
        counts: (B,) int32 in [0, size], number of tokens of each sequence in the chunk.
        size: C.

    Returns:
        The chunk, and (B, U) bool, True at the cache positions that hold a token once it is written.
    """
    offsets = jnp.arange(size, dtype=jnp.int32)[None]
    places = jnp.arange(visible.shape[1], dtype=jnp.int32)[None, None]
    within = offsets < counts[:, None]
    visible = jax.lax.dynamic_update_slice(visible, within, (0, used))
    seen = visible[:, None] & (places <= used + offsets[:, :, None])
    return Chunk(counts, lengths[:, None] + offsets, used, seen), visible


def append(cached: jax.Array, new: jax.Array, first: jax.Array) -> jax.Array:
    """Writes new keys or values (B, C, A_kv, d) to cached ones (B·A_kv, U, d), at cache position `first`."""
    new = new.swapaxes(1, 2).reshape(cached.shape[0], -1, cached.shape[2])
    return jax.lax.dynamic_update_slice(cached, new.astype(cached.dtype), (0, first, 0))


def last_tokens(sequence: jax.Array, counts: jax.Array, kept: int) -> jax.Array:
    """Returns each sequence's last `kept` tokens, without the chunk's padding.

    Args:
        sequence: (B, kept + C, D), the tokens kept before, followed by the chunk.
        counts: (B,) int32, number of tokens of each sequence in the chunk.
        kept: number of tokens to keep.

    Returns:
        (B, kept, D).
    """
    index = counts[:, None] + jnp.arange(kept, dtype=jnp.int32)[None]
    return jnp.take_along_axis(sequence, index[:, :, None], axis=1, mode="promise_in_bounds")
