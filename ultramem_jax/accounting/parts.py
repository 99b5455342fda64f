"""What a part of a step costs at least, and how many rows and experts random choices find.

Shared by the floors of training (`ultramem_jax.accounting.step_costs`) and of decoding
(`accounting.decoding`). The letters are those of the axis legend in `ultramem_jax`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PartCost:
    """What one part of a step costs at least."""

    flops: int
    """Two per multiplication and addition."""
    bytes: int
    """Read and written."""

    def __add__(self, other: "PartCost") -> "PartCost":
        return PartCost(self.flops + other.flops, self.bytes + other.bytes)


def floor_seconds(cost: PartCost, flops_per_second: float, bytes_per_second: float) -> float:
    """The least time that a part can take: computing and moving at once, it waits for the slower of the two.

    Args:
        cost: of the part, or of the whole step.
        flops_per_second: the rate of matrix products.
        bytes_per_second: the bandwidth of the memory, read and written.
    """
    return max(cost.flops / flops_per_second, cost.bytes / bytes_per_second)


def expected_rows(num_slots: int, reads: int) -> float:
    """U: how many distinct rows that many reads find, uniformly at random: N·(1 - (1 - 1/N)^reads).

    Args:
        num_slots: N.
        reads: T·R.
    """
    return num_slots * (1 - (1 - 1 / num_slots) ** reads)


def expected_experts(num_experts: int, top_k: int, tokens: int) -> float:
    """How many distinct experts T tokens find, each of which draws k different ones: X·(1 - (1 - k/X)^T).

    Args:
        num_experts: X.
        top_k: k.
        tokens: T.
    """
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)
