"""Makes the cache of a model that decodes: what its layers keep of the tokens so far."""

from typing import TypeAlias

import jax
import jax.numpy as jnp

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.model import layer_name
from ultramem_jax.errors import at_least, choice
from ultramem_jax.tree_types import ArrayTree

Cache: TypeAlias = dict[str, ArrayTree]
"""The collection `cache`, as `empty_cache` makes it."""

CACHE_DTYPES = ("float32", "bfloat16")
"""Allowed dtypes of the keys and values in a cache."""


def empty_cache(config: ModelConfig, batch_size: int, length: int, dtype: str = "float32") -> Cache:
    """Returns the collection `cache` before the first token.

    Args:
        config: the model's config.
        batch_size: B, sequences.
        length: U, cache positions per sequence. The caller must ensure that no chunk ends beyond it: a chunk
            of C tokens must start at a position up to U - C.
        dtype: dtype of keys and values, one of `CACHE_DTYPES`. On CPU float32 is several times as fast.

    Returns:
        `visible` (B, U) bool, cache positions that hold a token; `lengths` (B,) int32, tokens of each
        sequence; `used` () int32, cache positions taken; and the layers' parts, which
        `ultramem_jax.layers.caching` describes.

    Raises:
        UserError: an empty batch or cache, or another dtype.
    """
    at_least(1, batch_size=batch_size, cache_length=length)
    choice("cache_dtype", dtype, CACHE_DTYPES)
    shape = (batch_size * config.num_kv_heads, length, config.head_width)
    cache: Cache = {
        "visible": jnp.zeros((batch_size, length), bool),
        "lengths": jnp.zeros((batch_size,), jnp.int32),
        "used": jnp.zeros((), jnp.int32),
    }
    for layer in range(1, config.num_layers + 1):
        # Each layer has its own arrays, because they are updated in place.
        cached = {name: jnp.zeros(shape, jnp.dtype(dtype)) for name in ("keys", "values")}
        cache[layer_name(layer)] = {"attention": cached}
    for site in config.sites:
        if kept := site.cache:
            cache[site.name] = {
                name: jnp.zeros((batch_size, *shape), jnp.dtype(kind)) for name, (shape, kind) in kept.items()
            }
    return cache


def cache_bytes(config: ModelConfig, batch_size: int, length: int, dtype: str = "float32") -> int:
    """Returns the bytes that such a cache takes."""
    shapes = jax.eval_shape(lambda: empty_cache(config, batch_size, length, dtype))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
