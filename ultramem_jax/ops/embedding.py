"""Looks up the embeddings of tokens, with a gradient that is fast on every platform."""

import jax
import jax.numpy as jnp

from ultramem_jax.ops.algorithms import algorithms
from ultramem_jax.ops.on_mesh import sum_over_tokens
from ultramem_jax.ops.row_sums import sorted_rows, sums_of_rows

_MOST_COMPARED = 4096
"""Largest vocabulary whose gradient is a product with zeros and ones. That takes as many operations as the
product for the logits; sorting costs less for larger ones."""


@jax.custom_vjp
def embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns rows (B, S, D) of an embedding (V, D) for tokens (B, S) int32; ids past the end are clipped.

    Differentiable in the embedding.
    """
    return table.at[tokens].get(mode="clip")


def _forward(table: jax.Array, tokens: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return embed(table, tokens), (table, tokens)


def _backward(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, None]:
    table, tokens = saved
    size, width = table.shape

    def gradient(cotangent: jax.Array, tokens: jax.Array) -> jax.Array:
        rows = cotangent.reshape(-1, width).astype(jnp.float32)
        ids = jnp.clip(tokens.reshape(-1), 0, size - 1)
        if algorithms().sums_by_row == "scatter":
            return jnp.zeros((size, width), jnp.float32).at[ids].add(rows, mode="promise_in_bounds")
        if size <= _MOST_COMPARED:
            chosen = (ids[None] == jnp.arange(size, dtype=jnp.int32)[:, None]).astype(cotangent.dtype)
            return jax.lax.dot_general(
                chosen,
                cotangent.reshape(-1, width),
                (((1,), (0,)), ((), ())),
                precision=jax.lax.Precision.HIGHEST,
                preferred_element_type=jnp.float32,
            )
        found = sorted_rows(ids, size)
        ordered = rows.at[found.order].get(mode="promise_in_bounds")
        sums = sums_of_rows(ordered, found.row_of_read, found.counts)
        zeros = jnp.zeros((size, width), jnp.float32)
        return zeros.at[found.rows].set(sums, mode="drop", unique_indices=True, indices_are_sorted=True)

    return sum_over_tokens(gradient, (cotangent, tokens)).astype(table.dtype), None


embed.defvjp(_forward, _backward)
