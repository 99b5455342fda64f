"""Selects the k largest of n values without sorting them, by counting: for GPUs and TPUs.

There `jax.lax.top_k` of more than a few values sorts the whole row, with the positions beside it. Here the
rank of a value is the number of values that are larger. That is a sum of comparisons. It takes one pass and
moves no data. Counting takes n² comparisons, so a long row is first cut into about 4·k tiles. The k tiles of
the largest maxima hold the k largest values. They are cut again until 4·k values are left.

Values lie along the last axis but one, and tokens along the last. So all work is on whole vectors of tokens,
however few the values are.
"""

import math

import jax
import jax.numpy as jnp

from ultramem_jax.ops.algorithms import algorithms

_TILES = 4
"""Tiles per value that is selected. A row of 2,200 with k 42 is then cut into 158 tiles, then 147, and 168
values are left: 74,000 comparisons a row, where sorting it takes 160,000 and moves it each time."""
_LOWEST = jnp.iinfo(jnp.int32).min


def largest(x: jax.Array, k: int) -> jax.Array:
    """Returns the positions of the k largest values, in the order of `jax.lax.top_k`, also for NaN and ties.

    Args:
        x: (..., n, T), float32, bfloat16, float16, or integers of at most 32 bits.
        k: from 0 to n.

    Returns:
        (..., k, T) int32, the largest value's first; of equal values the first one's.
    """
    if k == 0:
        return jnp.zeros((*x.shape[:-2], 0, x.shape[-1]), jnp.int32)
    return _largest(_ordered(x), k)


def pick(values: jax.Array, positions: jax.Array) -> jax.Array:
    """Takes the entries of values (..., n, T) at positions (..., k, T) int32 -> (..., k, T), to the bit."""
    if algorithms().picks == "gather":
        return jnp.take_along_axis(values, positions, axis=-2, mode="promise_in_bounds")
    # As integers: a sum of floats would lose subnormals, and the sign of zero.
    bits = jnp.dtype(f"uint{8 * values.dtype.itemsize}")
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return pick_with_gradient(values, positions)
    taken = pick_with_gradient(jax.lax.bitcast_convert_type(values, bits), positions)
    return jax.lax.bitcast_convert_type(taken.astype(bits), values.dtype)


def pick_with_gradient(values: jax.Array, positions: jax.Array) -> jax.Array:
    """Does what `pick` does, by comparing: so the derivative by the values is a sum, and no scatter."""
    chosen = positions[..., None, :, :] == _counted(values.shape[-2], -3, values.ndim + 1)
    return jnp.where(chosen, values[..., :, None, :], jnp.zeros((), values.dtype)).sum(-3)


def put(values: jax.Array, positions: jax.Array, length: int) -> jax.Array:
    """Puts values (..., k, T) at distinct positions (..., k, T) of zeros (..., n, T).

    Args:
        values: (..., k, T).
        positions: (..., k, T) int32 in [0, n), the same leading axes; distinct for every token.
        length: n; there are fewer than 2³¹ zeros.
    """
    if algorithms().picks == "compare":
        chosen = positions[..., :, None, :] == _counted(length, -2, positions.ndim + 1)
        return jnp.where(chosen, values[..., :, None, :], jnp.zeros((), values.dtype)).sum(-3)
    *batch, _, tokens = values.shape
    number = math.prod(batch)
    rows = jnp.arange(number, dtype=jnp.int32).reshape(*batch, 1, 1) * length + positions
    flat = (rows * tokens + _counted(tokens, -1, positions.ndim)).reshape(-1)
    zeros = jnp.zeros((number * length * tokens,), values.dtype)
    full = zeros.at[flat].set(values.reshape(-1), mode="promise_in_bounds", unique_indices=True)
    return full.reshape(*batch, length, tokens)


def _ordered(x: jax.Array) -> jax.Array:
    """Returns int32 numbers in the order of x: -NaN, -inf, ..., -0, 0, ..., inf, NaN."""
    if x.dtype == jnp.uint32:
        return jax.lax.bitcast_convert_type(x ^ jnp.uint32(1 << 31), jnp.int32)
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x.astype(jnp.int32)
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _largest(x: jax.Array, k: int) -> jax.Array:
    """Returns `largest` of int32 numbers."""
    length = x.shape[-2]
    tile = -(-length // (_TILES * k))
    if tile == 1:
        return _by_place(_ranks(x), jnp.broadcast_to(_counted(length, -2, x.ndim), x.shape), k)
    tiles = -(-length // tile)
    # What is added is never larger than what was there, and comes last.
    room = [(0, 0)] * (x.ndim - 2) + [(0, tiles * tile - length), (0, 0)]
    cut = jnp.pad(x, room, constant_values=_LOWEST).reshape(*x.shape[:-2], tiles, tile, x.shape[-1])
    best = _largest(cut.max(-2), k)
    # In the order of the row, so that the first of equal values is found first.
    best = _by_place(_ranks(-best), best, k)
    held = _pick_tiles(cut, best).reshape(*x.shape[:-2], k * tile, x.shape[-1])
    found = _largest(held, k)
    return pick(best, found // tile) * tile + found % tile


def _ranks(x: jax.Array) -> jax.Array:
    """Returns the rank of every value (..., n, T): how many are larger, or equal and before it."""
    one, other = x[..., None, :, :], x[..., :, None, :]
    length, ndim = x.shape[-2], x.ndim + 1
    before = _counted(length, -3, ndim) < _counted(length, -2, ndim)
    return ((other > one) | ((other == one) & before)).sum(-3, dtype=jnp.int32)


def _by_place(places: jax.Array, values: jax.Array, k: int) -> jax.Array:
    """Puts values (..., n, T) at their places (..., n, T), of which the first k are kept: (..., k, T)."""
    wanted = _counted(k, -2, places.ndim + 1)
    return jnp.where(places[..., :, None, :] == wanted, values[..., :, None, :], 0).sum(-3)


def _pick_tiles(tiles: jax.Array, positions: jax.Array) -> jax.Array:
    """Takes tiles (..., n, b, T) at positions (..., k, T) -> (..., k, b, T)."""
    if algorithms().picks == "gather":
        return jnp.take_along_axis(tiles, positions[..., None, :], axis=-3, mode="promise_in_bounds")
    chosen = positions[..., None, :, None, :] == _counted(tiles.shape[-3], -4, tiles.ndim + 1)
    return jnp.where(chosen, tiles[..., :, None, :, :], 0).sum(-4)


def _counted(length: int, axis: int, ndim: int) -> jax.Array:
    """Returns 0, 1, ..., length - 1 along an axis, counted from the end, of an array with `ndim` axes."""
    return jnp.arange(length, dtype=jnp.int32).reshape(
        [length if i == ndim + axis else 1 for i in range(ndim)]
    )
