"""Counts the costs of a model, given only its config: parameters, FLOPs, and bytes read, stored and sent."""

from ultramem_jax.accounting.communication import (
    Exchange,
    Transfer,
    exchange_bytes,
    step_transfers,
)
from ultramem_jax.accounting.decoding import DecodeCost, decode_cost
from ultramem_jax.accounting.model import (
    Bytes,
    Flops,
    Parameters,
    RowBytes,
    bytes_per_token,
    count_parameters,
    flops_per_token,
    moments_kept,
    optimizer_bytes,
    row_bytes,
)
from ultramem_jax.accounting.parts import PartCost, expected_experts, expected_rows, floor_seconds

__all__ = [
    "Bytes",
    "DecodeCost",
    "Exchange",
    "Flops",
    "Parameters",
    "PartCost",
    "RowBytes",
    "Transfer",
    "bytes_per_token",
    "count_parameters",
    "decode_cost",
    "exchange_bytes",
    "expected_experts",
    "expected_rows",
    "floor_seconds",
    "flops_per_token",
    "moments_kept",
    "optimizer_bytes",
    "row_bytes",
    "step_transfers",
]
