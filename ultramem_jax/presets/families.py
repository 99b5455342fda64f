"""The published kinds of memory as functions: `MemoryConfig`s with the switches of each, sizes left to you.

`pkm` has every change of the UltraMem paper off, `ultramem` (numbers of the ablation in its table 2) every
one on; the others switch on what their papers added. With the default placement every layer has a memory,
also of the older systems, which were published with one (PKM, PEER) or a few. Fields are given by their names
alone, whichever part of the memory has them.
"""

from typing import Any

from ultramem_jax.config.memory import MemoryConfig, memory_of

_PRODUCT_KEYS = "product_keys"
_NGRAMS = ("hashed_ngrams", "context_gate")


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


def engram(max_order: int = 3, **fields: Any) -> MemoryConfig:
    """Returns an Engram (arXiv 2601.07372): hashed n-grams of orders 2 to n_max, before attention.

    Published are layers 2 and 15 of 30, 8 heads an order, rows that learn at 5 times the rate and do not
    decay, and a convolution whose dilation is n_max. Give `placement`, `rows_per_head` and `value_dim`, which
    is d_e/K.
    """
    on: dict[str, Any] = dict(
        placement="before@2",
        max_order=max_order,
        conv_dilation=max_order,
        value_lr_multiple=5.0,
        value_lr_final_multiple=5.0,
        decay_values=False,
    )
    return memory_of(*_NGRAMS, **on | fields)


def per_layer_embedding(**fields: Any) -> MemoryConfig:
    """Returns a per-layer embedding (STEM, arXiv 2601.10639): a row for each token, gated by the context.

    Give `placement` and `value_dim`.
    """
    on: dict[str, Any] = dict(min_order=1, max_order=1, heads_per_order=1, exact=True, conv_width=0)
    return engram(**on | dict(conv_dilation=1) | fields)
