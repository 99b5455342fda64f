"""Matrix products of arrays over tokens."""

from typing import Any

import jax
import jax.numpy as jnp


def project(x: jax.Array, weights: jax.Array, result_dtype: Any = None) -> jax.Array:
    """X (..., D) times weights (D, F) -> (..., F), as one product of two matrices.

    The leading axes are flattened because the gradient of the weights sums over them: XLA on CPU takes 2.3
    times as long for a sum over two axes as for one over their product (MLP of 4096 tokens, D 128, F 768,
    forward and backward: 100 ms against 43 ms).

    Args:
        x: in the dtype of the computation.
        weights: cast to that dtype.
        result_dtype: of the sums; that of x if None.
    """
    product = jnp.matmul(
        x.reshape(-1, x.shape[-1]), weights.astype(x.dtype), preferred_element_type=result_dtype
    )
    return product.reshape(*x.shape[:-1], weights.shape[-1])
