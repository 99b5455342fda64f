"""Defines a preset with the table of Engram-27B (arXiv 2601.07372), in a decoder that is not the paper's.

The published model is a Mixture of Experts with another attention and several residual streams. Not all of
its sizes are published. So the preset serves to count the table and the layers that read it, beside plain
layers.
"""

from ultramem_jax.config import ModelConfig
from ultramem_jax.presets import families

PRESETS: dict[str, ModelConfig] = {
    "engram-27b-table": ModelConfig(
        vocab_size=129_280,
        embed_dim=2560,
        num_layers=30,
        num_heads=32,
        num_kv_heads=32,
        mlp="swiglu",
        mlp_dim=6848,
        memories={
            "engram": families.engram(
                placement="before@2/before@15",
                heads_per_order=8,
                # 5.7 B / (2 layers · 2 orders · 8 heads · 160 numbers per row)
                rows_per_head=(1_113_280,),
                value_dim=160,
                row_multiple=1024,
            )
        },
    ),
}

NOTES: dict[str, str] = {
    "engram-27b-table": (
        "Engram paper, Engram-27B. Published: 5.7 B of 26.7 B parameters in the table, orders 2 and 3 with 8 "
        "heads each, rows 1,280 wide per order, in layers 2 and 15 of 30; rows learn at 5 times the rate, "
        "without decay. Inferred: the rows of a head, from 5.7 B. Not the paper's: all but the table. The "
        "model is a Mixture of Experts (55 routed ones where 72 would be without the table) with several "
        "residual streams; here are plain layers, of width 2,560, with 129,280 tokens that are not mapped."
    ),
}
