"""Makes the mesh of a run, devices along named axes, and checks it before anything is compiled."""

import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from ultramem_jax.config import MeshConfig, RunConfig
from ultramem_jax.config.exchange_shapes import axis_roles
from ultramem_jax.errors import require
from ultramem_jax.ops.on_mesh import MeshAxes

AXES = ("data", "fsdp", "tensor", "memory", "width")
"""Axes of every mesh; `MeshConfig` explains them."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of the devices, or of all devices if None.

    Raises:
        UserError: the number of devices is not the product of the axes.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {name: getattr(config, name) for name in AXES}
    rest = math.prod(size for name, size in sizes.items() if name != "data")
    if sizes["data"] == 0:
        require(
            len(devices) % rest == 0,
            "mesh",
            in_words(sizes),
            f"its other axes make {rest}, which does not divide the {len(devices)} devices",
        )
        sizes["data"] = len(devices) // rest
    require(
        math.prod(sizes.values()) == len(devices),
        "mesh",
        in_words(sizes),
        f"makes {math.prod(sizes.values())}, there are {len(devices)} devices",
    )
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def mesh_axes(config: RunConfig, mesh: Mesh) -> MeshAxes:
    """Returns which axes of a mesh split tokens, tables and experts in a run.

    Raises:
        UserError: a micro-batch does not divide over the devices that split it.
    """
    axes = MeshAxes(mesh, **axis_roles(config, mesh.shape))
    micro_batch = config.train.batch_size // config.train.grad_accumulation
    shards = axes.size(axes.tokens)
    require(
        micro_batch % shards == 0,
        "train.batch_size",
        config.train.batch_size,
        f"a micro-batch of {micro_batch} sequences does not divide over the {shards} devices along "
        f"{', '.join(axes.tokens) or 'no axis'}",
    )
    return axes


def one_device(device: jax.Device | None = None) -> MeshAxes:
    """Makes a mesh of one device, the first of this process if None."""
    return MeshAxes(make_mesh(MeshConfig(), [jax.local_devices()[0] if device is None else device]))


@functools.lru_cache(maxsize=8)
def rows_here(axes: MeshAxes, batch_size: int) -> np.ndarray:
    """Returns the rows of a batch that devices of this process work on, rising.

    Two processes may need the same rows: devices along `tensor` work on the same sequences.
    """
    rows = np.arange(batch_size)
    parts = axes.sharding(P(axes.tokens)).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([rows[part] for part in parts]))


def shard_batch(batch: np.ndarray, axes: MeshAxes, batch_size: int | None = None) -> jax.Array:
    """Returns a batch (B, ...) with its sequences split over the devices.

    Args:
        batch: the rows of the batch that this process needs, those of `rows_here`.
        axes: the axes of the mesh.
        batch_size: B; None if `batch` is the whole batch.
    """
    size = len(batch) if batch_size is None else batch_size
    rows = rows_here(axes, size)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # every device gets a slice
        first, last, _ = index[0].indices(size)
        return batch[slice(*np.searchsorted(rows, [first, last]))]

    return jax.make_array_from_callback((size, *batch.shape[1:]), axes.sharding(P(axes.tokens)), part)


def in_words(sizes: dict[str, int]) -> str:
    """Formats sizes of axes as `--mesh` takes them: `data:16,memory:64`."""
    named = [f"{name}:{size}" for name, size in sizes.items() if size != 1]
    return ",".join(named) or "data:1"
