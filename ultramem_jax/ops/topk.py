"""Exact top-k that stays fast on long rows.

`jax.lax.top_k` passes a whole row by a heap of the k best, one value at a time. Here a long row is cut into
blocks. The k blocks with the largest maxima hold the k largest values, since each of these k maxima is at
least as large as anything in another block. So the heap sees K/b maxima and then k blocks of b values. The
maxima are a plain reduction, vectorised and on all cores.
"""

import math

import jax
import jax.numpy as jnp

_SHORT_ROW = 4095
"""Rows up to here go to `jax.lax.top_k` whole: a second heap would cost more than it saves."""


def top_k(x: jax.Array, k: int, block: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns the k largest values of every row and their indices.

    They are those of `jax.lax.top_k`, also for ties, in every row of integers and every row whose k-th
    largest value is neither zero nor subnormal. Other rows agree with it in all values of at least the
    smallest normal number and in their indices. What follows these may be any of the row's zeros and
    subnormals, in the order of `jax.lax.top_k`.

    Args:
        x: (..., K), floats or integers, without NaN.
        k: at most K.
        block: b, values per block, a divisor of K; None chooses.

    Returns:
        Values (..., k) of the dtype of x, largest first and of equal ones that of the lower index first; and
        their indices, int32 and distinct.
    """
    length = x.shape[-1]
    block = _block(length, k) if block is None else block
    num_blocks = length // block
    if block == 1 or num_blocks <= k:  # every block would be taken
        values, index = jax.lax.top_k(x, k)
        return values, index
    blocks = x.reshape(*x.shape[:-1], num_blocks, block)
    # `lax.top_k` sorts -0 below 0 and subnormals by value. To the maximum they may be one number: XLA's CPU
    # code takes subnormals for zero. A maximum of the bits as integers would tell them apart, but rows
    # (512, 2, 65536) take 276 ms with it against 65, on two CPU cores.
    #
    # In the order of the row again, so that of equal values the first is found first. Of blocks with equal
    # maxima, too, the first ones have been taken.
    best = jnp.sort(jax.lax.top_k(blocks.max(-1), k)[1], axis=-1)
    values = jnp.take_along_axis(blocks, best[..., None], axis=-2, mode="promise_in_bounds")
    values, position = jax.lax.top_k(values.reshape(*x.shape[:-1], k * block), k)
    of_block = jnp.take_along_axis(best, position // block, axis=-1, mode="promise_in_bounds")
    return values, of_block * block + position % block


def _block(length: int, k: int) -> int:
    """The divisor of K closest to √(K/k), where the two heaps see least; 1 if there is none near it."""
    if length <= _SHORT_ROW:
        return 1
    ideal = math.sqrt(length / k)
    divisors = [b for b in range(math.ceil(ideal / 2), int(2 * ideal) + 1) if length % b == 0]
    return min(divisors, key=lambda b: abs(math.log(b / ideal)), default=1)
