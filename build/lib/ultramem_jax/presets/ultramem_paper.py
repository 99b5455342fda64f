"""Defines the models of table 1 of the UltraMem paper (arXiv 2411.12364), and the first rung of table 2."""

from dataclasses import replace

from ultramem_jax.config import ModelConfig, MoEConfig
from ultramem_jax.presets import families


def _layers(embed_dim: int, num_layers: int, num_heads: int) -> ModelConfig:
    """Returns the dense model of a size. It has 12·L·D² weights, which is its published count."""
    return ModelConfig(
        vocab_size=50_432,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        mlp_dim=4 * embed_dim,
        dropout=0.1,
    )


def _ultramem(layers: ModelConfig, placement: str, num_keys: int, key_dim: int) -> ModelConfig:
    """Returns the dense model with UltraMem memories."""
    memory = families.ultramem(
        placement=placement,
        num_keys=num_keys,
        top_m=42,
        num_heads=2,
        key_dim=key_dim,
        value_dim=layers.embed_dim // 2,
    )
    return replace(layers, memories={"ultramem": memory})


# Attention heads are 64, 96, 128 and 128 wide. Their widths are not published.
_LAYERS_151M = _layers(1024, 12, 16)
_LAYERS_680M = _layers(1536, 24, 16)
_LAYERS_1_6B = _layers(2048, 32, 16)
_LAYERS_6_5B = _layers(4096, 32, 32)

PRESETS: dict[str, ModelConfig] = {
    "dense-151m": _LAYERS_151M,
    "moe-151m-2in32": replace(_LAYERS_151M, moe=MoEConfig(num_experts=32, top_k=2, expert_dim=2528)),
    "pkm-151m-x10": replace(
        _LAYERS_151M,
        memories={
            "pkm": families.pkm(
                placement="6:6",
                num_keys=1224,
                top_m=42,
                num_heads=2,
                # With 2 heads that do not share a query, D·2·2·d_k + 2·2·n·d_k weights are the published
                # 173.01 - 150.99 M.
                key_dim=2448,
                value_dim=1024,
            )
        },
    ),
    "ultramem-151m-x12": _ultramem(_LAYERS_151M, "3:5/6:8/9:11", num_keys=1100, key_dim=500),
    "dense-680m": _LAYERS_680M,
    "moe-680m-2in33": replace(_LAYERS_680M, moe=MoEConfig(num_experts=33, top_k=2, expert_dim=3584)),
    "ultramem-680m-x12": _ultramem(_LAYERS_680M, "3:7/8:12/13:17/18:22", num_keys=1632, key_dim=720),
    "dense-1.6b": _LAYERS_1_6B,
    "moe-1.6b-2in34": replace(_LAYERS_1_6B, moe=MoEConfig(num_experts=34, top_k=2, expert_dim=4672)),
    "ultramem-1.6b-x12": _ultramem(
        _LAYERS_1_6B, "3:7/8:12/13:17/18:22/23:27/28:32", num_keys=1789, key_dim=800
    ),
    "dense-6.5b": _LAYERS_6_5B,
}


def _layers_note(size: str, heads: str) -> str:
    """Returns the note on the layers of a size, which all presets of this size share."""
    return (
        f"Inferred of the layers: {size}, with a GELU MLP four times as wide (12·L·D² is the published count "
        f"of weights); {heads}; rotary positions; tied embeddings; a vocabulary of 50,432 (the tokenizer is "
        "GPT-NeoX's, the number that of GPT-NeoX-20B's embedding; published counts leave it out)."
    )


_NOTE_151M = _layers_note("12 of width 1024", "16 attention heads of width 64")
_NOTE_680M = _layers_note("24 of width 1536", "16 attention heads of width 96")
_NOTE_1_6B = _layers_note("32 of width 2048", "16 attention heads of width 128")
_NOTE_6_5B = _layers_note("32 of width 4096", "32 attention heads of width 128")

_ULTRAMEM_SWITCHES = (
    "values half as wide as the model, tables about 12 times the dense weights, r 2, h 2, E 4, α 0.001, τ "
    "0.15, dropout 0.1. "
)
_READS = "42 reads a head, as in the 1.6 B model; convolutions 4 wide, from the last rung of table 2. "

NOTES: dict[str, str] = {
    "dense-151m": (
        "UltraMem paper, table 1. Published: 0.15 B parameters, 0.30 GFLOPs, dropout 0.1. " + _NOTE_151M
    ),
    "moe-151m-2in32": (
        "UltraMem paper, table 1. Published: 2 of 32 GELU experts in every layer, 2.04 B parameters, "
        "0.35 GFLOPs, dropout 0.1. Inferred: experts 2,528 wide, from those two totals. " + _NOTE_151M
    ),
    "pkm-151m-x10": (
        "UltraMem paper, table 2, first rung. Published: 173.01 M dense and 1.534 G sparse "
        "parameters, 346.06 MFLOPs, dropout 0.1. Inferred: one memory of 1224² values and 2 heads "
        "with keys 2,448 wide, from those counts and the next rungs'; its place, layer 6; 42 reads a "
        "head, as in the 1.6 B UltraMem. " + _NOTE_151M
    ),
    "ultramem-151m-x12": (
        "UltraMem paper, table 1. Published: 2.03 B parameters, 0.35 GFLOPs, "
        + _ULTRAMEM_SWITCHES
        + "Inferred: three memories of 1100² values and 2 heads with keys 500 wide, from those "
        "totals and table 2; their places, at a regular interval as in the 1.6 B model; "
        + _READS
        + _NOTE_151M
    ),
    "dense-680m": (
        "UltraMem paper, table 1. Published: 0.68 B parameters, 1.36 GFLOPs, dropout 0.1. " + _NOTE_680M
    ),
    "moe-680m-2in33": (
        "UltraMem paper, table 1. Published: 2 of 33 GELU experts in every layer, 8.95 B parameters, "
        "1.50 GFLOPs, dropout 0.1. Inferred: experts 3,584 wide, from the first of the two totals. The "
        "second would be met by experts 3,542 wide; with 3,584 it is 0.8 % above the published one. "
        + _NOTE_680M
    ),
    "ultramem-680m-x12": (
        "UltraMem paper, table 1. Published: 8.93 B parameters, 1.49 GFLOPs, "
        + _ULTRAMEM_SWITCHES
        + "Inferred: four memories, at the interval of five layers of the 1.6 B model, as many as 24 layers "
        "hold; 1632² values each, from 8.93 B less the 0.745 B dense weights that are half the FLOPs; keys "
        "720 wide, because the 65.5 M dense weights beside the layers are 4·(4·768·1536 + 4·1536) of "
        "projections and convolutions and 4·(2·1536 + 2·2·3264)·d_k of queries and keys, hence d_k 723; 2 "
        "heads; " + _READS + _NOTE_680M
    ),
    "dense-1.6b": (
        "UltraMem paper, table 1. Published: 1.61 B parameters, 3.21 GFLOPs (2·12·L·D² is 3.22), "
        "dropout 0.1. " + _NOTE_1_6B
    ),
    "moe-1.6b-2in34": (
        "UltraMem paper, table 1. Published: 2 of 34 GELU experts in every layer, 21.36 B parameters, "
        "3.52 GFLOPs, dropout 0.1. Inferred: experts 4,672 wide, from those two totals. " + _NOTE_1_6B
    ),
    "ultramem-1.6b-x12": (
        "UltraMem paper, table 1. Published: 21.41 B parameters, 3.50 GFLOPs, the places of the six "
        "memories, 42 reads a head, about 20 million values, "
        + _ULTRAMEM_SWITCHES
        + "Inferred: 1789² values in each memory, from 21.41 B less the 1.75 B dense weights that are half "
        "the FLOPs; 2 heads with keys 800 wide, from those dense weights as for `ultramem-680m-x12`; "
        "convolutions 4 wide, from the last rung of table 2. " + _NOTE_1_6B
    ),
    "dense-6.5b": (
        "UltraMem paper, table 1. Published: 6.44 B parameters, 12.88 GFLOPs, dropout 0.1. " + _NOTE_6_5B
    ),
}
