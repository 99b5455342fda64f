"""Data parallelism over the devices of one process: batches are split, everything else is on every device."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices, all of them if None, along one axis, `data`."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shard_batch(batch: np.ndarray, mesh: Mesh) -> jax.Array:
    """A batch (B, ...) with its sequences split over the devices."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
