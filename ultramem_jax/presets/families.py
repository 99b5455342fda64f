"""Provides a function for each published kind of memory, which sets its switches and leaves sizes to you.

`pkm` switches every change of the UltraMem paper off. `ultramem` switches every one on, with the numbers of
the ablation in its table 2. The other functions switch on the changes of their papers. With the default
placement every layer has a memory. That includes the older systems, which were published with one memory
(PKM, PEER) or a few. A field of any part of the memory needs only its own name.
"""

from ultramem_jax.config.field_types import Fields, FieldValue
from ultramem_jax.config.memory import MemoryConfig, memory_of


def pkm(**fields: FieldValue) -> MemoryConfig:
    """Returns a Product-Key Memory (arXiv 1907.05242), with every switch off. Give `value_dim` = D."""
    off: dict[str, FieldValue] = dict(
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
    return memory_of("product_keys", "projection", **off | fields)


def ultramem(**fields: FieldValue) -> MemoryConfig:
    """Returns an UltraMem memory (arXiv 2411.12364), with every switch on."""
    return memory_of("product_keys", "projection", **fields)


def memory_plus(**fields: FieldValue) -> MemoryConfig:
    """Returns a Memory+ (arXiv 2412.09764): PKM with norms, one table for all memories and a SiLU gate.

    Here the norm of the keys is applied. The release of the UltraMemV2 authors computes this norm but scores
    with the plain keys; `norm_keys=False` reproduces that.
    """
    on: dict[str, FieldValue] = dict(
        norm_query=True,
        norm_keys=True,
        project_values=True,
        gate=True,
        sharing="all",
        shuffle="none",
    )
    return pkm(**on | fields)


def peer(**fields: FieldValue) -> MemoryConfig:
    """Returns a PEER memory (arXiv 2407.04153): experts of inner width 1, found by heads with common keys.

    Every head has its own query. Give `value_dim` = `pre_value_dim` = D. Queries pass an RMS norm where PEER
    has a batch norm. A batch norm would make the output of a token depend on the other tokens of its batch.
    """
    on: dict[str, FieldValue] = dict(
        share_keys=True,
        norm_query=True,
        project_pre_values=False,
        pre_value_activation="gelu",
    )
    return pkm(**on | fields)


def ultramem_v2(**fields: FieldValue) -> MemoryConfig:
    """Returns an UltraMemV2 memory (arXiv 2508.18756).

    Give `pre_value_dim`, and `share_ratio` if a memory reads only a part of the ring.
    """
    on: dict[str, FieldValue] = dict(
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
    return memory_of("product_keys", "projection", **on | fields)


def engram(max_order: int = 3, **fields: FieldValue) -> MemoryConfig:
    """Returns an Engram memory (arXiv 2601.07372): hashed n-grams of orders 2 to n_max, before attention.

    The paper has memories in layers 2 and 15 of 30, 8 heads per order, rows that learn at 5 times the rate
    and do not decay, and a convolution whose dilation is n_max. Give `placement`, `rows_per_head`, and
    `value_dim`, which is d_e/K.
    """
    on: dict[str, FieldValue] = dict(
        placement="before@2",
        max_order=max_order,
        conv_dilation=max_order,
        value_lr_multiple=5.0,
        value_lr_final_multiple=5.0,
        decay_values=False,
    )
    return memory_of("hashed_ngrams", "context_gate", **on | fields)


def per_layer_embedding(**fields: FieldValue) -> MemoryConfig:
    """Returns a per-layer embedding (STEM, arXiv 2601.10639): a row for each token, gated by the context.

    Give `placement` and `value_dim`.
    """
    on: Fields = dict(min_order=1, max_order=1, heads_per_order=1, exact=True, conv_width=0)
    return engram(**on | dict(conv_dilation=1) | fields)
