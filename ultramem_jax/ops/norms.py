"""Implements the RMS norm as a function of arrays; layers add its gain as a parameter."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, gain: jax.Array, eps: float, axes: tuple[int, ...] = (-1,)) -> jax.Array:
    """Returns x · gain / sqrt(mean(x²) + eps) (arXiv 1910.07467, equation 4).

    Args:
        x: (..., d) float32.
        gain: float32, of the last axes of x, each of its length or 1.
        eps: number added to the mean square.
        axes: axes of the mean.

    Returns:
        The shape and dtype of x.
    """
    mean_square = jnp.mean(x * x, axis=axes, keepdims=True)
    gain = gain.reshape((1,) * (x.ndim - gain.ndim) + gain.shape)
    return x * jax.lax.rsqrt(mean_square + jnp.float32(eps)) * gain
