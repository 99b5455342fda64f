"""What a model costs, from its config alone: parameters, FLOPs, bytes touched, kept and sent."""

from ultramem_jax.accounting.communication import (
    Exchange,
    Transfer,
    exchange_bytes,
    step_transfers,
)
from ultramem_jax.accounting.model import (
    Bytes,
    Flops,
    Parameters,
    RowBytes,
    bytes_per_token,
    count_parameters,
    flops_per_token,
    optimizer_bytes,
    row_bytes,
)

__all__ = [
    "Bytes",
    "Exchange",
    "Flops",
    "Parameters",
    "RowBytes",
    "Transfer",
    "bytes_per_token",
    "count_parameters",
    "exchange_bytes",
    "flops_per_token",
    "optimizer_bytes",
    "row_bytes",
    "step_transfers",
]
