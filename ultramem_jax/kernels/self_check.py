"""Checks a library of kernels that was just built, on a few numbers, against NumPy.

It finds a compiler that makes wrong code, or a library that does not fit this jaxlib. Most numbers are small
integers, so that sums are exact. The tests check every kernel against the JAX function that it stands for.

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
    # Of small integers many are equal.
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


def _key_gradients() -> bool:
    rng = np.random.default_rng(3)
    queries, keys, cotangent = (
        rng.integers(-3, 4, shape).astype(np.float32)
        for shape in ((20, 2, 2, 2, 8), (2, 2, 2, 40, 8), (20, 2, 2, 2, 5))
    )
    index = rng.integers(0, 40, (20, 2, 2, 5)).astype(np.int32)
    rows = np.take_along_axis(keys[None], index[:, :, :, None, :, None], axis=4)
    of_queries = np.einsum("tahrj,tahrjd->tahrd", cotangent, rows)
    of_keys = np.zeros_like(keys)
    side, head, rank = (np.arange(2).reshape(shape) for shape in ((2, 1, 1, 1), (2, 1, 1), (2, 1)))
    np.add.at(
        of_keys, (side, head, rank, index[:, :, :, None]), cotangent[..., None] * queries[:, :, :, :, None]
    )
    by_queries = jax.jit(calls.query_gradient, static_argnums=3)(cotangent, index, keys, 2)
    by_keys = jax.jit(calls.key_gradient, static_argnums=3)(cotangent, index, queries, keys.shape)
    return np.array_equal(by_queries, of_queries) and np.array_equal(by_keys, of_keys)


def _norm() -> bool:
    rng = np.random.default_rng(4)
    keys, gain = rng.standard_normal((2, 1, 2, 50, 24)), rng.standard_normal((2, 24))
    expected = keys * gain[:, None] / np.sqrt((keys**2).mean((2, 4), keepdims=True) + 0.5)
    found = jax.jit(calls.rms_norm, static_argnums=2)(keys.astype(np.float32), gain.astype(np.float32), 0.5)
    return np.allclose(found, expected, rtol=0, atol=1e-5)


def _reads(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws a table (50, 24), and the slots and blocks of reads (9, 6) of it."""
    table = rng.integers(-4, 5, (50, 24)).astype(np.float32)
    slots = rng.integers(0, 50, (9, 6)).astype(np.int32)
    blocks = rng.integers(0, 4, (9, 6)).astype(np.int32)
    return table, slots, blocks


def _products() -> bool:
    rng = np.random.default_rng(5)
    table, slots, blocks = _reads(rng)
    vectors = rng.integers(-2, 3, (9, 4, 24)).astype(np.float32)
    of_values = table[slots] * np.take_along_axis(vectors, blocks[:, :, None], axis=1)
    expected = of_values.reshape(9, 6, 2, 12).sum(-1)
    words = (table.view(np.uint32) >> 16).astype(np.uint16)  # exact: few bits are set
    multiply = jax.jit(partial(calls.products, cores=2))
    return all(np.array_equal(multiply(t, slots, blocks, vectors), expected) for t in (table, words))


def _hashes() -> bool:
    rng = np.random.default_rng(6)
    window = rng.integers(0, 2**31 - 1, (2, 40)).astype(np.int32)
    multipliers = rng.integers(1, 2**63 - 1, 2)
    with np.errstate(over="ignore"):
        hashed = window[:, 1:] * multipliers[0] ^ window[:, :-1] * multipliers[1]
    found = jax.jit(lambda w: calls.ngram_slots(w, multipliers, [1009], [2]))(window)
    return np.array_equal(found[..., 0], hashed % 1009)


def _rows() -> bool:
    rng = np.random.default_rng(2)
    table, slots, blocks = _reads(rng)
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


_CHECKS: dict[str, Callable[[], bool]] = {
    "selection": _selection,
    "keys": _keys,
    "key gradients": _key_gradients,
    "norm": _norm,
    "products": _products,
    "rows": _rows,
    "hashes": _hashes,
}


def main() -> None:
    """Loads the library that the command line names, and exits with a line if it is wrong."""
    try:
        native.register(Path(sys.argv[1]))
        wrong = wrong_kernels()
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    if wrong:
        sys.exit(f"wrong results of {', '.join(wrong)}")


if __name__ == "__main__":
    main()
