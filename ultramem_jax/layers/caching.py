"""What layers know of the tokens at hand when earlier ones are in a cache.

A cache has U places per sequence, which all sequences of a batch fill together: a chunk of C tokens takes the
next C places of every sequence, so it is written as one block. Where a sequence has fewer tokens than the
chunk, the places left over are hidden from its attention for good. So a place says when a token came, and not
its position, which each sequence counts for itself.

The layers keep their parts in the collection `cache`: attention its `keys` and `values` (B·A_kv, U, d) of
the cache's dtype, a memory with a query convolution of w taps the last w - 1 `query_inputs` (B, w - 1, D) of
the computation's dtype. Sequences and heads are one axis, in products with keys and values too: for a write
and a product of unlike shapes, if only by an axis B of one, XLA on CPU copies the cache four times.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

CACHE = "cache"
"""Name of the collection."""


class Chunk(NamedTuple):
    """The new tokens (B, C) of a batch. Of a sequence the first `counts` are tokens, the rest is filling."""

    counts: jax.Array
    """(B,) int32 in [0, C]."""
    positions: jax.Array
    """(B, C) int32, of each token in its sequence."""
    first: jax.Array
    """() int32, the place of the first one in the cache."""
    visible: jax.Array
    """(B, C, U) bool: the places that each token sees, its own among them."""


def next_chunk(
    visible: jax.Array, lengths: jax.Array, used: jax.Array, counts: jax.Array, size: int
) -> tuple[Chunk, jax.Array]:
    """The chunk of `size` places that follows, and which places hold a token once it is written.

    Args:
        visible: (B, U) bool, places that hold a token so far.
        lengths: (B,) int32, tokens of each sequence so far.
        used: () int32, places taken so far; used + size <= U is the caller's to see to.
        counts: (B,) int32 in [0, size], tokens of each sequence in the chunk.
        size: C.

    Returns:
        The chunk and (B, U) bool.
    """
    offsets = jnp.arange(size, dtype=jnp.int32)[None]
    places = jnp.arange(visible.shape[1], dtype=jnp.int32)[None, None]
    within = offsets < counts[:, None]
    visible = jax.lax.dynamic_update_slice(visible, within, (0, used))
    seen = visible[:, None] & (places <= used + offsets[:, :, None])
    return Chunk(counts, lengths[:, None] + offsets, used, seen), visible


def append(cached: jax.Array, new: jax.Array, first: jax.Array) -> jax.Array:
    """Cached keys or values (B·A_kv, U, d) with new ones (B, C, A_kv, d) written from place `first` on."""
    new = new.swapaxes(1, 2).reshape(cached.shape[0], -1, cached.shape[2])
    return jax.lax.dynamic_update_slice(cached, new.astype(cached.dtype), (0, first, 0))


def last_tokens(sequence: jax.Array, counts: jax.Array, kept: int) -> jax.Array:
    """The `kept` tokens up to each sequence's own end: (B, kept + C, D) -> (B, kept, D).

    Args:
        sequence: the tokens kept before and the chunk, one after the other.
        counts: (B,) int32, tokens in the chunk.
        kept: how many.
    """
    index = counts[:, None] + jnp.arange(kept, dtype=jnp.int32)[None]
    return jnp.take_along_axis(sequence, index[:, :, None], axis=1, mode="promise_in_bounds")
