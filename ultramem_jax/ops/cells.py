"""Chooses the best cells among the pairs of a token's candidates, and scores them under every core.

A cell pairs a row with a column candidate. Its score under a core C is Σ_qs row_q · C_qs · column_s: this is
TDQKR with Multi-Core Scoring (MCS) of the UltraMem paper, section 3. Without cores it is row + column, as in
Product-Key Memory (arXiv 1907.05242). Cells are chosen by the sum of the cores.
"""

from functools import partial

import jax
import jax.numpy as jnp

from ultramem_jax.kernels import calls
from ultramem_jax.kernels.dispatch import native_or
from ultramem_jax.ops.algorithms import algorithms
from ultramem_jax.ops.cells_by_ranks import best_cells_by_ranks, cell_scores_by_ranks
from ultramem_jax.ops.chunks import map_chunks
from ultramem_jax.ops.on_mesh import per_token, per_token_and_sum

_Cells = tuple[jax.Array, jax.Array]
"""Cells and their scores."""


def no_cores(heads: int) -> jax.Array:
    """Returns the cores (H, 0, 1, 1) that stand for row + column."""
    return jnp.zeros((heads, 0, 1, 1), jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def best_cells(scores: jax.Array, cores: jax.Array, top_m: int) -> _Cells:
    """Returns the `top_m` best cells of every token and head, best first, and their scores.

    Args:
        scores: (T, 2, H, r, m) float32, of the candidates: side 0 are rows, side 1 columns.
        cores: (H, h, r, r), the C⁽ⁱ⁾ of Multi-Core Scoring, or `no_cores(H)` with r = 1.
        top_m: at most m².

    Returns:
        Cells (T, H, top_m) int32, each row·m + column; scores (T, H, top_m, h) float32, core i's at [..., i],
        or h = 1 without cores. Scores are differentiable in both arguments; the choice has no gradient.
    """

    def best(scores: jax.Array, cores: jax.Array) -> _Cells:
        kernel, serves = partial(calls.best_cells, top_m=top_m), calls.serves_best_cells(scores, cores, top_m)
        return native_or(partial(_best_cells, top_m=top_m), kernel, serves, scores, cores)

    return per_token(best, (scores,), (cores,))


def _forward(
    scores: jax.Array, cores: jax.Array, top_m: int
) -> tuple[_Cells, tuple[jax.Array, jax.Array, jax.Array]]:
    cells, of_cells = best_cells(scores, cores, top_m)
    return (cells, of_cells), (cells, scores, cores)


def _backward(
    top_m: int, saved: tuple[jax.Array, jax.Array, jax.Array], cotangents: _Cells
) -> tuple[jax.Array, jax.Array]:
    def gradients(
        cotangent: jax.Array, cells: jax.Array, scores: jax.Array, cores: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        serves = calls.serves_best_cells(scores, cores, top_m)
        return native_or(_gradients, calls.best_cells_gradient, serves, cotangent, cells, scores, cores)

    cells, scores, cores = saved
    return per_token_and_sum(gradients, (cotangents[1], cells, scores), (cores,))


best_cells.defvjp(_forward, _backward)


def _best_cells(scores: jax.Array, cores: jax.Array, top_m: int) -> _Cells:
    if algorithms().selection == "ranks":
        return best_cells_by_ranks(scores, cores, top_m)
    summed = cores.sum(1)

    def best(scores: jax.Array) -> jax.Array:
        row, column = jnp.unstack(scores, axis=1)  # (T, H, r, m) each
        if not cores.shape[1]:
            grid = row[:, :, 0, :, None] + column[:, :, 0, None, :]
        else:
            grid = jnp.zeros((), row.dtype)
            # The sum over ranks is written out: r is 1 to 4, too short a contraction for a matrix product.
            for rank in range(summed.shape[-1]):
                mixed = _combine_ranks(summed[:, :, rank], row)
                grid = grid + mixed[..., :, None] * column[:, :, rank, None, :]
        return jax.lax.top_k(grid.reshape(*grid.shape[:-2], -1), top_m)[1]

    cells = map_chunks(best, scores.shape[2] * scores.shape[-1] ** 2, scores)
    return cells, cell_scores(scores, cores, cells)


def _gradients(
    cotangent: jax.Array, cells: jax.Array, scores: jax.Array, cores: jax.Array
) -> tuple[jax.Array, jax.Array]:
    by_ranks = algorithms().selection == "ranks"
    of_cells = cell_scores_by_ranks if by_ranks else cell_scores
    return jax.vjp(partial(of_cells, cells=cells), scores, cores)[1](cotangent)


def cell_scores(scores: jax.Array, cores: jax.Array, cells: jax.Array) -> jax.Array:
    """Returns the scores (T, H, top_m, h) of given cells (T, H, top_m), else as `best_cells`."""
    row, column = jnp.unstack(scores, axis=1)
    i, j = jnp.divmod(cells[:, :, None], scores.shape[-1])
    row, column = _pick(row, i), _pick(column, j)
    if not cores.shape[1]:
        return (row + column)[:, :, 0, :, None]
    per_core = []
    for core in range(cores.shape[1]):
        score = jnp.zeros((), row.dtype)
        for rank in range(cores.shape[-1]):
            score = score + _combine_ranks(cores[:, core, :, rank], row) * column[:, :, rank]
        per_core.append(score)
    return jnp.stack(per_core, axis=-1)


def _combine_ranks(weights: jax.Array, scores: jax.Array) -> jax.Array:
    """Sums scores (T, H, r, m) over ranks, weighted by (H, r) -> (T, H, m)."""
    terms = [weights[None, :, rank, None] * scores[:, :, rank] for rank in range(scores.shape[2])]
    return sum(terms[1:], terms[0])


def _pick(values: jax.Array, position: jax.Array) -> jax.Array:
    """Takes entries of values (..., m) with a gradient along the last axis.

    Comparing with all m is quicker than scattering that gradient.
    """
    chosen = jax.nn.one_hot(position, values.shape[-1], dtype=bool)
    return jnp.where(chosen, values[..., None, :], 0).sum(-1)
