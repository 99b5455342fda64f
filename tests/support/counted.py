"""Holds a model and a memory small enough to count by hand."""

from ultramem_jax.config import ModelConfig
from ultramem_jax.presets import families

# V 10, D 8, L 2, A 4 (2 wide), 2 heads of keys and values, gated MLP, F 6.
PLAIN = ModelConfig(
    vocab_size=10,
    embed_dim=8,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    mlp="swiglu",
    mlp_dim=6,
    tie_embeddings=False,
)
# One memory: n 3 (N 9), m 2, H 2, d_k 4, d_v 4, E 4 (K 6), r 2, h 2, convolution 3 wide.
MEMORY = families.ultramem(
    placement="1:2",
    num_keys=3,
    top_m=2,
    num_heads=2,
    key_dim=4,
    value_dim=4,
    expansion=4,
    tucker_rank=2,
    num_cores=2,
    query_conv_width=3,
)
