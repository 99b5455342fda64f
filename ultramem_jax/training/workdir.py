"""Gives a run's folder one owner at a time."""

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from ultramem_jax.errors import UserError
from ultramem_jax.parallel.distributed import look_in_first
from ultramem_jax.training.refusals import refusals_in_a_line

log = logging.getLogger(__name__)

_LOCK = ".lock"


@contextlib.contextmanager
def owned(workdir: Path) -> Iterator[Callable[[], None]]:
    """Holds `workdir` for this run until the block ends. The folder is created if it is missing.

    It gives a function that raises a `UserError` if the folder was deleted meanwhile, or created again by
    another run. All processes call that function together.

    The lock belongs to an open file, so the system takes it back when a process dies, however that happens.
    Where the file system has no locks, the log says so and nothing is held. Of several processes the first
    one holds the lock for all; all call `owned` together.

    Raises:
        UserError: another process holds the folder; the message names its number and host. Or the folder
            cannot be created or written.
    """
    with contextlib.ExitStack() as stack:

        def take() -> int:
            with refusals_in_a_line(workdir):
                return stack.enter_context(_locked(workdir))

        held = look_in_first(take)

        def require_held() -> None:
            with refusals_in_a_line(workdir):
                if os.stat(workdir / _LOCK).st_ino != held:
                    raise UserError(f"{workdir} was deleted, and is in use by another run now")

        yield lambda: look_in_first(require_held)


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[int]:
    """Holds the lock, and gives the number of its file."""
    try:
        str(workdir).encode()
    except UnicodeEncodeError:
        raise UserError(f"--workdir = {str(workdir)!r}: must be a name in UTF-8") from None
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        allowed = "must be a folder that can be written"
        raise UserError(f"--workdir = {str(workdir)!r}: {allowed}: {error.strerror}") from None
    # The file is emptied only once it is held: a second process reads in it who the owner is.
    with open(workdir / _LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read() or "another process"
            raise UserError(
                f"{workdir} is in use by {owner}: wait until it ends, or give another --workdir"
            ) from None
        except OSError as error:
            log.warning(
                "%s: no lock can be held there (%s); start one run at a time", workdir, error.strerror
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield os.fstat(file.fileno()).st_ino
