"""Works on tokens chunk by chunk, so that temporary arrays do not grow with the number of tokens."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from ultramem_jax.ops.algorithms import algorithms

Result = TypeVar("Result")
"""A pytree of arrays."""
Total = TypeVar("Total")
"""A pytree of arrays that are sums over tokens."""


def map_chunks(function: Callable[..., Result], values_per_token: int, *arrays: jax.Array) -> Result:
    """Computes `function(*arrays)` by chunks of tokens.

    A token's result must depend only on that token.

    Args:
        function: maps arrays (T, ...) to a tree of arrays (T, ...), for any T.
        values_per_token: number of temporary values that `function` holds for a token.
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
    function: Callable[..., Result],
    start: Result,
    values_per_token: int,
    *arrays: jax.Array,
    up_to: jax.Array | None = None,
) -> Result:
    """Computes `function(start, *arrays)` by chunks of tokens; `function` adds each token's part to `start`.

    Args:
        function: maps the total so far and arrays (T, ...), for any T, to the new total.
        start: a tree of arrays; changed in place.
        values_per_token: number of temporary values that `function` holds for a token.
        *arrays: (T, ...) each.
        up_to: () int32, number of tokens that are needed. Later tokens may be left out, but need not be. None
            for all.
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


def scan_chunks(
    function: Callable[..., tuple[Total, Result]],
    start: Total,
    values_per_token: int,
    *arrays: jax.Array,
) -> tuple[Total, Result]:
    """Computes what `fold_chunks` and `map_chunks` compute, for a function that gives both.

    Args:
        function: maps the total so far and arrays (T, ...), for any T, to the new total and a tree of arrays
            (T, ...).
        start: a tree of arrays.
        values_per_token: number of temporary values that `function` holds for a token.
        *arrays: (T, ...) each.
    """
    tokens = arrays[0].shape[0]
    chunk = chunk_tokens(values_per_token)
    if tokens <= chunk:
        return function(start, *arrays)
    count = tokens // chunk
    numbers = jnp.arange(count, dtype=jnp.int32)
    total, mapped = jax.lax.scan(
        lambda total, i: function(total, *_chunk(arrays, i * chunk, chunk)), start, numbers
    )
    mapped = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), mapped)
    if count * chunk == tokens:
        return total, mapped
    total, rest = function(total, *(a[count * chunk :] for a in arrays))
    return total, jax.tree.map(lambda *parts: jnp.concatenate(parts), mapped, rest)


def chunk_tokens(values_per_token: int) -> int:
    """Returns the number of tokens of a chunk."""
    return max(algorithms().chunk_values // values_per_token, 1)


def _chunk(arrays: tuple[jax.Array, ...], first: jax.Array, size: int) -> tuple[jax.Array, ...]:
    # The loop cuts chunks out of the arrays. Arrays that are no multiple of a chunk would have to be copied
    # if all chunks were cut beforehand.
    return tuple(jax.lax.dynamic_slice_in_dim(a, first, size) for a in arrays)
