"""Implements the readout of product-key memories, whose config is `Projection`."""

import math

import flax.linen as nn
import jax

from ultramem_jax.config.memory import MemorySite
from ultramem_jax.layers.caching import Chunk
from ultramem_jax.layers.memory.readout import Projection
from ultramem_jax.layers.parameters import matrix
from ultramem_jax.ops.linear import project


class ProjectionReadout(nn.Module):
    """Maps pooled values (T, E, d_v) to the output (B, S, D)."""

    site: MemorySite
    config: Projection

    @nn.compact
    def __call__(self, pooled: jax.Array, x: jax.Array, chunk: Chunk | None) -> jax.Array:
        """Applies gate and projection; `chunk` is unused, because this readout does not look back.

        Args:
            pooled: (T, E, d_v), pooled values.
            x: (B, S, D), hidden states, for the gate.
            chunk: unused.

        Returns:
            (B, S, D).
        """
        del chunk
        shapes, init = self.config.parameters(self.site), self.site.initial
        default: nn.initializers.Initializer = nn.initializers.normal(
            1 / math.sqrt(pooled.shape[1] * pooled.shape[2])
        )
        y = pooled.reshape(pooled.shape[0], -1)
        if self.config.gate:
            kernel = matrix(self, "gate", init.input or nn.initializers.lecun_normal(), shapes["gate"].shape)
            y = y * nn.silu(project(x.reshape(-1, x.shape[2]), kernel))
        if self.config.project_values:
            kernel = matrix(self, "projection", init.projection or default, shapes["projection"].shape)
            y = project(y, kernel)
        return y.reshape(x.shape)
