"""Computes the pooled lookup, products with rows, their derivatives, and row gradients for sparse training.

pooled[t, p, c]  = Σ_j [blocks[t, j] = p] · scores[t, j, c] · table[slots[t, j], slice c]
products[t, j]   = table[slots[t, j]] · vectors[t]

Each is the other's derivative: the derivative of `pooled` by its scores is a product of rows and cotangents,
that of `products` by its vectors is a pooled lookup. The backward pass gathers rows again instead of keeping
them. The E·N expanded table of Implicit Value Expansion (IVE) is never built: rows are first summed within
each virtual block and then projected.

Score c of a read weighs slice c of its row: this is Multi-Core Scoring (MCS).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ultramem_jax.kernels import calls
from ultramem_jax.kernels.dispatch import native_or
from ultramem_jax.memory_spaces import is_on_host
from ultramem_jax.ops.algorithms import algorithms
from ultramem_jax.ops.chunks import map_chunks
from ultramem_jax.ops.row_sums import sorted_rows, sums_of_rows
from ultramem_jax.ops.rows import take_rows

_PoolingSaved = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""Table, slots, blocks and scores, which `pooled_lookup` keeps for its backward pass."""
_ProductsSaved = tuple[jax.Array, jax.Array, jax.Array]
"""Table, slots and vectors, which `row_products` keeps for its backward pass."""


class RowsRead(NamedTuple):
    """Lists the rows that T·R reads touch, each once and sorted, and maps reads to these rows."""

    slots: jax.Array
    """(U,) int32, slots of the rows read, strictly increasing. Entries past the last row read are padding, N
    and more: a scatter with `mode="drop"` skips them."""
    counts: jax.Array
    """(U,) int32, number of reads of each row; zero past the last row read."""
    order: jax.Array
    """(T·R,) int32, indices of the reads, sorted by slot."""
    row_of_read: jax.Array
    """(T·R,) int32 in [0, U), row of each read in sorted order; never decreasing."""


class RowGradients(NamedTuple):
    """Holds the gradient of a table for the rows that were read; it is zero for all others."""

    slots: jax.Array
    """(U,) int32, slots of the rows, as in `RowsRead`."""
    values: jax.Array
    """(U, d_v) float32, gradients of the rows; past the last row read they have no meaning."""


class GradientsOfReads(NamedTuple):
    """Holds what the gradients of a table's rows are made of.

    A read adds its scores times the cotangent of its block to the gradient of its row. For a table of
    `row_products`, blocks are zeros, the scores are the products' cotangent (T, R, 1), and the cotangent is
    the vectors (T, 1, d).
    """

    rows: RowsRead
    """`rows_read` of the slots (T, R)."""
    blocks: jax.Array
    """(T, R) int32 in [0, E)."""
    scores: jax.Array
    """(T, R, h)."""
    cotangent: jax.Array
    """(T, E, d_v), of `pooled_lookup`'s result."""


def score_products(
    table: jax.Array, slots: jax.Array, blocks: jax.Array, vectors: jax.Array, cores: int, apart: bool = False
) -> jax.Array:
    """Returns products of rows read with the vectors of their blocks: `pooled_lookup`'s derivative by scores.

    Args:
        table: (N, d_v), as `ultramem_jax.ops.rows` stores it.
        slots: (T, R) int32 in [0, N).
        blocks: (T, R) int32 in [0, E).
        vectors: (T, E, d_v). Their dtype is that of the computation and of the result.
        cores: h, number of slices, of d_v/h values each.
        apart: the same as in `pooled_lookup`.

    Returns:
        (T, R, h).
    """
    expansion, dtype = vectors.shape[1], vectors.dtype

    def multiply(table: jax.Array, slots: jax.Array, blocks: jax.Array, vectors: jax.Array) -> jax.Array:
        of_reads = vectors
        if not apart:
            first = jnp.arange(0, blocks.shape[0] * expansion, expansion, dtype=blocks.dtype)[:, None]
            of_blocks = vectors.reshape(-1, vectors.shape[-1])
            of_reads = of_blocks.at[first + blocks].get(mode="promise_in_bounds")
        return slice_sums(take_rows(table, slots, dtype) * of_reads, cores)

    def by_chunks(table: jax.Array, slots: jax.Array, blocks: jax.Array, vectors: jax.Array) -> jax.Array:
        return map_chunks(
            partial(multiply, table), 2 * slots.shape[1] * table.shape[1], slots, blocks, vectors
        )

    kernel = partial(calls.products, cores=cores, apart=apart)
    return native_or(
        by_chunks, kernel, calls.serves_lookup(table, slots, vectors), table, slots, blocks, vectors
    )


def slice_sums(products: jax.Array, cores: int) -> jax.Array:
    """Sums products (..., d) over each of h slices -> (..., h)."""
    # The sum is a matrix product with zeros and ones, because XLA on CPU is slow at short sums.
    slices = jnp.repeat(jnp.eye(cores, dtype=products.dtype), products.shape[-1] // cores, axis=0)
    sums = jnp.matmul(products.reshape(-1, len(slices)), slices, precision=jax.lax.Precision.HIGHEST)
    return sums.reshape(*products.shape[:-1], cores)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def pooled_lookup(
    table: jax.Array,
    slots: jax.Array,
    blocks: jax.Array,
    scores: jax.Array,
    expansion: int,
    apart: bool = False,
) -> jax.Array:
    """Returns score-weighted sums of table rows, one per virtual block.

    Args:
        table: (N, d_v), as `ultramem_jax.ops.rows` stores it.
        slots: (T, R) int32 in [0, N).
        blocks: (T, R) int32 in [0, E).
        scores: (T, R, h); score c weighs the c-th slice of d_v/h values of a row. Their dtype is that of the
            computation and of the result.
        expansion: E.
        apart: True if E is R and read j is in block j. Then nothing is summed, which saves the R² work.

    Returns:
        (T, E, d_v). Differentiable in `table` (with a dense gradient, for dense training) and `scores`.
    """

    def pool(table: jax.Array, slots: jax.Array, blocks: jax.Array, scores: jax.Array) -> jax.Array:
        rows = take_rows(table, slots, scores.dtype)
        if apart:
            return weighed_rows(rows, scores)
        # Every core weighs whole rows, although only one slice of each is kept. If the rows were cut into
        # slices, XLA on CPU would gather them in the order of the slices, three times as slowly.
        tokens, width, cores = len(slots), rows.shape[-1], scores.shape[-1]
        weights = _block_weights(blocks, scores, expansion).reshape(tokens, -1, expansion * cores)
        by_core = jnp.einsum("tjq,tjd->tqd", weights, rows).reshape(
            tokens, expansion, cores, cores, width // cores
        )
        return jnp.stack([by_core[:, :, core, core] for core in range(cores)], axis=2)

    def by_chunks(table: jax.Array, slots: jax.Array, blocks: jax.Array, scores: jax.Array) -> jax.Array:
        pooled = map_chunks(partial(pool, table), slots.shape[1] * table.shape[1], slots, blocks, scores)
        return pooled.reshape(slots.shape[0], expansion, table.shape[1])

    kernel = partial(calls.pool, expansion=expansion, apart=apart)
    return native_or(
        by_chunks, kernel, calls.serves_lookup(table, slots, scores), table, slots, blocks, scores
    )


def _forward(
    table: jax.Array, slots: jax.Array, blocks: jax.Array, scores: jax.Array, expansion: int, apart: bool
) -> tuple[jax.Array, _PoolingSaved]:
    return pooled_lookup(table, slots, blocks, scores, expansion, apart), (table, slots, blocks, scores)


def _backward(
    expansion: int, apart: bool, saved: _PoolingSaved, cotangent: jax.Array
) -> tuple[jax.Array | None, None, None, jax.Array]:
    table, slots, blocks, scores = saved

    d_scores = score_products(table, slots, blocks, cotangent, scores.shape[-1], apart)
    reads = jnp.arange(slots.size, dtype=jnp.int32)
    per_read = read_gradients(_of_reads(cotangent, blocks, reads), scores.reshape(-1, scores.shape[-1]))
    return _table_gradient(table, slots, per_read), None, None, d_scores


pooled_lookup.defvjp(_forward, _backward)


@jax.custom_vjp
def row_products(table: jax.Array, slots: jax.Array, vectors: jax.Array) -> jax.Array:
    """Returns the inner products of every token's vector with the rows that it reads.

    Args:
        table: (N, d), as `ultramem_jax.ops.rows` stores it.
        slots: (T, R) int32 in [0, N).
        vectors: (T, d). Their dtype is that of the computation and of the result.

    Returns:
        (T, R). Differentiable in `table` (with a dense gradient) and `vectors`.
    """

    def multiply(table: jax.Array, slots: jax.Array, vectors: jax.Array) -> jax.Array:
        rows = take_rows(table, slots, vectors.dtype)
        return jnp.einsum("tjd,td->tj", rows, vectors)

    def by_chunks(table: jax.Array, slots: jax.Array, vectors: jax.Array) -> jax.Array:
        return map_chunks(partial(multiply, table), slots.shape[1] * table.shape[1], slots, vectors)

    def kernel(table: jax.Array, slots: jax.Array, vectors: jax.Array) -> jax.Array:
        # There is one block, so that the kernel does not look at `blocks`.
        return calls.products(table, slots, slots, vectors[:, None], cores=1)[..., 0]

    return native_or(by_chunks, kernel, calls.serves_lookup(table, slots, vectors), table, slots, vectors)


def _products_forward(
    table: jax.Array, slots: jax.Array, vectors: jax.Array
) -> tuple[jax.Array, _ProductsSaved]:
    return row_products(table, slots, vectors), (table, slots, vectors)


def _products_backward(
    saved: _ProductsSaved, cotangent: jax.Array
) -> tuple[jax.Array | None, None, jax.Array]:
    table, slots, vectors = saved
    one_block = jnp.zeros_like(slots)
    d_vectors = pooled_lookup(table, slots, one_block, cotangent[..., None], 1)[:, 0]
    tokens = jnp.repeat(jnp.arange(slots.shape[0]), slots.shape[1])
    per_read = read_gradients(vectors[tokens], cotangent.reshape(-1, 1))
    return _table_gradient(table, slots, per_read), None, d_vectors


row_products.defvjp(_products_forward, _products_backward)


def rows_read(slots: jax.Array, num_slots: int) -> RowsRead:
    """Sorts the reads by slot and counts them, without an array of the table's size.

    Args:
        slots: int32 in [0, N), any shape, T·R in all.
        num_slots: N.

    Returns:
        U = min(T·R, N) rows, padding included.
    """
    slots = slots.reshape(-1)

    def kernel(slots: jax.Array) -> RowsRead:
        return RowsRead(*calls.rows_read(slots, num_slots))

    return native_or(partial(_rows_read, num_slots=num_slots), kernel, slots.size > 0, slots)


def _rows_read(slots: jax.Array, num_slots: int) -> RowsRead:
    return RowsRead(*sorted_rows(slots, num_slots))


def row_gradients(of_reads: GradientsOfReads) -> RowGradients:
    """Returns the gradient of every row that was read, summed over its reads."""
    rows, blocks, scores, cotangent = of_reads
    # Reads are sorted by slot before their gradients are formed. The largest array here, (T·R, d_v), is then
    # written once and summed in the order in which it lies.
    per_read = read_gradients(
        _of_reads(cotangent, blocks, rows.order),
        take_weights(scores, rows.order),
    )
    return RowGradients(rows.slots, sums_of_rows(per_read, rows.row_of_read, rows.counts))


def _of_reads(vectors: jax.Array, blocks: jax.Array, reads: jax.Array) -> jax.Array:
    """Takes the vector (n, d) of the token and block of some reads.

    Args:
        vectors: (T, E, d).
        blocks: (T, R) int32 in [0, E), of all reads.
        reads: (n,) int32, indices of reads, of T·R.
    """
    # By one index: a TPU pads an array of pairs to 128 numbers each.
    index = reads // blocks.shape[1] * vectors.shape[1] + blocks.reshape(-1)[reads]
    return vectors.reshape(-1, vectors.shape[-1])[index]


def take_weights(scores: jax.Array, reads: jax.Array) -> jax.Array:
    """Returns the scores (n, h) of some of the reads of scores (T, R, h).

    Args:
        scores: (T, R, h).
        reads: (n,) int32, indices of reads, of T·R.
    """
    flat = scores.reshape(-1, scores.shape[-1])
    if algorithms().layouts == "wide":
        # A TPU would pad h, the last axis, to 128.
        return jnp.take(flat.T, reads, axis=1, mode="clip").T
    return flat[reads]


def read_gradients(cotangents: jax.Array, scores: jax.Array) -> jax.Array:
    """Returns what each read adds to its row's gradient, (T·R, d_v) float32.

    This is its scores (T·R, h) times its cotangent (T·R, d_v).
    """
    return weighed_rows(cotangents.astype(jnp.float32), scores.astype(jnp.float32))


def weighed_rows(rows: jax.Array, scores: jax.Array) -> jax.Array:
    """Multiplies each of the h slices of rows (..., d) with its score (..., h)."""
    if algorithms().layouts == "wide":
        # As an array, a TPU would pad the scores to 128.
        parts = jnp.split(rows, scores.shape[-1], axis=-1)
        return jnp.concatenate([part * scores[..., c, None] for c, part in enumerate(parts)], axis=-1)
    slices = rows.reshape(*scores.shape, -1)
    return (slices * scores[..., None]).reshape(rows.shape)


def _table_gradient(table: jax.Array, slots: jax.Array, per_read: jax.Array) -> jax.Array | None:
    """Returns the dense gradient of a table, or None for a table without one.

    The compiler removes this as dead code unless the table is differentiated.
    """
    if not has_dense_gradient(table):
        return None
    return jnp.zeros(table.shape, jnp.float32).at[slots.reshape(-1)].add(per_read).astype(table.dtype)


def has_dense_gradient(table: jax.Array) -> bool:
    """Tells whether a table can be differentiated.

    A table that is stored as words, or in host memory, counts as a constant and is trained by rows.
    """
    return jnp.issubdtype(table.dtype, jnp.floating) and not is_on_host(table)


def _one_hot(blocks: jax.Array, expansion: int, dtype: jnp.dtype) -> jax.Array:
    """Returns (T, R, E): one at the block of each read, else zero."""
    return jax.nn.one_hot(blocks, expansion, dtype=dtype)


def _block_weights(blocks: jax.Array, scores: jax.Array, expansion: int) -> jax.Array:
    """Returns (T, R, E, h): the scores of each read at its own block, else zero."""
    return _one_hot(blocks, expansion, scores.dtype)[..., None] * scores[:, :, None]
