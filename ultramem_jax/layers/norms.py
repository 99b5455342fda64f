"""Implements RMS normalisation, the only norm of this project."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ultramem_jax.ops.norms import rms_norm


class RMSNorm(nn.Module):
    """Computes x / sqrt(mean(x²) + eps) · gain over the last axis (arXiv 1910.07467, equation 4).

    There is no bias. The mean square and the division are always in float32: the square of a bfloat16 has too
    few bits to be averaged.
    """

    eps: float = 1e-5
    """Number added to the mean square."""
    dtype: DTypeLike = jnp.float32
    """Dtype of the output."""
    gain_init: float = 1.0
    """Initial value of every entry of the gain."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (..., d) of any float dtype to (..., d) in `dtype`.

        The gain is the parameter `scale` (d,), float32, or another dtype in a model that was loaded so.
        """
        gain = self.param("scale", nn.initializers.constant(self.gain_init), (x.shape[-1],), jnp.float32)
        return rms_norm(x.astype(jnp.float32), gain.astype(jnp.float32), self.eps).astype(self.dtype)
