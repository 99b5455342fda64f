"""Holds the registries of a memory's parts: addressers, which find rows, and readouts, which use them."""

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
"""Registry of the kinds of `MemoryConfig.address`: kind -> config class, which makes the addresser."""

READOUTS: "Registry[ReadoutConfig]" = Registry(
    "readout kind",
    {
        "projection": "ultramem_jax.layers.memory.readout",
        "context_gate": "ultramem_jax.layers.memory.context_gate",
    },
)
"""Registry of the kinds of `MemoryConfig.readout`: kind -> config class, which makes the readout."""
