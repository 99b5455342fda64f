"""Implements the readout of Engram, whose config is `ContextGate`."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.config.memory import MemorySite
from ultramem_jax.layers.caching import CACHE, Chunk, last_tokens
from ultramem_jax.layers.memory.context_gate import ContextGate
from ultramem_jax.layers.parameters import matrix
from ultramem_jax.layers.sowing import sow
from ultramem_jax.ops.linear import project
from ultramem_jax.ops.norms import rms_norm

_LEAST_SQUARE = 1e-6
"""Smallest |g| under the root: smaller ones count as this, so that the root has a derivative."""


class ContextGateReadout(nn.Module):
    """Maps rows (T, R, d_v) and hidden states (B, S, D) to the output (B, S, D).

    It sows the metric `gate`, the mean of α.
    """

    site: MemorySite
    config: ContextGate

    @nn.compact
    def __call__(self, pooled: jax.Array, x: jax.Array, chunk: Chunk | None) -> jax.Array:
        """Applies gate and convolution to the rows of every token.

        Args:
            pooled: (T, R, d_v), a token's rows.
            x: (B, S, D), hidden states.
            chunk: how x continues `conv_inputs` in the collection `cache`, in decoding.

        Returns:
            (B, S, D).
        """
        config, tokens = self.config, x.reshape(-1, x.shape[2])
        rows = pooled.reshape(pooled.shape[0], -1)
        values, keys = self._projected("value", rows), self._projected("key", rows)
        eps = config.gate_norm_eps or float(jnp.finfo(jnp.float32).eps)
        normed = self._norm("gate_key_scale", keys, eps) * self._norm("gate_hidden_scale", tokens, eps)
        fit = normed.sum(-1, keepdims=True) / math.sqrt(x.shape[2])
        gate = nn.sigmoid(jnp.sign(fit) * jnp.sqrt(jnp.maximum(jnp.abs(fit), _LEAST_SQUARE)))
        sow(self, "metrics", "gate", gate.mean())
        u = (values * gate.astype(values.dtype)).reshape(x.shape)
        if config.conv_width == 0:
            return u
        inputs = self._norm("conv_scale", u, self.site.context.norm_eps).astype(x.dtype)
        return u + nn.silu(self._convolved(inputs, chunk))

    def _projected(self, name: str, rows: jax.Array) -> jax.Array:
        shape = self.config.parameters(self.site)[f"{name}_projection"].shape
        init = nn.initializers.normal(1 / math.sqrt(shape[0]))
        kernel = matrix(self, f"{name}_projection", init, shape)
        bias = self.param(f"{name}_bias", nn.initializers.zeros, shape[1:], jnp.float32)
        return project(rows, kernel) + bias.astype(rows.dtype)[None]

    def _norm(self, name: str, x: jax.Array, eps: float) -> jax.Array:
        """Applies an RMS norm over the last axis, in float32."""
        scale = self.param(name, nn.initializers.ones, x.shape[-1:], jnp.float32)
        return rms_norm(x.astype(jnp.float32), scale, eps)

    def _convolved(self, x: jax.Array, chunk: Chunk | None) -> jax.Array:
        """Applies the causal depthwise convolution; tap i looks i·dilation positions back."""
        config, length, back = self.config, x.shape[1], self.config.look_back
        taps = self.param("conv", nn.initializers.zeros, (config.conv_width, x.shape[2]), jnp.float32)
        taps = taps.astype(x.dtype)[:, None, None]
        if chunk is None or back == 0:
            sequence = jnp.pad(x, ((0, 0), (back, 0), (0, 0)))
        else:
            sequence = jnp.concatenate([self.get_variable(CACHE, "conv_inputs"), x], axis=1)
            self.put_variable(CACHE, "conv_inputs", last_tokens(sequence, chunk.counts, back))
        steps = [back - i * config.conv_dilation for i in range(config.conv_width)]
        shifted = [taps[i] * sequence[:, step : step + length] for i, step in enumerate(steps)]
        return sum(shifted[1:], shifted[0])
