"""Stochastic rounding from float32 to bfloat16.

An update much smaller than a value's last bit is lost by rounding to nearest, always; rounded up with the
probability of how far it reaches towards the next number, it arrives on average.
"""

import jax
import jax.numpy as jnp

from ultramem_jax.ops.hashing import mix

_DROPPED_BITS = 16


def stochastic_round(
    x: jax.Array, rows: jax.Array, seed: jax.Array, first_column: jax.Array | int = 0
) -> jax.Array:
    """To bfloat16, up or down so that the expectation over seeds is `x`.

    Args:
        x: (U, d) float32, finite or not; what is not finite stays what it is.
        rows: (U,) int32, names of the rows: a row is rounded by its name, column and seed, whatever stands
            beside it.
        seed: () uint32, another one for every array and step.
        first_column: of x in a whole row.

    Returns:
        (U, d) bfloat16: one of the two neighbours of each value, itself where it has 8 bits. Above the
        largest number of bfloat16, infinity is a neighbour.
    """
    columns = jnp.asarray(first_column, jnp.uint32) + jnp.arange(x.shape[1], dtype=jnp.uint32)
    noise = mix(mix(rows.astype(jnp.uint32), seed)[:, None] + columns[None], seed)
    # Numbers of one sign and their bits as integers rise together, so adding noise below the last bit that
    # stays carries into it as often as the dropped part is large. A carry into the exponent is right as well.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    low = jnp.uint32((1 << _DROPPED_BITS) - 1)
    rounded = jax.lax.bitcast_convert_type((bits + (noise & low)) & ~low, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
