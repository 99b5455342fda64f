"""The rows that memories read: values and, where slots are experts, pre-values."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.layers.memory.initializers import MemoryInit, draw_table
from ultramem_jax.memory_config import MemoryConfig

Tables = dict[str, jax.Array]
"""`values` (N, d_v) and, if d_p > 0, `pre_values` (N, d_p), as `ultramem_jax.ops.rows` stores them."""


def declare_tables(module: nn.Module, config: MemoryConfig, num_slots: int, init: MemoryInit) -> Tables:
    """The module's tables, in its collection `memory`, apart from `params`: they are trained by rows."""
    widths = {"values": (config.value_dim, init.values_std)}
    if config.pre_value_dim:
        widths["pre_values"] = (config.pre_value_dim, init.pre_values_std)
    tables = {}
    for name, (width, std) in widths.items():
        # A default argument, because the loop goes on before a lambda is called.
        draw = lambda width=width, std=std: draw_table(  # noqa: E731
            module.make_rng("params"), num_slots, width, std, config.table_dtype
        )
        tables[name] = jnp.asarray(module.variable("memory", name, draw).value)
    return tables
