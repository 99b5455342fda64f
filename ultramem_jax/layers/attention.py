"""Implements causal self-attention with rotary positions and grouped key/value heads.

In decoding, the keys and values of earlier positions come from a cache (`ultramem_jax.layers.caching`), and
those of new positions are written to it.

In the shapes: d is the width of a head, A_kv the number of key/value heads, U the number of keys attended to,
and G = A/A_kv the number of query heads that share a key/value head.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.exchange_shapes import CAUSAL_CHUNKS
from ultramem_jax.config.model import RopeScalingConfig
from ultramem_jax.layers.caching import CACHE, Chunk, append
from ultramem_jax.layers.mlp import fan_in_normal, output_normal
from ultramem_jax.layers.norms import RMSNorm
from ultramem_jax.layers.parameters import matrix
from ultramem_jax.ops.linear import project

MIN_CHUNK = 32
"""Fewest queries of a part: a smaller one is not worth its own products."""

MASKED = -1e30
"""Number added to the score of a masked key. It is finite, so that a row without any key stays finite."""


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScalingConfig | None = None) -> np.ndarray:
    """Returns theta^(-2i/d) for every i < d/2, scaled as `RopeScalingConfig` says, as (d/2,) float32.

    The scaling is that of Llama 3.1's release, `apply_scaling` in its `model.py`.

    Args:
        head_dim: d, even.
        theta: base of the frequencies.
        scaling: scaling of low frequencies; None for none.
    """
    half = head_dim // 2
    frequencies: np.ndarray = theta ** (-np.arange(half, dtype=np.float32) / np.float32(half))
    if scaling is None:
        return frequencies
    turns = scaling.original_length * frequencies.astype(np.float64) / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (frequencies * (kept + (1 - kept) / scaling.factor)).astype(np.float32)


def rotary(x: jax.Array, positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Rotates the features of each head by angles that grow with the position (arXiv 2104.09864, eq. 34).

    Feature i < d/2 is paired with i + d/2 and turned by position·frequency radians. The paper pairs 2i with
    2i + 1, which differs only in the order of the features. The angles are in float32.

    Args:
        x: (B, S, heads, d), d even.
        positions: (S,) or (B, S), integers.
        frequencies: (d/2,), of `rotary_frequencies`.

    Returns:
        An array of the shape and dtype of x. Products of a rotated query and key depend only on their
        distance.
    """
    half = x.shape[-1] // 2
    if positions.ndim == 1:
        positions = positions[None, :]
    angles = positions.astype(jnp.float32)[:, :, None, None] * jnp.asarray(frequencies)[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _biased(y: jax.Array, bias: jax.Array) -> jax.Array:
    return y + bias.astype(y.dtype)[None, None]


class Attention(nn.Module):
    """Computes softmax(q·kᵀ/√d)·v per head, then the output projection.

    Dropout applies to the attention weights.

    Parameters, float32: `w_query` (D, A·d), `w_key` and `w_value` (D, A_kv·d), `w_out` (A·d, D). With
    `attention_bias` also `query_bias` (A·d,), `key_bias` and `value_bias` (A_kv·d,), and with `all` also
    `output_bias` (D,). With `attention_qk_norm` also the gains of two RMS norms before the rotation,
    `query_norm` and `key_norm`: (A·d,) over the queries and (A_kv·d,) over the keys of all heads together, or
    (d,) each over those of every single head.
    """

    config: ModelConfig

    def setup(self) -> None:
        """Declares the parameters and the dropout."""
        config = self.config
        width, q_width, kv_width = config.embed_dim, config.query_width, config.key_width
        self.w_query = matrix(self, "w_query", fan_in_normal(), (width, q_width))
        self.w_key = matrix(self, "w_key", fan_in_normal(), (width, kv_width))
        self.w_value = matrix(self, "w_value", fan_in_normal(), (width, kv_width))
        self.w_out = matrix(self, "w_out", output_normal(config.num_layers), (q_width, width))
        zeros = nn.initializers.zeros_init()
        if config.attention_bias != "none":
            self.query_bias = self.param("query_bias", zeros, (q_width,), jnp.float32)
            self.key_bias = self.param("key_bias", zeros, (kv_width,), jnp.float32)
            self.value_bias = self.param("value_bias", zeros, (kv_width,), jnp.float32)
        if config.attention_bias == "all":
            self.output_bias = self.param("output_bias", zeros, (width,), jnp.float32)
        if config.attention_qk_norm != "none":
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
        batch, length, _ = x.shape
        q, k, v = (project(x, w) for w in (self.w_query, self.w_key, self.w_value))
        if config.attention_bias != "none":
            biases = (self.query_bias, self.key_bias, self.value_bias)
            q, k, v = (_biased(y, bias) for y, bias in zip((q, k, v), biases, strict=True))
        if config.attention_qk_norm == "all_heads":
            q, k = self.query_norm(q), self.key_norm(k)
        q = q.reshape(batch, length, config.num_heads, config.head_width)
        k, v = (y.reshape(batch, length, config.num_kv_heads, config.head_width) for y in (k, v))
        if config.attention_qk_norm == "per_head":
            q, k = self.query_norm(q), self.key_norm(k)
        frequencies = rotary_frequencies(config.head_width, config.rope_theta, config.rope_scaling)
        return rotary(q, positions, frequencies), rotary(k, positions, frequencies), v

    def _output(self, pooled: jax.Array) -> jax.Array:
        y = project(pooled.reshape(*pooled.shape[:2], -1), self.w_out)
        return _biased(y, self.output_bias) if self.config.attention_bias == "all" else y

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
