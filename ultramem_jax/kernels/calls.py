"""Calls the native kernels: a function of arrays for each, with the shapes and dtypes that it serves.

A function computes what the JAX function that its docstring names computes, and a function `serves_…` tells
whether it can. Selection is equal to the bit. Sums differ in the order of their terms. Where JAX computes in
bfloat16, kernels compute in float32 and round the result.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.kernels.rules import RowKernel
from ultramem_jax.kernels.targets import target
from ultramem_jax.memory_spaces import is_on_host

Shape = jax.ShapeDtypeStruct
_MOST_SELECTED = 96
"""Largest m of `best_keys`, as in `sources/select.h`."""
_MOST_VALUES = 1 << 31
"""Largest number of values that int32 indices count."""


def _call(
    name: str, results: Shape | Sequence[Shape], input_output_aliases: dict[int, int] | None = None
) -> Callable[..., Any]:
    """Returns the function of arrays and attributes that a kernel computes; `vmap` calls it in turn."""
    return jax.ffi.ffi_call(
        target(name), results, vmap_method="sequential", input_output_aliases=input_output_aliases
    )


def _is_computed(*arrays: jax.Array) -> bool:
    """Tells whether all arrays have one dtype, float32 or bfloat16."""
    return arrays[0].dtype in (jnp.float32, jnp.bfloat16) and len({a.dtype for a in arrays}) == 1


def _is_table(table: jax.Array) -> bool:
    """Tells whether an array can be a table of `ops.rows`, (N, d) float32 or words, on the device."""
    return table.ndim == 2 and table.dtype in (jnp.float32, jnp.uint16) and not is_on_host(table)


# ---- retrieval


def serves_top_k(x: jax.Array, k: int) -> bool:
    """Tells whether `top_k` serves x (..., K)."""
    return x.dtype == jnp.float32 and 0 < k <= x.shape[-1] and 0 < x.size < _MOST_VALUES


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns `jax.lax.top_k` of x (..., K) float32, to the bit, NaN included."""
    shape = (*x.shape[:-1], k)
    values, index = _call("top_k", (Shape(shape, jnp.float32), Shape(shape, jnp.int32)))(x)
    return values, index


def serves_best_keys(queries: jax.Array, keys: jax.Array, top_m: int) -> bool:
    """Tells whether `best_keys` serves these queries and keys."""
    return _is_computed(queries, keys) and queries.size > 0 and top_m <= min(_MOST_SELECTED, keys.shape[3])


def best_keys(queries: jax.Array, keys: jax.Array, directions: jax.Array, top_m: int) -> jax.Array:
    """Returns `ops.key_scores.best_keys`: (T, 2, H, m) int32."""
    result = Shape((*queries.shape[:3], top_m), jnp.int32)
    return _call("best_keys", result)(queries, keys, directions.astype(jnp.float32))


def serves_key_scores(queries: jax.Array, keys: jax.Array) -> bool:
    """Tells whether `key_scores`, `query_gradient` and `key_gradient` serve these queries and keys."""
    return _is_computed(queries, keys) and queries.size > 0


def key_scores(queries: jax.Array, keys: jax.Array, index: jax.Array) -> jax.Array:
    """Returns `ops.key_scores.key_scores`: (T, 2, H, r, m) float32."""
    result = Shape((*index.shape[:3], keys.shape[2], index.shape[3]), jnp.float32)
    return _call("key_scores", result)(queries, keys, index)


def query_gradient(cotangent: jax.Array, index: jax.Array, keys: jax.Array, query_ranks: int) -> jax.Array:
    """Returns the gradient (T, 2, H, q, d) of `key_scores` by queries, in the dtype of the keys."""
    result = Shape((*index.shape[:3], query_ranks, keys.shape[4]), keys.dtype)
    return _call("query_gradient", result)(cotangent.astype(jnp.float32), index, keys)


def key_gradient(
    cotangent: jax.Array, index: jax.Array, queries: jax.Array, keys: tuple[int, ...]
) -> jax.Array:
    """Returns the gradient of `key_scores` by keys of the shape `keys`, (2, S, r, K, d), in float32."""
    return _call("key_gradient", Shape(keys, jnp.float32))(cotangent.astype(jnp.float32), index, queries)


def serves_rms_norm(keys: jax.Array, gain: jax.Array) -> bool:
    """Tells whether `rms_norm` and `rms_norm_gradient` serve these keys."""
    return keys.dtype == gain.dtype == jnp.float32 and keys.size > 0


def rms_norm(keys: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """Returns `ops.key_norm.rms_norm_of_keys`: (2, S, r, K, d) float32."""
    normed: jax.Array = _call("rms_norm", Shape(keys.shape, jnp.float32))(keys, gain, eps=np.float32(eps))
    return normed


def rms_norm_gradient(
    cotangent: jax.Array, keys: jax.Array, gain: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of `rms_norm` by keys and by gain."""
    results = (Shape(keys.shape, jnp.float32), Shape(gain.shape, jnp.float32))
    d_keys, d_gain = _call("rms_norm_gradient", results)(cotangent, keys, gain, eps=np.float32(eps))
    return d_keys, d_gain


def serves_best_cells(scores: jax.Array, cores: jax.Array, top_m: int) -> bool:
    """Tells whether `best_cells` serves scores (T, 2, H, r, m)."""
    cells = scores.shape[-1] ** 2
    return scores.dtype == cores.dtype == jnp.float32 and scores.size > 0 and top_m <= cells < _MOST_VALUES


def best_cells(scores: jax.Array, cores: jax.Array, top_m: int) -> tuple[jax.Array, jax.Array]:
    """Returns the `top_m` best cells of every token and head, best first, and their scores.

    Args:
        scores: (T, 2, H, r, m) float32, scores of the candidates: rows, and columns.
        cores: (H, h, r, r) float32; (H, 0, 1, 1) for the sum of two scores, with r = h = 1.
        top_m: at most m².

    Returns:
        Cells (T, H, top_m) int32, row·m + column among the candidates; their scores (T, H, top_m, h).
    """
    shape = (scores.shape[0], scores.shape[2], top_m)
    results = (Shape(shape, jnp.int32), Shape((*shape, max(cores.shape[1], 1)), jnp.float32))
    cells, of_cells = _call("best_cells", results)(scores, cores)
    return cells, of_cells


def best_cells_gradient(
    cotangent: jax.Array, cells: jax.Array, scores: jax.Array, cores: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of `best_cells`' scores, by the candidates' scores and by the cores."""
    results = (Shape(scores.shape, jnp.float32), Shape(cores.shape, jnp.float32))
    d_scores, d_cores = _call("best_cells_gradient", results)(cotangent, cells, scores, cores)
    return d_scores, d_cores


# ---- lookup


def serves_lookup(table: jax.Array, slots: jax.Array, values: jax.Array) -> bool:
    """Tells whether `pool` and `products` serve a table, slots (T, R), and scores or vectors."""
    return _is_table(table) and _is_computed(values) and slots.size > 0


def pool(
    table: jax.Array,
    slots: jax.Array,
    blocks: jax.Array,
    scores: jax.Array,
    first: jax.Array | int = 0,
    *,
    expansion: int,
    apart: bool = False,
) -> jax.Array:
    """Returns `ops.lookup.pooled_lookup`, of the rows from slot `first` on: (T, E, d) in the scores' dtype.

    Reads of other rows count as zeros. A NaN among the scores is in the sum of its block. JAX's sums are
    matrix products, in which it reaches the token's other blocks too.
    """
    result = Shape((slots.shape[0], expansion, table.shape[1]), scores.dtype)
    return _call("pool", result)(
        table, slots, blocks, scores, jnp.asarray(first, jnp.int32), apart=np.int64(apart)
    )


def products(
    table: jax.Array,
    slots: jax.Array,
    blocks: jax.Array,
    vectors: jax.Array,
    first: jax.Array | int = 0,
    *,
    cores: int,
    apart: bool = False,
) -> jax.Array:
    """Returns `ops.lookup.score_products`, of the rows from slot `first` on: (T, R, h) in the vectors' dtype.

    Those of reads of other rows are zero.
    """
    result = Shape((*slots.shape, cores), vectors.dtype)
    return _call("products", result)(
        table, slots, blocks, vectors, jnp.asarray(first, jnp.int32), apart=np.int64(apart)
    )


# ---- rows that were read


def rows_read(slots: jax.Array, num_slots: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the fields of `ops.lookup.rows_read` for slots (n,) int32, to the bit.

    When it runs, it fails if a slot is not in [0, num_slots).
    """
    (n,), num_rows = slots.shape, min(slots.size, num_slots)
    of_rows, of_reads = Shape((num_rows,), jnp.int32), Shape((n,), jnp.int32)
    found = _call("rows_read", (of_rows, of_rows, of_reads, of_reads))(slots, num_slots=np.int64(num_slots))
    slots, counts, order, row_of_read = found
    return slots, counts, order, row_of_read


def record_reads(
    seen: jax.Array, slots: jax.Array, counts: jax.Array, num_reads: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Records rows read (U,) and their counts in `seen` (N,) bool, in place.

    Returns:
        `seen`, the number of slots that are new () int32, and the entropy of the reads () float32 in nats.
    """
    results = (Shape(seen.shape, seen.dtype), Shape((), jnp.int32), Shape((), jnp.float32))
    seen, num_new, entropy = _call("record_reads", results, input_output_aliases={0: 0})(
        seen, slots, counts, num_reads=np.int64(num_reads)
    )
    return seen, num_new, entropy


def serves_update(arrays: Sequence[jax.Array], weights: jax.Array, vectors: jax.Array) -> bool:
    """Tells whether `update_rows` serves a table with its state, and reads with these weights and vectors."""
    table, *state = arrays
    kept = all((a.ndim == 2 and a.dtype == jnp.int32 and not is_on_host(a)) or _is_table(a) for a in state)
    return _is_table(table) and kept and _is_computed(weights, vectors) and weights.size > 0


def update_rows(
    rule: RowKernel,
    arrays: Sequence[jax.Array],
    reads: tuple[jax.Array, ...],
    rate: jax.Array,
    step: jax.Array,
    seed: jax.Array,
    *,
    stochastic: bool,
    record: bool,
    first: tuple[jax.Array | int, jax.Array | int] = (0, 0),
    means: jax.Array | None = None,
) -> tuple[list[jax.Array], jax.Array, list[jax.Array]]:
    """Applies a rule to the rows that were read, in place.

    Args:
        rule: the rule.
        arrays: the table (N, d), and what the rule keeps, (N, d) or (N, 1).
        reads: rows read (U,), order (n,) and rows (n,) of the reads, as in `ops.lookup.RowsRead`; blocks
            (T, R) int32, weights (T, R, h) and vectors (T, E, d).
        rate: () float32, the learning rate.
        step: () int32, the step, from 0.
        seed: () uint32, for rounding.
        stochastic: whether bfloat16 is rounded stochastically.
        record: whether to return the rows as they were.
        first: slot of the first row, and number of the first column, in the whole table.
        means: (U,) float32, means of the squares of the gradients of whole rows, if columns are split.

    Returns:
        The arrays; the sum of the squares of the new rows before rounding, () float32; the rows as they were,
        (U, ...) each, or none. Entries past the last row read are undefined.
    """
    num_rows = reads[0].shape[0]
    shapes = [Shape(a.shape, a.dtype) for a in arrays]
    before = [Shape((num_rows, *a.shape[1:]), a.dtype) for a in arrays] if record else []
    results = (*shapes, Shape((), jnp.float32), *before)
    inputs = (
        *reads,
        jnp.asarray(rate, jnp.float32),
        jnp.asarray(step, jnp.int32),
        jnp.broadcast_to(seed, (len(arrays),)),
        jnp.stack([jnp.asarray(x, jnp.int32) for x in first]),
        jnp.zeros((0,), jnp.float32) if means is None else means,
    )
    done = _call(
        "update_rows",
        results,
        input_output_aliases={len(inputs) + i: i for i in range(len(arrays))},
    )(*inputs, *arrays, stochastic=np.int64(stochastic), **rule.attributes())
    return list(done[: len(arrays)]), done[len(arrays)], list(done[len(arrays) + 1 :])


def row_mean_squares(reads: tuple[jax.Array, ...], num_slots: int) -> jax.Array:
    """Returns the means (U,) float32 of the squares of every row's gradient, zero past the last row.

    Args:
        reads: as in `update_rows`.
        num_slots: number of rows of the table.
    """
    means = Shape(reads[0].shape, jnp.float32)
    return _call("row_mean_squares", means)(*reads, num_slots=np.int64(num_slots))


# ---- n-grams


def ngram_slots(
    window: jax.Array, multipliers: np.ndarray, sizes: Sequence[int], orders: Sequence[int]
) -> jax.Array:
    """Returns `ops.ngram_hash.ngram_slots`: (B, S, R) int32, to the bit.

    Args:
        window: (B, n_max - 1 + S) int32, ids with those before them.
        multipliers: at least (n_max,) int64.
        sizes: (R,), rows of the heads' tables.
        orders: lengths of the n-grams.
    """
    span = max(orders)
    halves = np.ascontiguousarray(multipliers[:span], "<i8").view(np.uint32).reshape(span, 2)
    result = Shape((window.shape[0], window.shape[1] - span + 1, len(sizes)), jnp.int32)
    return _call("ngram_slots", result)(
        window.astype(jnp.int32), halves, np.asarray(sizes, np.int32), np.asarray(orders, np.int32)
    )
