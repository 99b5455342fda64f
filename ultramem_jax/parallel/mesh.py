"""Data parallelism over the devices of one process: batches are split, everything else is on every device."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh() -> Mesh:
    """All devices along one axis, `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shard_batch(batch: np.ndarray, mesh: Mesh) -> jax.Array:
    """A batch (B, ...) with its sequences split over the devices."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
