"""Scores the keys of a served model: what depends only on parameters is precomputed, each key is read once.

In training, the choice of candidates drops the scores of all keys. It computes those of the candidates again,
from m·r gathered keys a side and head. For the few tokens of a decoding step it is cheaper to keep the scores
of each rank: they include the candidates' scores, and no key is read twice.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ultramem_jax.ops.chunks import map_chunks
from ultramem_jax.ops.linear import OutputMajor, project
from ultramem_jax.ops.topk import top_k


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ServedKeys:
    """Holds both sides' keys, normed and in the dtype of the computation, and the weights of their ranks."""

    matrices: tuple[tuple[tuple[OutputMajor, ...], ...], ...]
    """Keys `[side][set][rank]`, (d, K) each: an array of its own, so that its product reads it in place."""
    directions: jax.Array
    """(2, H, r) float32, u and t, which weigh the ranks."""


def serve_keys(keys: jax.Array, directions: jax.Array) -> ServedKeys:
    """Prepares the keys (2, S, r, K, d) and directions (2, H, r) of `retrieve_tucker` for serving."""
    matrices = tuple(tuple(tuple(OutputMajor(rank) for rank in each) for each in side) for side in keys)
    return ServedKeys(matrices, directions)


def served_candidates(queries: jax.Array, keys: ServedKeys, top_m: int) -> tuple[jax.Array, jax.Array]:
    """Returns what `key_scores.best_keys` would choose, and the `key_scores.key_scores` of it.

    Args:
        queries: (T, 2, H, q, d).
        keys: one set per head, or one set for all heads.
        top_m: m <= K.

    Returns:
        Candidates (T, 2, H, m) int32 in [0, K), best first, and their scores (T, 2, H, r, m) float32.
    """
    ranks, num_keys = len(keys.matrices[0][0]), keys.matrices[0][0][0].shape[1]

    def of_head(queries: jax.Array, side: int, head: int) -> tuple[jax.Array, jax.Array]:
        sets = keys.matrices[side]
        # Ranks may share a query, and heads a set of keys.
        scores = [
            project(queries[:, side, head, rank % queries.shape[3]], matrix, jnp.float32)
            for rank, matrix in enumerate(sets[head % len(sets)])
        ]
        weighted = [keys.directions[side, head, rank] * score for rank, score in enumerate(scores)]
        chosen = top_k(sum(weighted[1:], weighted[0]), top_m)[1]
        picked = [jnp.take_along_axis(s, chosen, axis=-1, mode="promise_in_bounds") for s in scores]
        return chosen, jnp.stack(picked, axis=1)

    def choose(queries: jax.Array) -> tuple[jax.Array, jax.Array]:
        heads = range(queries.shape[2])
        of_sides = [[of_head(queries, side, head) for head in heads] for side in range(2)]
        chosen = jnp.stack([jnp.stack([c for c, _ in side], axis=1) for side in of_sides], axis=1)
        return chosen, jnp.stack([jnp.stack([s for _, s in side], axis=1) for side in of_sides], axis=1)

    return map_chunks(choose, 2 * queries.shape[2] * (ranks + 1) * num_keys, queries)
