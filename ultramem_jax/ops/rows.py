"""Stores rows of tables, takes them and puts them back.

A table is float32, or bfloat16 kept as its 16 bits in uint16. To scatter into a bfloat16 array, XLA on CPU
converts all of it to float32 and back afterwards. It scatters words as they are, in place.

A table can also be in host memory, if it is too large for the accelerator. Then the host gathers the rows and
sends them to the device, and the device sends new rows back.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import compute_on as _compute_on

from ultramem_jax.memory_spaces import is_on_host
from ultramem_jax.platforms import platform

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
# Before jax 0.12 the function is called `compute_on2`, from 0.12 on `compute_on`.
_run_on: Any = getattr(_compute_on, "compute_on2", None) or _compute_on.compute_on

Result = TypeVar("Result")
"""A pytree of arrays."""


def stored_dtype(dtype: str) -> jnp.dtype:
    """Returns the dtype of the array that stores rows of `dtype`, `float32` or `bfloat16`."""
    return jnp.dtype({"float32": jnp.float32, "bfloat16": jnp.uint16}[dtype])


def to_stored(rows: jax.Array, stored: jnp.dtype) -> jax.Array:
    """Encodes rows, float32 or bfloat16, as a table of dtype `stored` holds them.

    float32 rows are rounded to nearest if the table is bfloat16.
    """
    if stored == jnp.uint16:
        return jax.lax.bitcast_convert_type(rows.astype(jnp.bfloat16), jnp.uint16)
    return rows.astype(stored)


def from_stored(rows: jax.Array) -> jax.Array:
    """Decodes rows of a table: stored bits (uint16) become bfloat16, float32 rows stay as they are."""
    return jax.lax.bitcast_convert_type(rows, jnp.bfloat16) if rows.dtype == jnp.uint16 else rows


def on_host(function: Callable[..., Result]) -> Callable[..., Result]:
    """Makes the host compute a function on arguments in host memory; its result stays there."""
    return _run_on(function, compute_type="device_host", out_memory_spaces=_HOST)


def take_stored_rows(table: jax.Array, slots: jax.Array) -> jax.Array:
    """Takes rows (..., d) of a table (N, d) to the device, as the table stores them; else as `take_rows`."""
    return _take(table, slots, mode="promise_in_bounds")


def take_rows(table: jax.Array, slots: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Takes rows (..., d) of a table (N, d) to the device, in the dtype of the computation.

    Args:
        table: (N, d), as this module stores it, on the device or in host memory.
        slots: int32 in [0, N), any shape.
        dtype: float32 or bfloat16. float32 rows are rounded to nearest if it is bfloat16.
    """
    rows = from_stored(take_stored_rows(table, slots))
    if platform() == "tpu" and rows.dtype == jnp.float32 and dtype == jnp.bfloat16:
        # The TPU's compiler moves a conversion before the gather and out of the loop around it, and so
        # converts the whole table. It does not move a rounding.
        rows = jax.lax.reduce_precision(rows, exponent_bits=8, mantissa_bits=7)
    return rows.astype(dtype)


def take_sorted_rows(table: jax.Array, slots: jax.Array) -> jax.Array:
    """Takes rows (U, d) of a table at rising slots; slots past the end give copies of the last row."""
    return from_stored(take_sorted_stored_rows(table, slots))


def take_sorted_stored_rows(table: jax.Array, slots: jax.Array) -> jax.Array:
    """Takes rows (U, d) as the table stores them; else as `take_sorted_rows`."""
    return _take(table, slots, mode="clip", indices_are_sorted=True)


def put_sorted_rows(table: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns the table with new rows (U, d) at strictly rising slots.

    Rows of slots past the end are dropped.
    """
    return put_stored_rows(table, slots, to_stored(rows, table.dtype))


def put_stored_rows(table: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns the table (N, ...) with new rows (U, ...), already encoded, at strictly rising slots.

    Rows of slots past the end are dropped.
    """

    def put(table: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
        return table.at[slots].set(rows, mode="drop", unique_indices=True, indices_are_sorted=True)

    # A GPU writes into host memory by itself. If the host wrote, XLA would give it a copy of the table. The
    # TPU's compiler has no other way than the host, and makes no copy.
    if is_on_host(table) and platform() == "tpu":
        return on_host(put)(table, *jax.device_put((slots, rows), _HOST))
    return put(table, slots, rows)


def _take(table: jax.Array, slots: jax.Array, mode: str, indices_are_sorted: bool = False) -> jax.Array:
    def get(table: jax.Array, slots: jax.Array) -> jax.Array:
        return table.at[slots].get(mode=mode, indices_are_sorted=indices_are_sorted)

    if is_on_host(table):
        get = _run_on(get, compute_type="device_host", out_memory_spaces=_DEVICE)
        slots = jax.device_put(slots, _HOST)
    return get(table, slots)
