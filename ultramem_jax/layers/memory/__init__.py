"""Memory layers. They answer the call of every layer, `(x, *, train) -> y`."""

from ultramem_jax.layers.memory.product_key_memory import ProductKeyMemory, SharedTables

__all__ = ["ProductKeyMemory", "SharedTables"]
