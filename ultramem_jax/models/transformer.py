"""The pre-norm decoder: blocks of attention and feed-forward, and memories that skip over them."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.config import ModelConfig
from ultramem_jax.layers import Attention, RMSNorm, feed_forward, memory, shared_tables
from ultramem_jax.ops.linear import project
from ultramem_jax.ops.on_mesh import constrain_tokens

SHARED_TABLES = "memory_tables"
"""Name of the module that holds the table which all memories read, where they share one."""


def table_readers(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The memories that read each table: name in the collection `memory` -> names in `reads`."""
    names = tuple(memory_name(index) for index in range(len(config.spans)))
    if names and config.memory is not None and config.memory.shares_table:
        return {SHARED_TABLES: names}
    return {name: (name,) for name in names}


def memory_name(index: int) -> str:
    """The module of memory number `index`, which counts from 0."""
    return f"memory_{index}"


class Block(nn.Module):
    """One layer: x += Attention(norm(x)); h = norm(x); x += FeedForward(h)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Applies the layer.

        Args:
            x: (B, S, D), the residual stream.
            train: whether dropout is on.

        Returns:
            x after the layer, and h, the normalised input of its feed-forward, which memories read.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        dropout = nn.Dropout(config.dropout, deterministic=not train)
        h = RMSNorm(config.norm_eps, dtype, name="attention_norm")(x)
        x = x + dropout(Attention(config, name="attention")(h, train=train))
        h = RMSNorm(config.norm_eps, dtype, name="feed_forward_norm")(x)
        return x + dropout(feed_forward(config, name="feed_forward")(h, train=train)), h


class Transformer(nn.Module):
    """A decoder-only language model: token ids -> logits of the next token.

    A memory whose placement reads `start:end` takes h of layer `start` and is added to the residual stream
    after layer `end`; between the two, nothing waits for it.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        """Applies the model.

        Args:
            tokens: (B, S) integer ids in [0, V).
            train: whether dropout is on; needs the `dropout` stream of random numbers then.

        Returns:
            (B, S, V) float32 logits.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        dropout = nn.Dropout(config.dropout, deterministic=not train)
        # The standard deviation 1/√D makes tied logits start with a variance of one.
        embedding = self.param(
            "embedding",
            nn.initializers.normal(1 / math.sqrt(config.embed_dim)),
            (config.vocab_size, config.embed_dim),
            jnp.float32,
        )
        x = constrain_tokens(dropout(embedding.at[tokens].get(mode="clip").astype(dtype)))
        tables = None
        if config.memory is not None and config.memory.shares_table and config.spans:
            tables = shared_tables(config, name=SHARED_TABLES)(config.embed_dim)
        landing: dict[int, list[jax.Array]] = {}
        for layer in range(1, config.num_layers + 1):
            x, h = Block(config, name=f"layer_{layer}")(x, train=train)
            for index, span in enumerate(config.spans):
                if span.start == layer:
                    read = memory(config, index, name=memory_name(index))(h, train=train, tables=tables)
                    landing.setdefault(span.end, []).append(dropout(read))
            for y in landing.pop(layer, ()):
                x = x + y
            x = constrain_tokens(x)
        x = RMSNorm(config.norm_eps, dtype, name="final_norm")(x)
        if config.tie_embeddings:
            output = embedding.T
        else:
            shape = (config.embed_dim, config.vocab_size)
            output = self.param("output", nn.initializers.lecun_normal(), shape, jnp.float32)
        return project(x, output, result_dtype=jnp.float32)
