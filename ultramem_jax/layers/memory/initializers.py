"""How a memory starts: as in the UltraMem paper, the authors' code, Product-Key Memory, or UltraMemV2."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ultramem_jax.memory_config import MemoryConfig
from ultramem_jax.ops.on_mesh import current_axes, island
from ultramem_jax.ops.rows import stored_dtype, to_stored
from ultramem_jax.ops.sharded_lookup import first_slot

Initializer = Callable[..., jax.Array]

_BLOCK_VALUES = 1 << 20
"""Values of a table drawn at a time."""
_SAMPLED_TOKENS = 128
"""Draws that `chosen_scores` averages over."""
_SMALL_INIT = 2 / 5
"""D times the variance of weights in the "small init" of N(0, 2/(5·D)), which UltraMemV2's models start from
(their initial standard deviation at D = 768 is 0.0228)."""
_V2_SCALE = 0.2
"""The constant of UltraMemV2's value initialisation (paper, appendix A.3, equation 26)."""


class MemoryInit(NamedTuple):
    """Initialisers of one memory's parameters; gains are constants, `*_std` standard deviations of tables."""

    query: Initializer
    keys: Initializer
    query_gain: float
    key_gain: float
    values_std: float
    pre_values_std: float
    projection: Initializer
    input: Initializer
    """Of the maps that meet x beside the query: the projection of pre-values, and the gate."""


class ChosenScores(NamedTuple):
    """Moments of the m chosen scores of a token at a query gain of one."""

    mean: float
    mean_square: float


def memory_init(
    config: MemoryConfig, num_virtual_keys: int, embed_dim: int, num_layers: int, inner_ratio: float
) -> MemoryInit:
    """The initialisers that `config.init` names.

    Args:
        config: of the memory.
        num_virtual_keys: K, of its layout.
        embed_dim: D.
        num_layers: L of the whole Transformer.
        inner_ratio: inner width of the feed-forward over D; for `v2` alone.
    """
    d_k, d_v, d_p = config.key_dim, config.value_dim, config.pre_value_dim
    normal = jax.nn.initializers.normal
    pkm = MemoryInit(
        query=normal(1 / math.sqrt(embed_dim)),
        keys=_symmetric_uniform(1 / math.sqrt(d_k)),
        query_gain=1.0,
        # PKM has no norms. Where they are switched on, scores are to start at a variance of one.
        key_gain=1 / math.sqrt(d_k),
        values_std=1 / math.sqrt(d_v),
        # x has a mean square of one, and so have the products with pre-values.
        pre_values_std=1 / math.sqrt(max(d_p, 1)),
        projection=normal(1 / math.sqrt(config.num_blocks * d_v)),
        input=normal(1 / math.sqrt(embed_dim)),
    )
    normed = pkm._replace(keys=normal(1 / math.sqrt(d_k)))
    if config.init == "pkm":
        return pkm
    if config.init == "reference":
        return normed._replace(
            query=normal(1 / math.sqrt(d_k)),
            query_gain=d_k**-0.33,
            key_gain=d_k**-0.33,
            values_std=0.02,
            pre_values_std=0.02,
        )
    scores = chosen_scores(config, num_virtual_keys)
    if config.init == "v2":
        gain = _gain(config, scores.mean)
        spread = scores.mean_square / scores.mean**2  # 1 + σ_s²
        reads = config.top_m * config.num_heads
        variance = _V2_SCALE * inner_ratio * embed_dim / (reads * spread * max(d_p, 1) * d_v * num_layers)
        # With pre-values it is the variance of a product of two, drawn with the same standard deviation.
        std = variance ** (1 / 4 if d_p else 1 / 2)
        projection = normal(math.sqrt(_SMALL_INIT / embed_dim))
        normed = normed._replace(values_std=std, pre_values_std=std, projection=projection)
    else:
        gain = _gain(config, math.sqrt(scores.mean_square))
        reads = config.top_m * config.num_heads
        power = (_second_moment("gelu") if config.pre_value_activation == "gelu" else 1.0) * (
            _second_moment("silu") if config.gate else 1.0
        )
        values_std = math.sqrt(config.num_blocks / (2 * reads * num_layers * power))
        normed = normed._replace(values_std=values_std)
    # Without norms the gain has no parameter of its own and goes into the weights of the query.
    query = normal((1.0 if config.norm_query else gain) / math.sqrt(embed_dim))
    return normed._replace(query=query, query_gain=gain)


def _gain(config: MemoryConfig, chosen: float) -> float:
    """The query gain that brings scores of size `chosen` to one; of a softmax, it is one.

    A Tucker score is bilinear in the query, a product-key score linear.
    """
    if config.softmax:
        return 1.0
    return 1 / math.sqrt(chosen) if config.tucker_rank else 1 / chosen


@functools.lru_cache(maxsize=64)
def chosen_scores(config: MemoryConfig, num_virtual_keys: int) -> ChosenScores:
    """What the retrieval chooses among random scores, by sampling it.

    With keys of norm one, the score of a key is N(0, gain²) (per rank N(0, gain²/r) where the ranks split
    d_k). Values drawn from N(0, E/(2·m·H·L)) give an output variance of 1/(2L) exactly if the m chosen scores
    have mean square one; the paper writes the gain as 1/√E[Y] with Y their mean, and the two differ by the
    spread of the m scores.

    Args:
        config: of the memory.
        num_virtual_keys: K.

    Returns:
        The moments, the same for the same arguments on every machine; ones for a softmax.
    """
    if config.softmax:
        return ChosenScores(1.0, 1.0)
    rng = np.random.default_rng(0)
    rank, top_m = config.tucker_rank, config.top_m
    drawn = []
    for _ in range(_SAMPLED_TOKENS):
        if rank == 0:
            row, column = np.sort(rng.standard_normal((2, num_virtual_keys)))[:, -top_m:]
            drawn.append(np.sort((row[:, None] + column).ravel())[-top_m:])
            continue
        scale = 1 / math.sqrt(rank) if config.rank_keys == "split" else 1.0
        row, column = rng.standard_normal((2, rank, num_virtual_keys)) * scale
        cores = rng.uniform(size=(config.num_cores, rank, rank))
        left, _, right = np.linalg.svd(cores.sum(0))
        row = row[:, np.argsort(left[:, 0] @ row)[-top_m:]]
        column = column[:, np.argsort(right[0] @ column)[-top_m:]]
        cells = np.argsort((row.T @ cores.sum(0) @ column).ravel())[-top_m:]
        drawn.append(np.einsum("qi,cqs,sj->cij", row, cores, column).reshape(config.num_cores, -1)[:, cells])
    return ChosenScores(float(np.mean(drawn)), float(np.mean(np.square(drawn))))


def _second_moment(activation: str) -> float:
    """E[act(z)²] for z ~ N(0, 1), by Gauss-Hermite quadrature."""
    z, weights = np.polynomial.hermite_e.hermegauss(64)
    if activation == "gelu":
        y = z * (1 + np.vectorize(math.erf)(z / math.sqrt(2))) / 2
    else:
        y = z / (1 + np.exp(-z))
    return float((weights * y**2).sum() / weights.sum())


def draw_table(key: jax.Array, num_slots: int, width: int, std: float, dtype: str = "float32") -> jax.Array:
    """A table (N, width) of N(0, std²), drawn block by block, as `ultramem_jax.ops.rows` stores `dtype`.

    The generator's bits for a whole table would take a multiple of the table; these take that of a block.
    """
    rows = min(max(_BLOCK_VALUES // width, 1), num_slots)
    stored = stored_dtype(dtype)

    def block_of(key: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A block's first row, and the block. The last one starts early enough to fit in."""
        start = jnp.minimum(block * rows, num_slots - rows)
        drawn = std * jax.random.normal(jax.random.fold_in(key, block), (rows, width), jnp.float32)
        return start, to_stored(drawn, stored)

    def draw_all(key: jax.Array) -> jax.Array:
        def fill(block: jax.Array, table: jax.Array) -> jax.Array:
            start, drawn = block_of(key, block)
            return jax.lax.dynamic_update_slice(table, drawn, (start, 0))

        return jax.lax.fori_loop(0, -(-num_slots // rows), fill, jnp.zeros((num_slots, width), stored))

    def draw_part(key: jax.Array) -> jax.Array:
        """Rows and columns of the same table that a device owns, from the blocks that they are in.

        Blocks have whole rows: devices that own columns all draw the same ones, and keep their part.
        """
        assert axes is not None
        own_rows, own_width = num_slots // axes.size(axes.slots), width // axes.size(axes.width)
        first = first_slot(axes, own_rows)
        column = jax.lax.axis_index(axes.width) * own_width if axes.width else 0

        def fill(block: jax.Array, table: jax.Array) -> jax.Array:
            start, drawn = block_of(key, block)
            place = start - first + jnp.arange(rows, dtype=jnp.int32)
            place = jnp.where(place < 0, own_rows, place)  # a negative index would count from the end
            own = jax.lax.dynamic_slice_in_dim(drawn, column, own_width, 1)
            return table.at[place].set(own, mode="drop", unique_indices=False, indices_are_sorted=False)

        last = jnp.minimum((first + own_rows - 1) // rows + 1, -(-num_slots // rows) - 1)
        return jax.lax.fori_loop(first // rows, last + 1, fill, jnp.zeros((own_rows, own_width), stored))

    axes = current_axes()
    return draw_all(key) if axes is None else island(axes, draw_part, P(), axes.table)(key)


def _symmetric_uniform(bound: float) -> Initializer:
    """U(-bound, bound)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
