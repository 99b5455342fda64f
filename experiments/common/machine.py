"""Measures the rates of this machine, from which floors are computed, and the memory that is free."""

import contextlib
import ctypes
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from ultramem_jax.ops.linear import Matrix, OutputMajor, project
from ultramem_jax.ops.lookup import pooled_lookup
from ultramem_jax.reporting.environment import read_system_file

_ROW_VALUES = 128
"""Values of a random row: 512 bytes in float32."""
_ROWS_OF_TOKEN = 64
_ROW_REPEATS = 40
"""Reads of random rows that are timed: each takes about a millisecond."""
_REPEATS = 7
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in glibc's malloc.h."""


@dataclass(frozen=True)
class Rates:
    """Holds measured rates of this machine: the best of repeats, because floors are made of them."""

    flops_per_second: float
    """FLOPs per second of a product of two square float32 matrices, at JAX's default precision."""
    bytes_per_second: float
    """Bytes read and written per second when an array that no cache holds is scaled in place."""
    row_bytes_per_second: float
    """Bytes read per second when random rows of 512 bytes of that array are read and summed, by the lookup of
    memories."""


def measure_rates(side: int = 2048, array_bytes: int = 1 << 30, tokens: int = 512) -> Rates:
    """Measures the rates of JAX's default device.

    It holds at most two copies of the array at the same time.

    Args:
        side: rows and columns of the matrices.
        array_bytes: bytes of the array; must be much more than the caches hold.
        tokens: tokens that read 64 rows each at a time; each time other rows are drawn.
    """
    num_rows = array_bytes // (4 * _ROW_VALUES)
    matrix = jax.random.normal(jax.random.key(0), (side, side), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    flops = 2 * side**3 / min(_seconds(lambda: multiply(matrix, matrix)))

    array = jax.jit(lambda: jnp.ones((num_rows, _ROW_VALUES), jnp.float32))()
    scale = jax.jit(lambda array: array * jnp.float32(1.0001), donate_argnums=0)

    def in_place() -> jax.Array:
        nonlocal array
        array = scale(array)
        return array

    scaled = 2 * array.nbytes / min(_seconds(in_place))

    read = jax.jit(lambda array, slots, scores: pooled_lookup(array, slots, jnp.zeros_like(slots), scores, 1))
    shape = (tokens, _ROWS_OF_TOKEN)
    draws = [
        jax.random.randint(jax.random.key(i), shape, 0, num_rows, jnp.int32) for i in range(1 + _ROW_REPEATS)
    ]
    jax.block_until_ready(draws)
    scores = jnp.ones((*shape, 1), jnp.float32)
    row_bytes = tokens * _ROWS_OF_TOKEN * _ROW_VALUES * 4
    rows = row_bytes / min(_seconds(lambda: read(array, draws.pop(), scores), _ROW_REPEATS))
    return Rates(flops, scaled, rows)


def product_flops_per_second(dtype: str, side: int = 2048) -> float:
    """Measures the FLOPs per second of a product of square matrices, as a median.

    The second matrix has the layout of training or that of serving, whichever is faster.

    Args:
        dtype: dtype of the matrices.
        side: their rows and columns.
    """
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.dtype(dtype))
    multiply = jax.jit(project)
    forms: tuple[Matrix, ...] = (x, OutputMajor(x))
    return 2 * side**3 / min(_median_seconds(partial(multiply, x, form)) for form in forms)


def read_bytes_per_second(array_bytes: int = 1 << 31) -> float:
    """Measures the bandwidth of memory that is only read, as a median in bytes per second.

    It multiplies a float32 matrix of `array_bytes` with a vector.
    """
    width = 4096
    matrix = jax.jit(lambda: jnp.ones((array_bytes // (4 * width), width), jnp.float32))()
    vector = jnp.ones((width,), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    return matrix.nbytes / _median_seconds(lambda: multiply(matrix, vector))


def available_bytes() -> int | None:
    """Returns the bytes that arrays can still take on JAX's default device; None if unknown.

    On a CPU it is the free memory of the machine, or what the container's limit leaves if that is less.
    """
    if memory := jax.local_devices()[0].memory_stats():
        return int(memory["bytes_limit"] - memory["bytes_in_use"])
    machine = re.search(r"^MemAvailable:\s+(\d+) kB", read_system_file("/proc/meminfo"), re.MULTILINE)
    if machine is None:
        return None
    left = int(machine[1]) * 1024
    limit = read_system_file("/sys/fs/cgroup/memory.max").strip()
    used = read_system_file("/sys/fs/cgroup/memory.current").strip()
    return min(left, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else left


@contextlib.contextmanager
def memory_of_their_own() -> Iterator[None]:
    """Lets glibc return arrays of 1 MiB and more that are made inside to the system when they are freed.

    By default glibc keeps the memory of arrays of up to 32 MB for reuse: 8 GB of it after a model of many
    experts. Larger arrays do not fit into that memory. Temporaries of a step are better kept, so they are
    made outside the block. Without glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        # glibc raises these thresholds by itself up to these values, but stops doing so after `mallopt`.
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)


def _median_seconds(run: Callable[[], jax.Array]) -> float:
    """Returns the median time of a computation in seconds, after a first call that compiles."""
    return statistics.median(_seconds(run))


def _seconds(run: Callable[[], jax.Array], repeats: int = _REPEATS) -> list[float]:
    """Returns times of a computation in seconds, after a first call that compiles."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return seconds
