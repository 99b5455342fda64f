"""Defines one layer of the decoder."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.config import ModelConfig
from ultramem_jax.layers import Attention, RMSNorm, feed_forward
from ultramem_jax.layers.caching import Chunk


class Block(nn.Module):
    """Applies one layer: x += Attention(norm(x)); h = norm(x); x += FeedForward(h)."""

    config: ModelConfig
    feeds_forward: bool = True
    """True if the layer has a feed-forward. Otherwise a memory stands in its place, and the caller adds
    it."""

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, chunk: Chunk | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Applies the layer.

        Args:
            x: (B, S, D), the residual stream.
            train: whether dropout is on.
            chunk: tokens that follow those in the cache, if there is one.

        Returns:
            x after the layer, and h, the normalised input of its feed-forward, which memories read.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        dropout = nn.Dropout(config.dropout, deterministic=not train)
        h = RMSNorm(config.norm_eps, dtype, name="attention_norm")(x)
        x = x + dropout(Attention(config, name="attention")(h, train=train, chunk=chunk))
        h = RMSNorm(config.norm_eps, dtype, name="feed_forward_norm")(x)
        if not self.feeds_forward:
            return x, h
        return x + dropout(feed_forward(config, name="feed_forward")(h, train=train)), h
