"""Layers. Each answers the call `(x (B, S, D), *, train) -> y (B, S, D)` and sows its metrics and losses.

Those that look back, attention and memories whose parts do, also take a `chunk`: in decoding, x follows on
what they have in the collection `cache` (`layers.caching`). Matrices may be served ones
(`layers.parameters`). One contract suite, tests/layers/test_contract.py, runs over all of them.

They are imported when they are asked for: the configs of memories lie in this package, and whoever counts
parameters from a config alone does not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ultramem_jax.layers.attention import Attention
    from ultramem_jax.layers.memory.memory import Memory, SharedTables
    from ultramem_jax.layers.mlp import MLP
    from ultramem_jax.layers.moe import MoE, feed_forward
    from ultramem_jax.layers.norms import RMSNorm

__all__ = ["MLP", "Attention", "Memory", "MoE", "RMSNorm", "SharedTables", "feed_forward"]

_MODULES = {
    "MLP": "mlp",
    "Attention": "attention",
    "Memory": "memory.memory",
    "MoE": "moe",
    "RMSNorm": "norms",
    "SharedTables": "memory.memory",
    "feed_forward": "moe",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
