"""RMS normalisation, the only norm of this project."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · gain over the last axis (arXiv 1910.07467, equation 4), without a bias.

    The mean square and the division are in float32 whatever the computation's dtype: the square of a
    bfloat16 has too few bits to be averaged.
    """

    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32
    """Of the output."""
    gain_init: float = 1.0
    """Value that every entry of the gain starts at."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (..., d) of any float dtype -> (..., d) in `dtype`. Parameter `scale` (d,), float32."""
        gain = self.param("scale", nn.initializers.constant(self.gain_init), (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        gain = gain.reshape((1,) * (x.ndim - 1) + gain.shape)
        return (x * inverse_rms * gain).astype(self.dtype)
