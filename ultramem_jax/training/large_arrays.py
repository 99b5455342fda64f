"""Large arrays of a checkpoint, read piece by piece into the buffer where they stay.

Orbax reads a whole array into host memory and has JAX copy it, for all arrays at once: a restore would need
every table twice. Here TensorStore reads the same files, and a piece is all that exists beside the array.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

from ultramem_jax.ops.rows import put_stored_rows

LARGE_BYTES = 64 * 2**20
"""Arrays above it are read in pieces."""
_PIECE_BYTES = 8 * 2**20
"""About what is read at a time; at least a chunk, as it was written."""


def read_large_array(
    state: Path, name: str, leaf: jax.ShapeDtypeStruct, change: Callable[[np.ndarray, int], None]
) -> jax.Array:
    """One array of Orbax's folder `state`.

    Args:
        state: folder of the checkpoint's state.
        name: dotted name of the leaf.
        leaf: shape, dtype and sharding of it, which must be those that were saved.
        change: is given each piece (rows, ...) and the place of its first row, to change it before use.
    """
    store = _open(state, name)
    chunk_rows = store.chunk_layout.read_chunk.shape[0]
    chunk_bytes = chunk_rows * leaf.size // leaf.shape[0] * leaf.dtype.itemsize
    rows = chunk_rows * max(1, _PIECE_BYTES // chunk_bytes)
    on_host = leaf.sharding.memory_kind == "pinned_host"
    put = jax.jit(_scatter if on_host else _put, donate_argnums=0, out_shardings=leaf.sharding)
    array = (
        jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        if on_host
        else jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    )
    for start in range(0, leaf.shape[0], rows):
        piece = store[start : min(start + rows, leaf.shape[0])].read().result()
        change(piece, start)
        # Waits, because pieces that nobody has taken in yet would add up to another array.
        array = jax.block_until_ready(put(array, piece, np.int32(start)))
    return array


def array_name(path: Any) -> str:
    """The dotted name of a leaf, as Orbax has it."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _put(array: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, piece, start, 0)


def _scatter(array: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    """`_put` for an array in the memory of the host, where a slice cannot be updated from the device."""
    return put_stored_rows(array, start + jnp.arange(piece.shape[0], dtype=jnp.int32), piece)


def _open(state: Path, name: str) -> Any:
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
