"""Tries what a table in host memory needs: to gather its rows, and to write them."""

import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ultramem_jax.ops.rows import put_stored_rows, take_sorted_rows

WAYS = ("gather", "write")
"""Ways to try. A failed check of XLA ends the process, so that each needs its own."""
_CALLS = 10


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
        seconds = _times(lambda: gather(table, at))
    else:
        write = jax.jit(put_stored_rows, donate_argnums=0, out_shardings=host)
        seconds = []
        for _ in range(_CALLS + 1):
            start = time.perf_counter()
            table = jax.block_until_ready(write(table, at, rows))
            seconds.append(time.perf_counter() - start)
        seconds = seconds[1:]
    median = statistics.median(seconds)
    return HostTable(way, at.size, slots, median * 1e3, rows.nbytes / median / 1e9)


def _times(call: object) -> list[float]:
    assert callable(call)
    jax.block_until_ready(call())
    seconds = []
    for _ in range(_CALLS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return seconds
