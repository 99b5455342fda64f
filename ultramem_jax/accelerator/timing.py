"""Times calls on the default device."""

import statistics
import time
from collections.abc import Callable

import jax

from ultramem_jax.tree_types import ArrayTree


def median_seconds(call: Callable[[], ArrayTree], calls: int = 10, warm_up: int = 1) -> float:
    """Returns the median time of a call until its result is there, in seconds.

    Args:
        call: what is timed; it returns what to wait for.
        calls: calls that count.
        warm_up: calls before them.
    """
    seconds = []
    for _ in range(warm_up + calls):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warm_up:])
