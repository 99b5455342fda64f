"""Holds the small models whose training step is tested, and makes batches of their tokens."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.presets import families

MODEL = ModelConfig(vocab_size=11, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=2, mlp_dim=16)
ULTRAMEM = replace(
    MODEL,
    memories={
        "memory": families.ultramem(
            placement="1:2/2:2", num_keys=4, top_m=8, num_heads=2, key_dim=8, value_dim=8, shuffle_seed=3
        )
    },
)
SMALL = dict(num_keys=4, top_m=4, num_heads=2, key_dim=8, value_dim=8)
# Both layers of the first two read one table; the windows of the ring overlap.
FAMILY = {
    "ultramem-v2": families.ultramem_v2(
        **SMALL | dict(num_keys=3, num_heads=1),
        pre_value_dim=6,
        pre_value_activation="gelu",
        share_ratio=0.9,
        value_lr_multiple=2.0,
        balance_loss_weight=0.1,
    ),
    "memory-plus": families.memory_plus(**SMALL),
    "peer": families.peer(**SMALL | dict(value_dim=16), pre_value_dim=16, placement="1:2"),
}


def token_batches(count: int, sequences: int = 8, length: int = 17, seed: int = 0) -> list[jax.Array]:
    """Returns batches (sequences, length) of random tokens of `MODEL`'s vocabulary."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.integers(0, 11, (sequences, length)), jnp.int32) for _ in range(count)]
