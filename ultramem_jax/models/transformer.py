"""Defines the pre-norm decoder: layers of attention and feed-forward, and memories that skip over them."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.config.model import layer_name, table_readers
from ultramem_jax.layers import Memory, RMSNorm, SharedTables
from ultramem_jax.layers.caching import CACHE, Chunk, next_chunk
from ultramem_jax.layers.parameters import matrix, served_parameter
from ultramem_jax.models.block import Block
from ultramem_jax.models.layer_groups import run_group
from ultramem_jax.ops.embedding import embed
from ultramem_jax.ops.linear import project
from ultramem_jax.ops.on_mesh import constrain_tokens


class Transformer(nn.Module):
    """Maps token ids to logits of the next token, as a decoder-only language model.

    The placement of a memory says what it reads and where its output is added:

    - `start:end` reads h of layer `start`, and adds to the residual stream after layer `end`. Between the
      two, nothing waits for it.
    - `before@layer` reads the residual stream before the layer, and adds to it there.
    - `instead@layer` reads h, and takes the place of the feed-forward.

    With the collection `cache` (`models.cache.empty_cache`), which must be mutable, tokens follow those in
    the cache, and are added to it: first the prompt in chunks, then token by token.
    """

    config: ModelConfig
    remat: str = "none"
    """Activations that layers compute again in the backward pass, see `TrainConfig.remat`."""

    @nn.compact
    def __call__(
        self, tokens: jax.Array, *, train: bool = False, counts: jax.Array | None = None
    ) -> jax.Array:
        """Applies the model.

        Args:
            tokens: (B, S) integer ids in [0, V).
            train: whether dropout is on. It then needs the `dropout` stream of random numbers.
            counts: (B,) int32 in [0, S], only with a cache. It gives the number of a sequence's tokens, which
                come first. The rest is padding, which nothing sees. None means S for all.

        Returns:
            (B, S, V) float32 logits. With `counts` only those after each sequence's last token, (B, V); those
            of a sequence without a token have no meaning.
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
        x = constrain_tokens(dropout(embed(embedding, tokens).astype(dtype)))
        chunk = self._chunk(tokens, counts)
        shared = {
            name: SharedTables(readers[0], name=name)()
            for name, readers in table_readers(config).items()
            if readers[0].config.table.is_shared
        }

        def read(site: MemorySite, x: jax.Array) -> jax.Array:
            layer_memory = Memory(site, name=site.name)
            tables = shared.get(site.table)
            return dropout(layer_memory(x, train=train, token_ids=tokens, tables=tables, chunk=chunk))

        landing: dict[int, list[jax.Array]] = {}
        # Parameters are declared, and caches updated, layer by layer.
        single = chunk is not None or self.is_initializing()
        groups: Sequence[range] = [range(layer, layer + 1) for layer in range(1, config.num_layers + 1)]
        if config.scan_layers and not single:
            groups = config.layer_groups
        for layers in groups:
            for site in config.sites:
                if site.span.place == "before" and site.span.start == layers[0]:
                    x = x + read(site, x)
            if single or (len(layers) == 1 and self.remat == "none"):
                feeds_forward = layers[0] in config.feed_forward_layers
                x, h = Block(config, feeds_forward, name=layer_name(layers[0]))(x, train=train, chunk=chunk)
            else:
                x, h = run_group(self, config, layers, x, train, self.remat)
            for site in config.sites:
                if site.span.place != "before" and site.span.start == layers[-1]:
                    landing.setdefault(site.span.end, []).append(read(site, h))
            for y in landing.pop(layers[-1], ()):
                x = x + y
            x = constrain_tokens(x)
        if counts is not None:
            last = jnp.maximum(counts - 1, 0)[:, None, None]
            x = jnp.take_along_axis(x, last, axis=1, mode="promise_in_bounds")[:, 0]
        x = RMSNorm(config.norm_eps, dtype, name="final_norm")(x)
        if not config.tie_embeddings:
            output = matrix(self, "output", nn.initializers.lecun_normal(), embedding.shape[::-1])
        else:
            # Served variables hold the embedding once more, as the matrix that is needed here.
            output = served_parameter(self, "output") or embedding.T
        return project(x, output, result_dtype=jnp.float32)

    def _chunk(self, tokens: jax.Array, counts: jax.Array | None) -> Chunk | None:
        """Returns what the layers must know of tokens that follow a cache, and advances the cache's counters.

        It returns None without a cache.
        """
        if not self.has_variable(CACHE, "visible"):
            return None
        batch, size = tokens.shape
        counts = jnp.full((batch,), size, jnp.int32) if counts is None else counts
        names = ("visible", "lengths", "used")
        visible, lengths, used = (jnp.asarray(self.get_variable(CACHE, name)) for name in names)
        chunk, visible = next_chunk(visible, lengths, used, counts, size)
        self.put_variable(CACHE, "visible", visible)
        self.put_variable(CACHE, "lengths", lengths + counts)
        # The padding at the end of all sequences will be overwritten.
        self.put_variable(CACHE, "used", used + counts.max())
        return chunk
