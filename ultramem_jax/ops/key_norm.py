"""Normalises keys by their root mean square.

All keys of a memory are normalised once per step. That is the second largest work that grows with the table,
as its square root; the largest is to score them.
"""

from functools import partial

import jax

from ultramem_jax.kernels import calls
from ultramem_jax.kernels.dispatch import native_or
from ultramem_jax.ops.norms import rms_norm
from ultramem_jax.ops.on_mesh import current_axes

_Pair = tuple[jax.Array, jax.Array]
"""Keys and gain, or their gradients."""


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm_of_keys(keys: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """Returns keys · gain / sqrt(mean square + eps), each key by itself.

    Args:
        keys: (2, S, r, K, d) float32.
        gain: (r, d) float32 for a mean over all parts of a key, one for each rank; (1, d) for a mean of each
            part by itself.
        eps: number added to the mean square.

    Returns:
        (2, S, r, K, d) float32. Differentiable in keys and gain.
    """
    kernel, serves = partial(calls.rms_norm, eps=eps), _serves(keys, gain)
    return native_or(partial(_by_jax, eps=eps), kernel, serves, keys, gain)


def _forward(keys: jax.Array, gain: jax.Array, eps: float) -> tuple[jax.Array, _Pair]:
    return rms_norm_of_keys(keys, gain, eps), (keys, gain)


def _backward(eps: float, saved: _Pair, cotangent: jax.Array) -> _Pair:
    def gradients(cotangent: jax.Array, keys: jax.Array, gain: jax.Array) -> _Pair:
        return jax.vjp(partial(_by_jax, eps=eps), keys, gain)[1](cotangent)

    kernel, serves = partial(calls.rms_norm_gradient, eps=eps), _serves(*saved)
    return native_or(gradients, kernel, serves, cotangent, *saved)


rms_norm_of_keys.defvjp(_forward, _backward)


def _serves(keys: jax.Array, gain: jax.Array) -> bool:
    """Tells whether the kernels serve these keys, which the compiler splits on a mesh."""
    return current_axes() is None and calls.serves_rms_norm(keys, gain)


def _by_jax(keys: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    axes = (4,) if gain.shape[0] == 1 else (2, 4)
    return rms_norm(keys, gain[:, None], eps, axes)
