"""Retrieval: from the scores of row and column keys to the m best cells of the virtual grid.

A grid of K·K cells is never built. Each side is cut to its m best keys, and the best cells are sought among
the m·m pairs of those. For a sum of two scores (Product-Key Memory) this finds the m best of all K·K cells;
for a Tucker core it is the approximation of the UltraMem paper (section 3, TDQKR).

Scores are laid out (H, T, K) for product keys and (H, r, T, K) for Tucker retrieval, heads and ranks first,
because that is the order in which a batched matrix product of queries and keys writes them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Retrieved(NamedTuple):
    """The m cells of every head and token, best first."""

    rows: jax.Array
    """(H, T, m) int32 in [0, K)."""
    columns: jax.Array
    """(H, T, m) int32 in [0, K)."""
    scores: jax.Array
    """(H, T, m, h), differentiable; one score per core, a single one without cores."""
    row_candidates: jax.Array
    """(H, T, m) int32, the rows whose cells were compared, best first."""
    column_candidates: jax.Array
    """(H, T, m) int32."""


def retrieve_product_keys(row_scores: jax.Array, column_scores: jax.Array, top_m: int) -> Retrieved:
    """The `top_m` cells with the largest row score + column score (PKM, arXiv 1907.05242, section 3.2).

    Args:
        row_scores: (H, T, K) scores of the row keys.
        column_scores: (H, T, K) scores of the column keys.
        top_m: m <= K.

    Returns:
        Exactly the m best of all K² cells, with h = 1.
    """
    row_best, row_index = jax.lax.top_k(jax.lax.stop_gradient(row_scores), top_m)
    column_best, column_index = jax.lax.top_k(jax.lax.stop_gradient(column_scores), top_m)
    grid = row_best[..., :, None] + column_best[..., None, :]
    rows, columns = _best_cells(grid, row_index, column_index, top_m)
    scores = _pick(row_scores, rows) + _pick(column_scores, columns)
    return Retrieved(rows, columns, scores[..., None], row_index, column_index)


def retrieve_tucker(
    row_scores: jax.Array,
    column_scores: jax.Array,
    cores: jax.Array,
    row_direction: jax.Array,
    column_direction: jax.Array,
    top_m: int,
) -> Retrieved:
    """Tucker-decomposed query-key retrieval with multi-core scoring (UltraMem paper, section 3).

    The grid is S_rowᵀ·C·S_col with C the sum of the cores. Candidates are the m best rows of uᵀS_row and the
    m best columns of tᵀS_col; the exact grid over those m·m cells decides. Gradients reach the scores of the
    chosen cells alone, and neither u nor t.

    Args:
        row_scores: (H, r, T, K), S_row.
        column_scores: (H, r, T, K), S_col.
        cores: (H, h, r, r), the C⁽ⁱ⁾; first r is the row side.
        row_direction: (H, r), u, the leading left singular vector of C.
        column_direction: (H, r), t, the leading right singular vector of C.
        top_m: m <= K.

    Returns:
        The best m of the m·m candidate cells, with core i's own score at [..., i].
    """
    stop = jax.lax.stop_gradient
    fixed_rows, fixed_columns, fixed_core = stop(row_scores), stop(column_scores), stop(cores).sum(1)
    row_index = jax.lax.top_k(combine_ranks(stop(row_direction), fixed_rows), top_m)[1]
    column_index = jax.lax.top_k(combine_ranks(stop(column_direction), fixed_columns), top_m)[1]
    candidate_rows = _pick(fixed_rows, row_index[:, None])
    candidate_columns = _pick(fixed_columns, column_index[:, None])
    grid = jnp.zeros((), row_scores.dtype)
    # The sum over ranks is written out: r is 1 to 4, and a contraction that short is no work for a matmul.
    for rank in range(cores.shape[-1]):
        mixed = combine_ranks(fixed_core[:, :, rank], candidate_rows)
        grid = grid + mixed[..., :, None] * candidate_columns[:, rank, :, None, :]
    rows, columns = _best_cells(grid, row_index, column_index, top_m)
    scores = tucker_scores(_pick(row_scores, rows[:, None]), _pick(column_scores, columns[:, None]), cores)
    return Retrieved(rows, columns, scores, row_index, column_index)


def tucker_scores(row_scores: jax.Array, column_scores: jax.Array, cores: jax.Array) -> jax.Array:
    """Scores of given cells under every core: Σ_qs row_q · C⁽ⁱ⁾_qs · column_s.

    Args:
        row_scores: (H, r, T, m), of the cells' rows.
        column_scores: (H, r, T, m), of the cells' columns.
        cores: (H, h, r, r).

    Returns:
        (H, T, m, h).
    """
    num_cores, rank = cores.shape[1], cores.shape[-1]
    per_core = []
    for core in range(num_cores):
        score = jnp.zeros((), row_scores.dtype)
        for column_rank in range(rank):
            mixed = combine_ranks(cores[:, core, :, column_rank], row_scores)
            score = score + mixed * column_scores[:, column_rank]
        per_core.append(score)
    return jnp.stack(per_core, axis=-1)


def leading_singular_vectors(
    core: jax.Array, last_u: jax.Array, last_t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Leading singular vectors of the summed core, with a sign that does not jump.

    A pair (u, t) is defined up to a joint sign, and the sign decides which keys become candidates. It is
    chosen to be closer to the last pair in the sum of absolute differences, as in the authors' code; from
    zeros, and where both are equally close, it is that of the singular value decomposition.

    Args:
        core: (H, r, r), C.
        last_u: (H, r), the last left vector; zeros at the start.
        last_t: (H, r), the last right vector; zeros at the start.

    Returns:
        u (H, r) and t (H, r), float32, without a gradient.
    """
    left, _, right = jnp.linalg.svd(jax.lax.stop_gradient(core).astype(jnp.float32))
    u, t = left[:, :, 0], right[:, 0, :]
    distance = _distance(u, last_u) + _distance(t, last_t)
    mirrored = _distance(-u, last_u) + _distance(-t, last_t)
    sign = jnp.where(mirrored < distance, -1.0, 1.0).astype(jnp.float32)
    return u * sign, t * sign


def _distance(vector: jax.Array, last: jax.Array) -> jax.Array:
    return jnp.abs(vector - last).sum(-1, keepdims=True)


def core_loss(cores: jax.Array, margin: float) -> jax.Array:
    """Mean over heads of Σ_{i>=2} max(0, λ_i - τ)² / (r - 1), λ the singular values of C (paper, section 3).

    It keeps C near rank 1, where the candidates of `retrieve_tucker` are the right ones. Zero for r = 1.

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
    """K·Σ_i f_i·p_i over one side's keys: how unevenly they become candidates (UltraMemV2, arXiv 2508.18756).

    f_i is the share of key i in all candidates, p_i its mean probability under a softmax of the scores; heads
    count together. 1 if either is uniform. The gradient flows through p.

    Args:
        scores: (H, T, K), by which candidates are chosen.
        candidates: (H, T, m) int32 in [0, K).

    Returns:
        () float32, without the weight β.
    """
    num_keys = scores.shape[-1]
    counts = jnp.zeros((num_keys,), jnp.float32).at[candidates.reshape(-1)].add(1.0)
    probability = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).mean((0, 1))
    return num_keys * (counts / candidates.size * probability).sum()


def singular_values(cores: jax.Array) -> jax.Array:
    """(H, r) float32 singular values of the summed core of `cores` (H, h, r, r), largest first."""
    return jnp.linalg.svd(cores.astype(jnp.float32).sum(1), compute_uv=False)


def combine_ranks(weights: jax.Array, scores: jax.Array) -> jax.Array:
    """Σ_r weights (H, r) · scores (H, r, T, any) -> (H, T, any), as one fused pass over the scores.

    With u or t as weights, it gives the scores by which a side's candidates are chosen.
    """
    terms = [
        weights[:, rank, None, None].astype(scores.dtype) * scores[:, rank] for rank in range(scores.shape[1])
    ]
    return sum(terms[1:], terms[0])


def _best_cells(
    grid: jax.Array, row_index: jax.Array, column_index: jax.Array, top_m: int
) -> tuple[jax.Array, jax.Array]:
    """Rows and columns (H, T, m) of the m best cells of a candidate grid (H, T, m, m)."""
    cell = jax.lax.top_k(grid.reshape(*grid.shape[:-2], -1), top_m)[1]
    return _pick(row_index, cell // top_m), _pick(column_index, cell % top_m)


def _pick(values: jax.Array, index: jax.Array) -> jax.Array:
    """Entries along the last axis; every index is known to be in bounds."""
    return jnp.take_along_axis(values, index, axis=-1, mode="promise_in_bounds")
