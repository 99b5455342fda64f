"""Defines the open models of the UltraMemV2 paper (arXiv 2508.18756): a MoE and three memories at two scales.

The four models of a scale have equal cost. At 227M/1.2B, the shapes of the memory models come from the
commands that the authors released in
https://github.com/ZihaoHuang-notabot/Ultra-Sparse-Memory-Network: run_memory_plus.sh, run_ultramem_v1.sh, and
README.md for UltraMemV2. The script run_ultramem_v2.sh has a larger UltraMemV2 in OLMoE-1B-7B. (Their places
of memories count layers from 0, and their `mlp_hidden_size` is twice the inner width of a SwiGLU.) At 1B/7B
only the MoE, OLMoE, is published (arXiv 2409.02060), and the memory models are fitted to it. Here counts of
active and of all parameters include the embeddings (`Parameters.active_total`, `Parameters.total`), unlike
those of the UltraMem paper.
"""

from dataclasses import replace

from ultramem_jax.config import MemoryConfig, ModelConfig, MoEConfig
from ultramem_jax.presets import families

_LAYERS_227M = ModelConfig(
    vocab_size=50_304,
    embed_dim=768,
    num_layers=20,
    num_heads=12,
    num_kv_heads=12,
    attention_qk_norm="all_heads",
    mlp="swiglu",
    mlp_dim=2496,
)
_LAYERS_1B = ModelConfig(
    vocab_size=50_304,
    embed_dim=2048,
    num_layers=16,
    num_heads=16,
    num_kv_heads=16,
    attention_qk_norm="all_heads",
    mlp="swiglu",
    mlp_dim=6784,
    tie_embeddings=False,
)


def _olmoe(expert_dim: int) -> MoEConfig:
    """Returns OLMoE's experts: the best 8 of 64 keep their softmax weights; losses are means over layers."""
    return MoEConfig(
        num_experts=64,
        top_k=8,
        expert_dim=expert_dim,
        activation="swiglu",
        normalize_gates=False,
        load_balance_weight=0.01,
        router_z_weight=1e-3,
        auxiliary_over_layers="mean",
    )


def _memory_plus(placement: str, num_keys: int, key_dim: int, value_dim: int) -> MemoryConfig:
    """Returns Memory+ with the settings that both scales share."""
    return families.memory_plus(
        placement=placement,
        num_keys=num_keys,
        top_m=80,
        num_heads=2,
        key_dim=key_dim,
        value_dim=value_dim,
        value_lr_multiple=4.0,
    )


def _ultramem(placement: str, num_keys: int, key_dim: int, value_dim: int) -> MemoryConfig:
    """Returns UltraMem as in the release of UltraMemV2: without a convolution and without a core loss."""
    return families.ultramem(
        placement=placement,
        num_keys=num_keys,
        top_m=80,
        num_heads=2,
        key_dim=key_dim,
        value_dim=value_dim,
        rank_keys="full",
        core_loss_weight=0.0,
        init="reference",
        value_lr_multiple=4.0,
        query_conv_width=0,
    )


PRESETS: dict[str, ModelConfig] = {
    "olmoe-227m-1.2b": replace(_LAYERS_227M, moe=_olmoe(384)),
    "memory-plus-227m-1.2b": replace(
        _LAYERS_227M,
        mlp_dim=3008,
        memories={
            "memory_plus": _memory_plus("5:5/9:9/13:13/17:17", num_keys=1138, key_dim=384, value_dim=768)
        },
    ),
    "ultramem-227m-1.2b": replace(
        _LAYERS_227M,
        mlp_dim=2752,
        memories={"ultramem": _ultramem("3:6/7:10/11:14/15:18", num_keys=808, key_dim=192, value_dim=384)},
    ),
    "ultramem-v2-227m-1.2b": replace(
        _LAYERS_227M,
        mlp_dim=2496,
        memories={
            "ultramem_v2": families.ultramem_v2(
                num_keys=360, top_m=32, key_dim=192, value_dim=192, pre_value_dim=192, share_ratio=0.5
            )
        },
    ),
    "olmoe-1b-7b": replace(_LAYERS_1B, moe=_olmoe(1024)),
    "memory-plus-1b-7b": replace(
        _LAYERS_1B,
        mlp_dim=7232,
        memories={
            "memory_plus": _memory_plus("4:4/7:7/10:10/13:13", num_keys=1659, key_dim=1024, value_dim=2048)
        },
    ),
    "ultramem-1b-7b": replace(
        _LAYERS_1B,
        mlp_dim=7424,
        memories={"ultramem": _ultramem("3:5/6:8/9:11/12:14", num_keys=1173, key_dim=512, value_dim=1024)},
    ),
    "ultramem-v2-1b-7b": replace(
        _LAYERS_1B,
        mlp_dim=6784,
        memories={
            "ultramem_v2": families.ultramem_v2(
                num_keys=587,
                top_m=32,
                key_dim=512,
                value_dim=768,
                pre_value_dim=256,
                expansion=4,
                query_per_rank=True,
                share_ratio=1 / 16,
            )
        },
    ),
}

WHOLE = frozenset({"ultramem-227m-1.2b", "ultramem-v2-227m-1.2b", "olmoe-1b-7b"})
"""Names of the presets whose shape is fully published. The notes on the others say what is inferred."""

_LAYERS_227M_NOTE = (
    "Published: 20 layers of width 768, 12 heads, norms of queries and keys in attention, SwiGLU, tied "
    "embeddings of 50,304 tokens"
)
_INFERRED_1B = (
    "UltraMemV2 paper, open models. Published: OLMoE-1B-7B beside it (arXiv 2409.02060), 1.28 B active and "
    "6.92 B parameters in all, embeddings among them. Inferred: the shapes. The layers are OLMoE-1B-7B's but "
    "for the MLP; 5.64 B parameters in tables, OLMoE's total less its active ones, give the slots; the width "
    "of the MLP, a multiple of 64, gives OLMoE's active count to 0.3 %. "
)

NOTES: dict[str, str] = {
    "olmoe-227m-1.2b": (
        f"UltraMemV2 paper, open models. {_LAYERS_227M_NOTE}; 8 of 64 SwiGLU experts, "
        "227 M active parameters, 1.2 B in all. Inferred: experts 384 wide, from those two totals, which "
        "include the embeddings: 227.4 M active without the router, 228.4 M with it. The two losses of the "
        "router are OLMoE's."
    ),
    "memory-plus-227m-1.2b": (
        f"UltraMemV2 paper, open models. {_LAYERS_227M_NOTE}; MLPs 3,008 wide, 4 "
        "memories with n 1138, keys 384 wide and 2·80 reads. Inferred: values 768 wide. The paper prints "
        "384, but one table of 1138² such values is half of 1.2 B; the authors' layer demands values as wide "
        "as the model, and run_memory_plus.sh has 768. These shapes have 240.9 M active parameters, 6 % more "
        "than 227 M. The norm of the keys is applied here; the release computes it and scores with the plain "
        "keys."
    ),
    "ultramem-227m-1.2b": (
        f"UltraMemV2 paper, open models. {_LAYERS_227M_NOTE}; MLPs 2,752 wide, 4 "
        "memories with n 808, keys 192 and values 384 wide, 2·80 reads, E 4, r 2, h 2, their places, keys of "
        "full width for every rank, no convolution, values that learn at 4 times the rate at first. The loss "
        "on the cores is switched off in the release. Inferred: nothing of the shape."
    ),
    "ultramem-v2-227m-1.2b": (
        f"UltraMemV2 paper, open models. {_LAYERS_227M_NOTE}; MLPs 2,496 wide, a "
        "memory in every layer with n 360, keys, values and pre-values 192 wide, one head of 32 reads, r 2, "
        "h 2, blocks not expanded, one query for both ranks, each memory reading half of a common ring. "
        "Inferred: nothing of the shape. These shapes have 230.2 M active parameters, 1.4 % more than 227 M."
    ),
    "olmoe-1b-7b": (
        "OLMoE-1B-7B (arXiv 2409.02060). Published: 16 layers of width 2048, 16 heads, norms "
        "of queries and keys in attention, 8 of 64 SwiGLU experts 1,024 wide, "
        "50,304 tokens, untied; 1.28 B active parameters, 6.92 B in all. Inferred: nothing."
    ),
    "memory-plus-1b-7b": (
        _INFERRED_1B + "For Memory+: the 227M model in proportion, 4 memories, values as wide as the model, "
        "keys half as wide, 2·80 reads."
    ),
    "ultramem-1b-7b": (
        _INFERRED_1B + "For UltraMem: the 227M model in proportion, 4 memories that leave the first and the "
        "last two layers free, values half as wide as the model, keys a quarter, 2·80 reads."
    ),
    "ultramem-v2-1b-7b": (
        _INFERRED_1B + "For UltraMemV2: keys 512, values 768 and pre-values 256 wide, a query for every "
        "rank, E 4 with summed blocks and 32 reads are those of the authors' run_ultramem_v2.sh; each "
        "memory reads its own sixteenth of the ring."
    ),
}
