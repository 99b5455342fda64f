"""Divides the sparse parameters of a model between its experts or memory and an Engram table.

At equal parameters and compute, the Engram paper (arXiv 2601.07372, section 3) finds that the best share of
the table is near 20 to 25 %, with the rest in experts.
"""

import dataclasses

from ultramem_jax.accounting import count_parameters, flops_per_token
from ultramem_jax.baselines.systems import engram_beside, reads_per_token
from ultramem_jax.config import ModelConfig
from ultramem_jax.errors import UserError, require

_READS = 32
"""Reads of the table in a model without a memory; the paper has 2 layers of 2 orders with 8 heads."""


def with_table_share(base: ModelConfig, share: float, name: str = "engram") -> ModelConfig:
    """Returns the model with a share of its sparse parameters in an Engram table, at equal cost.

    The result has fewer experts than `base`, or fewer slots in its memory. Its MLPs or experts are narrower
    by the cost of the table's projections.

    Args:
        base: a model with experts or one memory.
        share: share of the table in the sparse parameters, in (0, 1).
        name: name of the table in `ModelConfig.memories`.

    Raises:
        UserError: a share out of range, a model without sparse parameters, a name that is already used,
            several memories, or a model that is too small for the table.
    """
    require(0 < share < 1, "table_share", share, "must be between 0 and 1, without both")
    sparse, target = count_parameters(base).sparse, flops_per_token(base).matched
    if not sparse or name in base.memories:
        raise UserError(f"table_share = {share}: must be of a model with experts or a memory, and no {name}")
    table = engram_beside(base, reads_per_token(base) // 2 or _READS)
    for _ in range(2):  # memories with small tables differ in size, so one estimate is not enough
        only = dataclasses.replace(base, memories={name: table}, moe=None)
        per_slot = count_parameters(only).sparse / table.address.own_slots
        table = table.resized(share * sparse / per_slot)
    if base.moe is None:
        (kept, memory), *others = base.memories.items()
        require(not others, "model.memories", list(base.memories), "must be one memory to be shared with")
        rest = {kept: memory.resized((1 - share) * memory.address.own_slots)}
        shared = dataclasses.replace(base, memories={**rest, name: table})
        return _of_equal_cost(shared, "mlp_dim", target)
    moe = base.moe
    shared = dataclasses.replace(base, memories={**base.memories, name: table})
    width = _of_equal_cost(shared, "expert_dim", target).moe
    assert width is not None
    of_expert = count_parameters(base).experts / moe.num_experts * width.expert_dim / moe.expert_dim
    experts = max(round((1 - share) * sparse / of_expert), moe.top_k)
    return dataclasses.replace(shared, moe=dataclasses.replace(width, num_experts=experts))


def _of_equal_cost(model: ModelConfig, field: str, target: int) -> ModelConfig:
    """Returns the model with the width whose FLOPs are nearest to `target`. FLOPs are linear in the width."""

    def of_width(width: int) -> ModelConfig:
        if field == "mlp_dim":
            return dataclasses.replace(model, mlp_dim=width)
        assert model.moe is not None
        return dataclasses.replace(model, moe=dataclasses.replace(model.moe, expert_dim=width))

    first = flops_per_token(of_width(1)).matched
    slope = flops_per_token(of_width(2)).matched - first
    width = round(1 + (target - first) / slope)
    require(width >= 1, field, width, "would have to be at least 1: the model is too small for the table")
    return of_width(width)
