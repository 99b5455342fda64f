"""Chooses the best cells as `ultramem_jax.ops.cells` does, with tokens along the last axis, for accelerators.

Short axes (ranks, cores, candidates) come first, so that a TPU does not pad them to 128, and nothing is
sorted. The m² scores of a token's grid are one array, and a cell's scores are taken by comparing positions,
so that their derivative is a sum and no scatter.
"""

import jax
import jax.numpy as jnp

from ultramem_jax.ops.chunks import map_chunks
from ultramem_jax.ops.selection import largest, pick_with_gradient


def best_cells_by_ranks(scores: jax.Array, cores: jax.Array, top_m: int) -> tuple[jax.Array, jax.Array]:
    """Returns the result of `ops.cells.best_cells`, cells (T, H, top_m) and scores (T, H, top_m, h).

    Args:
        scores: (T, 2, H, r, m) float32.
        cores: (H, h, r, r), or (H, 0, 1, 1) for row + column.
        top_m: at most m².
    """

    def best(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        last = jnp.moveaxis(scores, 0, -1)
        row, column = last[0], last[1]  # (H, r, m, T)
        if cores.shape[1]:
            # Written out over ranks: r is 1 to 4, too short a contraction for a matrix product.
            mixed = _mixed(cores.sum(1), row)
            terms = [mixed[s][:, :, None] * column[:, s, None] for s in range(len(mixed))]
        else:
            terms = [row[:, 0, :, None] + column[:, 0, None]]
        grid = sum(terms[1:], terms[0])
        cells = largest(grid.reshape(grid.shape[0], -1, grid.shape[-1]), top_m)
        of_cells = _scores_of_cells(last, cores, cells)
        return jnp.moveaxis(cells, -1, 0), jnp.moveaxis(of_cells, (0, -1), (-1, 0))

    # The grid, and the comparisons of the first ranks, which are not all fused.
    return map_chunks(best, 4 * scores.shape[2] * scores.shape[-1] ** 2, scores)


def cell_scores_by_ranks(scores: jax.Array, cores: jax.Array, cells: jax.Array) -> jax.Array:
    """Returns the scores (T, H, top_m, h) of given cells (T, H, top_m), else as `best_cells_by_ranks`."""
    of_cells = _scores_of_cells(jnp.moveaxis(scores, 0, -1), cores, jnp.moveaxis(cells, 0, -1))
    return jnp.moveaxis(of_cells, (0, -1), (-1, 0))


def _scores_of_cells(scores: jax.Array, cores: jax.Array, cells: jax.Array) -> jax.Array:
    """Maps scores (2, H, r, m, T) and cells (H, top_m, T) to the cells' scores (h, H, top_m, T)."""
    i, j = jnp.divmod(cells[:, None], scores.shape[3])
    row, column = (
        pick_with_gradient(side, jnp.broadcast_to(at, (*side.shape[:2], *at.shape[2:])))
        for side, at in ((scores[0], i), (scores[1], j))
    )
    if not cores.shape[1]:
        return (row + column)[None, :, 0]
    of_cores = []
    for core in range(cores.shape[1]):
        mixed = _mixed(cores[:, core], row)
        terms = [mixed[s] * column[:, s] for s in range(len(mixed))]
        of_cores.append(sum(terms[1:], terms[0]))
    return jnp.stack(of_cores)


def _mixed(core: jax.Array, row: jax.Array) -> list[jax.Array]:
    """Returns Σ_q core[q, s]·row_q (H, m, T) for every column rank s, of core (H, r, r), row (H, r, m, T)."""
    ranks = range(core.shape[-1])
    mixed = []
    for s in ranks:
        terms = [core[:, q, s, None, None] * row[:, q] for q in ranks]
        mixed.append(sum(terms[1:], terms[0]))
    return mixed
