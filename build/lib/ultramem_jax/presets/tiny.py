"""Defines models for the CPU of a laptop, with equal FLOPs per token and equal sparse parameters."""

from dataclasses import replace

from ultramem_jax.config import ModelConfig, MoEConfig
from ultramem_jax.presets import families

# The tiny family has bytes as tokens, 4 layers and width 128. Its base is `ultramem-tiny`. The MLP of the
# base has the usual width 4·D. Its two tables of 320² values of width 64 hold 16.7 times the 12·L·D² weights
# of the layers, and a token reads 64 values. The other models are those that
# `ultramem_jax.baselines.matching.match` finds for the base, with equal FLOPs per token, equal sparse
# parameters and, where there are memories, equal reads. A test checks that.
LAYERS = ModelConfig(embed_dim=128, num_layers=4, num_heads=4, num_kv_heads=4, mlp_dim=512)
"""Dense layers of `ultramem-tiny`, and of the ladder at the scale `tiny`."""

_PKM = families.pkm(placement="2:2", num_keys=320, top_m=32, num_heads=2, key_dim=144, value_dim=128)

PRESETS: dict[str, ModelConfig] = {
    "ultramem-tiny": replace(
        LAYERS,
        memories={
            "ultramem": families.ultramem(
                placement="1:2/3:4", num_keys=320, top_m=16, num_heads=2, key_dim=32, value_dim=64
            )
        },
    ),
    "dense-tiny": replace(LAYERS, mlp_dim=768),
    "moe-tiny": replace(LAYERS, moe=MoEConfig(num_experts=34, top_k=2, expert_dim=376)),
    "pkm-tiny": replace(LAYERS, memories={"pkm": _PKM}),
    "moe-fine-tiny": replace(
        LAYERS,
        moe=MoEConfig(
            num_experts=147,
            top_k=8,
            expert_dim=58,
            activation="swiglu",
            normalize_gates=False,
            auxiliary_over_layers="mean",
        ),
    ),
    "pkm-improved-tiny": replace(
        LAYERS, memories={"pkm": _PKM.changed(norm_query=True, norm_keys=True, value_lr_multiple=4.0)}
    ),
    "memory-plus-tiny": replace(
        LAYERS,
        memories={
            "memory_plus": families.memory_plus(
                placement="1:1/3:3",
                num_keys=320,
                top_m=16,
                num_heads=2,
                key_dim=53,
                value_dim=128,
                value_lr_multiple=4.0,
            )
        },
    ),
    "peer-tiny": replace(
        LAYERS,
        memories={
            "peer": families.peer(
                placement="2:2",
                num_keys=226,
                top_m=8,
                num_heads=8,
                key_dim=44,
                value_dim=128,
                pre_value_dim=128,
            )
        },
    ),
    "ultramem-v2-tiny": replace(
        LAYERS,
        mlp_dim=536,
        memories={
            "ultramem_v2": families.ultramem_v2(
                num_keys=226, top_m=16, key_dim=32, value_dim=32, pre_value_dim=32, share_ratio=0.5
            )
        },
    ),
    "engram-tiny": replace(
        LAYERS,
        mlp_dim=704,
        memories={
            "engram": families.engram(
                placement="before@2/before@3",
                heads_per_order=16,
                rows_per_head=(50_804,),
                value_dim=4,
                row_multiple=64,
            )
        },
    ),
    "ultramem-demo": replace(
        LAYERS,
        memories={
            "ultramem": families.ultramem(
                placement="1:2/3:4", num_keys=192, top_m=16, num_heads=2, key_dim=32, value_dim=64
            )
        },
    ),
}

_TINY_NOTE = (
    "Not a published model: one of a family of equal FLOPs per token and (but for the dense one) "
    "equal sparse parameters, small enough for the CPU of a laptop."
)
NOTES: dict[str, str] = {name: _TINY_NOTE for name in PRESETS if name.endswith("-tiny")} | {
    "ultramem-demo": "Not a published model: `ultramem-tiny` with tables of 192² slots, for runs of minutes.",
}
