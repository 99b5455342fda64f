"""Looks up rows of tables that are split over P devices of a mesh, by slots, by width, or both.

    at the tokens (T/P each)             at the owners (the T tokens of a group of P)

    slots, blocks, scores    --------->  all-gather                        `numbers_to_owners`
                                         owned rows, weighed and summed
    pooled (T/P, E, d_v)     <---------  by slots: reduce-scatter          `sums_to_tokens`
                                         by width: all-to-all of columns
    its cotangent            --------->  by slots: all-gather              `columns_to_owners`
                                         by width: all-to-all of columns
    cotangent of the scores  <---------  reduce-scatter                    `numbers_to_tokens`

By slots, a device owns N/P rows and sums those that its group reads. The tokens get the sum over all owners.
By width, a device owns d_v/P columns of all rows. In both cases only sums travel back, E of d_v values for a
token, and not the R rows that went into them. No collective's size depends on N.

Owners form the gradients of their rows (`training.table_gradients`). They already have what this takes: the
reads, and the cotangent of the sums at the owners. To make both visible to the caller, a lookup has two
halves. The first ends with the owners' sums, the second brings them to the tokens. Without a mesh the second
half does nothing, and the first is `ultramem_jax.ops.lookup`.

In the shapes, T is all tokens; P_s and P_w are the numbers of parts that rows and columns are split into.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ultramem_jax.config import exchange_purposes as purposes
from ultramem_jax.config.exchange_shapes import block_bytes
from ultramem_jax.ops import lookup
from ultramem_jax.ops.exchanges import named_exchange
from ultramem_jax.ops.on_mesh import MeshAxes, current_axes, island
from ultramem_jax.ops.owned_rows import pooled_of_owned, products_of_owned

_Pair = tuple[jax.Array, jax.Array]
"""Sums at the owners, and the scores or vectors that went into them."""


def reads_at_owners(slots: jax.Array, blocks: jax.Array, expansion: int) -> tuple[jax.Array, jax.Array]:
    """Gathers slots and blocks of all tokens to every device of a group.

    Args:
        slots: (T, R) int32.
        blocks: (T, R) int32 in [0, E).
        expansion: E.

    Returns:
        Slots and blocks, (T, R) int32 both.
    """
    axes = current_axes()
    if axes is None or not axes.of_tokens(axes.owners):
        return slots, blocks

    def gather(slots: jax.Array, blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
        slots = numbers_to_owners(axes, slots, purposes.READS_TO_OWNERS)
        if expansion == 1:
            return slots, jnp.zeros_like(slots)
        narrow = numbers_to_owners(axes, narrow_blocks(blocks, expansion), purposes.READS_TO_OWNERS)
        return slots, narrow.astype(jnp.int32)

    tokens, owners = P(axes.tokens), P(axes.replicas)
    return island(axes, gather, (tokens, tokens), (owners, owners))(slots, blocks)


def narrow_blocks(blocks: jax.Array, expansion: int) -> jax.Array:
    """Casts blocks in [0, `expansion`) to the dtype in which they are sent: mostly one byte is enough."""
    return blocks.astype({1: jnp.uint8, 4: jnp.int32}[block_bytes(expansion)])


# ---- the pooled lookup


def pooled_shape(tokens: int, expansion: int, width: int) -> tuple[int, ...]:
    """Returns the shape of `pooled_at_owners`'s sums: (T, E, d_v), on a mesh (P_s, T, E, d_v)."""
    axes = current_axes()
    parts = () if axes is None else (axes.size(axes.slots),)
    return (*parts, tokens, expansion, width)


def pooled_at_owners(
    table: jax.Array,
    slots: jax.Array,
    blocks: jax.Array,
    scores: jax.Array,
    expansion: int,
    apart: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns score-weighted sums of the rows that each device owns, one per virtual block.

    Args:
        table: (N, d_v), as `ultramem_jax.ops.rows` stores it.
        slots: (T, R) int32 in [0, N), of `reads_at_owners`.
        blocks: (T, R) int32 in [0, E), of `reads_at_owners`.
        scores: (T, R, h), at the tokens; score c weighs the c-th slice of d_v/h values of a row. Their dtype
            is that of the computation and of the result.
        expansion: E.
        apart: True if E is R and read j is in block j.

    Returns:
        The sums, of `pooled_shape`, and the scores at the owners. The sums are differentiable in `table`
        (with a dense gradient, for dense training) and in `scores`.
    """
    axes = current_axes()
    if axes is None:
        return lookup.pooled_lookup(table, slots, blocks, scores, expansion, apart), scores
    return _pooled_at_owners(table, slots, blocks, scores, expansion, apart, axes)


def pooled_at_tokens(sums: jax.Array) -> jax.Array:
    """Brings `pooled_at_owners`'s sums to the tokens: (T, E, d_v)."""
    axes = current_axes()
    return sums if axes is None else _pooled_at_tokens(sums, axes)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _pooled_at_owners(
    table: jax.Array,
    slots: jax.Array,
    blocks: jax.Array,
    scores: jax.Array,
    expansion: int,
    apart: bool,
    axes: MeshAxes,
) -> _Pair:
    def pool(table: jax.Array, slots: jax.Array, blocks: jax.Array, scores: jax.Array) -> _Pair:
        scores = numbers_to_owners(axes, scores, purposes.SCORES_TO_OWNERS)
        return _pool(axes, table, slots, blocks, scores, expansion, apart=apart)[None], scores

    reads = P(axes.replicas)
    specs = (axes.table, reads, reads, P(axes.tokens))
    return island(axes, pool, specs, (_sums(axes), reads))(table, slots, blocks, scores)


def _pooled_forward(
    table: jax.Array,
    slots: jax.Array,
    blocks: jax.Array,
    scores: jax.Array,
    expansion: int,
    apart: bool,
    axes: MeshAxes,
) -> tuple[_Pair, tuple[jax.Array, ...]]:
    sums, gathered = _pooled_at_owners(table, slots, blocks, scores, expansion, apart, axes)
    return (sums, gathered), (table, slots, blocks, gathered)


def _pooled_backward(
    expansion: int, apart: bool, axes: MeshAxes, saved: tuple[jax.Array, ...], cotangents: _Pair
) -> tuple[jax.Array | None, None, None, jax.Array]:
    table, slots, blocks, scores = saved
    cotangent = cotangents[0]  # the scores at the owners are only recorded: their cotangent is unused

    def score_gradient(
        table: jax.Array, slots: jax.Array, blocks: jax.Array, cotangent: jax.Array
    ) -> jax.Array:
        cores = scores.shape[-1]
        products = _score_products(axes, table, slots, blocks, cotangent[0], cores, apart=apart)
        return numbers_to_tokens(axes, products, purposes.SCORE_GRADIENTS_TO_TOKENS)

    reads = P(axes.replicas)
    specs = (axes.table, reads, reads, _sums(axes))
    d_scores = island(axes, score_gradient, specs, P(axes.tokens))(table, slots, blocks, cotangent)
    dense_specs = (axes.table, reads, reads, reads, _sums(axes))

    def table_gradient(
        table: jax.Array, slots: jax.Array, blocks: jax.Array, scores: jax.Array, cotangent: jax.Array
    ) -> jax.Array:
        tokens = jnp.repeat(jnp.arange(slots.shape[0]), slots.shape[1])
        weights = own_cores(axes, scores).reshape(slots.size, -1)
        per_read = lookup.read_gradients(cotangent[0][tokens, blocks.reshape(-1)], weights)
        return _dense_gradient(axes, table, slots, per_read)

    dense = island(axes, table_gradient, dense_specs, axes.table)
    return _if_trained(dense, table, slots, blocks, scores, cotangent), None, None, d_scores


_pooled_at_owners.defvjp(_pooled_forward, _pooled_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _pooled_at_tokens(sums: jax.Array, axes: MeshAxes) -> jax.Array:
    def bring(sums: jax.Array) -> jax.Array:
        return sums_to_tokens(axes, sums[0], purposes.POOLED_SUMS_TO_TOKENS)

    return island(axes, bring, _sums(axes), P(axes.tokens))(sums)


def _at_tokens_forward(sums: jax.Array, axes: MeshAxes) -> tuple[jax.Array, None]:
    return _pooled_at_tokens(sums, axes), None


def _at_tokens_backward(axes: MeshAxes, saved: None, cotangent: jax.Array) -> tuple[jax.Array]:
    del saved

    def bring(cotangent: jax.Array) -> jax.Array:
        return columns_to_owners(axes, cotangent, purposes.COTANGENTS_TO_OWNERS)[None]

    return (island(axes, bring, P(axes.tokens), _sums(axes))(cotangent),)


_pooled_at_tokens.defvjp(_at_tokens_forward, _at_tokens_backward)


# ---- products with rows


def products_shape(tokens: int, reads: int) -> tuple[int, ...]:
    """Returns the shape of `products_at_owners`'s sums: (T, R), on a mesh (P_s, P_w, T, R)."""
    axes = current_axes()
    parts = () if axes is None else (axes.size(axes.slots), axes.size(axes.width))
    return (*parts, tokens, reads)


def products_at_owners(table: jax.Array, slots: jax.Array, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns inner products of every token's vector with the rows read, over what each device owns of them.

    Args:
        table: (N, d), as `ultramem_jax.ops.rows` stores it.
        slots: (T, R) int32 in [0, N), of `reads_at_owners`.
        vectors: (T, d), at the tokens. Their dtype is that of the computation and of the result.

    Returns:
        The products, of `products_shape`, and the vectors (T, d) at the owners. The products are
        differentiable in `table` and `vectors`.
    """
    axes = current_axes()
    if axes is None:
        return lookup.row_products(table, slots, vectors), vectors
    return _products_at_owners(table, slots, vectors, axes)


def products_at_tokens(sums: jax.Array) -> jax.Array:
    """Brings `products_at_owners`'s products to the tokens: (T, R)."""
    axes = current_axes()
    return sums if axes is None else _products_at_tokens(sums, axes)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _products_at_owners(table: jax.Array, slots: jax.Array, vectors: jax.Array, axes: MeshAxes) -> _Pair:
    def multiply(table: jax.Array, slots: jax.Array, vectors: jax.Array) -> _Pair:
        vectors = columns_to_owners(axes, vectors, purposes.INPUTS_TO_OWNERS)
        one_block = jnp.zeros_like(slots)
        products = _score_products(axes, table, slots, one_block, vectors[:, None], 1, split=False)
        return products[None, None, ..., 0], vectors

    specs = (axes.table, P(axes.replicas), P(axes.tokens))
    out = (_products(axes), P(axes.replicas, axes.width))
    return island(axes, multiply, specs, out)(table, slots, vectors)


def _products_forward(
    table: jax.Array, slots: jax.Array, vectors: jax.Array, axes: MeshAxes
) -> tuple[_Pair, tuple[jax.Array, ...]]:
    sums, gathered = _products_at_owners(table, slots, vectors, axes)
    return (sums, gathered), (table, slots, gathered)


def _products_backward(
    axes: MeshAxes, saved: tuple[jax.Array, ...], cotangents: _Pair
) -> tuple[jax.Array | None, None, jax.Array]:
    table, slots, vectors = saved
    cotangent = cotangents[0]

    def vector_gradient(table: jax.Array, slots: jax.Array, cotangent: jax.Array) -> jax.Array:
        one_block = jnp.zeros_like(slots)
        pooled = _pool(axes, table, slots, one_block, cotangent[0, 0][..., None], 1, split=False)
        return sums_to_tokens(axes, pooled[:, 0], purposes.INPUT_GRADIENTS_TO_TOKENS)

    specs = (axes.table, P(axes.replicas), _products(axes))
    d_vectors = island(axes, vector_gradient, specs, P(axes.tokens))(table, slots, cotangent)

    def table_gradient(
        table: jax.Array, slots: jax.Array, vectors: jax.Array, cotangent: jax.Array
    ) -> jax.Array:
        tokens = jnp.repeat(jnp.arange(slots.shape[0]), slots.shape[1])
        per_read = lookup.read_gradients(vectors[tokens], cotangent[0, 0].reshape(-1, 1))
        return _dense_gradient(axes, table, slots, per_read)

    dense_specs = (axes.table, P(axes.replicas), P(axes.replicas, axes.width), _products(axes))
    dense = island(axes, table_gradient, dense_specs, axes.table)
    return _if_trained(dense, table, slots, vectors, cotangent), None, d_vectors


_products_at_owners.defvjp(_products_forward, _products_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _products_at_tokens(sums: jax.Array, axes: MeshAxes) -> jax.Array:
    def bring(sums: jax.Array) -> jax.Array:
        return numbers_to_tokens(axes, sums[0, 0], purposes.PRODUCTS_TO_TOKENS)

    return island(axes, bring, _products(axes), P(axes.tokens))(sums)


def _products_at_tokens_forward(sums: jax.Array, axes: MeshAxes) -> tuple[jax.Array, None]:
    return _products_at_tokens(sums, axes), None


def _products_at_tokens_backward(axes: MeshAxes, saved: None, cotangent: jax.Array) -> tuple[jax.Array]:
    del saved

    def bring(cotangent: jax.Array) -> jax.Array:
        return numbers_to_owners(axes, cotangent, purposes.PRODUCT_COTANGENTS_TO_OWNERS)[None, None]

    return (island(axes, bring, P(axes.tokens), _products(axes))(cotangent),)


_products_at_tokens.defvjp(_products_at_tokens_forward, _products_at_tokens_backward)


# ---- the four exchanges between tokens and owners; called within an island


def numbers_to_owners(axes: MeshAxes, x: jax.Array, purpose: str) -> jax.Array:
    """Gathers the arrays (T/P, ...) of a group's devices: (T, ...) on each."""
    with named_exchange(purpose):
        return _gathered(x, axes.of_tokens(axes.owners), 0)


def numbers_to_tokens(axes: MeshAxes, x: jax.Array, purpose: str) -> jax.Array:
    """Sums arrays (T, ...) over a group, and gives each device the sums of its own tokens: (T/P, ...)."""
    with named_exchange(purpose):
        return _sum_to_tokens(axes, axes.owners, x)


def columns_to_owners(axes: MeshAxes, x: jax.Array, purpose: str) -> jax.Array:
    """Sends each device, of the vectors (T/P, ..., d) of its group's tokens, its columns: (T, ..., d/P_w)."""
    with named_exchange(purpose):
        if axes.of_tokens(axes.width):
            x = jax.lax.all_to_all(x, axes.width, split_axis=x.ndim - 1, concat_axis=0, tiled=True)
        elif axes.width:
            size = x.shape[-1] // axes.size(axes.width)
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes.width) * size, size, x.ndim - 1)
        return _gathered(x, axes.of_tokens(axes.slots), 0)


def sums_to_tokens(axes: MeshAxes, x: jax.Array, purpose: str) -> jax.Array:
    """Sums (T, ..., d/P_w) over the owners of rows, and gives each device all columns of its tokens' sums.

    It is the way back of `columns_to_owners`: the result is (T/P, ..., d).
    """
    with named_exchange(purpose):
        x = _sum_to_tokens(axes, axes.slots, x)
        if axes.of_tokens(axes.width):
            return jax.lax.all_to_all(x, axes.width, split_axis=0, concat_axis=x.ndim - 1, tiled=True)
        return _gathered(x, axes.width, x.ndim - 1)


def _gathered(x: jax.Array, names: tuple[str, ...], axis: int) -> jax.Array:
    return jax.lax.all_gather(x, names, axis=axis, tiled=True) if names else x


def _sum_to_tokens(axes: MeshAxes, names: tuple[str, ...], x: jax.Array) -> jax.Array:
    if not names:
        return x
    if axes.of_tokens(names):
        return jax.lax.psum_scatter(x, names, scatter_dimension=0, tiled=True)
    return jax.lax.psum(x, names)


# ---- what a device owns; called within an island


def first_slot(axes: MeshAxes, num_rows: int) -> jax.Array:
    """Returns the index, () int32, of the first of the `num_rows` rows that this device owns."""
    return jax.lax.axis_index(axes.slots) * num_rows if axes.slots else jnp.zeros((), jnp.int32)


def own_cores(axes: MeshAxes, scores: jax.Array) -> jax.Array:
    """Selects, of scores (..., h), those of the slices that this device's columns are part of."""
    start, size = _own_cores(axes, scores.shape[-1])
    if size == scores.shape[-1]:
        return scores
    return jax.lax.dynamic_slice_in_dim(scores, start, size, scores.ndim - 1)


def _own_cores(axes: MeshAxes, cores: int) -> tuple[jax.Array | int, int]:
    """Returns the first and the number of the cores that weigh this device's columns.

    The columns are some whole slices, or part of one.
    """
    parts = axes.size(axes.width)
    if parts == 1:
        return 0, cores
    return jax.lax.axis_index(axes.width) * cores // parts, max(cores // parts, 1)


def _pool(
    axes: MeshAxes,
    table: jax.Array,
    slots: jax.Array,
    blocks: jax.Array,
    scores: jax.Array,
    expansion: int,
    split: bool = True,
    apart: bool = False,
) -> jax.Array:
    """Computes `lookup.pooled_lookup` of this device's rows and columns.

    Without `split` one score weighs whole rows.
    """
    if split:
        scores = own_cores(axes, scores)
    if not axes.slots:
        return lookup.pooled_lookup(table, slots, blocks, scores, expansion, apart)
    return pooled_of_owned(table, slots, blocks, scores, first_slot(axes, table.shape[0]), expansion)


def _score_products(
    axes: MeshAxes,
    table: jax.Array,
    slots: jax.Array,
    blocks: jax.Array,
    vectors: jax.Array,
    cores: int,
    split: bool = True,
    apart: bool = False,
) -> jax.Array:
    """Computes `lookup.score_products` of this device's rows and columns, to be summed over devices."""
    start, own = _own_cores(axes, cores) if split else (0, cores)
    if axes.slots:
        products = products_of_owned(table, slots, blocks, vectors, first_slot(axes, table.shape[0]), own)
    else:
        products = lookup.score_products(table, slots, blocks, vectors, own, apart)
    if own == cores:
        return products
    return jax.lax.dynamic_update_slice_in_dim(
        jnp.zeros((*products.shape[:-1], cores), products.dtype), products, start, products.ndim - 1
    )


def _dense_gradient(axes: MeshAxes, table: jax.Array, slots: jax.Array, per_read: jax.Array) -> jax.Array:
    """Returns the dense gradient of this device's part of a table, summed over all tokens."""
    local = slots.reshape(-1) - first_slot(axes, table.shape[0])
    local = jnp.where(local < 0, table.shape[0], local)  # a negative index would count from the end
    gradient = jnp.zeros(table.shape, jnp.float32).at[local].add(per_read, mode="drop").astype(table.dtype)
    with named_exchange(purposes.GRADIENTS_OF_TABLES):
        return jax.lax.psum(gradient, axes.replicas) if axes.replicas else gradient


def _if_trained(
    gradient: Callable[..., jax.Array], table: jax.Array, *arguments: jax.Array
) -> jax.Array | None:
    """Returns the dense gradient of a table, or None if it has none (`lookup.has_dense_gradient`)."""
    return gradient(table, *arguments) if lookup.has_dense_gradient(table) else None


def _sums(axes: MeshAxes) -> P:
    """Returns the partition spec of the pooled sums (P_s, T, E, d_v)."""
    return P(axes.slots, axes.replicas, None, axes.width)


def _products(axes: MeshAxes) -> P:
    """Returns the partition spec of the products (P_s, P_w, T, R)."""
    return P(axes.slots, axes.width, axes.replicas)
