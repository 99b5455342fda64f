"""The models of the UltraMem paper (arXiv 2411.12364), table 1."""

from dataclasses import replace

from ultramem_jax.config import MemoryConfig, ModelConfig, MoEConfig

# The 151M family of the UltraMem paper. 12·L·D² = 150,994,944 is the published dense count exactly.
_LAYERS_151M = ModelConfig(
    vocab_size=50_432,
    embed_dim=1024,
    num_layers=12,
    num_heads=16,
    num_kv_heads=16,
    mlp_dim=4096,
    dropout=0.1,
)

PRESETS: dict[str, ModelConfig] = {
    "dense-151m": _LAYERS_151M,
    "moe-151m-2in32": replace(_LAYERS_151M, moe=MoEConfig(num_experts=32, top_k=2, expert_dim=2528)),
    "pkm-151m-x10": replace(
        _LAYERS_151M,
        memory=MemoryConfig.pkm(
            placement="6:6", num_keys=1224, top_m=42, num_heads=2, key_dim=2448, value_dim=1024
        ),
    ),
    "ultramem-151m-x12": replace(
        _LAYERS_151M,
        memory=MemoryConfig.ultramem(
            placement="3:5/6:8/9:11", num_keys=1100, top_m=42, num_heads=2, key_dim=500, value_dim=512
        ),
    ),
}

_LAYERS_NOTE = (
    "Inferred of the layers: 12 of width 1024 and a GELU MLP of 4·1024 (12·L·D² is the published count of "
    "weights); 16 attention heads of width 64; rotary positions; tied embeddings; a vocabulary of "
    "50,432 (the tokenizer is GPT-NeoX's, the number that of GPT-NeoX-20B's embedding; published "
    "counts leave it out)."
)

NOTES: dict[str, str] = {
    "dense-151m": (
        "UltraMem paper, table 1. Published: 0.15 B parameters, 0.30 GFLOPs, dropout 0.1. " + _LAYERS_NOTE
    ),
    "moe-151m-2in32": (
        "UltraMem paper, table 1. Published: 2 of 32 GELU experts in every layer, 2.04 B parameters, "
        "0.35 GFLOPs, dropout 0.1. Inferred: experts 2,528 wide, from those two totals. " + _LAYERS_NOTE
    ),
    "pkm-151m-x10": (
        "UltraMem paper, table 2, first rung. Published: 173.01 M dense and 1.534 B sparse "
        "parameters, 346.06 MFLOPs, dropout 0.1. Inferred: one memory of 1224² values and 2 heads "
        "with keys 2,448 wide, from those counts and the next rungs'; its place, layer 6; 42 reads a "
        "head, as in the 1.6 B UltraMem. " + _LAYERS_NOTE
    ),
    "ultramem-151m-x12": (
        "UltraMem paper, table 1. Published: 2.03 B parameters, 0.35 GFLOPs, values half as wide as "
        "the model, tables about 12 times the dense weights, r 2, h 2, E 4, α 0.001, τ 0.15, dropout "
        "0.1. Inferred: three memories of 1100² values and 2 heads with keys 500 wide, from those "
        "totals and table 2; their places, at a regular interval as in the 1.6 B model; 42 reads a "
        "head, as there; convolutions 4 wide, from the last rung of table 2. " + _LAYERS_NOTE
    ),
}
