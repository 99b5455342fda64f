"""Sorts small integers together with their positions, as single 32-bit words.

XLA sorts pairs of keys and positions with a comparator that it calls for each comparison. A sort of one array
of words takes a quarter of that time on CPU (docs/performance.md). So a key and its position share a word
here. (On accelerators, pairs are sorted.) Keys that do not fit are sorted digit by digit, least significant
first. The positions in the low bits keep each pass stable.
"""

import jax
import jax.numpy as jnp

from ultramem_jax.ops.algorithms import algorithms

_WORD_BITS = 32
_LEAST_DIGIT_BITS = 8
"""Fewest bits of a digit. With fewer, there would be so many passes that they save nothing."""


def sort_with_order(keys: jax.Array, num_values: int) -> tuple[jax.Array, jax.Array]:
    """Sorts integers in rising order, and returns where each of them was; equal ones keep their order.

    Args:
        keys: (n,) int32 in [0, num_values).
        num_values: at most 2**31.

    Returns:
        Sorted keys and positions, (n,) int32 both.
    """
    count = keys.shape[0]
    position_bits = max((count - 1).bit_length(), 1)
    digit_bits = _WORD_BITS - position_bits
    if digit_bits < _LEAST_DIGIT_BITS or algorithms().sort == "pairs":
        ordered, order = jax.lax.sort_key_val(keys, jnp.arange(count, dtype=jnp.int32))
        return ordered, order
    positions = jnp.arange(count, dtype=jnp.uint32)
    order = positions.astype(jnp.int32)
    for shift in range(0, max((num_values - 1).bit_length(), 1), digit_bits):
        digit = _entries(keys, order).astype(jnp.uint32) >> jnp.uint32(shift)
        # The shift to the left drops the bits above the digit.
        words = jax.lax.sort((digit << jnp.uint32(position_bits)) | positions, is_stable=False)
        order = _entries(order, (words & jnp.uint32((1 << position_bits) - 1)).astype(jnp.int32))
    return _entries(keys, order), order


def _entries(values: jax.Array, positions: jax.Array) -> jax.Array:
    return values.at[positions].get(mode="promise_in_bounds")
