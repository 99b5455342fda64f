"""Configures the mesh of devices that a run is laid out on."""

from dataclasses import dataclass

from ultramem_jax.config.field_types import Checked
from ultramem_jax.errors import at_least


@dataclass(frozen=True)
class MeshConfig(Checked):
    """Devices along named axes; the product of all is their number. A run may go on on another mesh.

    Sequences of a batch are split over `data` and `fsdp` and, unless `batch_over_memory` is off, over
    `memory` and `width`. Devices along `tensor` work on the same sequences.
    """

    PREFIX = "mesh."

    data: int = 0
    """Data parallelism: every device along it has all parameters. 0: the devices that the others leave."""
    fsdp: int = 1
    """Fully sharded data parallelism: dense parameters and their optimizer state are split over it, by their
    axis of width D, and keys by their number."""
    tensor: int = 1
    """Tensor parallelism: attention heads, the inner width of MLPs and, if it divides, the vocabulary."""
    memory: int = 1
    """Sparse parameters: tables are split over it, as `TableConfig.partition` says, and experts."""
    width: int = 1
    """Columns of tables, where `TableConfig.partition` is `both`."""
    batch_over_memory: bool = True
    """Whether devices along `memory` and `width` have sequences of their own, or all the same ones: for
    batches smaller than the number of devices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, mesh__data=self.data)
        at_least(1, mesh__fsdp=self.fsdp, mesh__tensor=self.tensor)
        at_least(1, mesh__memory=self.memory, mesh__width=self.width)
