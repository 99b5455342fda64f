"""Layers. Each answers the call `(x (B, S, D), *, train) -> y (B, S, D)` and sows its metrics and losses.

`LAYERS` is the registry: a name for every system, and how its layer is made from a `ModelConfig`. One
contract suite, tests/layers/test_contract.py, runs over all of it.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from ultramem_jax.config import ModelConfig
from ultramem_jax.layers.attention import Attention
from ultramem_jax.layers.memory import ProductKeyMemory
from ultramem_jax.layers.mlp import MLP
from ultramem_jax.layers.moe import MoE
from ultramem_jax.layers.norms import RMSNorm

__all__ = ["LAYERS", "MLP", "Attention", "MoE", "ProductKeyMemory", "RMSNorm", "feed_forward", "memory"]


def feed_forward(config: ModelConfig, name: str | None = None) -> nn.Module:
    """The feed-forward of a layer: a Mixture of Experts if the config has one, else the MLP."""
    return MLP(config, name=name) if config.moe is None else MoE(config, name=name)


def memory(config: ModelConfig, index: int = 0, name: str | None = None) -> nn.Module:
    """The model's memory number `index`, of the kind that `config.memory` describes."""
    assert config.memory is not None
    dtype = jnp.dtype(config.dtype)
    return ProductKeyMemory(config.memory, config.num_layers, index, dtype, config.norm_eps, name=name)


LAYERS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "attention": Attention,
    "mlp": feed_forward,
    "moe": feed_forward,
    "pkm": memory,
    "ultramem": memory,
}
"""System -> its layer, from a config whose `mlp`, `moe` and `memory` describe that system."""
