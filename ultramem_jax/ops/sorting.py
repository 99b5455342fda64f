"""The order of small integers, as sorts of single 32-bit words.

XLA sorts pairs of keys and positions with a comparator that it calls for each comparison. One array of words
takes a quarter of that time on CPU (docs/performance.md), so a key and its position share a word here. What
does not fit is sorted digit by digit, least significant first; the positions in the low bits keep each pass
stable.
"""

import jax
import jax.numpy as jnp

_WORD_BITS = 32
_LEAST_DIGIT_BITS = 8
"""With fewer bits left for keys, the passes would outnumber what they save."""


def sort_with_order(keys: jax.Array, num_values: int) -> tuple[jax.Array, jax.Array]:
    """Integers in rising order, and where each of them was; equal ones keep their order.

    Args:
        keys: (n,) int32 in [0, num_values).
        num_values: at most 2**31.

    Returns:
        Sorted keys and positions, (n,) int32 both.
    """
    count = keys.shape[0]
    position_bits = max((count - 1).bit_length(), 1)
    digit_bits = _WORD_BITS - position_bits
    if digit_bits < _LEAST_DIGIT_BITS:
        ordered, order = jax.lax.sort_key_val(keys, jnp.arange(count, dtype=jnp.int32))
        return ordered, order
    positions = jnp.arange(count, dtype=jnp.uint32)
    order = positions.astype(jnp.int32)
    for shift in range(0, max((num_values - 1).bit_length(), 1), digit_bits):
        digit = _entries(keys, order).astype(jnp.uint32) >> jnp.uint32(shift)
        # Shifted to the left, a digit loses the bits above it.
        words = jax.lax.sort((digit << jnp.uint32(position_bits)) | positions, is_stable=False)
        order = _entries(order, (words & jnp.uint32((1 << position_bits) - 1)).astype(jnp.int32))
    return _entries(keys, order), order


def _entries(values: jax.Array, positions: jax.Array) -> jax.Array:
    return values.at[positions].get(mode="promise_in_bounds")
