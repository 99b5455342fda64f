"""Scores keys: all keys to choose candidates, and then the candidates, through which gradients flow.

Queries have the shape (T, 2, H, q, d) and keys (2, S, r, K, d): two sides (rows, columns), H heads, r ranks.
Either every rank has a query (q = r), or all ranks share one (q = 1). A rank's query scores with its own d of
the d_k dimensions, or with d_k dimensions of its own. Either every head has keys of its own (S = H), or all
heads share them (S = 1).

The scores of all 2·H·K keys of a token are the only part of a memory's computation that grows with its slots,
as their square root. One pass computes them chunk by chunk of tokens, combined over the ranks as the choice
of candidates needs them. They are dropped once the m best keys are known. The r scores of a candidate are
computed again from its key. So the derivative is that of T·2·H·m products, and involves no other key.
"""

from functools import partial

import jax
import jax.numpy as jnp

from ultramem_jax.kernels import calls
from ultramem_jax.kernels.dispatch import native_or
from ultramem_jax.ops.chunks import fold_chunks, map_chunks
from ultramem_jax.ops.on_mesh import per_token, sum_over_tokens
from ultramem_jax.ops.topk import top_k

_Saved = tuple[jax.Array, jax.Array, jax.Array]
"""Queries, keys and index, which `key_scores` keeps for its backward pass."""


def combined_scores(queries: jax.Array, keys: jax.Array, directions: jax.Array) -> jax.Array:
    """Returns the scores of all keys, summed over ranks: Σ_r directions_r · (query_r · key_r).

    There is one matrix product for each side and head.

    Args:
        queries: (T, 2, H, q, d).
        keys: (2, S, r, K, d).
        directions: (2, H, r), u and t.

    Returns:
        (2, H, T, K) float32.
    """
    keys = jnp.broadcast_to(keys, (2, queries.shape[2], *keys.shape[2:]))
    if queries.shape[3] == keys.shape[2]:
        queries = _weighted(queries, directions[None, ..., None])
    else:  # Multiplying one query with the weighted sum of the keys takes r times fewer operations.
        keys = _weighted(keys, directions[..., None, None]).sum(2, keepdims=True)
    return jnp.einsum("tahqd,ahqkd->ahtk", queries, keys, preferred_element_type=jnp.float32)


def best_keys(queries: jax.Array, keys: jax.Array, directions: jax.Array, top_m: int) -> jax.Array:
    """Returns the `top_m` keys of every side and head with the largest `combined_scores`, best first.

    Args:
        queries: (T, 2, H, q, d).
        keys: (2, S, r, K, d).
        directions: (2, H, r).
        top_m: m <= K.

    Returns:
        (T, 2, H, m) int32 in [0, K). No gradient flows through it.
    """
    queries, keys, directions = jax.lax.stop_gradient((queries, keys, directions))

    def choose(queries: jax.Array, keys: jax.Array, directions: jax.Array) -> jax.Array:
        index = top_k(combined_scores(queries, keys, directions), top_m)[1]
        return jnp.moveaxis(index, 2, 0)

    def choose_by_chunks(queries: jax.Array, keys: jax.Array, directions: jax.Array) -> jax.Array:
        chosen = partial(choose, keys=keys, directions=directions)
        return map_chunks(chosen, 2 * queries.shape[2] * keys.shape[3], queries)

    def choose_all(queries: jax.Array, keys: jax.Array, directions: jax.Array) -> jax.Array:
        kernel, serves = partial(calls.best_keys, top_m=top_m), calls.serves_best_keys(queries, keys, top_m)
        return native_or(choose_by_chunks, kernel, serves, queries, keys, directions)

    return per_token(choose_all, (queries,), (keys, directions))


@jax.custom_vjp
def key_scores(queries: jax.Array, keys: jax.Array, index: jax.Array) -> jax.Array:
    """Returns the scores of chosen keys under every rank: query_r · key_r.

    Args:
        queries: (T, 2, H, q, d).
        keys: (2, S, r, K, d).
        index: (T, 2, H, m) int32 in [0, K).

    Returns:
        (T, 2, H, r, m) float32. Differentiable in queries and keys; the backward pass gathers the keys again.
    """

    def score(queries: jax.Array, index: jax.Array, keys: jax.Array) -> jax.Array:
        rows = _rows(keys, index)
        queries = jnp.broadcast_to(queries, (*rows.shape[:4], rows.shape[-1]))
        return jnp.einsum("tahrjd,tahrd->tahrj", rows, queries, preferred_element_type=jnp.float32)

    def score_by_chunks(queries: jax.Array, keys: jax.Array, index: jax.Array) -> jax.Array:
        return map_chunks(partial(score, keys=keys), _gathered(keys, index), queries, index)

    def score_all(queries: jax.Array, index: jax.Array, keys: jax.Array) -> jax.Array:
        serves = calls.serves_key_scores(queries, keys)
        return native_or(score_by_chunks, calls.key_scores, serves, queries, keys, index)

    return per_token(score_all, (queries, index), (keys,))


def _forward(queries: jax.Array, keys: jax.Array, index: jax.Array) -> tuple[jax.Array, _Saved]:
    return key_scores(queries, keys, index), (queries, keys, index)


def _backward(saved: _Saved, cotangent: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    queries, keys, index = saved
    shared = queries.shape[3] < keys.shape[2]

    def query_gradient(cotangent: jax.Array, index: jax.Array, keys: jax.Array) -> jax.Array:
        by_rank = jnp.einsum(
            "tahrj,tahrjd->tahrd",
            cotangent.astype(keys.dtype),
            _rows(keys, index),
            preferred_element_type=jnp.float32,
        )
        return (by_rank.sum(3, keepdims=True) if shared else by_rank).astype(queries.dtype)

    def add_key_gradient(
        total: jax.Array, cotangent: jax.Array, queries: jax.Array, index: jax.Array
    ) -> jax.Array:
        products = cotangent[..., None] * queries[..., None, :].astype(jnp.float32)
        return total.at[_flat(keys, index)].add(products, mode="promise_in_bounds")

    width, serves = _gathered(keys, index), calls.serves_key_scores(queries, keys)

    def query_by_chunks(cotangent: jax.Array, index: jax.Array, keys: jax.Array) -> jax.Array:
        return map_chunks(partial(query_gradient, keys=keys), width, cotangent, index)

    def query_gradients(cotangent: jax.Array, index: jax.Array, keys: jax.Array) -> jax.Array:
        kernel = partial(calls.query_gradient, query_ranks=queries.shape[3])
        return native_or(query_by_chunks, kernel, serves, cotangent, index, keys)

    def key_by_chunks(cotangent: jax.Array, index: jax.Array, queries: jax.Array) -> jax.Array:
        zeros = jnp.zeros((keys.size // keys.shape[-1], keys.shape[-1]), jnp.float32)
        return fold_chunks(add_key_gradient, zeros, width, cotangent, queries, index).reshape(keys.shape)

    def key_gradient(cotangent: jax.Array, index: jax.Array, queries: jax.Array) -> jax.Array:
        kernel = partial(calls.key_gradient, keys=keys.shape)
        return native_or(key_by_chunks, kernel, serves, cotangent, index, queries)

    d_queries = per_token(query_gradients, (cotangent, index), (keys,))
    d_keys = sum_over_tokens(key_gradient, (cotangent, index, queries))
    return d_queries, d_keys.astype(keys.dtype), None


key_scores.defvjp(_forward, _backward)


def _weighted(x: jax.Array, weights: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) * weights).astype(x.dtype)


def _rows(keys: jax.Array, index: jax.Array) -> jax.Array:
    """Gathers the chosen keys of every rank: (T, 2, H, r, m, d)."""
    flat = keys.reshape(-1, keys.shape[-1])
    return flat.at[_flat(keys, index)].get(mode="promise_in_bounds")


def _flat(keys: jax.Array, index: jax.Array) -> jax.Array:
    """Returns the positions (T, 2, H, r, m) of the chosen keys among those of all sides, sets and ranks."""
    sides, sets, ranks, num_keys = keys.shape[:4]
    first = jnp.arange(sides * sets * ranks, dtype=jnp.int32).reshape(sides, sets, ranks, 1) * num_keys
    return index[:, :, :, None] + first[None]


def _gathered(keys: jax.Array, index: jax.Array) -> int:
    """Returns the number of values in the keys that a token gathers."""
    return index[0].size * keys.shape[2] * keys.shape[4]
