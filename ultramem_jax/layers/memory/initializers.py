"""How a memory starts: the paper's improved initialisation, that of the authors' code, and that of PKM."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import MemoryConfig

Initializer = Callable[..., jax.Array]

_BLOCK_VALUES = 1 << 20
"""Values of a table drawn at a time."""
_SAMPLED_TOKENS = 128
"""Draws that `query_gain` averages over."""


class MemoryInit(NamedTuple):
    """Initialisers of one memory's parameters; gains are constants, `values_std` a standard deviation."""

    query: Initializer
    keys: Initializer
    query_gain: float
    key_gain: float
    values_std: float
    projection: Initializer


def memory_init(config: MemoryConfig, embed_dim: int, num_layers: int) -> MemoryInit:
    """The initialisers that `config.init` names.

    Args:
        config: of the memory.
        embed_dim: D.
        num_layers: L of the whole Transformer.
    """
    d_k, d_v, expansion = config.key_dim, config.value_dim, config.expansion
    normal = jax.nn.initializers.normal
    projection = normal(1 / math.sqrt(expansion * d_v))
    if config.init == "pkm":
        return MemoryInit(
            query=normal(1 / math.sqrt(embed_dim)),
            keys=_symmetric_uniform(1 / math.sqrt(d_k)),
            query_gain=1.0,
            # PKM has no norms. Where they are switched on, scores are to start at a variance of one.
            key_gain=1 / math.sqrt(d_k),
            values_std=1 / math.sqrt(d_v),
            projection=projection,
        )
    if config.init == "reference":
        return MemoryInit(
            query=normal(1 / math.sqrt(d_k)),
            keys=normal(1 / math.sqrt(d_k)),
            query_gain=d_k**-0.33,
            key_gain=d_k**-0.33,
            values_std=0.02,
            projection=projection,
        )
    gain = 1.0 if config.softmax else query_gain(config)
    reads = config.top_m * config.num_heads
    return MemoryInit(
        # Without norms the gain has no parameter of its own and goes into the weights of the query.
        query=normal((1.0 if config.norm_query_key else gain) / math.sqrt(embed_dim)),
        keys=normal(1 / math.sqrt(d_k)),
        query_gain=gain,
        key_gain=1 / math.sqrt(d_k),
        values_std=math.sqrt(expansion / (2 * reads * num_layers)),
        projection=projection,
    )


@functools.lru_cache(maxsize=64)
def query_gain(config: MemoryConfig) -> float:
    """The gain of the query norm that gives the chosen scores a mean square of one, estimated by sampling.

    With keys of norm one, the score of a key is N(0, gain²) (per rank N(0, gain²/r) where the ranks split
    d_k). Values drawn from N(0, E/(2·m·H·L)) then give an output variance of 1/(2L) exactly if the m chosen
    scores have mean square one. A Tucker score is bilinear in the query, so that the gain is 1/√Y, with Y the
    root mean square of the chosen scores at gain one; a product-key score is linear in it, gain 1/Y. The
    paper writes 1/√E[Y] with the mean of the top m; the two differ by the spread of the m scores.

    Returns:
        The gain, the same for the same `config` on every machine.
    """
    rng = np.random.default_rng(0)
    rank, num_keys, top_m = config.tucker_rank, config.num_virtual_keys, config.top_m
    squares = []
    for _ in range(_SAMPLED_TOKENS):
        if rank == 0:
            row, column = np.sort(rng.standard_normal((2, num_keys)))[:, -top_m:]
            chosen = np.sort((row[:, None] + column).ravel())[-top_m:]
            squares.append(np.mean(chosen**2))
            continue
        scale = 1 / math.sqrt(rank) if config.rank_keys == "split" else 1.0
        row, column = rng.standard_normal((2, rank, num_keys)) * scale
        cores = rng.uniform(size=(config.num_cores, rank, rank))
        left, _, right = np.linalg.svd(cores.sum(0))
        row = row[:, np.argsort(left[:, 0] @ row)[-top_m:]]
        column = column[:, np.argsort(right[0] @ column)[-top_m:]]
        cells = np.argsort((row.T @ cores.sum(0) @ column).ravel())[-top_m:]
        per_core = np.einsum("qi,cqs,sj->cij", row, cores, column).reshape(config.num_cores, -1)
        squares.append(np.mean(per_core[:, cells] ** 2))
    rms = math.sqrt(np.mean(squares))
    return 1 / rms if rank == 0 else 1 / math.sqrt(rms)


def draw_table(key: jax.Array, num_slots: int, value_dim: int, std: float) -> jax.Array:
    """A table (N, d_v) float32 of N(0, std²), drawn block by block.

    The generator's bits for a whole table would take a multiple of the table; these take that of a block.
    """
    rows = min(max(_BLOCK_VALUES // value_dim, 1), num_slots)

    def fill(block: jax.Array, table: jax.Array) -> jax.Array:
        # The last block starts early enough to fit; what it draws again is as random as the first time.
        start = jnp.minimum(block * rows, num_slots - rows)
        drawn = std * jax.random.normal(jax.random.fold_in(key, block), (rows, value_dim), jnp.float32)
        return jax.lax.dynamic_update_slice(table, drawn, (start, 0))

    table = jnp.zeros((num_slots, value_dim), jnp.float32)
    return jax.lax.fori_loop(0, -(-num_slots // rows), fill, table)


def _symmetric_uniform(bound: float) -> Initializer:
    """U(-bound, bound)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
