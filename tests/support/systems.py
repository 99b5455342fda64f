"""Holds a small model of every system."""

from dataclasses import replace

from ultramem_jax.config import ModelConfig, MoEConfig
from ultramem_jax.presets import families

BASE = ModelConfig(embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, mlp_dim=24)
MEMORY = dict(num_keys=8, top_m=4, num_heads=2, key_dim=8)
OWN_TABLE = dict(sharing="none")  # a layer on its own; sharing is in test_memory_family.py
PLUS = families.memory_plus(**MEMORY, **OWN_TABLE, value_dim=8, balance_loss_weight=0.1)
V2 = families.ultramem_v2(
    **MEMORY | OWN_TABLE | dict(num_heads=1),
    value_dim=8,
    pre_value_dim=8,
    pre_value_activation="gelu",
    query_per_rank=True,
)
CONFIGS = {
    "attention": BASE,
    "mlp": BASE,
    "moe": replace(BASE, moe=MoEConfig(num_experts=6, top_k=2, expert_dim=8)),
    "moe-fine": replace(
        BASE,
        moe=MoEConfig(num_experts=8, top_k=3, expert_dim=4, activation="swiglu", normalize_gates=False),
    ),
    "pkm": replace(BASE, memories={"memory": families.pkm(**MEMORY, value_dim=16)}),
    "memory-plus": replace(BASE, memories={"memory": PLUS}),
    "peer": replace(BASE, memories={"memory": families.peer(**MEMORY, value_dim=16, pre_value_dim=16)}),
    "ultramem": replace(BASE, memories={"memory": families.ultramem(**MEMORY, value_dim=8)}),
    "ultramem-v2": replace(BASE, memories={"memory": V2}),
}
"""Models of 16 channels and two layers, by the system whose layer they have."""
