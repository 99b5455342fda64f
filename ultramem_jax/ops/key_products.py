"""Chooses and scores candidates by matrix products with all keys, so that accelerators gather no keys.

The shapes are those of `ultramem_jax.ops.key_scores`. Scores of all keys under every rank are one product, of
which the m best keys of each side and head are kept. The derivative is two products with a matrix that is
zero but for the candidates. With 8,192 tokens, K 2,200, H 2, m 42 and keys of 500 values, gathered keys would
be 2.8 GB in bfloat16 forward, and again backward; the products read and write 1.2 GB.
"""

from functools import partial

import jax
import jax.numpy as jnp

from ultramem_jax.ops.chunks import map_chunks, scan_chunks
from ultramem_jax.ops.on_mesh import per_token, per_token_and_sum
from ultramem_jax.ops.selection import largest, pick, put

_SUMS = jnp.float32
_Saved = tuple[jax.Array, jax.Array, jax.Array]
"""Queries, keys and index, which `candidates_by_products` keeps for its backward pass."""


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def candidates_by_products(
    queries: jax.Array, keys: jax.Array, directions: jax.Array, top_m: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the `top_m` keys of every side and head with the largest scores, and their scores by rank.

    Args:
        queries: (T, 2, H, q, d).
        keys: (2, S, r, K, d).
        directions: (2, H, r), by which ranks are combined for the choice; without a gradient.
        top_m: m <= K.

    Returns:
        Index (T, 2, H, m) int32 in [0, K), best first; scores (T, 2, H, r, m) float32, differentiable in
        queries and keys.
    """

    def choose(queries: jax.Array, keys: jax.Array, directions: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = _of_heads(keys, queries.shape[2])
        scores = jnp.einsum(
            f"ahrkd,{_axes(queries, keys)}->ahrkt", keys, queries, preferred_element_type=_SUMS
        )
        index = largest((directions[..., None, None] * scores).sum(2), top_m)
        of_ranks = jnp.broadcast_to(index[:, :, None], (*scores.shape[:3], *index.shape[2:]))
        return jnp.moveaxis(index, -1, 0), jnp.moveaxis(pick(scores, of_ranks), -1, 0)

    def by_chunks(queries: jax.Array, keys: jax.Array, directions: jax.Array) -> tuple[jax.Array, jax.Array]:
        return map_chunks(lambda queries: choose(queries, keys, directions), _values(queries, keys), queries)

    return per_token(by_chunks, (_squeezed(queries, keys),), (keys, directions))


def _forward(
    queries: jax.Array, keys: jax.Array, directions: jax.Array, top_m: int
) -> tuple[tuple[jax.Array, jax.Array], _Saved]:
    index, scores = candidates_by_products(queries, keys, directions, top_m)
    return (index, scores), (queries, keys, index)


def _backward(
    top_m: int, saved: _Saved, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None]:
    queries, keys, index = saved

    def gradients(
        total: jax.Array, cotangent: jax.Array, index: jax.Array, queries: jax.Array, keys: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        keys_of_heads = _of_heads(keys, queries.shape[2])
        cotangent = jnp.moveaxis(cotangent, 0, -1).astype(keys.dtype)
        index = jnp.broadcast_to(jnp.moveaxis(index, 0, -1)[:, :, None], cotangent.shape)
        full, axes = put(cotangent, index, keys.shape[3]), _axes(queries, keys)
        d_queries = jnp.einsum(f"ahrkt,ahrkd->{axes}", full, keys_of_heads, preferred_element_type=_SUMS)
        of_sets = "ahrkd" if keys.shape[1] == queries.shape[2] else "arkd"
        d_keys = jnp.einsum(f"ahrkt,{axes}->{of_sets}", full, queries, preferred_element_type=_SUMS)
        return total + d_keys.reshape(total.shape), d_queries.astype(queries.dtype)

    def by_chunks(
        cotangent: jax.Array, index: jax.Array, queries: jax.Array, keys: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        zeros = jnp.zeros(keys.shape, jnp.float32)
        arrays = (cotangent, index, queries)
        total, d_queries = scan_chunks(partial(gradients, keys=keys), zeros, _values(queries, keys), *arrays)
        return d_queries, total

    of_tokens = (cotangents[1], index, _squeezed(queries, keys))
    d_queries, d_keys = per_token_and_sum(by_chunks, of_tokens, (keys,))
    return d_queries.reshape(queries.shape), d_keys.astype(keys.dtype), None


candidates_by_products.defvjp(_forward, _backward)


def _of_heads(keys: jax.Array, heads: int) -> jax.Array:
    return jnp.broadcast_to(keys, (2, heads, *keys.shape[2:]))


def _squeezed(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Returns queries (T, 2, H, r, d), or (T, 2, H, d) if several ranks share one."""
    return queries[:, :, :, 0] if queries.shape[3] < keys.shape[2] else queries


def _axes(queries: jax.Array, keys: jax.Array) -> str:
    """Names the axes of `_squeezed` queries."""
    return "tahrd" if queries.ndim == keys.ndim else "tahd"


def _values(queries: jax.Array, keys: jax.Array) -> int:
    """Returns the scores of a token, combined and by rank."""
    return 2 * queries.shape[2] * (keys.shape[2] + 1) * keys.shape[3]
