"""Keeps the steps that the device has been given and that the host has not looked at yet.

A device that waits for the host after every step idles while the host prepares the next one. So the host
gives steps ahead, and looks at a step's numbers when later ones are on their way. It looks at all of them, in
order.
"""

import math
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from ultramem_jax.training.step import Metrics

MOST_AHEAD = 8
"""Most steps in flight. More would not help, and each holds a batch."""
_SECONDS_AHEAD = 0.5
"""About the time that steps in flight take. A request to stop waits for them."""
_TIMED_STEPS = 1000
"""Number of last steps that the median speed covers."""


class FinishedStep(NamedTuple):
    """Holds the numbers of a step, on the host."""

    step: int
    metrics: dict[str, float]
    num_bytes: int
    """Bytes of text that the targets stand for."""


class StepsInFlight:
    """Queues steps until the host looks at them, and times them."""

    def __init__(self) -> None:
        """Makes an empty queue."""
        self._steps: deque[tuple[int, Metrics, jax.Array]] = deque()
        self._seconds: deque[float] = deque(maxlen=_TIMED_STEPS)
        self._since = time.perf_counter()

    def add(self, step: int, metrics: Metrics, target_bytes: jax.Array) -> None:
        """Adds a step that has been given to the device."""
        self._steps.append((step, metrics, target_bytes))

    def finished(self, wait_for_all: bool = False) -> Iterator[FinishedStep]:
        """Yields the oldest steps until few enough are in flight, or none; waits for each.

        Args:
            wait_for_all: whether to leave none in flight.
        """
        while self._steps and (wait_for_all or len(self._steps) > self._allowed()):
            step, metrics, target_bytes = self._steps.popleft()
            values, num_bytes = jax.device_get((metrics, target_bytes))
            now = time.perf_counter()
            self._seconds.append(now - self._since)
            self._since = now
            yield FinishedStep(step, {name: float(value) for name, value in values.items()}, int(num_bytes))

    def restart_clock(self) -> None:
        """Leaves out the time since the last finished step: the device has done something else."""
        self._since = time.perf_counter()

    def seconds_per_step(self, last: int = 20) -> float:
        """Returns the median time of the last steps, in seconds; NaN without any."""
        return float(np.median(list(self._seconds)[-last:])) if self._seconds else math.nan

    def seconds_without_first(self) -> float:
        """Returns the median time of the last steps but for the first of all, which was compiled.

        It is NaN after one step.
        """
        return float(np.median(list(self._seconds)[1:])) if len(self._seconds) > 1 else math.nan

    def _allowed(self) -> int:
        seconds = self.seconds_per_step()
        if math.isnan(seconds):
            return 0  # the first step compiles, and may fail
        return min(max(int(_SECONDS_AHEAD / max(seconds, 1e-6)), 1), MOST_AHEAD)
