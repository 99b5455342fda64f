"""Work on tokens chunk by chunk, so that what it needs in between does not grow with their number."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_CHUNK_VALUES = 1 << 22
"""Values in flight at a time (16 MB of float32). On CPU they stay in the cache and are paged in once; on an
accelerator they are still enough to fill it."""


def map_chunks(function: Callable[..., Any], values_per_token: int, *arrays: jax.Array) -> Any:
    """`function(*arrays)`, whose result for a token depends on that token alone, by chunks of tokens.

    Args:
        function: of arrays (T, ...) to a tree of arrays (T, ...), for any T.
        values_per_token: how much it holds for a token while it works.
        *arrays: (T, ...) each.
    """
    tokens = arrays[0].shape[0]
    chunk = chunk_tokens(values_per_token)
    if tokens <= chunk:
        return function(*arrays)
    count = tokens // chunk
    mapped = jax.lax.map(
        lambda i: function(*_chunk(arrays, i * chunk, chunk)), jnp.arange(count, dtype=jnp.int32)
    )
    mapped = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), mapped)
    if count * chunk == tokens:
        return mapped
    rest = function(*(a[count * chunk :] for a in arrays))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), mapped, rest)


def fold_chunks(
    function: Callable[..., Any],
    start: Any,
    values_per_token: int,
    *arrays: jax.Array,
    up_to: jax.Array | None = None,
) -> Any:
    """`function(start, *arrays)`, which adds something of every token to `start`, by chunks of tokens.

    Args:
        function: of what there is so far and arrays (T, ...), for any T, to what there is then.
        start: a tree of arrays; changed in place.
        values_per_token: how much `function` holds for a token while it works.
        *arrays: (T, ...) each.
        up_to: () int32, tokens from this one on need not be worked on, but may be; None for all.
    """
    tokens = arrays[0].shape[0]
    chunk = chunk_tokens(values_per_token)
    if tokens <= chunk:
        return function(start, *arrays)
    count = tokens // chunk
    last = count if up_to is None else jnp.minimum(-(-up_to // chunk), count)
    done = jax.lax.fori_loop(
        0, last, lambda i, carry: function(carry, *_chunk(arrays, i * chunk, chunk)), start
    )
    return done if count * chunk == tokens else function(done, *(a[count * chunk :] for a in arrays))


def chunk_tokens(values_per_token: int) -> int:
    """Tokens of a chunk."""
    return max(_CHUNK_VALUES // values_per_token, 1)


def _chunk(arrays: tuple[jax.Array, ...], first: jax.Array, size: int) -> tuple[jax.Array, ...]:
    # Cut out inside the loop: cutting the arrays into chunks beforehand would copy those with a rest.
    return tuple(jax.lax.dynamic_slice_in_dim(a, first, size) for a in arrays)
