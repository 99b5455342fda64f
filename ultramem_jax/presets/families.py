"""The published kinds of memory as functions: `MemoryConfig`s with the switches of each, sizes left to you.

`pkm` has every change of the UltraMem paper off, `ultramem` (numbers of the ablation in its table 2) every
one on; the others switch on what their papers added. With the default placement every layer has a memory,
also of the older systems, which were published with one (PKM, PEER) or a few. Fields are given by their names
alone, whichever part of the memory has them.
"""

from typing import Any

from ultramem_jax.memory_config import MemoryConfig, memory_of

_PRODUCT_KEYS = "product_keys"


def pkm(**fields: Any) -> MemoryConfig:
    """Returns a Product-Key Memory (arXiv 1907.05242): every switch off. Give `value_dim` = D."""
    off: dict[str, Any] = dict(
        softmax=True,
        project_values=False,
        share_query=False,
        norm_query=False,
        norm_keys=False,
        expansion=1,
        tucker_rank=0,
        num_cores=1,
        init="pkm",
        value_lr_multiple=1.0,
        query_conv_width=0,
    )
    return memory_of(_PRODUCT_KEYS, **off | fields)


def ultramem(**fields: Any) -> MemoryConfig:
    """Returns an UltraMem (arXiv 2411.12364): every switch on."""
    return memory_of(_PRODUCT_KEYS, **fields)


def memory_plus(**fields: Any) -> MemoryConfig:
    """Returns a Memory+ (arXiv 2412.09764): PKM with norms, one table for all memories and a SiLU gate.

    The norm of the keys is applied. (The UltraMemV2 authors' release computes it and uses the plain keys;
    `norm_keys=False` is that.)
    """
    on: dict[str, Any] = dict(
        norm_query=True,
        norm_keys=True,
        project_values=True,
        gate=True,
        sharing="all",
        shuffle="none",
    )
    return pkm(**on | fields)


def peer(**fields: Any) -> MemoryConfig:
    """Returns a PEER (arXiv 2407.04153): experts of inner width 1, heads with own queries and common keys.

    Give `value_dim` = `pre_value_dim` = D. Queries pass an RMS norm where PEER has a batch norm, which would
    make a token's output depend on its batch.
    """
    on: dict[str, Any] = dict(
        share_keys=True,
        norm_query=True,
        project_pre_values=False,
        pre_value_activation="gelu",
    )
    return pkm(**on | fields)


def ultramem_v2(**fields: Any) -> MemoryConfig:
    """Returns an UltraMemV2 (arXiv 2508.18756): give `pre_value_dim`, and `share_ratio` below the ring."""
    on: dict[str, Any] = dict(
        placement="full",
        num_heads=1,
        expansion=1,
        sum_blocks=True,
        rank_keys="full",
        core_loss_weight=0.0,
        sharing="ring",
        init="v2",
        value_lr_multiple=4.0,
        query_conv_width=0,
    )
    return memory_of(_PRODUCT_KEYS, **on | fields)
