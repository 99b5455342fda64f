"""Multiplies arrays over tokens with matrices of weights."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ultramem_jax.platforms import platform

LEAST_ROWS = 4
"""Fewest rows of a bfloat16 product on CPU: a single row does not reach the matrix unit. 1 token against
100 MB of weights on 2 CPU cores takes 63 ms, padded to 4 rows 8 ms."""


PACKED_ROWS = 128
"""Fewest rows of a float32 product on CPU for which it pays that the kernel packs the weights: a prompt of
512 tokens takes SmolLM2-135M 1.5 s of one CPU core then, in chunks of 256, and 1.9 s otherwise."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OutputMajor:
    """Holds a matrix (D, F) of a served model as its transpose, in the dtype of the computation.

    The time of a product of few rows is that of reading the matrix. The product reads the matrix in place if
    the axis that is summed over is the last one; in float32 the matrix must be the left operand, too. 8
    tokens against the MLPs of a model of D 1,024, L 12 on 2 CPU cores (AMD EPYC), this way and as trained: in
    float32 15 and 26 ms, in bfloat16 16 and 20 ms.
    """

    rows: jax.Array
    """The transposed matrix, (F, D)."""

    @property
    def shape(self) -> tuple[int, int]:
        """Returns the shape of the matrix, (D, F)."""
        return self.rows.shape[1], self.rows.shape[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRankSum:
    """Holds a matrix (D, F) as a sum of weights and a product of low rank, as LoRA adapts them."""

    weights: jax.Array
    """(D, F)."""
    a: jax.Array
    """(D, r)."""
    b: jax.Array
    """(r, F)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the matrix, (D, F)."""
        return self.weights.shape


Matrix = jax.Array | OutputMajor | LowRankSum
"""Weights (D, F): trained ones, in float32, served ones, or adapted ones."""


def project(x: jax.Array, weights: Matrix, result_dtype: DTypeLike | None = None) -> jax.Array:
    """Multiplies x (..., D) with weights (D, F) -> (..., F), as one product of two matrices.

    The leading axes are flattened because the gradient of the weights sums over them. XLA on CPU takes 2.3
    times as long for a sum over two axes as for one over their product (MLP of 4096 tokens, D 128, F 768,
    forward and backward: 100 ms against 43 ms).

    Args:
        x: an array in the dtype of the computation.
        weights: cast to that dtype. Products with an `OutputMajor` are summed in float32.
        result_dtype: dtype of the sums; that of x if None.
    """
    if isinstance(weights, LowRankSum):
        low = project(project(x, weights.a), weights.b, result_dtype)
        return project(x, weights.weights, result_dtype) + low
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(weights, OutputMajor):
        product = _by_output(rows, weights.rows.astype(x.dtype)).astype(result_dtype or x.dtype)
    else:
        product = jnp.matmul(rows, weights.astype(x.dtype), preferred_element_type=result_dtype)
    return product.reshape(*x.shape[:-1], weights.shape[-1])


def _by_output(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Multiplies x (T, D) with the transpose of weights (F, D) -> (T, F) float32."""
    tokens, contract_last = x.shape[0], (((1,), (1,)), ((), ()))
    on_cpu = platform() == "cpu"
    if on_cpu and x.dtype == jnp.float32 and tokens < PACKED_ROWS:
        # XLA's kernel packs its right operand before it starts, so the weights are the left one. Without the
        # barrier, XLA would swap the operands to produce the transposed result directly. In bfloat16 this
        # order would convert the weights to float32 (docs/performance.md, "Decoding").
        by_output = jax.lax.dot_general(weights, x, contract_last, preferred_element_type=jnp.float32)
        return jax.lax.optimization_barrier(by_output).T
    if on_cpu and tokens < LEAST_ROWS:
        x = jnp.pad(x, ((0, LEAST_ROWS - tokens), (0, 0)))
    return jax.lax.dot_general(x, weights, contract_last, preferred_element_type=jnp.float32)[:tokens]
