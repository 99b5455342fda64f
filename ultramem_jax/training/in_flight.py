"""Queues steps that were dispatched and whose results the host has not read.

A device that waits for the host after every step idles while the host prepares the next one. So the host
dispatches steps ahead, and reads a step's results after it has dispatched later ones. It reads all of them,
in order.
"""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from ultramem_jax.training.step import Metrics

MOST_AHEAD = 8
"""Most steps in flight. More would not help, and each holds a batch."""
_SECONDS_AHEAD = 0.5
"""About the time that steps in flight take. A request to stop waits for them."""
_TIMED_STEPS = 1000
"""Number of last steps that the mean speed covers."""


class FinishedStep(NamedTuple):
    """Holds the results of a step, on the host."""

    step: int
    metrics: dict[str, float]
    num_bytes: int
    """Bytes of text that the targets stand for."""


class StepsInFlight:
    """Queues steps until the host reads their results, and times them."""

    def __init__(self) -> None:
        """Makes an empty queue."""
        self._steps: deque[tuple[int, Metrics, jax.Array]] = deque()
        self._seconds: deque[float] = deque(maxlen=_TIMED_STEPS)
        self._since = time.perf_counter()

    def add(self, step: int, metrics: Metrics, target_bytes: jax.Array) -> None:
        """Adds a step that was dispatched."""
        self._steps.append((step, metrics, target_bytes))

    def finished(self, seconds_per_step: float, wait_for_all: bool = False) -> Iterator[FinishedStep]:
        """Yields the oldest steps until few enough are in flight, or none; waits for each.

        Args:
            seconds_per_step: speed by which steps are left in flight, the same in all processes: where they
                read different steps, one could fail while another waits for it. NaN leaves none.
            wait_for_all: whether to leave none in flight.
        """
        allowed = 0 if wait_for_all else _steps_ahead(seconds_per_step)
        while len(self._steps) > allowed:
            step, metrics, target_bytes = self._steps.popleft()
            values, num_bytes = jax.device_get((metrics, target_bytes))
            now = time.perf_counter()
            self._seconds.append(now - self._since)
            self._since = now
            yield FinishedStep(step, {name: float(value) for name, value in values.items()}, int(num_bytes))

    def restart_clock(self) -> None:
        """Restarts the clock, so that the time since the last finished step is not counted."""
        self._since = time.perf_counter()

    def seconds_per_step(self, last: int = 20) -> float:
        """Returns the mean time of the last steps, in seconds; NaN without any.

        The first step of all, which was compiled, counts only as long as it is the only one. The host may
        read several steps at once after it has waited for data. Then single times mean nothing, and neither
        does their median.
        """
        return _mean([*self._seconds][1:][-last:] or [*self._seconds])

    def seconds_without_first(self) -> float:
        """Returns the mean time of the last steps but for the first of all, which was compiled.

        It is NaN after one step.
        """
        return _mean([*self._seconds][1:])


def _mean(seconds: Sequence[float]) -> float:
    return sum(seconds) / len(seconds) if seconds else math.nan


def _steps_ahead(seconds_per_step: float) -> int:
    """Returns the most steps in flight; none as long as the first one, which compiles, may fail."""
    if math.isnan(seconds_per_step):
        return 0
    return min(max(int(_SECONDS_AHEAD / max(seconds_per_step, 1e-6)), 1), MOST_AHEAD)
