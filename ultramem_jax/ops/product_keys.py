"""Retrieves the m best cells of the virtual grid: product keys, TDQKR and Multi-Core Scoring (MCS).

`retrieve_product_keys` adds the scores of a row key and a column key (Product-Key Memory, PKM).
`retrieve_tucker` is Tucker decomposed query-key retrieval (TDQKR) with Multi-Core Scoring (MCS) of the
UltraMem paper, section 3.

The grid of K·K cells is never built. Each side is cut to its m best keys, its candidates. The best cells are
chosen among the m·m pairs of candidates. For a sum of two scores (PKM) this finds the m best of all K·K
cells; for a Tucker core it is the approximation of TDQKR.

Queries (T, 2, H, q, d) and keys (2, S, r, K, d) have the layout of `ultramem_jax.ops.key_scores`: rows are
side 0, columns side 1. `ServedKeys` can take the place of the keys; they have no derivative.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ultramem_jax.ops import small_svd
from ultramem_jax.ops.algorithms import algorithms
from ultramem_jax.ops.cells import best_cells, no_cores
from ultramem_jax.ops.key_products import candidates_by_products
from ultramem_jax.ops.key_scores import best_keys, key_scores
from ultramem_jax.ops.row_sums import counted
from ultramem_jax.ops.served_keys import ServedKeys, served_candidates
from ultramem_jax.ops.topk import take_along_last

Keys = jax.Array | ServedKeys
"""Keys (2, S, r, K, d), or those of a served model."""


class Retrieved(NamedTuple):
    """Holds the m best cells of every token and head, best first."""

    rows: jax.Array
    """(T, H, m) int32 in [0, K), rows of the cells."""
    columns: jax.Array
    """(T, H, m) int32 in [0, K), columns of the cells."""
    scores: jax.Array
    """(T, H, m, h) float32, scores of the cells, one per core or one without cores; differentiable."""
    candidates: jax.Array
    """(T, 2, H, m) int32, the keys of both sides whose cells were compared, best first."""


def retrieve_product_keys(queries: jax.Array, keys: Keys, top_m: int) -> Retrieved:
    """Returns the `top_m` cells of largest row score + column score (PKM, arXiv 1907.05242, section 3.2).

    Args:
        queries: (T, 2, H, 1, d).
        keys: (2, S, 1, K, d).
        top_m: m <= K.

    Returns:
        The m best of all K² cells, with h = 1.
    """
    heads = queries.shape[2]
    # With a single rank there is nothing to combine.
    candidates, scores = _candidates(queries, keys, jnp.ones((2, heads, 1), jnp.float32), top_m)
    return _retrieved(candidates, scores, no_cores(heads), top_m)


def retrieve_tucker(
    queries: jax.Array, keys: Keys, cores: jax.Array, directions: jax.Array, top_m: int
) -> Retrieved:
    """Retrieves by Tucker decomposed query-key retrieval (TDQKR) with Multi-Core Scoring (MCS).

    Both are from the UltraMem paper, section 3. The grid is S_rowᵀ·C·S_col with C the sum of the cores.
    Candidates are the m best rows of uᵀS_row and the m best columns of tᵀS_col. The exact grid over those m·m
    cells decides. Gradients reach only the scores of the chosen cells, and neither u nor t.

    Args:
        queries: (T, 2, H, q, d).
        keys: (2, S, r, K, d).
        cores: (H, h, r, r), the C⁽ⁱ⁾ of Multi-Core Scoring; the first r is the row side.
        directions: (2, H, r), u and t, the leading left and right singular vectors of C.
        top_m: m <= K.

    Returns:
        The best m of the m·m candidate cells, with core i's own score at [..., i].
    """
    candidates, scores = _candidates(queries, keys, directions, top_m)
    return _retrieved(candidates, scores, cores, top_m)


def leading_singular_vectors(
    core: jax.Array, last_u: jax.Array, last_t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the leading singular vectors of the summed core, with a sign that does not jump.

    A pair (u, t) is defined up to a joint sign, and the sign decides which keys become candidates. The sign
    is the one that brings the pair closer to the last one, in the sum of absolute differences, as in the
    authors' code. If both signs are equally close, as to zeros, the singular value decomposition decides.

    Args:
        core: (H, r, r), C.
        last_u: (H, r), the last left vector; zeros at the start.
        last_t: (H, r), the last right vector; zeros at the start.

    Returns:
        u (H, r) and t (H, r), float32, without a gradient.
    """
    left, _, right = small_svd.small_svd(core)
    u, t = left[:, :, 0], right[:, 0, :]
    distance = _distance(u, last_u) + _distance(t, last_t)
    mirrored = _distance(-u, last_u) + _distance(-t, last_t)
    sign = jnp.where(mirrored < distance, -1.0, 1.0).astype(jnp.float32)
    return u * sign, t * sign


def _distance(vector: jax.Array, last: jax.Array) -> jax.Array:
    return jnp.abs(vector - last).sum(-1, keepdims=True)


def core_loss(cores: jax.Array, margin: float) -> jax.Array:
    """Returns TDQKR's core loss: the mean over heads of Σ_{i>=2} max(0, λ_i - τ)² / (r - 1).

    λ are the singular values of C (UltraMem paper, section 3). The loss keeps C near rank 1, where the
    candidates of `retrieve_tucker` are the right ones. It is zero for r = 1.

    Args:
        cores: (H, h, r, r).
        margin: τ.

    Returns:
        () float32, without the weight α.
    """
    rank = cores.shape[-1]
    if rank == 1:
        return jnp.zeros((), jnp.float32)
    minor = singular_values(cores)[:, 1:]
    return (jax.nn.relu(minor - margin) ** 2).sum(-1).mean() / (rank - 1)


def balance_loss(scores: jax.Array, candidates: jax.Array) -> jax.Array:
    """Measures how unevenly one side's keys become candidates: K·Σ_i f_i·p_i (UltraMemV2, arXiv 2508.18756).

    f_i is the share of key i in all candidates of all heads, p_i its mean probability under a softmax of the
    scores. The loss is 1 if either is uniform. The gradient flows through p.

    Args:
        scores: (H, T, K), by which candidates are chosen: one side of `key_scores.combined_scores`.
        candidates: (T, H, m) int32 in [0, K).

    Returns:
        () float32, without the weight β.
    """
    num_keys = scores.shape[-1]
    counts = counted(candidates, num_keys).astype(jnp.float32)
    probability = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).mean((0, 1))
    return num_keys * (counts / candidates.size * probability).sum()


def singular_values(cores: jax.Array) -> jax.Array:
    """Returns the (H, r) float32 singular values of the sum of `cores` (H, h, r, r), largest first."""
    return small_svd.singular_values(cores.astype(jnp.float32).sum(1))


def _candidates(
    queries: jax.Array, keys: Keys, directions: jax.Array, top_m: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the keys (T, 2, H, m) whose cells are compared, and their scores (T, 2, H, r, m)."""
    if isinstance(keys, ServedKeys):
        return served_candidates(queries, keys, top_m)
    if algorithms().candidates == "products":
        return candidates_by_products(queries, keys, directions, top_m)
    candidates = best_keys(queries, keys, directions, top_m)
    return candidates, key_scores(queries, keys, candidates)


def _retrieved(candidates: jax.Array, scores: jax.Array, cores: jax.Array, top_m: int) -> Retrieved:
    cells, of_cells = best_cells(scores, cores, top_m)
    row, column = jnp.divmod(cells, top_m)
    rows, columns = take_along_last(candidates[:, 0], row), take_along_last(candidates[:, 1], column)
    return Retrieved(rows, columns, of_cells, candidates)
