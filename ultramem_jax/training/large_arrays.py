"""Reads large arrays of a checkpoint piece by piece, into the buffers where they stay.

Orbax reads a whole array into host memory and has JAX copy it, for all arrays at once: a restore would need
every table twice. Here TensorStore reads the same files, and only one piece exists beside the array. If an
array is split over devices, a process reads only the parts of its own devices.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from jax.experimental.layout import Format
from jax.tree_util import KeyPath

from ultramem_jax.ops.rows import put_stored_rows

LARGE_BYTES = 64 * 2**20
"""Size above which an array is read in pieces."""
_PIECE_BYTES = 8 * 2**20
"""Approximate size of a piece. A piece is at least one chunk, as it was written."""

Place = tuple[slice, ...]
"""Position of a part in its array, as one slice per axis."""
Change = Callable[[np.ndarray, Place], None]
"""Function of a piece and its place in the array, which may change the piece before use."""


def read_large_array(state: Path, name: str, leaf: jax.ShapeDtypeStruct, change: Change) -> jax.Array:
    """Returns one array of Orbax's folder `state`.

    Args:
        state: folder of the checkpoint's state.
        name: dotted name of the leaf.
        leaf: shape and dtype, which must be those that were saved, and the sharding for the result.
        change: applied to each piece.
    """
    store = _open(state, name)
    read: dict[jax.Device, jax.Array] = {}
    for parts in _by_rows(leaf):
        read |= _read_parts(store, parts, leaf, change)
    devices = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, [read[d] for d in devices])


def array_name(path: KeyPath) -> str:
    """Returns the dotted name of a leaf, in Orbax's form."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _by_rows(leaf: jax.ShapeDtypeStruct) -> Iterable[dict[jax.Device, Place]]:
    """Returns where the parts of this process's devices lie in the array. Parts of the same rows are grouped.

    A chunk of the checkpoint has whole rows, so one reading gives the columns for several devices.
    """
    groups: dict[tuple[int, int], dict[jax.Device, Place]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        place = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, leaf.shape, strict=True))
        groups.setdefault((place[0].start, place[0].stop), {})[device] = place
    return groups.values()


def _read_parts(
    store: tensorstore.TensorStore, parts: dict[jax.Device, Place], leaf: jax.ShapeDtypeStruct, change: Change
) -> dict[jax.Device, jax.Array]:
    """Returns the parts, all of the same rows, each on its device."""
    places = list(parts.values())
    dimensions = list(zip(*places, strict=True))
    hull = [slice(min(s.start for s in d), max(s.stop for s in d)) for d in dimensions]
    buffers = {device: _Buffer(device, place, leaf) for device, place in parts.items()}
    chunk_shape = store.chunk_layout.read_chunk.shape
    assert chunk_shape is not None and chunk_shape[0] is not None
    chunk_rows = chunk_shape[0]
    chunk_bytes = chunk_rows * math.prod(s.stop - s.start for s in hull[1:]) * leaf.dtype.itemsize
    rows = chunk_rows * max(1, _PIECE_BYTES // chunk_bytes)
    start, end = hull[0].start, hull[0].stop
    while start < end:
        stop = min(start - start % chunk_rows + rows, end)  # pieces end at chunk limits
        here = (slice(start, stop), *hull[1:])
        piece = store[here].read().result()
        change(piece, here)
        for buffer in buffers.values():
            buffer.put(piece, here)
        start = stop
    return {device: buffer.array for device, buffer in buffers.items()}


class _Buffer:
    """Holds the part of an array that one device has, and is filled piece by piece."""

    def __init__(self, device: jax.Device, place: Place, leaf: jax.ShapeDtypeStruct):
        self._place = place
        kind = leaf.sharding.memory_kind
        on_host = kind == "pinned_host"
        sharding = jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
        layout = leaf.format.layout
        here = sharding if layout is None else Format(layout, sharding)
        shape = tuple(s.stop - s.start for s in place)
        self._put = jax.jit(_scatter if on_host else _put, donate_argnums=0, out_shardings=here)
        if on_host:
            self.array = jax.device_put(np.zeros(shape, leaf.dtype), here)
        else:
            self.array = jax.jit(lambda: jnp.zeros(shape, leaf.dtype), out_shardings=here)()

    def put(self, piece: np.ndarray, place: Place) -> None:
        """Copies its own columns from a piece of some of its rows."""
        rows, *columns = zip(self._place, place, strict=True)
        own = piece[:, *(slice(s.start - p.start, s.stop - p.start) for s, p in columns)]
        start = np.int32(place[0].start - rows[0].start)
        # It waits, because pieces that are not copied yet would add up to another array.
        self.array = jax.block_until_ready(self._put(self.array, own, start))


def _put(array: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, piece, start, 0)


def _scatter(array: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    """Does what `_put` does for an array in host memory, where the device cannot update a slice."""
    return put_stored_rows(array, start + jnp.arange(piece.shape[0], dtype=jnp.int32), piece)


def _open(state: Path, name: str) -> tensorstore.TensorStore:
    files = {"driver": "file", "path": f"{state}/"}
    return tensorstore.open(
        {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": files, "path": f"{name}/"},
            "fill_missing_data_reads": False,
        },
        open=True,
        read=True,
    ).result()
