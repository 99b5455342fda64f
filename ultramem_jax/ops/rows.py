"""Rows of tables: how they are stored, taken and put back.

A table is float32, or bfloat16 kept as its 16 bits in uint16. Scattering into a bfloat16 array, XLA on CPU
first converts all of it to float32 and afterwards back; words are scattered as they are, in place.

A table can also lie in the memory of the host, beside an accelerator that is too small for it. Then the host
gathers the rows, which travel to the device, and new rows travel back.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import compute_on as _compute_on

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
# Its name from jax 0.12 on, and before.
_run_on: Any = getattr(_compute_on, "compute_on2", None) or _compute_on.compute_on


def stored_dtype(dtype: str) -> jnp.dtype:
    """The dtype of the array that holds rows of `dtype`, `float32` or `bfloat16`."""
    return jnp.dtype({"float32": jnp.float32, "bfloat16": jnp.uint16}[dtype])


def to_stored(rows: jax.Array, stored: jnp.dtype) -> jax.Array:
    """Rows, float32 or bfloat16, as a table of dtype `stored` holds them; rounded to nearest if need be."""
    if stored == jnp.uint16:
        return jax.lax.bitcast_convert_type(rows.astype(jnp.bfloat16), jnp.uint16)
    return rows.astype(stored)


def from_stored(rows: jax.Array) -> jax.Array:
    """The numbers in rows of a table; the bits as bfloat16."""
    return jax.lax.bitcast_convert_type(rows, jnp.bfloat16) if rows.dtype == jnp.uint16 else rows


def is_on_host(table: jax.Array) -> bool:
    """Whether a table, in a function that is being compiled, lies in the host's memory."""
    return jax.typeof(table).memory_space == _HOST


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, computed by the host on arguments in its memory; its result stays there."""
    return _run_on(function, compute_type="device_host", out_memory_spaces=_HOST)


def take_rows(table: jax.Array, slots: jax.Array) -> jax.Array:
    """Rows (..., d) of a table (N, d), float32 or bfloat16, on the device.

    Args:
        table: (N, d).
        slots: int32 in [0, N), any shape.
    """
    return _take(table, slots, mode="promise_in_bounds")


def take_sorted_rows(table: jax.Array, slots: jax.Array) -> jax.Array:
    """Rows (U, d) at rising slots; those of slots past the end are copies of the last row."""
    return _take(table, slots, mode="clip", indices_are_sorted=True)


def put_sorted_rows(table: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
    """The table with new rows (U, d) at strictly rising slots; those of slots past the end are dropped."""
    return put_stored_rows(table, slots, to_stored(rows, table.dtype))


def put_stored_rows(table: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
    """The same for rows (U, ...) as the table (N, ...) stores them."""

    def put(table: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
        return table.at[slots].set(rows, mode="drop", unique_indices=True, indices_are_sorted=True)

    # A GPU writes into the host's memory by itself. Were the host to do it, XLA would give it a copy of the
    # table; the TPU's compiler, on the other hand, knows no other way and makes no copy.
    if is_on_host(table) and jax.default_backend() == "tpu":
        return on_host(put)(table, *jax.device_put((slots, rows), _HOST))
    return put(table, slots, rows)


def _take(table: jax.Array, slots: jax.Array, **how: Any) -> jax.Array:
    def get(table: jax.Array, slots: jax.Array) -> jax.Array:
        return table.at[slots].get(**how)

    if is_on_host(table):
        get = _run_on(get, compute_type="device_host", out_memory_spaces=_DEVICE)
        slots = jax.device_put(slots, _HOST)
    return from_stored(get(table, slots))
