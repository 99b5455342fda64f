"""Shows our own log messages as plain lines on the command line, and only warnings of the libraries."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from absl import logging as absl_logging
from tqdm import tqdm

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


@contextlib.contextmanager
def plain_log() -> Iterator[logging.Logger]:
    """Shows logs on standard error while the block runs, and yields the logger of this library.

    Each message is a line of its own. It is printed above a progress bar that is being drawn.
    """
    absl_logging.set_verbosity(absl_logging.WARNING)
    logger = logging.getLogger("ultramem_jax")
    before = logger.level, logger.propagate
    handler = _BesideBars()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # Libraries add handlers to the root logger, which would print every line again.
    logger.propagate = False
    hook, sys.unraisablehook = sys.unraisablehook, _unless_of_a_closed_loop
    others = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for other in others:
        other.addFilter(_is_news)
    try:
        yield logger
    finally:
        sys.unraisablehook = hook
        for other in others:
            other.removeFilter(_is_news)
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


class _BesideBars(logging.Handler):
    """Writes messages on standard error without breaking a progress bar that is being drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def _is_news(record: logging.LogRecord) -> bool:
    """Tells whether a library's message says something that no other output says.

    Orbax logs a failed save with several tracebacks, and asyncio logs it once more. The error is also raised,
    and the command line reports it in one line. Orbax also logs that a save waits for the previous one, which
    is normal.
    """
    of_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
    waiting = of_orbax and str(record.msg).startswith("Waiting for previous save")
    failed = record.exc_info is not None and record.levelno >= logging.ERROR
    raised = failed and (of_orbax or record.name == "asyncio")
    return not (waiting or raised)


def _unless_of_a_closed_loop(unraisable: "UnraisableHookArgs") -> None:
    """Prints an exception that nothing can catch, as Python does, unless it is of a closed event loop.

    After a save has failed, TensorStore's own threads report further failed writes to an event loop that
    Orbax has already closed.
    """
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)
