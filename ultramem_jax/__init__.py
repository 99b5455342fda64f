"""ultramem_jax: memory layers for Transformers in JAX, from Product-Key Memory to UltraMem.

Axis legend, used in every shape comment and einsum of this project:

    B  sequences in a batch                 H  retrieval heads of a memory (num_heads)
    S  positions in a sequence              n  keys per side of the physical grid (num_keys)
    T  tokens, B·S flattened                N  slots of one table, n² (num_slots)
    V  vocabulary (vocab_size)              E  virtual blocks per table (expansion)
    D  residual stream (embed_dim)          K  keys per side of the virtual grid, √E·n
    L  layers (num_layers)                  m  values read per head and token (top_m)
    A  attention heads                      R  reads of a token, H·m
    F  inner width of an MLP or expert      r  rank of the Tucker core (tucker_rank)
    X  experts (num_experts)                h  cores of Multi-Core Scoring (num_cores)
    k  experts of a token (moe.top_k)       d_k, d_v  width of a key, of a value

In einsum strings, where an axis is one lower-case or upper-case letter: t tokens, p virtual block (of E),
j read (of R), c core (of h), d the width at hand, q and s the ranks of the row and the column side.
"""

from ultramem_jax.config import (
    DataConfig,
    MemoryConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    TrainConfig,
)
from ultramem_jax.errors import UserError

__version__ = "0.1.0"

__all__ = [
    "DataConfig",
    "MemoryConfig",
    "MoEConfig",
    "ModelConfig",
    "RunConfig",
    "TrainConfig",
    "UserError",
]
