"""Holds the registries of what a memory is made of: how it finds rows, and what it makes of them."""

from typing import TYPE_CHECKING

from ultramem_jax.registry import Registry

if TYPE_CHECKING:
    from ultramem_jax.config.memory_parts import AddressConfig, ReadoutConfig

ADDRESSERS: "Registry[AddressConfig]" = Registry(
    "address kind",
    {
        "product_keys": "ultramem_jax.layers.memory.product_keys",
        "hashed_ngrams": "ultramem_jax.layers.memory.hashed_ngrams",
    },
)
"""Kind of `MemoryConfig.address` -> its config, which makes the addresser."""

READOUTS: "Registry[ReadoutConfig]" = Registry(
    "readout kind",
    {
        "projection": "ultramem_jax.layers.memory.readout",
        "context_gate": "ultramem_jax.layers.memory.context_gate",
    },
)
"""Kind of `MemoryConfig.readout` -> its config, which makes the readout."""
