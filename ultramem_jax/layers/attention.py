"""Implements causal self-attention with rotary positions and grouped key/value heads.

In decoding, the keys and values of earlier positions come from a cache (`ultramem_jax.layers.caching`), and
those of new positions are written to it.

In the shapes: d = D/A is the width of a head, A_kv the number of key/value heads, U the number of keys
attended to, and G = A/A_kv the number of query heads that share a key/value head.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.exchange_shapes import CAUSAL_CHUNKS
from ultramem_jax.layers.caching import CACHE, Chunk, append
from ultramem_jax.layers.mlp import fan_in_normal, output_normal
from ultramem_jax.layers.norms import RMSNorm
from ultramem_jax.layers.parameters import matrix
from ultramem_jax.ops.linear import project

MIN_CHUNK = 32
"""Fewest queries of a part: a smaller one is not worth its own products."""

MASKED = -1e30
"""Number added to the score of a masked key. It is finite, so that a row without any key stays finite."""


def rotary(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotates the features of each head by angles that grow with the position (arXiv 2104.09864, eq. 34).

    Feature i < d/2 is paired with i + d/2 and turned by position·theta^(-2i/d) radians. The paper pairs 2i
    with 2i + 1, which differs only in the order of the features. The angles are in float32.

    Args:
        x: (B, S, heads, d), d even.
        positions: (S,) or (B, S), integers.
        theta: base of the frequencies.

    Returns:
        An array of the shape and dtype of x. Products of a rotated query and key depend only on their
        distance.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-np.arange(half, dtype=np.float32) / np.float32(half))
    if positions.ndim == 1:
        positions = positions[None, :]
    angles = positions.astype(jnp.float32)[:, :, None, None] * jnp.asarray(frequencies)[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class Attention(nn.Module):
    """Computes softmax(q·kᵀ/√d)·v per head, then the output projection, without biases.

    Dropout applies to the attention weights.

    Parameters, float32: `w_query` (D, A·d), `w_key` and `w_value` (D, A_kv·d), `w_out` (A·d, D). With
    `attention_qk_norm` also the gains of two RMS norms before the rotation: `query_norm` (A·d,) over the
    queries of all heads together, and `key_norm` (A_kv·d,) over the keys.
    """

    config: ModelConfig

    def setup(self) -> None:
        """Declares the parameters and the dropout."""
        config = self.config
        width = config.embed_dim
        kv_width = width // config.num_heads * config.num_kv_heads
        self.w_query = matrix(self, "w_query", fan_in_normal(), (width, width))
        self.w_key = matrix(self, "w_key", fan_in_normal(), (width, kv_width))
        self.w_value = matrix(self, "w_value", fan_in_normal(), (width, kv_width))
        self.w_out = matrix(self, "w_out", output_normal(config.num_layers), (width, width))
        if config.attention_qk_norm:
            self.query_norm = RMSNorm(config.norm_eps, jnp.dtype(config.dtype))
            self.key_norm = RMSNorm(config.norm_eps, jnp.dtype(config.dtype))
        self.dropout = nn.Dropout(config.dropout)

    def __call__(self, x: jax.Array, *, train: bool, chunk: Chunk | None = None) -> jax.Array:
        """Maps x (B, S, D) -> (B, S, D) in `config.dtype`; position s sees positions up to s.

        Args:
            x: (B, S, D).
            train: apply dropout to the attention weights (rng `dropout`).
            chunk: if given, x continues what is in the collection `cache`, which must be mutable and hold
                `keys` and `values` of this layer.
        """
        if chunk is not None:
            return self._after_cached(x, chunk)
        length = x.shape[1]
        q, k, v = self.heads(x, jnp.arange(length, dtype=jnp.int32))
        size = max(MIN_CHUNK, -(-length // CAUSAL_CHUNKS))
        parts = []
        for begin in range(0, length, size):
            end = min(begin + size, length)
            mask = jnp.arange(begin, end)[:, None] >= jnp.arange(end)[None, :]
            parts.append(self._pool(q[:, begin:end], k[:, :end], v[:, :end], mask, train))
        return self._output(jnp.concatenate(parts, axis=1))

    def _after_cached(self, x: jax.Array, chunk: Chunk) -> jax.Array:
        q, k, v = self.heads(x, chunk.positions)
        cached = []
        for name, new in (("keys", k), ("values", v)):
            cached.append(append(self.get_variable(CACHE, name), new, chunk.first))
            self.put_variable(CACHE, name, cached[-1])
        k, v = cached
        pooled = self._pool(q.astype(k.dtype), k, v, chunk.visible, False)
        return self._output(pooled.astype(q.dtype))

    def heads(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Maps x (B, S, D), positions (S,) or (B, S) to q (B, S, A, d), k and v (B, S, A_kv, d)."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        x = x.astype(dtype)
        batch, length, width = x.shape
        head_dim = width // config.num_heads
        q, k = project(x, self.w_query), project(x, self.w_key)
        if config.attention_qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        q = q.reshape(batch, length, config.num_heads, head_dim)
        k = k.reshape(batch, length, config.num_kv_heads, head_dim)
        v = project(x, self.w_value).reshape(batch, length, config.num_kv_heads, head_dim)
        return rotary(q, positions, config.rope_theta), rotary(k, positions, config.rope_theta), v

    def _output(self, pooled: jax.Array) -> jax.Array:
        return project(pooled.reshape(*pooled.shape[:2], -1), self.w_out)

    def _pool(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        """Pools, for every query, the values of the keys that its mask allows, with a softmax in float32.

        Args:
            q: (B, S, A, d).
            k: (B, U, A_kv, d), or (B·A_kv, U, d) as in a cache.
            v: same shape as k.
            mask: (S, U) or (B, S, U) bool, True where query s may see key u. A query that sees no key gets
                the mean of all values.
            train: apply dropout.

        Returns:
            (B, S, A, d), before the output projection.
        """
        batch, length, heads, head_dim = q.shape
        kv_heads = self.config.num_kv_heads
        group = heads // kv_heads
        # The query heads of a group are stacked as rows (B, A_kv, G·S, d) of one product with their key head.
        # Query head a reads key head a // G.
        q = q.reshape(batch, length, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
        q = q.reshape(batch, kv_heads, group * length, head_dim) * jnp.asarray(head_dim**-0.5, q.dtype)
        mask = mask[None] if mask.ndim == 2 else mask
        bias = jnp.where(jnp.tile(mask, (1, group, 1)), jnp.float32(0), jnp.float32(MASKED))[:, None]
        of, keys = "bh", "bkhd"
        if k.ndim == 3:
            of, keys = "n", "nkd"
            bias = jnp.broadcast_to(bias, (batch, kv_heads, *bias.shape[2:])).reshape(-1, *bias.shape[2:])
            q = q.reshape(-1, *q.shape[2:])
        scores = jnp.einsum(f"{of}qd,{keys}->{of}qk", q, k, preferred_element_type=jnp.float32) + bias
        # Dividing the pooled values instead of the weights takes U/d times fewer divisions. The maximum
        # cancels, so it needs no derivative.
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = self.dropout(weights, deterministic=not train).astype(v.dtype)
        pooled = jnp.einsum(f"{of}qk,{keys}->{of}qd", weights, v, preferred_element_type=jnp.float32) / total
        pooled = pooled.astype(v.dtype).reshape(batch, kv_heads, group, length, head_dim)
        return pooled.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)
