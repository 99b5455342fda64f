"""Makes models to time decoding with: random weights as served, a full cache, and the step as programs.

The cost of decoding depends on the numbers only through the experts and rows that they choose. So weights are
drawn in the form in which they are served, each array where it stays, and nothing exists twice.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.accounting import count_parameters
from ultramem_jax.config import ModelConfig
from ultramem_jax.config.model import table_readers
from ultramem_jax.errors import UserError
from ultramem_jax.models import Transformer
from ultramem_jax.models.cache import Cache, empty_cache
from ultramem_jax.models.parts import decoding_parts
from ultramem_jax.models.sampling import likeliest
from ultramem_jax.models.serving import prepare_for_decoding
from ultramem_jax.ops.hashing import mix
from ultramem_jax.ops.linear import OutputMajor
from ultramem_jax.ops.rows import to_stored

_TABLE_STD = 0.02
_BLOCK_VALUES = 1 << 28

Program = Callable[..., Any]


def served_in(config: ModelConfig, dtype: str) -> ModelConfig:
    """Returns the model in `dtype`, with its tables, and without dropout."""
    memories = {name: memory.changed(dtype=dtype) for name, memory in config.memories.items()}
    return replace(config, dtype=cast(Any, dtype), dropout=0.0, memories=memories)


def sparse_over_dense(config: ModelConfig) -> float:
    """Returns the parameters of experts and tables over the 12·L·D² weights of the dense model's layers."""
    parameters = count_parameters(config)
    return (parameters.experts + parameters.memory_tables) / _dense_weights(config)


def with_sparsity(config: ModelConfig, ratio: float) -> ModelConfig:
    """Returns the model with about `ratio` times its dense weights in experts or slots; all else stays.

    Raises:
        UserError: a model without experts and without a memory, or a ratio that leaves too few of them.
    """
    sparse = ratio * _dense_weights(config)
    if config.moe is not None:
        each = count_parameters(config).experts / config.moe.num_experts
        return replace(config, moe=replace(config.moe, num_experts=round(sparse / each)))
    if config.memory is None:
        raise UserError(f"ratios = {ratio}: must be of models with experts or a memory")
    of_slot = count_parameters(config).memory_tables / config.memory.address.own_slots
    return config.with_memory(config.memory.resized(sparse / of_slot))


def random_variables(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Returns what `prepare_for_decoding` makes of a model, with random numbers.

    Activations keep the size of one, gains are 1, and values have a standard deviation of 0.02.
    """
    transformer = Transformer(config)

    def shapes() -> dict[str, Any]:
        made = transformer.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        parts = ("params", "memory", "buffers")
        return prepare_for_decoding(config, {name: made[name] for name in parts if name in made})

    leaves, structure = jax.tree_util.tree_flatten_with_path(jax.eval_shape(shapes))
    drawn = [
        _drawn([_name(key) for key in path], leaf, np.uint32(seed * 1_000_003 + number))
        for number, (path, leaf) in enumerate(leaves)
    ]
    variables = jax.tree.unflatten(structure, drawn)
    if config.tie_embeddings:
        variables["params"]["output"] = OutputMajor(variables["params"]["embedding"])
    return variables


def full_cache(config: ModelConfig, batch: int, length: int, dtype: str) -> tuple[Cache, Cache]:
    """Returns a cache of random tokens with one cache position left: what layers keep, and the counters."""
    cache = jax.eval_shape(lambda: empty_cache(config, batch, length, dtype))
    counters = {
        "visible": jnp.ones((batch, length), bool),
        "lengths": jnp.full((batch,), length - 1, jnp.int32),
        "used": jnp.asarray(length - 1, jnp.int32),
    }
    kept = {name: part for name, part in cache.items() if name not in counters}
    leaves, structure = jax.tree.flatten(kept)
    drawn = [_uniform(leaf.shape, leaf.dtype, 1.0, np.uint32(number)) for number, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, drawn), counters


class Chosen(NamedTuple):
    """Holds what a step read of experts and tables."""

    experts: jax.Array
    """() float32, distinct experts that a layer read, the mean over layers; 0 without experts."""
    slots: dict[str, jax.Array]
    """(B, R) int32 of each table, R the reads of all memories that read it."""

    def distinct_rows(self) -> int:
        """Counts the distinct rows that were read, over all tables."""
        return sum(len(np.unique(np.asarray(slots))) for slots in self.slots.values())


def step_program(config: ModelConfig) -> Program:
    """Compiles a step: (variables, kept, counters, tokens (B,)) -> (kept, next tokens (B,), `Chosen`).

    `kept` is donated. The cache is as full after the step as before.
    """
    transformer = Transformer(config)

    def step(variables: Any, kept: Cache, counters: Cache, tokens: jax.Array) -> Any:
        logits, left = transformer.apply(
            variables | {"cache": kept | counters},
            tokens[:, None],
            counts=jnp.ones(tokens.shape, jnp.int32),
            mutable=["cache", "metrics", "reads"],
        )
        return {name: left["cache"][name] for name in kept}, likeliest(logits), _chosen(config, left)

    return jax.jit(step, donate_argnums=1)


def part_programs(config: ModelConfig) -> dict[str, Program]:
    """Compiles the parts of a step; `kept` is donated.

    Returns:
        Functions (variables, kept, counters, x (B, 1, D)) -> (kept, y) by the names of `decoding_parts`.
    """
    return {name: jax.jit(part, donate_argnums=1) for name, part in decoding_parts(config).items()}


def _chosen(config: ModelConfig, left: Any) -> Chosen:
    layers = [layer.get("feed_forward", {}) for layer in left.get("metrics", {}).values()]
    experts = [layer["experts_chosen"] for layer in layers if "experts_chosen" in layer]
    slots = {
        table: jnp.concatenate([left["reads"][site.name]["slots"] for site in readers], axis=1)
        for table, readers in table_readers(config).items()
    }
    return Chosen(jnp.stack(experts).mean() if experts else jnp.zeros(()), slots)


def sparse_part(config: ModelConfig) -> str:
    """Returns the part of `part_programs` that grows with experts or slots."""
    return "memory" if config.sites else "feed_forward"


def _dense_weights(config: ModelConfig) -> int:
    return 12 * config.num_layers * config.embed_dim**2


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _drawn(path: list[str], leaf: jax.ShapeDtypeStruct, seed: np.uint32) -> jax.Array:
    name = path[-1]
    if name.endswith("bias"):
        return jnp.zeros(leaf.shape, leaf.dtype)
    if name.endswith("scale"):
        return jnp.ones(leaf.shape, leaf.dtype)
    if name == "directions":
        return jnp.full(leaf.shape, leaf.shape[-1] ** -0.5, leaf.dtype)
    if name == "query_conv":
        return jnp.zeros(leaf.shape, leaf.dtype).at[0].set(1)
    if path[0] == "buffers":
        return jnp.zeros(leaf.shape, leaf.dtype)
    # A product sums over the last axis of a matrix that is kept by output, and of the embedding.
    fan_in = leaf.shape[-1 if name in ("rows", "embedding") else -2]
    std = _TABLE_STD if path[0] == "memory" else fan_in**-0.5
    return _uniform(leaf.shape, leaf.dtype, math.sqrt(3) * std, seed)


@partial(jax.jit, static_argnums=(0, 1))
def _uniform(shape: tuple[int, ...], dtype: jnp.dtype, bound: float, seed: jax.Array) -> jax.Array:
    """Draws uniform numbers in [-bound, bound) by a hash, ten times as fast as `jax.random`.

    It draws a few rows at a time, so that it needs little memory beside the array itself.
    """
    width, rows = shape[-1], math.prod(shape[:-1])
    block = max(_BLOCK_VALUES // width, 1)

    def draw(first: int, count: int) -> jax.Array:
        row, column = (jax.lax.broadcasted_iota(jnp.uint32, (count, width), axis) for axis in (0, 1))
        bits = mix(column, mix(row + jnp.uint32(first), seed)) >> jnp.uint32(8)
        return to_stored((bits.astype(jnp.float32) * jnp.float32(2**-23) - 1) * bound, dtype)

    if rows <= block:
        return draw(0, rows).reshape(shape)
    array = jnp.zeros((rows, width), dtype)
    for first in range(0, rows, block):
        part = draw(first, min(block, rows - first))
        array = jax.lax.dynamic_update_slice(array, part, (first, 0))
    return array.reshape(shape)
