"""Provides memory layers for Transformers in JAX, from Product-Key Memory to Engram.

The axis legend below holds for every shape comment and einsum of this project:

    B  sequences in a batch                 H  retrieval heads of a memory (num_heads)
    S  positions in a sequence              n  keys per side: a memory adds n² slots (num_keys)
    T  tokens, B·S flattened                M  memories of the model
    V  vocabulary (vocab_size)              N  rows of a table: n², or M·n² in a ring (num_slots)
    D  residual stream (embed_dim)          E  virtual blocks per table (expansion)
    L  layers (num_layers)                  K  keys per side of the virtual grid: √E·n, more in a ring
    A  attention heads                      m  values read per head and token (top_m)
    F  inner width of an MLP or expert      R  reads of a token (H·m)
    X  experts (num_experts)                r  rank of the Tucker core (tucker_rank)
    k  experts of a token (moe.top_k)       h  cores of Multi-Core Scoring (num_cores)
                                            d_k, d_v, d_p  width of a key, a value, a pre-value
                                            P  devices that a table is split over

Einsum strings need one letter per axis. They use t for tokens, p for the virtual block (of E), j for the
read (of R), c for the core (of h), d for the width of the arrays involved, and q and s for the ranks of the
row side and the column side.
"""

from ultramem_jax.config import (
    DataConfig,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    TrainConfig,
)
from ultramem_jax.errors import UserError

__version__ = "0.2.0"

__all__ = [
    "DataConfig",
    "MemoryConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "RunConfig",
    "TrainConfig",
    "UserError",
]
