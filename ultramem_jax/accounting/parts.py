"""Computes the least time of a part of a step, and the expected number of distinct rows and experts.

The floors of training (`ultramem_jax.accounting.step_costs`) and of decoding
(`ultramem_jax.accounting.decoding`) use it. The letters are those of the axis legend in `ultramem_jax`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PartCost:
    """Holds the least FLOPs and bytes of one part of a step."""

    flops: int
    """Floating-point operations; a multiplication with its addition counts two."""
    bytes: int
    """Bytes read and written."""
    row_bytes: int = 0
    """Bytes among `bytes` that are read from rows anywhere in a table: each waits for the device's memory."""

    def __add__(self, other: "PartCost") -> "PartCost":
        return PartCost(self.flops + other.flops, self.bytes + other.bytes, self.row_bytes + other.row_bytes)


def floor_seconds(
    cost: PartCost,
    flops_per_second: float,
    bytes_per_second: float,
    row_bytes_per_second: float | None = None,
) -> float:
    """Returns the least seconds of a part, which computes and moves at once and waits for the slower one.

    Args:
        cost: cost of the part, or of the whole step.
        flops_per_second: rate of matrix products.
        bytes_per_second: bandwidth of the device's memory, for reads and writes.
        row_bytes_per_second: rate at which rows anywhere in a table are read; by default the bandwidth.
    """
    of_rows = cost.row_bytes / (row_bytes_per_second or bytes_per_second)
    moving = (cost.bytes - cost.row_bytes) / bytes_per_second + of_rows
    return max(cost.flops / flops_per_second, moving)


def expected_rows(num_slots: int, reads: int) -> float:
    """Returns U, the expected number of distinct rows of uniform random reads: N·(1 - (1 - 1/N)^reads).

    Args:
        num_slots: N.
        reads: T·R.
    """
    return num_slots * (1 - (1 - 1 / num_slots) ** reads)


def expected_experts(num_experts: int, top_k: int, tokens: int) -> float:
    """Returns the expected number of distinct experts that T tokens choose: X·(1 - (1 - k/X)^T).

    Each token draws k different experts uniformly at random.

    Args:
        num_experts: X.
        top_k: k.
        tokens: T.
    """
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)
