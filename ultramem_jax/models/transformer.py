"""The pre-norm decoder: blocks of attention and feed-forward, and memories that skip over them."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.config import ModelConfig
from ultramem_jax.layers import Attention, RMSNorm, feed_forward, memory, shared_tables
from ultramem_jax.layers.caching import CACHE, Chunk, next_chunk
from ultramem_jax.layers.parameters import matrix, served_parameter
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
    def __call__(
        self, x: jax.Array, *, train: bool, chunk: Chunk | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Applies the layer.

        Args:
            x: (B, S, D), the residual stream.
            train: whether dropout is on.
            chunk: of tokens that follow on those in the cache, if there is one.

        Returns:
            x after the layer, and h, the normalised input of its feed-forward, which memories read.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        dropout = nn.Dropout(config.dropout, deterministic=not train)
        h = RMSNorm(config.norm_eps, dtype, name="attention_norm")(x)
        x = x + dropout(Attention(config, name="attention")(h, train=train, chunk=chunk))
        h = RMSNorm(config.norm_eps, dtype, name="feed_forward_norm")(x)
        return x + dropout(feed_forward(config, name="feed_forward")(h, train=train)), h


class Transformer(nn.Module):
    """A decoder-only language model: token ids -> logits of the next token.

    A memory whose placement reads `start:end` takes h of layer `start` and is added to the residual stream
    after layer `end`; between the two, nothing waits for it.

    With the collection `cache` (`models.cache.empty_cache`), which must be mutable, tokens follow on those
    that are in it, and are put there: first the prompt in chunks, then token by token.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, tokens: jax.Array, *, train: bool = False, counts: jax.Array | None = None
    ) -> jax.Array:
        """Applies the model.

        Args:
            tokens: (B, S) integer ids in [0, V).
            train: whether dropout is on; needs the `dropout` stream of random numbers then.
            counts: (B,) int32 in [0, S], with a cache alone: the first so many are a sequence's tokens, and
                the rest is filling, which nothing sees. None: all of them.

        Returns:
            (B, S, V) float32 logits; with `counts` those after each sequence's last token, (B, V), which of
            a sequence without a token mean nothing.
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
        chunk = self._chunk(tokens, counts)
        tables = None
        if config.memory is not None and config.memory.shares_table and config.spans:
            tables = shared_tables(config, name=SHARED_TABLES)(config.embed_dim)
        landing: dict[int, list[jax.Array]] = {}
        for layer in range(1, config.num_layers + 1):
            x, h = Block(config, name=f"layer_{layer}")(x, train=train, chunk=chunk)
            for index, span in enumerate(config.spans):
                if span.start == layer:
                    layer_memory = memory(config, index, name=memory_name(index))
                    read = layer_memory(h, train=train, tables=tables, chunk=chunk)
                    landing.setdefault(span.end, []).append(dropout(read))
            for y in landing.pop(layer, ()):
                x = x + y
            x = constrain_tokens(x)
        if counts is not None:
            last = jnp.maximum(counts - 1, 0)[:, None, None]
            x = jnp.take_along_axis(x, last, axis=1, mode="promise_in_bounds")[:, 0]
        x = RMSNorm(config.norm_eps, dtype, name="final_norm")(x)
        if not config.tie_embeddings:
            output = matrix(self, "output", nn.initializers.lecun_normal(), embedding.shape[::-1])
        else:
            # What is served has the embedding once more, as the matrix that it is here.
            output = served_parameter(self, "output") or embedding.T
        return project(x, output, result_dtype=jnp.float32)

    def _chunk(self, tokens: jax.Array, counts: jax.Array | None) -> Chunk | None:
        """What the layers must know of tokens that follow on a cache, whose counters go on; None without."""
        if not self.has_variable(CACHE, "visible"):
            return None
        batch, size = tokens.shape
        counts = jnp.full((batch,), size, jnp.int32) if counts is None else counts
        names = ("visible", "lengths", "used")
        visible, lengths, used = (jnp.asarray(self.get_variable(CACHE, name)) for name in names)
        chunk, visible = next_chunk(visible, lengths, used, counts, size)
        self.put_variable(CACHE, "visible", visible)
        self.put_variable(CACHE, "lengths", lengths + counts)
        # The filling that all sequences end with is written over.
        self.put_variable(CACHE, "used", used + counts.max())
        return chunk
