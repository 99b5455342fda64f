"""Profiles a few steps of a run, for xprof (TensorBoard's profiler) or Perfetto."""

import contextlib
import logging
import pathlib
from collections.abc import Iterator

import jax

log = logging.getLogger(__name__)


class Profile:
    """Records what devices and host do in a few steps, once the run is up to speed.

    In a `with`, which ends the recording in every case.
    """

    def __init__(self, folder: pathlib.Path | None = None, skip: int = 10, steps: int = 5):
        """Prepares to record.

        Args:
            folder: where to write the profile; None records nothing.
            skip: steps of this process before the first one that is recorded; fewer in a short run, but the
                first, which compiles, is recorded only where there is no other.
            steps: steps that are recorded.
        """
        self._folder, self._skip, self._steps = folder, skip, steps
        self._seen, self._is_on = 0, False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_on:
            self._stop()

    def expect(self, steps: int) -> None:
        """Says how many steps this process will do, so that some of them are recorded."""
        fewest = 1 if steps > 1 else 0  # the first step compiles, and would fill the profile
        self._skip = min(self._skip, max(steps - self._steps, fewest))

    @contextlib.contextmanager
    def of_step(self, step: int) -> Iterator[None]:
        """Surrounds the dispatch of a step, and names it in the profile."""
        self._seen += 1
        if self._folder and self._seen == self._skip + 1:
            jax.profiler.start_trace(str(self._folder))
            self._is_on = True
        if self._is_on and self._seen > self._skip + self._steps:
            self._stop()
        if not self._is_on:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._is_on = False
        log.info("the profile is in %s", self._folder)
