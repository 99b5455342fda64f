"""The readout of product-key memories: pooled values, perhaps gated, and projected to the model's width."""

from dataclasses import dataclass
from typing import Any, Literal

from ultramem_jax.config.memory import MemoryConfig, MemorySite
from ultramem_jax.config.memory_kinds import READOUTS
from ultramem_jax.config.memory_parts import ModelContext, Parameter, ReadoutConfig


@READOUTS.add("projection")
@dataclass(frozen=True)
class Projection(ReadoutConfig):
    """Projects the blocks of a token, side by side, to D. UltraMem's change 2 switches the projection on."""

    kind: Literal["projection"] = "projection"
    project_values: bool = True
    """A linear map (E·d_v -> D) after pooling; without it d_v must equal D and the blocks be one."""
    sum_blocks: bool = False
    """The E blocks are summed before the projection, which is then one of d_v -> D (UltraMemV2)."""
    gate: bool = False
    """The pooled values are multiplied by SiLU(W·x) before the projection (Memory+)."""

    @property
    def sums_blocks(self) -> bool:
        """See `sum_blocks`."""
        return self.sum_blocks

    @property
    def power(self) -> float:
        """E[SiLU(z)²] for z ~ N(0, 1) with a gate, else 1."""
        from ultramem_jax.layers.memory.initializers import second_moment

        return second_moment("silu") if self.gate else 1.0

    def check(self, memory: MemoryConfig) -> None:
        """Refuses blocks that nothing projects or that a gate does not fit."""
        blocks = memory.num_blocks
        memory.require(
            blocks == 1 or self.project_values,
            "readout.project_values",
            f"must be True while the address has {blocks} blocks: each needs its projector",
        )
        memory.require(
            not self.gate or blocks == 1,
            "readout.gate",
            f"must be False while {blocks} blocks of the address are not summed: it gates d_v values",
        )

    def check_model(self, memory: MemoryConfig, context: ModelContext) -> None:
        """Refuses values that are not as wide as the model where nothing projects them."""
        memory.require(
            self.project_values or memory.table.value_dim == context.embed_dim,
            "table.value_dim",
            f"must equal embed_dim = {context.embed_dim} while project_values is False",
        )

    def parameters(self, site: MemorySite) -> dict[str, Parameter]:
        """Returns the gate (D, d_v) and the projection (E·d_v, D)."""
        d, width = site.context.embed_dim, site.config.table.value_dim
        found = {}
        if self.gate:
            found["gate"] = Parameter((d, width), ("embed", None), "gate")
        if self.project_values:
            shape = (site.config.num_blocks * width, d)
            found["projection"] = Parameter(shape, (None, "embed"), "projection")
        return found

    def readout(self, site: MemorySite, name: str | None = None) -> Any:
        """Returns the module."""
        from ultramem_jax.layers.memory.projection import ProjectionReadout

        return ProjectionReadout(site, self, name=name)

    def in_words(self) -> list[str]:
        """Returns whether there is a gate."""
        return ["gate"] if self.gate else []
