"""Checks a library of kernels that was just built, on a few numbers, against NumPy.

It finds a compiler that makes wrong code, or a library that does not fit this jaxlib. The tests check every
kernel against the JAX function that it stands for.

    python -m ultramem_jax.kernels.self_check LIBRARY
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.kernels import calls, native
from ultramem_jax.kernels.rules import RowKernel


def wrong_kernels() -> list[str]:
    """Returns the names of the checks that fail; none if all is well."""
    return [name for name, check in _CHECKS.items() if not check()]


def _selection() -> bool:
    rng = np.random.default_rng(0)
    x = np.round(4 * rng.standard_normal((3, 700))).astype(np.float32) / 4
    values, index = jax.jit(calls.top_k, static_argnums=1)(x, 20)
    expected = np.argsort(-x, axis=1, kind="stable")[:, :20]
    return np.array_equal(index, expected) and np.array_equal(values, np.take_along_axis(x, expected, 1))


def _keys() -> bool:
    rng = np.random.default_rng(1)
    # Small integers: every sum is exact, and there are ties.
    queries, keys = (
        rng.integers(-3, 4, shape).astype(np.float32) for shape in ((20, 2, 2, 2, 8), (2, 2, 2, 600, 8))
    )
    directions = np.ones((2, 2, 2), np.float32)
    chosen = np.asarray(jax.jit(calls.best_keys, static_argnums=3)(queries, keys, directions, 8))
    scores = np.einsum("tahrd,ahrkd->tahrk", queries, keys)
    expected = np.argsort(-scores.sum(3), axis=-1, kind="stable")[..., :8]
    picked = np.take_along_axis(scores, expected[:, :, :, None], axis=-1)
    if not np.array_equal(chosen, expected):
        return False
    if not np.array_equal(jax.jit(calls.key_scores)(queries, keys, chosen), picked):
        return False
    cores = rng.integers(0, 3, (2, 2, 2, 2)).astype(np.float32)
    cells, of_cells = jax.jit(calls.best_cells, static_argnums=2)(picked, cores, 8)
    by_core = np.einsum("thqi,hcqs,thsj->thcij", picked[:, 0], cores, picked[:, 1]).reshape(20, 2, 2, -1)
    best = np.argsort(-by_core.sum(2), axis=-1, kind="stable")[..., :8]
    exact = np.moveaxis(np.take_along_axis(by_core, best[:, :, None], -1), 2, -1)
    return np.array_equal(cells, best) and np.array_equal(of_cells, exact)


def _rows() -> bool:
    rng = np.random.default_rng(2)
    table = rng.integers(-4, 5, (50, 24)).astype(np.float32)
    slots = rng.integers(0, 50, (9, 6)).astype(np.int32)
    blocks = rng.integers(0, 4, (9, 6)).astype(np.int32)
    weights = rng.integers(-2, 3, (9, 6, 2)).astype(np.float32)
    wide = np.repeat(weights, 12, axis=2)
    of_block = blocks[:, :, None] == np.arange(4)
    pooled = np.einsum("tje,tjd->ted", of_block, table[slots] * wide)
    if not np.array_equal(jax.jit(partial(calls.pool, expansion=4))(table, slots, blocks, weights), pooled):
        return False
    rows, counts, order, row_of_read = jax.jit(calls.rows_read, static_argnums=1)(slots.reshape(-1), 50)
    expected, reads = np.unique(slots, return_counts=True)
    used = len(expected)
    if not np.array_equal(rows[:used], expected) or not np.array_equal(counts[:used], reads):
        return False
    gradient = np.zeros_like(table)
    np.add.at(gradient, slots, wide * np.take_along_axis(pooled, blocks[:, :, None], axis=1))
    described = tuple(
        map(jnp.asarray, (rows, order, row_of_read, blocks, weights, pooled.astype(np.float32)))
    )
    half, step, seed = jnp.float32(0.5), jnp.int32(0), jnp.uint32(0)

    def update(table: jax.Array) -> list[jax.Array]:
        return calls.update_rows(
            RowKernel("sgd"), [table], described, half, step, seed, stochastic=True, record=False
        )[0]

    return np.array_equal(jax.jit(update)(jnp.asarray(table))[0], table - 0.5 * gradient)


_CHECKS: dict[str, Callable[[], bool]] = {"selection": _selection, "keys": _keys, "rows": _rows}


def main() -> None:
    """Loads the library that the command line names, and exits with a line if it is wrong."""
    native.register(Path(sys.argv[1]))
    if wrong := wrong_kernels():
        sys.exit(f"wrong results of {', '.join(wrong)}")


if __name__ == "__main__":
    main()
