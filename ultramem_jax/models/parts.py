"""Applies parts of a model by themselves: one memory, or one kind of layer through the whole depth."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.config.model import layer_name
from ultramem_jax.layers import Attention, Memory, RMSNorm, SharedTables, feed_forward
from ultramem_jax.layers.caching import Chunk, next_chunk
from ultramem_jax.models.cache import Cache
from ultramem_jax.models.sampling import likeliest
from ultramem_jax.ops.linear import project
from ultramem_jax.tree_types import Variables

PartFunction = Callable[[Variables, Cache, Cache, jax.Array], tuple[Cache, jax.Array]]
"""(variables, kept, counters, x (B, 1, D)) -> (kept, y): `kept` is what layers keep in the cache, `counters`
are its other entries."""


class OneMemory(nn.Module):
    """Applies one memory of a model; its variables have the same names as in the model."""

    site: MemorySite

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, token_ids: jax.Array | None = None) -> jax.Array:
        """Reads the memory; arguments and result are those of `layers.Memory`."""
        site = self.site
        tables = SharedTables(site, name=site.table)() if site.config.table.is_shared else None
        return Memory(site, name=site.name)(x, train=train, token_ids=token_ids, tables=tables)


def decoding_parts(config: ModelConfig) -> dict[str, PartFunction]:
    """Returns the parts of a decoding step; each takes one token of every sequence through all layers.

    Norms, residual sums and the choice of the next token are included, so that all parts together are about a
    step.

    Args:
        config: the model's config. The model's variables are those of `prepare_for_decoding`.

    Returns:
        `attention`, `feed_forward` and, if the model has memories, `memory`: to x (B, 1, D). `logits`: to the
        likeliest next tokens (B,).
    """
    layers = [layer_name(number) for number in range(1, config.num_layers + 1)]
    norm = RMSNorm(config.norm_eps, jnp.dtype(config.dtype))

    def normed(x: jax.Array) -> jax.Array:
        y: Any = norm.apply({"params": {"scale": jnp.ones((config.embed_dim,), jnp.float32)}}, x)
        return y

    def chunk_of(counters: Cache, x: jax.Array) -> Chunk:
        counts = jnp.ones((len(x),), jnp.int32)
        return next_chunk(counters["visible"], counters["lengths"], counters["used"], counts, 1)[0]

    def attention(
        variables: Variables, kept: Cache, counters: Cache, x: jax.Array
    ) -> tuple[Cache, jax.Array]:
        chunk, left = chunk_of(counters, x), dict(kept)
        for layer in layers:
            held = {"params": variables["params"][layer]["attention"], "cache": kept[layer]["attention"]}
            y, new = Attention(config).apply(held, normed(x), train=False, chunk=chunk, mutable=["cache"])
            x, left[layer] = x + jnp.asarray(y), {"attention": new["cache"]}
        return left, x

    def feed_forwards(
        variables: Variables, kept: Cache, counters: Cache, x: jax.Array
    ) -> tuple[Cache, jax.Array]:
        for layer in layers:
            held = {"params": variables["params"][layer]["feed_forward"]}
            y: Any = feed_forward(config).apply(held, normed(x), train=False)
            x = x + y
        return kept, x

    def memories(variables: Variables, kept: Cache, counters: Cache, x: jax.Array) -> tuple[Cache, jax.Array]:
        chunk, left = chunk_of(counters, x), dict(kept)
        held = {name: variables[name] for name in ("params", "memory", "buffers") if name in variables}
        for site in config.sites:
            name = site.name
            tables = held["memory"][site.table] if site.config.table.is_shared else None
            own = {part: tree[name] for part, tree in held.items() if name in tree}
            if name in kept:
                own["cache"] = kept[name]
            tokens = jnp.arange(len(x), dtype=jnp.int32)[:, None] % config.vocab_size
            y, new = Memory(site).apply(
                own, normed(x), train=False, token_ids=tokens, tables=tables, chunk=chunk, mutable=["cache"]
            )
            x, left = x + jnp.asarray(y), left | ({name: new["cache"]} if name in kept else {})
        return left, x

    def logits(variables: Variables, kept: Cache, counters: Cache, x: jax.Array) -> tuple[Cache, jax.Array]:
        params = variables["params"]
        return kept, likeliest(project(normed(x[:, 0]), params["output"], jnp.float32))

    parts: dict[str, PartFunction] = {
        "attention": attention,
        "feed_forward": feed_forwards,
        "logits": logits,
    }
    return parts | ({"memory": memories} if config.sites else {})
