"""What the machine at hand can do: rates that floors are made of, and the memory that is free."""

import contextlib
import ctypes
import pathlib
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

_ROW_VALUES = 128
"""A row of 512 bytes."""
_REPEATS = 7
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h."""


@dataclass(frozen=True)
class Rates:
    """Measured rates, medians."""

    flops_per_second: float
    """Of a product of two square float32 matrices, at JAX's default precision."""
    bytes_per_second: float
    """Read and written, of scaling an array in place that no cache holds."""
    gathered_bytes_per_second: float
    """Read and written, of gathering random rows of 512 bytes from that array. In no floor of a training
    step: rows of a table lie anywhere, and this is what it costs."""


def measure_rates(side: int = 2048, array_bytes: int = 1 << 30, gathered_rows: int = 1 << 15) -> Rates:
    """Measures the rates of JAX's default device. Holds twice the array for a moment, at most.

    Args:
        side: of the matrices.
        array_bytes: of the array; much more than the caches.
        gathered_rows: at a time, other ones each time.
    """
    num_rows = array_bytes // (4 * _ROW_VALUES)
    matrix = jax.random.normal(jax.random.key(0), (side, side), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    flops = 2 * side**3 / _median_seconds(lambda: multiply(matrix, matrix))

    array = jax.jit(lambda: jnp.ones((num_rows, _ROW_VALUES), jnp.float32))()
    gather = jax.jit(lambda array, rows: array.at[rows].get(mode="promise_in_bounds"))
    draws = [
        jax.random.randint(jax.random.key(i), (gathered_rows,), 0, num_rows, jnp.int32)
        for i in range(1 + _REPEATS)
    ]
    gathered_bytes = 2 * gathered_rows * _ROW_VALUES * 4
    gathered = gathered_bytes / _median_seconds(lambda: gather(array, draws.pop()))

    scale = jax.jit(lambda array: array * jnp.float32(1.0001), donate_argnums=0)

    def in_place() -> jax.Array:
        nonlocal array
        array = scale(array)
        return array

    return Rates(flops, 2 * array.nbytes / _median_seconds(in_place), gathered)


def product_flops_per_second(dtype: str, side: int = 2048) -> float:
    """Of a product of square matrices, median: as trained or as served, whichever is faster."""
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.dtype(dtype))
    multiply = jax.jit(project)
    forms: tuple[Matrix, ...] = (x, OutputMajor(x))
    return 2 * side**3 / min(_median_seconds(partial(multiply, x, form)) for form in forms)


def read_bytes_per_second(array_bytes: int = 1 << 31) -> float:
    """Of memory that is read and not written: a float32 matrix of that size times a vector, median."""
    width = 4096
    matrix = jax.jit(lambda: jnp.ones((array_bytes // (4 * width), width), jnp.float32))()
    vector = jnp.ones((width,), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    return matrix.nbytes / _median_seconds(lambda: multiply(matrix, vector))


def available_bytes() -> int | None:
    """Memory that arrays can still take, of JAX's default device; None if that is unknown.

    On a CPU it is what the machine has left, or the container's limit if that leaves less.
    """
    if memory := jax.local_devices()[0].memory_stats():
        return int(memory["bytes_limit"] - memory["bytes_in_use"])
    machine = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    if machine is None:
        return None
    left = int(machine[1]) * 1024
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    return min(left, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else left


@contextlib.contextmanager
def memory_of_their_own() -> Iterator[None]:
    """Arrays of 1 MiB and more that are made inside go back to the system when they go; only with glibc.

    Otherwise those of up to 32 MB are cut out of memory that glibc keeps, 8 GB of it after a model of many
    experts, and larger arrays find no room in it. What a step needs for a moment had better be kept.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        # The most that glibc goes to by itself, which it does no more once it has been told.
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)


def _median_seconds(run: Callable[[], jax.Array]) -> float:
    """Of a computation, the first call apart, which compiles."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
