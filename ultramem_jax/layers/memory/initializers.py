"""Initialises a memory as in the UltraMem paper, the authors' code, Product-Key Memory, or UltraMemV2."""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config.memory import MemorySite
from ultramem_jax.config.memory_parts import MemoryInit

if TYPE_CHECKING:
    from ultramem_jax.layers.memory.product_keys import ProductKeys

Initializer = Callable[..., jax.Array]

_SAMPLED_TOKENS = 128
"""Number of draws that `chosen_scores` averages over."""
_SMALL_INIT = 2 / 5
"""D times the variance of weights in the "small init" of N(0, 2/(5·D)), with which UltraMemV2's models start
(their initial standard deviation at D = 768 is 0.0228)."""
_V2_SCALE = 0.2
"""Constant of UltraMemV2's value initialisation (paper, appendix A.3, equation 26)."""


class RetrievalInit(NamedTuple):
    """Holds the initialisers of queries and keys, and the initial gains of their norms."""

    query: Initializer
    """Initialiser of the query projection."""
    keys: Initializer
    """Initialiser of the keys."""
    query_gain: float
    """Initial gain of the norm of queries."""
    key_gain: float
    """Initial gain of the norm of keys."""


class ChosenScores(NamedTuple):
    """Holds moments of the m chosen scores of a token, at a query gain of one."""

    mean: float
    """Mean of the chosen scores."""
    mean_square: float
    """Mean square of the chosen scores."""


def memory_init(site: MemorySite) -> MemoryInit:
    """Returns the initialisation of table and readout that `ProductKeys.init` names."""
    return _inits(site)[1]


def retrieval_init(site: MemorySite) -> RetrievalInit:
    """Returns the initialisation of queries and keys that `ProductKeys.init` names."""
    return _inits(site)[0]


def _inits(site: MemorySite) -> tuple[RetrievalInit, MemoryInit]:
    config: ProductKeys = site.config.address  # type: ignore[assignment]
    table, context = site.config.table, site.context
    d_k, d_v, d_p, embed_dim = config.key_dim, table.value_dim, table.pre_value_dim, context.embed_dim
    normal = jax.nn.initializers.normal
    # PKM has no norms. If they are switched on, scores should start with a variance of one.
    retrieval = RetrievalInit(
        query=normal(1 / math.sqrt(embed_dim)),
        keys=_symmetric_uniform(1 / math.sqrt(d_k)),
        query_gain=1.0,
        key_gain=1 / math.sqrt(d_k),
    )
    rest = MemoryInit(
        values_std=1 / math.sqrt(d_v),
        # x has a mean square of one, so the products with pre-values have one, too.
        pre_values_std=1 / math.sqrt(max(d_p, 1)),
        projection=normal(1 / math.sqrt(site.config.num_blocks * d_v)),
        input=normal(1 / math.sqrt(embed_dim)),
    )
    if config.init == "pkm":
        return retrieval, rest
    normed = retrieval._replace(keys=normal(1 / math.sqrt(d_k)))
    if config.init == "reference":
        normed = normed._replace(query=normal(1 / math.sqrt(d_k)), query_gain=d_k**-0.33, key_gain=d_k**-0.33)
        return normed, rest._replace(values_std=0.02, pre_values_std=0.02)
    scores = chosen_scores(config, config.num_virtual_keys(site))
    if config.init == "v2":
        gain = _gain(config, scores.mean)
        spread = scores.mean_square / scores.mean**2  # 1 + σ_s²
        variance = _V2_SCALE * context.inner_ratio * embed_dim
        variance /= config.reads_per_token * spread * max(d_p, 1) * d_v * context.num_layers
        # With pre-values, this is the variance of a product of two factors with the same standard deviation.
        std = variance ** (1 / 4 if d_p else 1 / 2)
        projection = normal(math.sqrt(_SMALL_INIT / embed_dim))
        rest = rest._replace(values_std=std, pre_values_std=std, projection=projection)
    else:
        gain = _gain(config, math.sqrt(scores.mean_square))
        power = second_moment("gelu") if table.pre_value_activation == "gelu" else 1.0
        power *= site.config.readout.power
        spread_over = 2 * config.reads_per_token * context.num_layers * power
        rest = rest._replace(values_std=math.sqrt(site.config.num_blocks / spread_over))
    # Without a norm the gain has no parameter of its own, so it scales the weights of the query.
    query = normal((1.0 if config.norm_query else gain) / math.sqrt(embed_dim))
    return normed._replace(query=query, query_gain=gain), rest


def _gain(config: "ProductKeys", chosen: float) -> float:
    """Returns the query gain that scales scores of size `chosen` to one; with a softmax, it is one.

    A Tucker score is bilinear in the query, a product-key score linear.
    """
    if config.softmax:
        return 1.0
    return 1 / math.sqrt(chosen) if config.tucker_rank else 1 / chosen


@functools.lru_cache(maxsize=64)
def chosen_scores(config: "ProductKeys", num_virtual_keys: int) -> ChosenScores:
    """Estimates, by sampling, moments of the scores that the retrieval chooses among random ones.

    With keys of norm one, the score of a key is N(0, gain²) (per rank N(0, gain²/r) if the ranks split d_k).
    Values drawn from N(0, E/(2·m·H·L)) give an output variance of exactly 1/(2L) if the m chosen scores have
    mean square one. The paper writes the gain as 1/√E[Y] with Y their mean. The two differ by the spread of
    the m scores.

    Args:
        config: the memory's config.
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


def second_moment(activation: str) -> float:
    """Returns E[act(z)²] for z ~ N(0, 1), by Gauss-Hermite quadrature; `activation` is `gelu` or `silu`."""
    z, weights = np.polynomial.hermite_e.hermegauss(64)
    if activation == "gelu":
        y = z * (1 + np.vectorize(math.erf)(z / math.sqrt(2))) / 2
    else:
        y = z / (1 + np.exp(-z))
    return float((weights * y**2).sum() / weights.sum())


def _symmetric_uniform(bound: float) -> Initializer:
    """Returns the initialiser U(-bound, bound)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
