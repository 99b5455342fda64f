"""Configures the readout of product-key memories: pooled values, optionally gated, projected to width D."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ultramem_jax.config.memory import MemoryConfig, MemorySite
from ultramem_jax.config.memory_kinds import READOUTS
from ultramem_jax.config.memory_parts import ModelContext, Parameter, ReadoutConfig
from ultramem_jax.tree_types import ArrayTree

if TYPE_CHECKING:
    import jax
    from flax import linen as nn


@READOUTS.add("projection")
@dataclass(frozen=True)
class Projection(ReadoutConfig):
    """Projects the concatenated blocks of a token to width D; the projection is UltraMem's change 2."""

    kind: Literal["projection"] = "projection"
    project_values: bool = True
    """Whether a linear map (E·d_v -> D) follows the pooling; without it d_v must be D, and E one."""
    sum_blocks: bool = False
    """Whether the E blocks are summed before the projection, which then maps d_v -> D (UltraMemV2)."""
    gate: bool = False
    """Whether the pooled values are multiplied by SiLU(W·x) before the projection (Memory+)."""

    @property
    def sums_blocks(self) -> bool:
        """Tells whether the E blocks are summed before the projection."""
        return self.sum_blocks

    @property
    def last_factors(self) -> tuple[str, ...]:
        """Returns the projection, or nothing if the values of the table are the output."""
        return ("projection",) if self.project_values else ()

    @property
    def power(self) -> float:
        """Returns the gate's mean square, E[SiLU(z)²] for z ~ N(0, 1), or 1 without a gate."""
        from ultramem_jax.layers.memory.initializers import second_moment

        return second_moment("silu") if self.gate else 1.0

    def check(self, memory: MemoryConfig) -> None:
        """Refuses several blocks without a projection, or with a gate.

        Raises:
            UserError: there are several blocks, and `project_values` is False or `gate` is True.
        """
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
        """Refuses values that are not as wide as the model if nothing projects them.

        Raises:
            UserError: `project_values` is False and `value_dim` is not `embed_dim`.
        """
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

    def value_matrix(self, site: MemorySite, params: ArrayTree, block: int) -> "jax.Array | None":
        """Returns the rows of the projection that a block's values meet; the gate is left out."""
        width = site.config.table.value_dim
        return params["projection"][block * width : (block + 1) * width] if self.project_values else None

    def readout(self, site: MemorySite, name: str | None = None) -> "nn.Module":
        """Returns the Flax module of this readout, `ProjectionReadout`."""
        from ultramem_jax.layers.memory.projection import ProjectionReadout

        return ProjectionReadout(site, self, name=name)

    def in_words(self) -> list[str]:
        """Describes the gate in words, if there is one."""
        return ["gate"] if self.gate else []
