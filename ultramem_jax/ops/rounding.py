"""Rounds float32 to bfloat16 stochastically.

Rounding to nearest always loses an update that is much smaller than a value's last bit. Stochastic rounding
rounds up with the probability of how far the value reaches towards the next number. So the update arrives on
average.
"""

import jax
import jax.numpy as jnp

from ultramem_jax.ops.hashing import mix

_DROPPED_BITS = 16


def stochastic_round(
    x: jax.Array, rows: jax.Array, seed: jax.Array, first_column: jax.Array | int = 0
) -> jax.Array:
    """Rounds to bfloat16, up or down at random, so that the expectation over seeds is `x`.

    Args:
        x: (U, d) float32. Values that are not finite stay what they are.
        rows: (U,) int32, ids of the rows. The rounding of a value depends only on its row id, column and
            seed.
        seed: () uint32; every array and step needs another one.
        first_column: index, in the whole row, of x's first column.

    Returns:
        (U, d) bfloat16: one of the two neighbours of each value, or the value itself if it has 8 bits. Above
        the largest number of bfloat16, infinity is a neighbour.
    """
    columns = jnp.asarray(first_column, jnp.uint32) + jnp.arange(x.shape[1], dtype=jnp.uint32)
    noise = mix(mix(rows.astype(jnp.uint32), seed)[:, None] + columns[None], seed)
    # For numbers of one sign, larger bits mean larger numbers. So noise that is added below the last kept bit
    # carries into it with a probability in proportion to the dropped part. A carry into the exponent is
    # right, too.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    low = jnp.uint32((1 << _DROPPED_BITS) - 1)
    rounded = jax.lax.bitcast_convert_type((bits + (noise & low)) & ~low, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
