"""Finds the exact top-k, and stays fast on long rows.

On CPU a native kernel finds it, on accelerators `ultramem_jax.ops.selection`. Elsewhere `jax.lax.top_k` does,
which passes a row through a heap of the k best, one value at a time. So a long row is cut into tiles. The k
tiles with the largest maxima hold the k largest values, because each of these k maxima is at least as large
as anything in another tile. So the heap sees K/b maxima and then k tiles of b values. The maxima are a plain
reduction, vectorised and on all CPU cores.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.kernels import calls
from ultramem_jax.kernels.dispatch import native_or
from ultramem_jax.ops.algorithms import algorithms
from ultramem_jax.ops.selection import largest, pick, pick_with_gradient
from ultramem_jax.tree_types import ArrayTree

_SHORT_ROW = 4095
"""Longest row that goes to `jax.lax.top_k` whole: for these a second heap would cost more than it saves."""


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def top_k(x: jax.Array, k: int, block: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns the k largest values of every row and their indices.

    The result is that of `jax.lax.top_k`, also for ties. Where a native kernel computes, or a row is not cut
    into tiles, that is true of all rows, NaN included. Without `block`, rows of up to 4,095 values are not
    cut. Rows that are cut need to be of integers, or to have no NaN and a k-th largest value that is neither
    zero nor subnormal. Other rows without NaN agree with it in all values of at least the smallest normal
    number, and in their indices. The remaining values may be any of the row's zeros and subnormals, in the
    order of `jax.lax.top_k`.

    Args:
        x: (..., K), floats or integers, of at most 32 bits.
        k: from 0 to K.
        block: b, values per tile, a divisor of K; None chooses one, 1 for short rows.

    Returns:
        Values (..., k) of the dtype of x, largest first, equal ones by rising index; and their indices, int32
        and distinct. The values are differentiable.
    """
    serves = calls.serves_top_k(x, k) and block is None
    return native_or(lambda x: _tiled_top_k(x, k, block), lambda x: calls.top_k(x, k), serves, x)


@top_k.defjvp
def _derivative(
    k: int, block: int | None, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[tuple[jax.Array, jax.Array], ArrayTree]:
    values, index = top_k(*primals, k, block)
    of_values = take_along_last(*tangents, index)
    return (values, index), (of_values, np.zeros(index.shape, jax.dtypes.float0))


def take_along_last(x: jax.Array, index: jax.Array) -> jax.Array:
    """Takes entries of x (..., K) at index (..., k) int32 in [0, K).

    On accelerators, its derivative has no scatter.
    """
    if algorithms().selection == "heap":
        return jnp.take_along_axis(x, index, axis=-1, mode="promise_in_bounds")
    columns, positions = x.reshape(-1, x.shape[-1]).T, index.reshape(-1, index.shape[-1]).T
    return pick_with_gradient(columns, positions).T.reshape(index.shape)


def _by_ranks(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    columns = x.reshape(-1, x.shape[-1]).T
    index = largest(columns, k)
    values = pick(columns, index)
    return values.T.reshape(*x.shape[:-1], k), index.T.reshape(*x.shape[:-1], k)


def _tiled_top_k(x: jax.Array, k: int, block: int | None) -> tuple[jax.Array, jax.Array]:
    if algorithms().selection == "ranks" and block is None:
        return _by_ranks(x, k)
    length = x.shape[-1]
    block = _block(length, k) if block is None else block
    num_blocks = length // block
    if block == 1 or num_blocks <= k:  # every tile would be taken
        values, index = jax.lax.top_k(x, k)
        return values, index
    blocks = x.reshape(*x.shape[:-1], num_blocks, block)
    # `lax.top_k` sorts -0 below 0 and subnormals by value. The maximum may treat them as one number, because
    # XLA's CPU code takes subnormals for zero. A maximum of the bits as integers would tell them apart, but
    # rows (512, 2, 65536) take 276 ms with it against 65 ms, on two CPU cores.
    #
    # The chosen tiles are put back in the order of the row, so that the first of equal values is found first.
    # Of tiles with equal maxima, too, the first ones have been taken.
    best = jnp.sort(jax.lax.top_k(blocks.max(-1), k)[1], axis=-1)
    values = jnp.take_along_axis(blocks, best[..., None], axis=-2, mode="promise_in_bounds")
    values, position = jax.lax.top_k(values.reshape(*x.shape[:-1], k * block), k)
    of_block = jnp.take_along_axis(best, position // block, axis=-1, mode="promise_in_bounds")
    return values, of_block * block + position % block


def _block(length: int, k: int) -> int:
    """Returns the divisor of K nearest √(K/k), where the two heaps see fewest values; 1 if none is near."""
    if length <= _SHORT_ROW:
        return 1
    ideal = math.sqrt(length / k)
    divisors = [b for b in range(math.ceil(ideal / 2), int(2 * ideal) + 1) if length % b == 0]
    return min(divisors, key=lambda b: abs(math.log(b / ideal)), default=1)
