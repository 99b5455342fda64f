"""Tries what a table in host memory needs: to gather its rows, and to write them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ultramem_jax.accelerator.timing import median_seconds
from ultramem_jax.ops.rows import put_stored_rows, take_sorted_rows

WAYS = ("gather", "write")
"""Ways to try. Each runs in its own process, because a failed check in XLA ends it."""


class HostTable(NamedTuple):
    """Holds the time of a way."""

    way: str
    rows: int
    slots: int
    milliseconds: float
    gigabytes_per_second: float
    """Bytes of the rows over the time."""


def try_host_table(way: str, slots: int = 1 << 20, width: int = 128) -> HostTable:
    """Times one way, on every 32nd row of a table in pinned host memory.

    Args:
        way: one of `WAYS`.
        slots: N.
        width: values of a row, float32.
    """
    device = jax.devices()[0]
    here = jax.sharding.SingleDeviceSharding(device)
    host = here.with_memory_kind("pinned_host")
    table = jax.device_put(jnp.zeros((slots, width)), host)
    at = jnp.arange(0, slots, 32, dtype=jnp.int32)
    rows = jnp.ones((at.size, width))
    if way == "gather":
        gather = jax.jit(take_sorted_rows, out_shardings=here)
        seconds = median_seconds(lambda: gather(table, at))
    else:
        write = jax.jit(put_stored_rows, donate_argnums=0, out_shardings=host)

        def write_again() -> jax.Array:
            nonlocal table
            table = write(table, at, rows)
            return table

        seconds = median_seconds(write_again)
    return HostTable(way, at.size, slots, seconds * 1e3, rows.nbytes / seconds / 1e9)
