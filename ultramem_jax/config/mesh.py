"""Configures the mesh of devices that a run is laid out on."""

from dataclasses import dataclass

from ultramem_jax.config.field_types import Checked
from ultramem_jax.errors import at_least


@dataclass(frozen=True)
class MeshConfig(Checked):
    """Arranges devices along named axes; the product of all sizes is the number of devices.

    A run may continue on another mesh. The sequences of a batch are split over `data` and `fsdp` and, unless
    `batch_over_memory` is off, over `memory` and `width`. Devices along `tensor` work on the same sequences.
    """

    PREFIX = "mesh."

    data: int = 0
    """Devices of data parallelism, each with all parameters. 0 takes the devices that other axes leave."""
    fsdp: int = 1
    """Devices of fully sharded data parallelism. Dense parameters and their optimizer state are split over
    this axis along their dimension of width D, and keys along the axis that counts them."""
    tensor: int = 1
    """Devices of tensor parallelism. Attention heads, the inner width of MLPs and, if the axis divides it,
    the vocabulary are split over this axis."""
    memory: int = 1
    """Devices that share the sparse parameters: experts, and tables as `TableConfig.partition` says."""
    width: int = 1
    """Devices over which the columns of tables are split where `TableConfig.partition` is `both`."""
    batch_over_memory: bool = True
    """True if each device along `memory` and `width` has its own sequences; False if they all have the same
    sequences, for batches smaller than the number of devices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, mesh__data=self.data)
        at_least(1, mesh__fsdp=self.fsdp, mesh__tensor=self.tensor)
        at_least(1, mesh__memory=self.memory, mesh__width=self.width)
