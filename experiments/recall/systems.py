"""Makes the models that are compared: every system, at every number of sparse parameters, at equal FLOPs."""

from dataclasses import dataclass, replace

from ultramem_jax import ModelConfig
from ultramem_jax.accounting import count_parameters, flops_per_token
from ultramem_jax.baselines.matching import match
from ultramem_jax.errors import require

DENSE = "dense"
SYSTEMS = (DENSE, "moe", "pkm", "ultramem", "ultramem-v2", "engram")
"""Names of the systems, of `ultramem_jax.baselines.matching.SYSTEMS`."""


@dataclass(frozen=True)
class Variant:
    """Describes a system at one size."""

    system: str
    """Name in `SYSTEMS`."""
    size: int
    """Sparse parameters, in multiples of the dense model's parameters; 0 for the dense model."""
    model: ModelConfig

    @property
    def name(self) -> str:
        """Returns the name of the variant, in which no other has it."""
        return f"{self.system}-{self.size}x" if self.size else self.system


def variant(base: ModelConfig, system: str, size: int) -> Variant:
    """Returns a system with the FLOPs per token of the base, and with other sparse parameters.

    Args:
        base: a model with one UltraMem memory.
        system: name in `SYSTEMS`.
        size: sparse parameters, in multiples of the parameters of the dense model that matches the base,
            without its embeddings and gains. The dense model has none, whatever the size.

    Raises:
        UserError: a base with another number of memories, or no model of that size that matches.
    """
    require(len(base.memories) == 1, "model.memories", list(base.memories), "must be one memory")
    if system == DENSE:
        return Variant(DENSE, 0, match(base, DENSE))
    return Variant(system, size, match(_resized(base, size), system))


def shape(model: ModelConfig) -> str:
    """Describes what distinguishes a model from the others, in a few words."""
    words = [", ".join(memory.in_words()) for memory in model.memories.values()]
    if moe := model.moe:
        return "; ".join([*words, f"{moe.top_k} of {moe.num_experts} experts, {moe.expert_dim} wide"])
    return "; ".join([*words, f"MLP {model.mlp_dim}"])


def _resized(base: ModelConfig, size: int) -> ModelConfig:
    """Returns the base with a memory of another size, whose compute the MLPs give or take."""
    ((name, memory),) = base.memories.items()
    per_slot = count_parameters(base).sparse / memory.address.own_slots
    sparse = size * count_parameters(match(base, DENSE)).paper_dense
    resized = replace(base, memories={name: memory.resized(sparse / per_slot)})
    # FLOPs are linear in the width of the MLPs.
    first, second = (flops_per_token(replace(resized, mlp_dim=width)).matched for width in (1, 2))
    width = 1 + round((flops_per_token(base).matched - first) / (second - first))
    allowed = "must be smaller: the memory alone would take more FLOPs than the base has"
    require(width >= 1, "sizes", size, allowed)
    return replace(resized, mlp_dim=width)
