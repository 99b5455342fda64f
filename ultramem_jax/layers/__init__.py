"""Contains the layers, which map `(x (B, S, D), *, train) -> y (B, S, D)` and sow their metrics and losses.

Layers that look back at earlier tokens (attention, and memories with such parts) also take a `chunk`: in
decoding, x continues what they have in the collection `cache` (`layers.caching`). Matrices may be those of a
served model (`layers.parameters`). One contract suite, tests/layers/test_contract.py, tests all layers.

Layers are imported when they are first used. The configs of memories are in this package, and counting
parameters from a config must not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING

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


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
