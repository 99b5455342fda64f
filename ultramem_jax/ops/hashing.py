"""Hashes 32-bit words to numbers that look random, in a few integer operations and without a state."""

import jax
import jax.numpy as jnp
import numpy as np


def mix(x: jax.Array, key: jax.Array | np.uint32) -> jax.Array:
    """Hashes `x`, one-to-one for every key: MurmurHash3's finaliser, keyed twice, with other multipliers.

    Args:
        x: uint32, any shape.
        key: uint32, () or of a shape that broadcasts.

    Returns:
        uint32, of the broadcast shape.
    """
    key = jnp.asarray(key, jnp.uint32)
    x = (x + key) * jnp.uint32(0x9E3779B1)
    x = (x ^ (x >> jnp.uint32(16)) ^ key) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))
