"""Layers. Each answers the call `(x (B, S, D), *, train) -> y (B, S, D)` and sows its metrics and losses.

Those that look back, attention and memories with a query convolution, also take a `chunk`: in decoding, x
follows on what they have in the collection `cache` (`layers.caching`). Matrices may be served ones
(`layers.parameters`).

`LAYERS` is the registry: a name for every system, and how its layer is made from a `ModelConfig`. One
contract suite, tests/layers/test_contract.py, runs over all of it.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ultramem_jax.config import ModelConfig
from ultramem_jax.layers.attention import Attention
from ultramem_jax.layers.memory import ProductKeyMemory, SharedTables
from ultramem_jax.layers.mlp import MLP
from ultramem_jax.layers.moe import MoE
from ultramem_jax.layers.norms import RMSNorm

__all__ = [
    "LAYERS",
    "MLP",
    "Attention",
    "MoE",
    "ProductKeyMemory",
    "RMSNorm",
    "SharedTables",
    "feed_forward",
    "memory",
    "shared_tables",
]


def feed_forward(config: ModelConfig, name: str | None = None) -> nn.Module:
    """The feed-forward of a layer: a Mixture of Experts if the config has one, else the MLP."""
    return MLP(config, name=name) if config.moe is None else MoE(config, name=name)


def memory(config: ModelConfig, index: int = 0, name: str | None = None) -> ProductKeyMemory:
    """The model's memory number `index`, of the kind that `config.memory` describes."""
    dtype = jnp.dtype(config.dtype)
    return ProductKeyMemory(**_family(config), index=index, dtype=dtype, norm_eps=config.norm_eps, name=name)


def shared_tables(config: ModelConfig, name: str | None = None) -> SharedTables:
    """The table that the model's memories have in common."""
    return SharedTables(**_family(config), name=name)


def _family(config: ModelConfig) -> dict[str, Any]:
    assert config.memory is not None
    inner = config.moe.top_k * config.moe.expert_dim if config.moe else config.mlp_dim
    return dict(
        config=config.memory,
        num_layers=config.num_layers,
        num_memories=len(config.spans),
        inner_ratio=inner / config.embed_dim,
    )


LAYERS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "attention": Attention,
    "mlp": feed_forward,
    "moe": feed_forward,
    "moe-fine": feed_forward,
    "pkm": memory,
    "memory-plus": memory,
    "peer": memory,
    "ultramem": memory,
    "ultramem-v2": memory,
}
"""System -> its layer, from a config whose `mlp`, `moe` and `memory` describe that system."""
